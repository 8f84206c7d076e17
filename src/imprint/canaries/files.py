"""A file of data with new records among the old ones, which stay as they are."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from imprint.data.row import Row
from imprint.errors import UsageError, first_line


def _write_lines(path: Path, out: Path, rows: Sequence[Row], told: Sequence[dict[str, Any]], order: list[int]) -> None:
    """The lines of the file as they are, and new ones."""
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    text = path.suffix.lower() == ".txt"
    added = [one["text"] if text else json.dumps(one, ensure_ascii=False) for one in told]
    with out.open("wb") as file:
        for n in order:
            line = lines[rows[n].number - 1].rstrip(b"\r") if n < len(rows) else added[n - len(rows)].encode()
            file.write(line + b"\n")


def _write_csv(path: Path, out: Path, rows: Sequence[Row], told: Sequence[dict[str, Any]], order: list[int]) -> None:
    header = rows[0].columns
    with out.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, header, lineterminator="\n")
        writer.writeheader()
        for n in order:
            writer.writerow(rows[n].values if n < len(rows) else told[n - len(rows)])


def _write_parquet(
    path: Path, out: Path, rows: Sequence[Row], told: Sequence[dict[str, Any]], order: list[int]
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    try:
        added = pa.Table.from_pylist(list(told), schema=table.schema)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise UsageError(f"{path.name}: its columns do not take a canary ({first_line(error)})") from None
    pq.write_table(pa.concat_tables([table, added]).take(pa.array(order)), out)


Writer = Callable[[Path, Path, Sequence[Row], Sequence[dict[str, Any]], list[int]], None]
"""The file, what to write, its rows, what is new, and the order: row n, or n rows further on what is new."""
WRITERS: dict[str, Writer] = {
    ".jsonl": _write_lines,
    ".json": _write_lines,
    ".txt": _write_lines,
    ".csv": _write_csv,
    ".parquet": _write_parquet,
}
