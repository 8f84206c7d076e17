"""What a column `group` means where nobody has said so: the owner of a record, or a property of it.

Both are called groups. An owner's records are all on one side, or a non-member would be about somebody the model knows;
a language or a region is on both, and leakage can be compared between its values.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace

from imprint.data import Pool
from imprint.data.formats import folder_files, read_rows
from imprint.data.given import Records, read_sides
from imprint.data.pool import local_path
from imprint.spec import DataSpec
from imprint.subgroups import SMALLEST

COLUMN = "group"
OTHERS = "other values"
"""In place of those that are too few to be compared, and might be names."""
NEARLY_ALL = 0.9


def read_records(spec: DataSpec, members: Records, nonmembers: Records | None) -> tuple[Pool, DataSpec]:
    """The records, and the columns by which they were found to belong together.

    Raises:
        DataError: they cannot be read.
    """
    if spec.group or spec.subgroup or COLUMN not in _columns(members):
        return read_sides(spec, members, nonmembers), spec
    pool = read_sides(spec.model_copy(update={"group": COLUMN}), members, nonmembers)
    values = _compared(pool)
    if not values:
        return pool, spec.model_copy(update={"group": COLUMN})
    parts = {
        name: tuple(
            replace(example, group=None, subgroup=example.group if example.group in values else OTHERS)
            for example in part
        )
        for name, part in pool.parts.items()
    }
    return replace(pool, parts=parts), spec.model_copy(update={"subgroup": COLUMN})


def _columns(members: Records) -> Collection[str]:
    """The names of the columns, of the first record."""
    if isinstance(members, str | os.PathLike):
        path = local_path(os.fspath(members))
        if path is None:
            return ()  # which is told where it is read
        files = folder_files(path) if path.is_dir() else {"": [(path.name, path)]}
        [(label, file), *_] = next(iter(files.values()))
        return next(read_rows(file, label, Counter())).columns
    names = getattr(members, "column_names", None)  # of a `datasets.Dataset`
    first = next(iter(members), None) if names is None else None
    return names or (first.keys() if isinstance(first, Mapping) else ())


def _compared(pool: Pool) -> set[str]:
    """The values that have enough records on both sides, if nearly all records have one of them; else none.

    A few values in common, such as "unknown" among names of customers, do not make a property of it.
    """
    sides = [Counter(example.group for example in pool.parts.get(name, ())) for name in ("member", "nonmember")]
    shared = {label for label in sides[0] if label is not None and min(side[label] for side in sides) >= SMALLEST}
    covered = sum(side[label] for side in sides for label in shared)
    return shared if covered >= NEARLY_ALL * sum(sum(side.values()) for side in sides) else set()
