"""What members and non-members have in common, counted: a record on both sides makes a leak look like none."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from imprint.data.dedup import far_from_earlier, word_ids
from imprint.types import Example

RUN = 13
"""Words of a run that natural texts seldom share by chance (Brown et al. 2020, contamination of GPT-3's test sets)."""


@dataclass(frozen=True)
class Overlap:
    """Counts across the two sides.

    Attributes:
        exact: non-members with the very words of a member, case and white space ignored.
        near: further non-members whose five-word shingles have a Jaccard similarity of at least .8 with a member's.
        groups: group labels found on both sides.
        shared_runs: non-members with a run of thirteen words that a member has too; for information, since texts of
            one template share runs without being about the same thing.
        members: records on this side.
        nonmembers: records on the other.
    """

    exact: int
    near: int
    groups: int
    shared_runs: int
    members: int
    nonmembers: int


def overlap(members: Sequence[Example], nonmembers: Sequence[Example]) -> Overlap:
    """Count what is on both sides. Exact: no sketch, no seed; prompt and target count as one text.

    >>> a, b = Example("1", "", "one two three four five", "x"), Example("2", "", "One two three four  five", "x")
    >>> overlap([a], [b])
    Overlap(exact=1, near=0, groups=1, shared_runs=0, members=1, nonmembers=1)
    """
    words = word_ids([*members, *nonmembers])
    ours, theirs = words[: len(members)], words[len(members) :]
    known = {ids.tobytes() for ids in ours}
    same = np.array([ids.tobytes() in known for ids in theirs], bool)
    far = far_from_earlier(words, [0] * len(ours) + [1] * len(theirs))[len(ours) :]
    labels = [{e.group for e in side if e.group is not None} for side in (members, nonmembers)]
    return Overlap(
        exact=int(same.sum()),
        near=int((~far & ~same).sum()),
        groups=len(labels[0] & labels[1]),
        shared_runs=_sharing_runs(ours, theirs),
        members=len(ours),
        nonmembers=len(theirs),
    )


def _sharing_runs(ours: Iterable[NDArray[np.int32]], theirs: Iterable[NDArray[np.int32]]) -> int:
    known = {run for ids in ours for run in _runs(ids)}
    return sum(any(run in known for run in _runs(ids)) for ids in theirs)


def _runs(ids: NDArray[np.int32]) -> Iterable[bytes]:
    """Every run of thirteen words; none of a shorter text."""
    raw, width = ids.tobytes(), ids.itemsize
    return (raw[at * width : (at + RUN) * width] for at in range(len(ids) - RUN + 1))
