"""Files and Hub data sets → rows → examples.

Three steps, each usable alone: a reader yields `Row`s (`read_rows`, `hub_rows`), `folder_files` says which files
form which part, and `examples` turns rows into `Example`s by the columns the recipe names. Nothing that is read
is ever executed, and what cannot be used is refused with the file, the line, and what to do about it.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from imprint.errors import DataError
from imprint.spec import Columns, DataSpec, Source
from imprint.types import Example

MAX_LINE = 64 * 2**20
"""Bytes of one line or field; more is a broken file, not a text."""
PARQUET_EXPORT = "refs/convert/parquet"
"""The Hub revision that holds every public data set as plain parquet, by configuration and split."""
PARTS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""First word of a file's, folder's or Hub split's name → the official part it belongs to."""


class Row(NamedTuple):
    """One record as it was read. `columns` are all the columns there are; `values` may hold only those asked for."""

    label: str
    unit: str
    number: int
    values: dict[str, Any]
    columns: tuple[str, ...]

    @property
    def where(self) -> str:
        return f"{self.label}, {self.unit} {self.number}"


# ---- files → rows ----


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


# ---- Hub → rows ----


def hub_rows(
    source: Source, *, hub: str = "", files: Mapping[str, str | list[str]] | None = None, wanted: Collection[str] = ()
) -> dict[str, Iterator[Row]]:
    """Part → rows of a Hub data set; loading scripts are never run.

    Args:
        source: as in the recipe.
        hub: the Hub id (default: the source's name).
        files: part → pattern of the files in the repository, where the data set's own splits are not wanted.
        wanted: the columns that may be needed (default: all).

    Raises:
        DataError: the Hub cannot be reached, or has no such data set, configuration, split or revision.
    """
    import datasets

    hub = hub or source.name
    options: dict[str, Any] = {"revision": source.revision}
    if int(datasets.__version__.split(".")[0]) < 4:
        options["trust_remote_code"] = False  # version 3 asks on the terminal otherwise
    try:
        if files is None and source.revision == PARQUET_EXPORT:
            files = _exported_files(hub, source.config)
        options |= {"data_files": dict(files)} if files else {"name": source.config}
        loaded = datasets.load_dataset(hub, split=source.split, **options)
    except DataError:
        raise
    except Exception as error:  # whatever a library over a network raises ends as one sentence
        raise DataError(_hub_sentence(source.name, hub, error)) from error
    if source.split is not None:
        part = "all" if "+" in source.split else part_name(source.split)
        return {part: _table_rows(f"{hub} ({source.split})", loaded, wanted)}
    parts: dict[str, list[Iterator[Row]]] = {}
    for name, table in loaded.items():
        parts.setdefault(part_name(name), []).append(_table_rows(f"{hub} ({name})", table, wanted))
    return {part: itertools.chain.from_iterable(rows) for part, rows in parts.items()}


def _exported_files(hub: str, config: str | None) -> dict[str, list[str]]:
    """Split → files `config/split/0000.parquet`, listed one by one: guessing splits from names would mix them up."""
    from huggingface_hub import HfApi

    listed = HfApi().list_repo_files(hub, repo_type="dataset", revision=PARQUET_EXPORT)
    paths = [path.split("/") for path in sorted(listed) if path.endswith(".parquet") and path.count("/") == 2]
    configs = sorted({path[0] for path in paths})
    if config not in configs and (config or len(configs) != 1):
        said = f"has no configuration {config!r}" if config else "has several configurations"
        raise DataError(f"Hub data set {hub!r} {said}; set `config` to one of: {', '.join(configs)}.")
    files: dict[str, list[str]] = {}
    for folder, split, name in paths:
        if folder == (config or configs[0]):
            files.setdefault(split.removeprefix("partial-"), []).append(f"{folder}/{split}/{name}")
    return files


def _table_rows(label: str, table: Any, wanted: Collection[str]) -> Iterator[Row]:
    columns = tuple(table.column_names)
    keep = [name for name in columns if name in wanted] or list(columns)
    for number, values in enumerate(table.select_columns(keep), 1):
        yield Row(label, "row", number, values, columns)


def _hub_sentence(name: str, hub: str, error: Exception) -> str:
    message = " ".join(str(error).split()).rstrip(".")
    local = f"or give a local folder: `source: {{name: {name}, path: FOLDER}}`"
    raised = {kind.__name__ for cause in (error, error.__cause__) for kind in type(cause).__mro__}
    if raised & {"ConnectionError", "TimeoutError", "TransportError", "Timeout", "LocalEntryNotFoundError"}:
        return f"Hub data set {hub!r} could not be reached; check the network, {local}."
    if "scripts are no longer supported" in message or "trust_remote_code" in message:
        export = f"`source: {{name: {hub}, revision: {PARQUET_EXPORT}}}`"
        return f"Hub data set {hub!r} is a loading script, which is never run; use its parquet copy: {export}."
    configs = re.search(r"(?:Available|available configs): \[(.*?)\]", message)
    if configs:
        return f"Hub data set {hub!r} needs one of its configurations; set `config` to one of: {configs[1]}."
    return f"Hub data set {hub!r} cannot be loaded ({message}); check the id, the revision and your access, {local}."


# ---- rows → examples ----


class _Fields(NamedTuple):
    """The columns one file is read by."""

    prompt: str | None
    target: str
    id: str | None
    group: str | None


