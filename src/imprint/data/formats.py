"""Files → rows: jsonl, csv, parquet and text.

`read_rows` yields the `Row`s of a file and `folder_files` says which files form which part; `hub.py` reads the Hub,
`forms.py` turns rows into examples. Nothing that is read is ever executed, and what cannot be used is refused with the
file, the line, and what to do about it.
"""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from imprint.data.row import Row
from imprint.errors import DataError

MAX_LINE = 64 * 2**20
"""Bytes of one line or field; more is a broken file, not a text."""
PARTS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""First word of a file's, folder's or Hub split's name → the official part it belongs to."""


def read_rows(path: Path, label: str, dropped: Counter[str], wanted: Collection[str] = ()) -> Iterator[Row]:
    """The records of one file, in order; blank lines are skipped and counted in `dropped`.

    Args:
        label: how error messages name the file.
        wanted: the columns that may be needed (default: all), so that wide parquet files are not read whole.

    Raises:
        DataError: the file cannot be read, is of no known kind or empty, or a record is broken (named by its line).
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{label}: not a kind of file that can be read; expected one of {', '.join(READERS)}.")
    row = None
    try:
        for row in reader(path, label, dropped, wanted):
            yield row
    except OSError as error:
        raise DataError(f"{label} cannot be read ({error.strerror or error}); check the path.") from error
    if row is None:
        raise DataError(f"{label} holds no records; expected at least one. Was it written to the end?")


def _lines(path: Path, label: str) -> Iterator[tuple[int, str]]:
    """Each line with its number and its line end: UTF-8, with or without a byte order mark, LF or CRLF."""
    with path.open("rb") as handle:
        for number, raw in enumerate(iter(lambda: handle.readline(MAX_LINE + 1), b""), 1):
            if len(raw) > MAX_LINE:
                raise DataError(f"{label}, line {number}: longer than {MAX_LINE >> 20} MiB; split the record.")
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                place = f"{label}, line {number}: byte {error.start + 1} of the line is not UTF-8"
                raise DataError(f"{place}; save the file as UTF-8.") from error


def _jsonl(path: Path, label: str, dropped: Counter[str], wanted: Collection[str]) -> Iterator[Row]:
    for number, line in _lines(path, label):
        if not line.strip():
            dropped["blank line"] += 1
            continue
        values = _json_object(f"{label}, line {number}", line)
        yield Row(label, "line", number, values, tuple(values))


def _json_object(where: str, line: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except RecursionError as error:
        raise DataError(f"{where}: JSON nested too deeply to be a record; delete the line.") from error
    except ValueError as error:  # JSONDecodeError, and whole numbers of more digits than Python converts
        if line.lstrip().startswith("[") and where.endswith("line 1"):
            convert = "rewrite it as JSON lines, for instance with `jq -c '.[]'`"
            raise DataError(f"{where}: a JSON array over several lines; {convert}.") from error
        detail = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise DataError(f"{where}: not valid JSON ({detail}); fix or delete the line.") from error
    if not isinstance(values, dict):
        found = {list: "an array", str: "a string", type(None): "null"}.get(type(values), "a number or boolean")
        raise DataError(f'{where}: {found}; expected one JSON object a line, such as {{"text": "…"}}.')
    return values


def _csv(path: Path, label: str, dropped: Counter[str], wanted: Collection[str]) -> Iterator[Row]:
    limit = csv.field_size_limit(MAX_LINE)  # the default, 128 KiB, is less than a long document
    try:
        yield from _csv_rows(path, label, dropped)
    finally:
        csv.field_size_limit(limit)


def _csv_rows(path: Path, label: str, dropped: Counter[str]) -> Iterator[Row]:
    reader = csv.reader((line for _, line in _lines(path, label)), strict=True)
    header: tuple[str, ...] = ()
    while True:
        number = reader.line_num + 1  # a quoted field may span lines: the record is named by its first
        try:
            fields = next(reader, None)
        except csv.Error as error:
            advice = "close the quote, double quotes inside a quoted field, or fix the line"
            raise DataError(f"{label}, line {number}: not valid CSV ({error}); {advice}.") from error
        if fields is None:
            return
        if not fields:
            dropped["blank line"] += 1
        elif not header:
            header = _csv_header(f"{label}, line {number}", fields)
        elif len(fields) != len(header):
            sizes = f"the header has {len(header)} fields and this record {len(fields)}"
            raise DataError(f"{label}, line {number}: {sizes}; quote fields that hold a comma or a line end.")
        else:
            yield Row(label, "line", number, dict(zip(header, fields, strict=True)), header)


def _csv_header(where: str, fields: list[str]) -> tuple[str, ...]:
    twice = sorted(name for name, count in Counter(fields).items() if count > 1)
    if twice:
        raise DataError(f"{where}: the header names {twice[0][:80]!r} twice; give each column a name of its own.")
    return tuple(fields)


def _parquet(path: Path, label: str, dropped: Counter[str], wanted: Collection[str]) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            columns = tuple(file.schema_arrow.names)
            keep = [name for name in columns if name in wanted] or list(columns)
            for batch in file.iter_batches(batch_size=1024, columns=keep):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(label, "row", number, values, columns)
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        detail = str(error).splitlines()[0].rstrip(".")
        place = f"{label}, after row {number}" if number else label
        raise DataError(f"{place}: not readable as parquet ({detail}); write the file again.") from error


def _txt(path: Path, label: str, dropped: Counter[str], wanted: Collection[str]) -> Iterator[Row]:
    for number, line in _lines(path, label):
        if line.strip():
            yield Row(label, "line", number, {"text": line.rstrip("\r\n")}, ("text",))
        else:
            dropped["blank line"] += 1


Reader = Callable[[Path, str, Counter[str], Collection[str]], Iterator[Row]]
READERS: dict[str, Reader] = {".jsonl": _jsonl, ".json": _jsonl, ".csv": _csv, ".parquet": _parquet, ".txt": _txt}


def part_name(name: str) -> str:
    """The official part a name stands for, or the name itself.

    >>> part_name("train-00000-of-00002"), part_name("dev"), part_name("testimonials")
    ('train', 'validation', 'testimonials')
    """
    return PARTS.get(re.split(r"[^a-z]", name.lower())[0], name)


def folder_files(folder: Path) -> dict[str, list[tuple[str, Path]]]:
    """Part → its files in sorted order, each with its label: by file name, or by the sub-folder (`train/0000.parquet`).

    Raises:
        DataError: there is no file of a known kind.
    """
    subfolders = [entry for entry in sorted(folder.iterdir()) if entry.is_dir() and entry.name.lower() in PARTS]
    found: dict[str, list[tuple[str, Path]]] = {}
    for entry in sorted(itertools.chain(folder.iterdir(), *(sub.iterdir() for sub in subfolders))):
        if entry.suffix.lower() not in READERS or entry.name.startswith(".") or not entry.is_file():
            continue
        inside = entry.parent != folder
        part = part_name(entry.parent.name if inside else entry.stem)
        found.setdefault(part, []).append((f"{entry.parent.name}/{entry.name}" if inside else entry.name, entry))
    if not found:
        kinds = f"{', '.join(READERS)} files, such as train.jsonl, validation.jsonl and test.jsonl"
        raise DataError(f"{folder}: the folder holds no data; expected {kinds}.")
    return found
