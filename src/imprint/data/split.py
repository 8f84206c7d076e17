"""A pool → who is tuned on, who is not, and who measures perplexity.

Duplicates go first, since a text on both sides makes a leak look like none; then either all records are divided by
the seed, whole groups at a time, or the source's own parts are taken. The result depends on the pool's content, the
numbers asked for and the seed alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from imprint.data.dedup import far_from_earlier, first_of_each, word_ids
from imprint.data.pool import Pool
from imprint.errors import DataError
from imprint.spec import DataSpec
from imprint.types import Example, Split

SIDES = {"members": "train", "nonmembers": "test", "validation": "validation"}
"""Side of a split → the official part it is drawn from."""
DEFAULTS = {"members": 1000, "nonmembers": 1000, "validation": 500}

Usable = Callable[[Example], str | None]


class _Record(NamedTuple):
    example: Example
    part: str
    group: int


def resolve_sizes(spec: DataSpec, pool: Pool) -> DataSpec:
    """The same recipe with every number filled in.

    Defaults of a random split are 1,000 members, 1,000 non-members and 500 for validation; of the official one the
    paper's numbers, or the whole part where it is smaller.

    Raises:
        DataError: `tune_on` is less than `members`, or the source lacks an official part.
    """
    sizes = {side: getattr(spec, side) or DEFAULTS[side] for side in SIDES}
    tune_on = spec.tune_on or sizes["members"]
    if spec.split == "official":
        _check_parts(pool)
        have = {side: len(pool.parts[part]) for side, part in SIDES.items()}
        wish = {side: pool.paper.get(side, DEFAULTS[side]) for side in SIDES}
        sizes = {side: getattr(spec, side) or min(wish[side], have[side]) for side in SIDES}
        tune_on = spec.tune_on or max(sizes["members"], min(pool.paper.get("tune_on", 0), have["members"]))
    if tune_on < sizes["members"]:
        raise DataError(
            f"`tune_on: {tune_on}` is less than `members: {sizes['members']}`, and every member is tuned on; "
            "raise `tune_on` or lower `members`."
        )
    return spec.model_copy(update=sizes | {"tune_on": tune_on})


def make_split(pool: Pool, spec: DataSpec, seed: int, usable: Usable = lambda e: None) -> Split:
    """Divide a pool.

    With `split: official` a number equal to the size of a part means: all of it that is left after filtering.

    Args:
        usable: why a record cannot be scored ("one token only"), or None; such records are passed over and counted.

    Raises:
        DataError: there are fewer records than asked for, the source lacks an official part, or the sizes contradict
            each other.
    """
    spec = resolve_sizes(spec, pool)
    dropped = Counter(pool.dropped)
    names = SIDES.values() if spec.split == "official" else pool.part_names
    records = _without_duplicates([(e, name) for name in names for e in pool.parts[name]], spec, dropped)
    rng = np.random.Generator(np.random.PCG64(seed))
    want = {"members": spec.tune_on or 0, "nonmembers": spec.nonmembers or 0, "validation": spec.validation or 0}
    if spec.split == "official":
        sides = {side: [r.example for r in records if r.part == part] for side, part in SIDES.items()}
    else:
        sides = _assign(records, want, rng)
    drawn = {side: _draw(sides[side], want[side], rng, usable, dropped) for side in SIDES}
    for option in (*SIDES, "tune_on"):
        _check_size(pool, spec, option, len(drawn[option if option in SIDES else "members"]), len(records))
    members = spec.members or 0
    tuned = drawn["members"]
    return Split(
        members=tuple(tuned[:members]),
        extra=tuple(tuned[members:]),
        nonmembers=tuple(drawn["nonmembers"]),
        validation=tuple(drawn["validation"]),
        dropped={reason: dropped[reason] for reason in sorted(dropped) if dropped[reason]},
    )


def _without_duplicates(found: list[tuple[Example, str]], spec: DataSpec, dropped: Counter[str]) -> list[_Record]:
    """The records that may be drawn, in order: the first of each set of duplicates, groups on one side only."""
    numbers: dict[str, int] = {}
    groups = [
        numbers.setdefault(e.group, len(numbers)) if e.group is not None else -1 - n for n, (e, _) in enumerate(found)
    ]
    records = [_Record(e, part, group) for (e, part), group in zip(found, groups, strict=True)]
    words = word_ids(e for e, _ in found)
    keep = first_of_each(words)
    dropped["exact duplicate"] += len(records) - int(keep.sum())
    if spec.split == "official":
        keep &= _one_part_a_group(records, keep.tolist(), dropped)
    left = np.flatnonzero(keep).tolist()
    far = far_from_earlier([words[n] for n in left], [groups[n] for n in left])
    dropped["near duplicate"] += len(left) - int(far.sum())
    return [records[n] for n, alone in zip(left, far, strict=True) if alone]


def _one_part_a_group(records: list[_Record], keep: list[bool], dropped: Counter[str]) -> np.ndarray:
    """A group belongs to the first part it occurs in: tuned before non-members before validation."""
    owner: dict[int, str] = {}
    own = np.ones(len(records), bool)
    called = {"train": "group also among the tuned", "test": "group also among the non-members"}
    for n, record in enumerate(records):
        own[n] = owner.setdefault(record.group, record.part) == record.part
        if keep[n] and not own[n]:
            dropped[called[owner[record.group]]] += 1
    return own


def _assign(records: list[_Record], want: dict[str, int], rng: np.random.Generator) -> dict[str, list[Example]]:
    """Whole groups, in the seed's order, each to the side that lacks most of its share of the pool.

    Shares are in proportion to the sizes asked for. Where every group is one record no side ends a whole record
    short of its share, hence none below its size if the pool is large enough.
    """
    groups: dict[int, list[Example]] = {}
    for record in records:
        groups.setdefault(record.group, []).append(record.example)
    bundles = list(groups.values())
    total = sum(want.values())
    lacking = {side: len(records) * size for side, size in want.items()}  # in units of 1/total of a record
    sides: dict[str, list[Example]] = {side: [] for side in want}
    for n in _order(len(bundles), rng):
        side = max(lacking, key=lacking.__getitem__)
        lacking[side] -= total * len(bundles[n])
        sides[side] += bundles[n]
    return sides


def _order(n: int, rng: np.random.Generator) -> list[int]:
    """A random order from plain uniform draws, whose sequence numpy does not change, unlike its shuffles'."""
    order: list[int] = np.argsort(rng.random(n), kind="stable").tolist()
    return order


