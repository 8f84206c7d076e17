"""True-positive rate at a small false-positive rate, with the checks and the interval the other measures share."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import betaincinv

from imprint.errors import DataError, InvalidAudit, UsageError
from imprint.types import Floats, Interval

ROUNDING = 1e-9
"""Slack on a product like 0.001 · 1000 or 0.29 · 100, which floats may put a rounding error below the integer."""


@dataclass(frozen=True)
class TPR(Interval):
    """The share of members found at a false-positive rate, and the counts behind it.

    Attributes:
        threshold: a record is called a member if its score is strictly above this.
        true_positives: members above the threshold.
        false_positives: non-members above the threshold.
        members: members scored.
        nonmembers: non-members scored.
        indicative: fewer than ten expected false positives, so the threshold itself is uncertain.
    """

    threshold: float
    true_positives: int
    false_positives: int
    members: int
    nonmembers: int
    indicative: bool


def tpr_at_fpr(member_scores: ArrayLike, nonmember_scores: ArrayLike, fpr: float, level: float = 0.95) -> TPR:
    """The largest TPR at a threshold whose empirical FPR is at most `fpr`, never the first point above it.

    With a = ⌊fpr · n⌋ false positives allowed among n non-members, records strictly above the (a+1)-th largest
    non-member score are called members: ties at that score count for neither side.
    The interval is Clopper-Pearson over the members, for the threshold as chosen; what the choice of threshold adds
    is small where `indicative` is False.

    Args:
        member_scores: [M] scores, higher = more likely a member; infinite scores rank like any other.
        nonmember_scores: [n] scores.
        fpr: between 0 and 1, for example 0.01.
        level: confidence level of the two-sided interval.

    Raises InvalidAudit if fpr · n < 1, where no threshold can be known; DataError for an empty side or NaN;
    UsageError for an fpr or level outside (0, 1).

    >>> result = tpr_at_fpr([0.9, 0.8, 0.7, 0.2], [0.75, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0, 0.0, 0.0], fpr=0.1)
    >>> result.value, result.threshold, result.false_positives    # above .6: one non-member and three members
    (0.75, 0.6, 1)
    """
    if not 0 < fpr < 1:
        raise UsageError(f"fpr must lie strictly between 0 and 1, not {fpr}.")
    members, nonmembers = two_sides(member_scores, nonmember_scores)
    M, n = len(members), len(nonmembers)
    expected = fpr * n + ROUNDING
    if expected < 1:
        needed = math.ceil(1 / fpr - ROUNDING)
        raise InvalidAudit(
            f"TPR at {100 * fpr:g}% FPR needs at least {needed} non-members (one expected false positive): "
            f"there are {n}."
        )
    allowed = min(int(expected), n - 1)
    threshold = np.sort(nonmembers)[n - 1 - allowed]
    found = int(np.sum(members > threshold))
    low, high = clopper_pearson(found, M, level)
    return TPR(
        value=found / M,
        low=low,
        high=high,
        threshold=float(threshold),
        true_positives=found,
        false_positives=int(np.sum(nonmembers > threshold)),
        members=M,
        nonmembers=n,
        indicative=expected < 10,
    )


def clopper_pearson(successes: float, trials: int, level: float = 0.95) -> tuple[float, float]:
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
