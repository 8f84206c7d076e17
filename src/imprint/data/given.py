"""Two sources, or one with a column that says so → who was tuned on and who was not, for a model tuned elsewhere."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from imprint.data.formats import folder_files, read_rows
from imprint.data.forms import examples, wanted_columns
from imprint.data.pool import Pool, file_rows, local_path, missing, pooled
from imprint.data.row import Row, kind
from imprint.errors import DataError
from imprint.spec import DataSpec

Records = str | os.PathLike[str] | Iterable[Mapping[str, Any] | str]
"""A file or folder; or rows in memory: mappings of columns (a `datasets.Dataset` is an iterable of them), or texts."""


def read_sides(spec: DataSpec, members: Records, nonmembers: Records | None = None) -> Pool:
    """A pool with the parts `member` and `nonmember`, to be divided by `split: given`.

    A record is known by its `id` or else by its content. What lies on both sides is a duplicate, which `make_split`
    drops and counts; an id of its own on both sides is refused, since it names two records.

    Args:
        spec: the columns and the form; its `source` names the pool where the records lie in memory.
        members: who was tuned on; or everyone, if `nonmembers` is None.
        nonmembers: who was not; None if a column `member` or `split` of `members` says who is who.

    Raises:
        DataError: names which of the two cannot be used, where and why.
    """
    dropped: Counter[str] = Counter()
    name = (Path(members).stem if isinstance(members, str | os.PathLike) else "") or spec.source.name
    if nonmembers is None:
        by_column = spec.model_copy(update={"split": "given"})
        return pooled(by_column, name, {"all": _rows(members, "records", spec, dropped)}, dropped)
    seen: dict[str, str] = {}
    parts = {}
    for part, called, source in (("member", "members", members), ("nonmember", "non-members", nonmembers)):
        rows = _rows(source, called, spec, dropped)
        parts[part] = tuple(example for _, example in examples(rows, spec, seen, dropped))
        if not parts[part]:
            raise DataError(f"{called}: no record holds text; give records that do.")
    forms = [{type(example.form) for example in part} for part in parts.values()]
    if forms[0] != forms[1]:
        raise DataError("members and non-members are of different forms; give both as texts, as chats or as tokens.")
    return Pool(name, parts, dict(dropped))


def _rows(source: Records, called: str, spec: DataSpec, dropped: Counter[str]) -> Iterator[Row]:
    wanted = wanted_columns(spec)
    if not isinstance(source, str | os.PathLike):
        yield from _in_memory(source, called, wanted)
        return
    path = local_path(os.fspath(source))
    if path is None:
        raise DataError(f"{called}: {missing(os.fspath(source))}")
    if not path.is_dir():
        yield from read_rows(path, f"{called} ({path.name})", dropped, wanted)
        return
    try:
        parts = folder_files(path)
    except DataError as error:
        raise DataError(f"{called}: {error}") from None
    for files in parts.values():
        yield from file_rows([(f"{called} ({label})", file) for label, file in files], dropped, wanted)


def _in_memory(source: Any, called: str, wanted: Collection[str]) -> Iterator[Row]:
    columns = tuple(getattr(source, "column_names", None) or ())
    if isinstance(source, bytes | Mapping) or not hasattr(source, "__iter__"):
        raise DataError(f"{called}: {kind(source)}; expected a path, or rows: mappings of columns, or texts.")
    if hasattr(source, "iterrows"):  # pandas, whose iterator gives the names of columns
        source = source.astype(object).where(source.notna(), None).to_dict("records")
    elif columns and hasattr(source, "select_columns"):
        source = source.select_columns([name for name in columns if name in wanted] or list(columns))
    number = 0
    for number, item in enumerate(source, 1):
        if isinstance(item, str):
            yield Row(called, "record", number, {"text": item}, ("text",))
        elif isinstance(item, Mapping):
            values = {str(key): _plain(value) for key, value in item.items()}
            yield Row(called, "record", number, values, columns or tuple(values))
        else:
            raise DataError(f"{called}, record {number}: {kind(item)}; expected a mapping of columns, or a text.")
    if not number:
        raise DataError(f"{called}: no records; expected at least one.")


def _plain(value: Any) -> Any:
    """Lists and numbers where a library gives its own."""
    return value.tolist() if hasattr(value, "tolist") else list(value) if isinstance(value, tuple) else value
