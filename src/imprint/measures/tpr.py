"""True-positive rate at a small false-positive rate, with the checks and the interval the other measures share.

`measures.threshold` says how its interval is made, `benchmarks/tpr.py` measures how often it holds the truth.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import betaincinv

from imprint.errors import DataError, InvalidAudit, UsageError
from imprint.measures.threshold import inflation, rate_bounds, worst
from imprint.types import Floats, Interval

ROUNDING = 1e-9
"""Slack on a product like 0.001 · 1000 or 0.29 · 100, which floats may put a rounding error below the integer."""
FEW = 10
"""Fewer non-members than this above a threshold do not show how much the records of a subject agree."""


@dataclass(frozen=True)
class TPR(Interval):
    """The share of members found at a false-positive rate, and the counts behind it.

    Attributes:
        threshold: a record is called a member if its score is strictly above this.
        true_positives: members above the threshold.
        false_positives: non-members above the threshold.
        members: members scored.
        nonmembers: non-members scored.
        indicative: fewer than ten expected false positives. The interval allows for that and is wide; its lower end is
            0 where none of the non-members may lie above the true threshold, (1 − fpr)ⁿ > 2.5%.
    """

    threshold: float
    true_positives: int
    false_positives: int
    members: int
    nonmembers: int
    indicative: bool


def tpr_at_fpr(
    member_scores: ArrayLike,
    nonmember_scores: ArrayLike,
    fpr: float,
    level: float = 0.95,
    member_groups: Iterable[object] | None = None,
    nonmember_groups: Iterable[object] | None = None,
) -> TPR:
    """The largest TPR at a threshold whose empirical FPR is at most `fpr`, never the first point above it.

    With a = ⌊fpr · n⌋ false positives allowed among n non-members, records strictly above the (a+1)-th largest
    non-member score are called members: ties at that score count for neither side.

    The interval is for other members and non-members, of other subjects, and so for another threshold. Its width is
    never 0. With groups its upper end is at least that of no subject found and its lower end at most that of all: few
    hits never promise more than none.

    Args:
        member_scores: [M] scores, higher = more likely a member; infinite scores rank like any other.
        nonmember_scores: [n] scores.
        fpr: between 0 and 1, for example 0.01.
        level: confidence level of the two-sided interval.
        member_groups: [M] labels of clusters (subject, document) within which records are dependent; None or NaN
            among them marks a record on its own. A label on both sides counts as two, which errs on the wide side.
        nonmember_groups: [n] labels; given if and only if `member_groups` is.

    Raises InvalidAudit if fpr · n < 1, where no threshold can be known; DataError for an empty side, NaN or groups that
    do not fit; UsageError for an fpr or level outside (0, 1).

    >>> result = tpr_at_fpr([0.9, 0.8, 0.7, 0.2], [0.75, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0, 0.0, 0.0], fpr=0.1)
    >>> result.value, result.threshold, result.false_positives    # above .6: one non-member and three members
    (0.75, 0.6, 1)
    """
    if not 0 < fpr < 1:
        raise UsageError(f"fpr must lie strictly between 0 and 1, not {fpr}.")
    tail = (1 - checked_level(level)) / 2
    members, nonmembers = two_sides(member_scores, nonmember_scores)
    M, n = len(members), len(nonmembers)
    subjects = _subjects((M, n), member_groups, nonmember_groups)
    expected = fpr * n + ROUNDING
    if expected < 1:
        needed = math.ceil(1 / fpr - ROUNDING)
        raise InvalidAudit(
            f"TPR at {100 * fpr:g}% FPR needs at least {needed} non-members (one expected false positive): "
            f"there are {n}."
        )
    allowed = min(int(expected), n - 1)
    ranked = np.sort(nonmembers)
    threshold = ranked[n - 1 - allowed]
    hits = members > threshold
    found = int(np.count_nonzero(hits))
    effects, unseen = (1.0, 1.0), 0.0
    if subjects:
        some = nonmembers > ranked[n - 1 - max(allowed, min(FEW, n // 2))]
        effects = inflation(hits, subjects[0], level), inflation(some, subjects[1], level)
        unseen = 1 - tail ** (worst(subjects[0]) / M)
    low, high = rate_bounds(np.sort(members), ranked, fpr, tail, effects)
    return TPR(
        value=found / M,
        low=min(low, found / M, 1 - unseen),
        high=max(high, found / M, unseen),
        threshold=float(threshold),
        true_positives=found,
        false_positives=int(np.sum(nonmembers > threshold)),
        members=M,
        nonmembers=n,
        indicative=expected < 10,
    )


def _subjects(
    records: tuple[int, int], member_groups: Iterable[object] | None, nonmember_groups: Iterable[object] | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
    """Codes of the subjects of both sides."""
    if member_groups is None and nonmember_groups is None:
        return None
    if member_groups is None or nonmember_groups is None:
        raise DataError("groups are given for one side only: give both, with None for a record on its own.")
    found = _codes(member_groups), _codes(nonmember_groups)
    if (len(found[0]), len(found[1])) != records:
        raise DataError(
            f"every score needs a group: {records[0]} and {records[1]} scores, {len(found[0])} and {len(found[1])} "
            "groups."
        )
    return found


def _codes(labels: Iterable[object]) -> NDArray[np.int64]:
    from imprint.measures.auc import codes  # which imports this module

    if (
        isinstance(labels, np.ndarray)
        and labels.dtype == np.int64
        and 0 <= labels.min(initial=0) <= labels.max(initial=0) < len(labels)
    ):
        return labels
    return codes(labels)


def clopper_pearson(successes: float, trials: float, level: float = 0.95) -> tuple[float, float]:
    """The exact two-sided interval of a binomial proportion. Clopper and Pearson 1934.

    Raises UsageError for a level outside (0, 1).

    >>> low, high = clopper_pearson(0, 10)    # 0 and 1 - .025^(1/10)
    >>> low, round(high, 4)
    (0.0, 0.3085)
    """
    tail = (1 - checked_level(level)) / 2
    failures = trials - successes
    low = betaincinv(successes, failures + 1, tail) if successes > 0 else 0.0
    high = betaincinv(successes + 1, failures, 1 - tail) if failures > 0 else 1.0
    return float(low), float(high)


def two_sides(member_scores: ArrayLike, nonmember_scores: ArrayLike) -> tuple[Floats, Floats]:
    """Both sides as float64 vectors. Raises DataError for an empty side, another shape, or NaN, with the counts."""
    members, nonmembers = np.asarray(member_scores, np.float64), np.asarray(nonmember_scores, np.float64)
    if members.ndim != 1 or nonmembers.ndim != 1:
        raise DataError(f"scores must be vectors, one per record, not of shape {members.shape} and {nonmembers.shape}.")
    if not len(members) or not len(nonmembers):
        raise DataError(
            f"members and non-members are both needed: there are {len(members)} and {len(nonmembers)} scores."
        )
    bad = int(np.isnan(members).sum()), int(np.isnan(nonmembers).sum())
    if any(bad):
        raise DataError(
            f"{bad[0]} of {len(members)} member scores and {bad[1]} of {len(nonmembers)} non-member scores are NaN: "
            "find out why these records have no score, rather than dropping them."
        )
    return members, nonmembers


def checked_level(level: float) -> float:
    """The level itself. Raises UsageError outside (0, 1)."""
    if not 0 < level < 1:
        raise UsageError(f"a confidence level must lie strictly between 0 and 1, not {level}.")
    return level
