"""A pool → who is tuned on, who is not, and who measures perplexity.

Duplicates go first, since a text on both sides makes a leak look like none; then either all records are divided by
the seed, whole groups at a time, or the source's own parts are taken, or those that the records themselves name. The
result depends on the pool's content, the numbers asked for and the seed alone; who is scored does not depend on
`tune_on` or `auxiliary`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import numpy as np

from imprint.data.dedup import far_from_earlier, first_of_each, word_ids
from imprint.data.pool import Pool
from imprint.errors import DataError
from imprint.spec import DataSpec
from imprint.types import Example, Split

SIDES = ("members", "nonmembers", "validation")
PARTS = {
    "official": dict(zip(SIDES, ("train", "test", "validation"), strict=True)),
    "given": dict(zip(SIDES, ("member", "nonmember", "validation"), strict=True)),
}
"""Kind of split → side → the part it is drawn from."""
GIVEN_MOST = 2000
"""Records of a part that `split: given` scores by default: with as many on both sides, an AUC of .5 ± .018."""
DEFAULTS = {"members": 1000, "nonmembers": 1000, "validation": 500}

Usable = Callable[[Example], str | None]
T = TypeVar("T")


class _Record(NamedTuple):
    example: Example
    part: str
    group: int


def resolve_sizes(spec: DataSpec, pool: Pool) -> DataSpec:
    """The same recipe with every number filled in.

    Defaults of a random split are 1,000 members, 1,000 non-members and 500 for validation; of the official one the
    paper's numbers, or the whole part where it is smaller; of a given one the whole part, at most 2,000 of it, and no
    validation where there is none.

    Raises:
        DataError: `tune_on` is less than `members`, or the source lacks a part.
    """
    sizes, tuned = dict(DEFAULTS), 0
    if spec.split != "random":
        _check_parts(pool, spec.split)
        have = {side: len(pool.parts.get(part, ())) for side, part in PARTS[spec.split].items()}
        for side in ("members", "nonmembers"):
            have[side] = max(have[side] - (spec.auxiliary or 0), 0)
        wish = DEFAULTS | pool.paper if spec.split == "official" else dict.fromkeys(SIDES, GIVEN_MOST)
        sizes = {side: min(wish[side], have[side]) for side in SIDES}
        tuned = min(pool.paper.get("tune_on", 0), have["members"])
    sizes = {side: getattr(spec, side) or sizes[side] for side in SIDES}
    least = sizes["members"] + (spec.auxiliary or 0)
    tune_on = spec.tune_on or max(least, tuned)
    if tune_on < least:
        beside = f" and `auxiliary: {spec.auxiliary}`" if spec.auxiliary else ""
        raise DataError(
            f"`tune_on: {tune_on}` is less than `members: {sizes['members']}`{beside}, and every member is tuned on; "
            "raise `tune_on` or lower `members`."
        )
    return spec.model_copy(update={**sizes, "validation": sizes["validation"] or None, "tune_on": tune_on})


def make_split(pool: Pool, spec: DataSpec, seed: int, usable: Usable = lambda e: None) -> Split:
    """Divide a pool.

    Members, non-members and validation are the same whatever `tune_on` is; a larger `tune_on` adds to the extra
    records of a smaller one. With `split: official` or `given` a number equal to the size of a part, or to the default,
    means: all of it that is left after filtering.

    Args:
        usable: why a record cannot be scored ("one token only"), or None; such records are passed over and counted.
            Asked once of a record: of members, then of non-members, of validation and of extra records.

    Raises:
        DataError: there are fewer records than asked for, the source lacks a part, or the sizes contradict each
            other.
    """
    spec = resolve_sizes(spec, pool)
    dropped = Counter(pool.dropped)
    parts = PARTS.get(spec.split)
    names = parts.values() if parts else pool.part_names
    found = [(e, name) for name in names for e in pool.parts.get(name, ())]
    records = _without_duplicates(found, spec, dropped)
    rng = np.random.Generator(np.random.PCG64(seed))
    want = {side: getattr(spec, side) or 0 for side in SIDES}
    if parts:
        sides = {side: [r for r in records if r.part == part] for side, part in parts.items()}
    else:
        sides = _assign(records, want, rng)
    order = _shuffled_groups if spec.split == "given" else _shuffled
    queues = {side: iter(order(sides[side], rng)) for side in SIDES}
    drawn = {side: _draw(queues[side], want[side], usable, dropped) for side in SIDES}
    count = spec.auxiliary or 0
    left = queues["members"] if parts else _left_to_tune_on(queues, drawn, rng)
    out: list[_Record] = []
    if count:
        evaluated, rest = drawn["members"] + drawn["nonmembers"], list(left)
        out = _draw(_apart(list(queues["nonmembers"]) if parts else rest, evaluated), count, usable, dropped)
        left = _others_first(rest, evaluated, out)
    known = _draw(left, count, usable, dropped)
    extra = _draw(left, (spec.tune_on or 0) - want["members"] - count, usable, dropped)
    have = {side: len(drawn[side]) for side in SIDES} | {"auxiliary": min(len(known), len(out))}
    have["tune_on"] = len(drawn["members"]) + len(known) + len(extra)
    for option, size in have.items():
        _check_size(pool, spec, option, size, len(records), dropped)
    drawn |= {"extra": extra, "auxiliary_in": known, "auxiliary_out": out}
    return Split(
        **{side: tuple(r.example for r in found) for side, found in drawn.items()},
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
    if spec.split in PARTS:
        keep &= _one_part_a_group(records, keep.tolist(), dropped)
    left = np.flatnonzero(keep).tolist()
    far = far_from_earlier([words[n] for n in left], [groups[n] for n in left])
    dropped["near duplicate"] += len(left) - int(far.sum())
    return [records[n] for n, alone in zip(left, far, strict=True) if alone]


def _one_part_a_group(records: list[_Record], keep: list[bool], dropped: Counter[str]) -> np.ndarray:
    """A group belongs to the first part it occurs in: tuned before non-members before validation."""
    owner: dict[int, str] = {}
    own = np.ones(len(records), bool)
    called = dict.fromkeys(("train", "member"), "group also among the tuned")
    called |= dict.fromkeys(("test", "nonmember"), "group also among the non-members")
    for n, record in enumerate(records):
        own[n] = owner.setdefault(record.group, record.part) == record.part
        if keep[n] and not own[n]:
            dropped[called[owner[record.group]]] += 1
    return own


def _assign(records: list[_Record], want: dict[str, int], rng: np.random.Generator) -> dict[str, list[_Record]]:
    """Whole groups, in the seed's order, each to the side that lacks most of its share of the pool.

    Shares are in proportion to the sizes asked for. Where every group is one record no side ends a whole record
    short of its share, hence none below its size if the pool is large enough.
    """
    total = sum(want.values())
    lacking = {side: len(records) * size for side, size in want.items()}  # in units of 1/total of a record
    sides: dict[str, list[_Record]] = {side: [] for side in want}
    for bundle in _shuffled(_bundles(records), rng):
        side = max(lacking, key=lacking.__getitem__)
        lacking[side] -= total * len(bundle)
        sides[side] += bundle
    return sides


def _bundles(records: list[_Record]) -> list[list[_Record]]:
    """The records of each group together, groups in the order of their first."""
    groups: dict[int, list[_Record]] = {}
    for record in records:
        groups.setdefault(record.group, []).append(record)
    return list(groups.values())


def _shuffled_groups(records: list[_Record], rng: np.random.Generator) -> list[_Record]:
    return [record for bundle in _shuffled(_bundles(records), rng) for record in bundle]


def _left_to_tune_on(
    queues: dict[str, Iterator[_Record]], drawn: dict[str, list[_Record]], rng: np.random.Generator
) -> Iterator[_Record]:
    """What no side of a random split has drawn, in the seed's order, less the groups of what is never tuned on.

    Members and extra records are one side, so a group may hold both. All that may be tuned on is here: single records
    are never wasted, a group of which a non-member was drawn is.
    """
    apart = {r.group for side in ("nonmembers", "validation") for r in drawn[side]}
    return iter(_shuffled([r for side in SIDES for r in queues[side] if r.group not in apart], rng))


def _apart(records: list[_Record], others: list[_Record]) -> Iterator[_Record]:
    """Those that share no group with `others`, which are not among them either."""
    groups = {record.group for record in others}
    return (record for record in records if record.group not in groups)


def _others_first(records: list[_Record], last: list[_Record], never: list[_Record]) -> Iterator[_Record]:
    """Those that share no group with `never`, the ones that share one with `last` behind the others."""
    groups = {record.group for record in last}
    return iter(sorted(_apart(records, never), key=lambda record: record.group in groups))


def _shuffled(items: list[T], rng: np.random.Generator) -> list[T]:
    """In a random order from plain uniform draws, whose sequence numpy does not change, unlike its shuffles'."""
    return [items[n] for n in np.argsort(rng.random(len(items)), kind="stable")]


