"""Data sets on the Hub → rows. Loading scripts are never run."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from imprint.data.formats import part_name
from imprint.data.row import Row
from imprint.errors import DataError
from imprint.spec import Source

PARQUET_EXPORT = "refs/convert/parquet"
"""The Hub revision that holds every public data set as plain parquet, by configuration and split."""


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
