"""The members that stand out: who is exposed, since when, and how many of the list chance alone would have put there.

A record's evidence is what tuning gained on it over the base, in nats per token (Ref), the score of the main table. By
itself it says nothing, since some text is always on top. Three numbers say what it is worth, all from the scores of the
non-members, which were not tuned on and whose gains are therefore chance:

- p, conformal: the probability that a record nobody tuned on scores as high. Where subjects own k records a non-member
  weighs 1/k, so that each subject counts once (Lee, Barber and Willett 2023, hierarchical conformal prediction).
- chance: how many of the M members would score as high if nothing leaked, M·p at most.
- q: the expected share of false names among the members that score as high (Benjamini and Hochberg 1995; conformal
  p-values of one sample keep its level: Bates et al. 2023). At most `FALSE_SHARE` names a record exposed.

A record counts as exposed from the epoch at which it first lies above the threshold of TPR at 1% FPR: the numbers by
epoch are those of the main table, with what chance puts there beside them. All of it holds if members and non-members
were divided at random, which the validity gates are for.

Of 2,000 simulated audits of a model that leaks nothing at most 5% name a record, under .1% with 1,000 records a side;
the number at the last epoch passes for more than chance in 4% at most (`benchmarks/subgroups.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from imprint.attacks import evidence_needed
from imprint.errors import InvalidAudit, UsageError
from imprint.measures import tpr_at_fpr
from imprint.measures.auc import Codes, codes
from imprint.measures.sizes import design_effect
from imprint.measures.tpr import ROUNDING, TPR
from imprint.rows import Cell
from imprint.types import Floats

RATE = 0.01
"""The share of non-members that may lie above the threshold."""
FALSE_SHARE = 0.05
"""Of the records that are named exposed, the share that is expected to be there by chance, at most."""
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class EpochCount:
    """How many members lie above the threshold of an epoch.

    Attributes:
        exposed: members above it; over all members this is the TPR at 1% FPR of the main table.
        expected: how many chance puts there: a little over 1%, as the threshold is itself one of the non-members; at
            most so many where subjects own several records.
        p: probability of as many by chance, at most, for this epoch alone.
    """

    epoch: int
    exposed: int
    expected: float
    p: float


@dataclass(frozen=True)
class ExposedRecord:
    """A member on the list.

    Attributes:
        rank: 1 is the most exposed.
        id, subject: as they stand in the data, to be cleaned before they are shown.
        score: at the last epoch; nats per token for `ref`.
        tokens: scored.
        p: probability that a record nobody tuned on scores as high.
        chance: members expected to score as high if nothing leaked.
        q: expected share of false names in the list down to here.
        first: the first epoch at which the record lies above the threshold; None if it never does.
    """

    rank: int
    id: str
    subject: str
    score: float
    tokens: int
    p: float
    chance: float
    q: float
    first: int | None


@dataclass(frozen=True)
class Exposure:
    """The list of a cell at its last finished epoch.

    Attributes:
        attack: whose scores.
        rate: of non-members above the threshold, at most.
        members, nonmembers: records.
        epochs: counts of every finished epoch, in order; empty where refused.
        rows: members, the most exposed first, named or not; empty where refused.
        named: how many of all members are named exposed: those with q of at most `FALSE_SHARE`.
        reason: why there is no list, else empty.
    """

    attack: str
    rate: float
    members: int
    nonmembers: int
    epochs: tuple[EpochCount, ...] = ()
    rows: tuple[ExposedRecord, ...] = ()
    named: int = 0
    reason: str = ""

    @property
    def finding(self) -> str:
        """One sentence for the head of the list, which by itself would always look like a leak."""
        if self.reason:
            return self.reason
        last = self.epochs[-1]
        counted = (
            f"{last.exposed} of {self.members} members lie above a threshold where chance puts {last.expected:.1f}"
        )
        if self.named:
            share = f"of these at most {FALSE_SHARE:.0%} are expected to be there by chance"
            return f"{self.named} of {self.members} members stand out: {share}; {counted}."
        if last.p < SIGNIFICANT:
            return f"Some members are exposed, but none stands out from the non-members by itself: {counted}."
        return f"None more than chance explains: {counted}."


def exposed(cell: Cell, most: int = 20, attack: str = "ref") -> Exposure:
    """The members that the last finished epoch gives away most, and how many are exposed at each epoch.

    Args:
        most: length of the list.
        attack: one that compares with the base: by any other, texts that are easy for every model would be on top.

    Raises:
        UsageError: no record is asked for, or the attack does not compare with the base.
        DataError: a score is NaN.
    """
    if most < 1:
        raise UsageError(f"most: at least one record has to be asked for, not {most}.")
    if "reference" not in evidence_needed(attack):
        raise UsageError(f"attack {attack!r} does not compare with the base: records are ranked by `ref` or `ratio`.")
    groups = cell.groups("member"), cell.groups("nonmember")
    audit = Exposure(attack, RATE, len(groups[0]), len(groups[1]))
    epochs = range(1, cell.epochs + 1)
    if not epochs:
        return replace(audit, reason="No epoch has finished.")
    scores = [cell.sides(cell.scores(epoch, [attack])[attack]) for epoch in epochs]
    try:
        found = [tpr_at_fpr(*sides, RATE) for sides in scores]
    except InvalidAudit as error:
        return replace(audit, reason=str(error))
    effects = design_effect(groups[0]), design_effect(groups[1])
    counts = tuple(count_of(epoch, tpr, effects) for epoch, tpr in zip(epochs, found, strict=True))
    above = np.array([sides[0] > tpr.threshold for sides, tpr in zip(scores, found, strict=True)])
    last, nonmembers = scores[-1]
    p = conformal_p(last, nonmembers, codes(groups[1]))
    q = false_shares(p)
    rows = tuple(_rows(cell, last, p, q, above, most))
    return replace(audit, epochs=counts, rows=rows, named=int(np.sum(q <= FALSE_SHARE)))


def conformal_p(members: Floats, nonmembers: Floats, subjects: Codes) -> Floats:
    """[M] p-value of each member: (1 + Σ over subjects of the share of its records that score as high)/(subjects + 1).

    Where every non-member is its own subject: (1 + the number of non-members that score as high)/(N + 1).

    Args:
        members: [M] scores.
        nonmembers: [N] scores.
        subjects: [N] codes of the non-members' subjects.

    >>> conformal_p(np.array([5.0, 2.0, 0.0]), np.array([1.0, 2.0, 3.0]), np.arange(3)).tolist()
    [0.25, 0.75, 1.0]
    """
    sizes = np.bincount(subjects)
    order = np.argsort(nonmembers)
    below = np.concatenate([[0.0], np.cumsum(1 / sizes[subjects[order]])])[np.searchsorted(nonmembers[order], members)]
    return np.minimum(1.0, (1 + len(sizes) - below) / (len(sizes) + 1))  # never over 1 by rounding


def false_shares(p: Floats) -> Floats:
    """[M] q-values by Benjamini and Hochberg: the least expected share of false names in a list with the record on it.

    >>> false_shares(np.array([0.5, 0.01, 0.03])).round(3).tolist()
    [0.5, 0.03, 0.045]
    """
    order = np.argsort(p)
    q = np.empty(len(p))
    q[order] = np.minimum.accumulate((p[order] * len(p) / np.arange(1, len(p) + 1))[::-1])[::-1]
    return q


def count_of(epoch: int, tpr: TPR, effects: tuple[float, float]) -> EpochCount:
    """The count behind a TPR beside what chance allows.

    If nothing leaked, the share of members above the (a+1)-th largest of n non-members would be Beta(a + 1, n − a), and
    their number beta-binomial. Where records share subjects both sides count as if all records of a subject had one
    score, which is the worst they can do; expectation and p are then upper bounds.

    Args:
        effects: `design_effect` of members and of non-members.
    """
    from scipy.stats import betabinom  # half a second, needed here alone

    found, M = tpr.true_positives, tpr.members
    trials, n = math.ceil(M / effects[0] - ROUNDING), tpr.nonmembers / effects[1]
    a = math.ceil((int(RATE * tpr.nonmembers + ROUNDING) + 1) / effects[1] - ROUNDING)
    p = betabinom.sf(math.floor(found * trials / M + ROUNDING) - 1, trials, a, n + 1 - a)
    return EpochCount(epoch, found, M * a / (n + 1), float(p))


def _rows(
    cell: Cell, scores: Floats, p: Floats, q: Floats, above: NDArray[np.bool_], most: int
) -> Iterator[ExposedRecord]:
    """The `most` highest scores; of equal ones the first in the data comes first. `above`: [E, M]."""
    records = cell.records.iloc[cell.rows("member")]
    ids, subjects, tokens = (records[name].tolist() for name in ("id", "group", "scored_tokens"))
    for rank, n in enumerate(np.argsort(-scores, kind="stable")[:most].tolist(), 1):
        first = int(np.argmax(above[:, n])) + 1 if above[:, n].any() else None
        chance = len(p) * float(p[n])
        yield ExposedRecord(
            rank, ids[n], subjects[n], float(scores[n]), tokens[n], float(p[n]), chance, float(q[n]), first
        )