def _draw(queue: Iterator[_Record], size: int, usable: Usable, dropped: Counter[str]) -> list[_Record]:
    """Take usable records off the front; what is passed over is gone too, so that it is counted once."""
    drawn: list[_Record] = []
    while len(drawn) < size and (record := next(queue, None)):
        reason = usable(record.example)
        if reason is None:
            drawn.append(record)
        else:
            dropped[reason] += 1
    return drawn


def _check_parts(pool: Pool, kind: str) -> None:
    needed = list(PARTS[kind].values())[: 3 if kind == "official" else 2]
    lacking = next((part for part in needed if part not in pool.parts), None)
    if lacking is None:
        return
    found = f"{pool.name} has no {lacking}; parts found: {', '.join(pool.part_names)}"
    if kind == "official":
        raise DataError(
            f"`split: official` needs the parts train, test and validation, and {found}. Use `split: random`."
        )
    raise DataError(f"`split: given` needs members and non-members, and {found}. Say so in a column `member`.")


def _check_size(pool: Pool, spec: DataSpec, option: str, have: int, total: int, dropped: Counter[str]) -> None:
    want = getattr(spec, option) or 0
    at_most = spec.split == "given"  # whose numbers are limits: somebody else has chosen who there is
    if at_most and not have and option in ("members", "nonmembers"):
        side = "members" if option == "members" else "non-members"
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in dropped.items() if n) or "none"
        told = "; are the two sides the same records?" if option == "nonmembers" else ""
        raise DataError(f"{pool.name}: no {side} are left to be scored (left out: {reasons}){told}")
    if have >= want or (have > 0 and (at_most or want in _all_there_is(pool, spec, option))):
        return
    called = {"nonmembers": "non-members", "validation": "validation records", "tune_on": "records to tune on"}
    called["auxiliary"] = "auxiliary records on each side"
    asked = f"{want} {called.get(option, option)}"
    left = f"{total} of {len(pool)} records are left after filtering, and {have} usable ones fall to that side"
    raise DataError(f"{pool.name}: {asked} asked for; {left}; lower `{option}` or bring more data.")


def _all_there_is(pool: Pool, spec: DataSpec, option: str) -> tuple[int, ...]:
    """Numbers that stand for all of a part that is left."""
    if spec.split not in PARTS:
        return ()
    parts = PARTS[spec.split]
    size = len(pool.parts.get(parts.get(option, parts["members"]), ()))
    return (size, min(size, GIVEN_MOST)) if spec.split == "given" else (size,)
