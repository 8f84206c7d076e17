"""Everything a source holds, read and checked, before it is divided (`split.py`)."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from imprint.data import formats, forms
from imprint.data.hub import hub_rows
from imprint.data.row import Row, side_of
from imprint.errors import DataError, unknown
from imprint.spec import DataSpec, canonical_json
from imprint.types import Example

OFFICIAL_PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Pool:
    """All records of a source, by part.

    Args:
        name: short, for display: the file's stem, the benchmark's name or the Hub id.
        parts: `train`, `validation` and `test` where the source has them; other names as they are; or `all` alone.
            With `split: given`: `member`, `nonmember` and perhaps `validation`.
        dropped: records left out while reading, by reason.
        paper: sizes of the paper's protocol (`members`, `nonmembers`, `tune_on`), for `split: official`.
    """

    name: str
    parts: dict[str, tuple[Example, ...]]
    dropped: dict[str, int] = field(default_factory=dict)
    paper: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts.values())

    @property
    def part_names(self) -> tuple[str, ...]:
        """The parts in an order that does not depend on how they were read: official ones first."""
        return (*(name for name in OFFICIAL_PARTS if name in self.parts), *sorted({*self.parts} - {*OFFICIAL_PARTS}))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of every record in order with its part: equal content gives equal fingerprints wherever it lies."""
        digest = hashlib.sha256()
        for name in self.part_names:
            for e in self.parts[name]:
                line = canonical_json([name, e.id, e.prompt, e.target, e.group, *_beside(e)]) + "\n"
                digest.update(line.encode("utf-8", "surrogatepass"))
        return digest.hexdigest()


def _beside(e: Example) -> list[dict[str, object]]:
    """What only some records have: of others nothing, so that their fingerprints stay what they were."""
    form = forms.form_document(e.form) if e.form is not None else None
    return [{"subgroup": e.subgroup, "form": form}] if e.subgroup is not None or form is not None else []


def read_pool(spec: DataSpec) -> Pool:
    """Read the source of a recipe: a benchmark, the offline world, a local file or folder, or a Hub data set.

    Raises:
        DataError: there is no such source, or it cannot be used as asked.
    """
    from imprint.data.benchmarks import BENCHMARKS, read_benchmark

    source = spec.source
    if source.name in BENCHMARKS:
        _refuse_columns(spec, ("config", "split") if source.path is None else ("config", "split", "revision"))
        return read_benchmark(source)
    if source.name == "world" or source.name.startswith("world/"):
        from imprint.data import world

        _refuse_columns(spec, ("config", "split", "revision", "path"))
        told: Pool = world.read(source.name)
        return told
    path = local_path(source.path or source.name)
    if source.path is not None or _looks_local(source.name) or path is not None:
        return _read_local(spec, path)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source.name):
        # Never handed to `datasets`, for which a bare word such as "csv" means the files of the working folder.
        kinds = "a file, a folder, a Hub id of the form owner/name, world/… or a benchmark"
        raise DataError(f"{unknown('data source', source.name, BENCHMARKS)} Expected {kinds}.")
    dropped: Counter[str] = Counter()
    return pooled(spec, source.name, hub_rows(source, wanted=forms.wanted_columns(spec)), dropped)


def _refuse_columns(spec: DataSpec, keys: tuple[str, ...]) -> None:
    """A source with a fixed layout: an option that would be ignored is refused."""
    given = [key for key in keys if getattr(spec.source, key) is not None]
    given += [key for key in ("id", "group", "subgroup") if getattr(spec, key) is not None]
    given += ["format"] if spec.format != "auto" else []
    if given:
        raise DataError(f"{spec.source.name} brings its own texts, ids and groups; leave out `{given[0]}`.")


def local_path(name: str) -> Path | None:
    """The file or folder of that name, `~` expanded; None where there is none."""
    try:
        path = Path(name).expanduser()
        return path if name and path.exists() else None
    except (OSError, ValueError, RuntimeError):  # too long for a path, a NUL character, no such user
        return None


def missing(name: str) -> DataError:
    """The sentence for a path at which nothing lies."""
    return DataError(f"{name}: no such file or folder; check the path (relative paths start at {Path.cwd()}).")


def _looks_local(name: str) -> bool:
    return name.startswith((".", "/", "~")) or Path(name).suffix.lower() in formats.READERS


def _read_local(spec: DataSpec, path: Path | None) -> Pool:
    if path is None:
        raise missing(spec.source.path or spec.source.name)
    given = [key for key in ("config", "split", "revision") if getattr(spec.source, key) is not None]
    if given:
        raise DataError(f"`{given[0]}` is for Hub data sets, and {path} is local; leave it out.")
    wanted = forms.wanted_columns(spec)
    dropped: Counter[str] = Counter()
    rows: dict[str, Iterator[Row]]
    if path.is_dir():
        rows = {part: file_rows(files, dropped, wanted) for part, files in formats.folder_files(path).items()}
    else:
        rows = {"all": formats.read_rows(path, path.name, dropped, wanted)}
    return pooled(spec, spec.source.name if spec.source.path else path.resolve().stem, rows, dropped)


def file_rows(files: Iterable[tuple[str, Path]], dropped: Counter[str], wanted: Iterable[str] = ()) -> Iterator[Row]:
    """The rows of the files of one part, one file after the other."""
    columns = frozenset(wanted)
    return itertools.chain.from_iterable(formats.read_rows(path, label, dropped, columns) for label, path in files)


def pooled(spec: DataSpec, name: str, rows: dict[str, Iterator[Row]], dropped: Counter[str]) -> Pool:
    """The rows of every part as a pool; with `split: given` the parts are those that the rows themselves name.

    Raises:
        DataError: a row cannot be used, or none holds text.
    """
    seen: dict[str, str] = {}
    parts: dict[str, list[Example]] = {}
    for part in sorted(rows):
        for row, example in forms.examples(rows[part], spec, seen, dropped):
            parts.setdefault(side_of(row) if spec.split == "given" else part, []).append(example)
    return nonempty(Pool(name, {part: tuple(found) for part, found in parts.items()}, dict(dropped)))


def nonempty(pool: Pool) -> Pool:
    """The pool itself.

    Raises:
        DataError: it holds nothing.
    """
    if not pool.parts:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in sorted(pool.dropped.items())) or "none"
        raise DataError(f"{pool.name}: no record left; dropped by reason: {reasons}. Give records that hold text.")
    return pool