def wanted_columns(spec: DataSpec) -> set[str]:
    """Every column the recipe may need of a row."""
    named = [spec.id, spec.group]
    if isinstance(spec.format, Columns):
        named += [spec.format.text, spec.format.prompt, spec.format.target]
    return {"text", "prompt", "completion", "target", "id", *(name for name in named if name)}


def examples(rows: Iterable[Row], spec: DataSpec, seen: dict[str, str], dropped: Counter[str]) -> Iterator[Example]:
    """Rows → examples by the recipe's columns; records without text are dropped and counted.

    Args:
        seen: id → where it was read; shared by all parts, since an id names one record of the whole source.

    Raises:
        DataError: a column is missing or not text, or an id is missing or used twice.
    """
    fields: _Fields | None = None
    for row in rows:
        fields = fields or _fields(spec, row)
        prompt = read_text(row, fields.prompt) if fields.prompt else ""
        target = read_text(row, fields.target)
        if not target.strip():
            dropped["empty text"] += 1
            continue
        group = read_key(row, fields.group, optional=True) if fields.group else None
        yield Example(_identity(row, fields.id, prompt, target, seen), prompt, target, group)


def content_id(prompt: str, target: str) -> str:
    """Sixteen hexadecimal digits of the SHA-256 of the text: the id of a record that brings none."""
    return hashlib.sha256(f"{prompt}\0{target}".encode()).hexdigest()[:16]


def read_text(row: Row, column: str) -> str:
    """The text in `column`.

    Raises:
        DataError: there is no such column, or what it holds is not Unicode text.
    """
    value = _value(row, column)
    if not isinstance(value, str):
        what = "null" if value is None else f"a {type(value).__name__}"
        raise DataError(f"{row.where}: column {column!r} is {what}; expected a string. Fix or delete the record.")
    return checked_text(row, column, value)


def checked_text(row: Row, column: str, value: str) -> str:
    """The string itself; JSON can spell halves of surrogate pairs, which no file and no tokenizer takes.

    Raises:
        DataError: it holds one.
    """
    try:
        value.encode()
    except UnicodeEncodeError as error:
        place = f"{row.where}: character {error.start + 1} of column {column!r}"
        raise DataError(f"{place} is half a surrogate pair, not Unicode text; remove it.") from error
    return value


def _value(row: Row, column: str) -> Any:
    if column not in row.values:
        raise DataError(f"{row.where}: {_missing(column, row.columns)}")
    return row.values[column]


def _missing(column: str, columns: Collection[str]) -> str:
    near = difflib.get_close_matches(column, columns, n=1, cutoff=0.5)
    hint = f" did you mean {near[0]!r}?" if near else ""
    return f"no column {column!r}:{hint} Columns found: {shown(columns)}."


def shown(columns: Iterable[str], most: int = 20) -> str:
    """Column names for a message: printable, and no longer than a reader wants, whatever the file holds."""
    names = [name if name.isprintable() else ascii(name) for name in columns]
    short = [name if len(name) <= 40 else f"{name[:40]}…" for name in names[:most]]
    return ", ".join(short + ["…"] * (len(names) > most)) or "none"


def _fields(spec: DataSpec, row: Row) -> _Fields:
    prompt, target = _text_columns(spec.format, row)
    for column in (prompt, target, spec.id, spec.group):
        if column is not None and column not in row.columns:
            raise DataError(f"{row.where}: {_missing(column, row.columns)}")
    return _Fields(prompt, target, spec.id or ("id" if "id" in row.columns else None), spec.group)


def _text_columns(form: str | Columns, row: Row) -> tuple[str | None, str]:
    """(prompt or None, target) columns."""
    if isinstance(form, Columns):
        if form.text and not (form.prompt or form.target):
            return None, form.text
        if form.prompt and form.target and not form.text:
            return form.prompt, form.target
        raise DataError("`format` must name either `text` alone, or `prompt` and `target`.")
    if form == "text" or (form == "auto" and "text" in row.columns):
        return None, "text"
    for target in ("completion", "target"):
        if "prompt" in row.columns and target in row.columns:
            return "prompt", target
    expected = "`prompt` and `completion`" if form == "prompt_completion" else "`text`, or `prompt` and `completion`"
    say = "name yours with `format: {text: COLUMN}` or `format: {prompt: COLUMN, target: COLUMN}`"
    raise DataError(f"{row.where}: expected the columns {expected}; columns found: {shown(row.columns)}; {say}.")


def read_key(row: Row, column: str, *, optional: bool = False) -> str | None:
    """An id or group: a string or a whole number; None where it is null or empty and may be.

    Raises:
        DataError: there is no such column, or it holds something else.
    """
    value = _value(row, column)
    if value is None or value == "":
        if optional:
            return None
        raise DataError(f"{row.where}: column {column!r} is empty; every record needs an id. Give it one.")
    if isinstance(value, str) and "\0" not in value:
        return read_text(row, column)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    what = "holds a NUL character" if isinstance(value, str) else f"is a {type(value).__name__}"
    raise DataError(f"{row.where}: column {column!r} {what}; expected a string or a whole number.")


def _identity(row: Row, column: str | None, prompt: str, target: str, seen: dict[str, str]) -> str:
    key = read_key(row, column) if column else None
    if key is None:
        return content_id(prompt, target)
    if key in seen:
        raise DataError(f"{row.where}: id {key[:80]!r} was used before, in {seen[key]}; make the ids unique.")
    seen[key] = row.where
    return key
