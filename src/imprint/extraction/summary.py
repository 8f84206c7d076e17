"""How many records come out of a model, beside how many would have come out of it anyway.

Texts that everybody writes come out of any model, tuned on them or not. A checkpoint is said to give its members away
only where they come out more often than records that it never saw, and more often than out of the untouched base: both
exact tests of `measures.extraction` have to say so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from imprint.extraction.passages import Outcomes
from imprint.extraction.spec import ExtractionSpec
from imprint.measures.estimate import holm
from imprint.measures.extraction import Extraction, extractable, extraction

SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Cohort:
    """Whose passages they are: [M] whether the record is a member's, and [M] its subject."""

    member: NDArray[np.bool_]
    subject: NDArray[np.object_]


@dataclass(frozen=True)
class Nearness:
    """How near what was written comes to the suffixes.

    Attributes:
        run: tokens of the longest run that both hold, mean.
        distance: edit distance over the length of the suffix, median.
    """

    run: float
    distance: float


@dataclass(frozen=True)
class Extracted:
    """One checkpoint.

    Attributes:
        epoch: 0 is the untouched base.
        greedy: shares whose suffix is written by always taking the most probable token, and their excess.
        sampled: shares whose suffix is among the tries with the probability that is asked for, and their excess.
        near: of members, of non-members, and of members by the base; empty where nothing was written.
        p: that the members' excess over both controls is chance, greedily and by sampling; corrected for the number of
            checkpoints. Empty where nothing was written.
    """

    run_id: str
    label: str
    epoch: int
    greedy: Extraction
    sampled: Extraction
    near: tuple[Nearness, ...] = ()
    p: tuple[float, ...] = ()

    @property
    def claims(self) -> tuple[str, ...]:
        """The ways in which members are said to be extracted."""
        ways = ("greedily", "by sampling")
        return tuple(way for way, p in zip(ways, self.p, strict=False) if p < SIGNIFICANT)


def extracted(
    name: tuple[str, str, int], found: Outcomes, base: Outcomes, cohort: Cohort, asked: ExtractionSpec
) -> Extracted:
    """One checkpoint beside both controls; p-values are not there yet.

    Args:
        name: run id, label and epoch.
        found, base: of M passages, by the checkpoint and by the untouched base.
    """
    ins, outs = cohort.member, ~cohort.member
    greedy, sampled = (
        extraction(
            hits[ins],
            hits[outs],
            control[ins],
            member_groups=cohort.subject[ins],
            nonmember_groups=cohort.subject[outs],
        )
        for hits, control in zip(_hits(found, asked), _hits(base, asked), strict=True)
    )
    near = (_near(found, ins), _near(found, outs), _near(base, ins)) if found.run is not None else ()
    return Extracted(*name, greedy, sampled, tuple(one for one in near if one))


def corrected(rows: Sequence[Extracted]) -> list[Extracted]:
    """With p-values, corrected over the checkpoints (Holm) for each of the two ways."""
    greedy, sampled = (
        holm([_p(way) for way in ways]) for ways in ([r.greedy for r in rows], [r.sampled for r in rows])
    )
    return [replace(row, p=(greedy[n], sampled[n])) for n, row in enumerate(rows)]


def _p(found: Extraction) -> float:
    """Both controls have to be exceeded: the larger p, and 1 where one of them is not."""
    over = found.over_nonmembers, found.over_base
    return max(one.p for one in over) if all(one.value > 0 for one in over) else 1.0


def _hits(found: Outcomes, asked: ExtractionSpec) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """[M] whether a record comes out greedily, and whether it does by sampling."""
    return found.exact, extractable(found.log_p, asked.tries, asked.probability)


def _near(found: Outcomes, rows: NDArray[np.bool_]) -> Nearness | None:
    if found.run is None or found.distance is None:
        return None
    return Nearness(float(found.run[rows].mean()), float(np.median(found.distance[rows])))