def _draw(
    records: list[Example], size: int, rng: np.random.Generator, usable: Usable, dropped: Counter[str]
) -> list[Example]:
    drawn: list[Example] = []
    for n in _order(len(records), rng):
        if len(drawn) == size:
            break
        reason = usable(records[n])
        if reason is None:
            drawn.append(records[n])
        else:
            dropped[reason] += 1
    return drawn


def _check_parts(pool: Pool) -> None:
    lacking = [part for part in SIDES.values() if part not in pool.parts]
    if lacking:
        raise DataError(
            f"`split: official` needs the parts train, test and validation, and {pool.name} has no {lacking[0]}; "
            f"parts found: {', '.join(pool.part_names)}. Use `split: random`."
        )


def _check_size(pool: Pool, spec: DataSpec, option: str, have: int, total: int) -> None:
    want = getattr(spec, option)
    whole = spec.split == "official" and want == len(pool.parts[SIDES.get(option, "train")])
    if have >= want or (whole and have > 0):
        return
    called = {"nonmembers": "non-members", "validation": "validation records", "tune_on": "records to tune on"}
    asked = f"{want} {called.get(option, option)}"
    left = f"{total} of {len(pool)} records are left after filtering, and {have} usable ones fall to that side"
    raise DataError(f"{pool.name}: {asked} asked for; {left}; lower `{option}` or bring more data.")
