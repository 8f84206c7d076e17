"""Area under the ROC curve with the interval it deserves, and the paired test of two attacks or methods.

One formula serves all cases: the structural components of DeLong, DeLong and Clarke-Pearson (1988), summed per
cluster as in Obuchowski (1997). Without groups every record is its own cluster, which is DeLong exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, logit, ndtr, ndtri

from imprint.errors import DataError
from imprint.measures.tpr import checked_level, clopper_pearson, two_sides
from imprint.types import Floats, Interval

ZERO = 1e-26
"""Variances up to this are rounding. One half-tie among m·n pairs makes about ¼/(m·n)²: more, up to m·n = 5e12."""

Codes = NDArray[np.int64]


@dataclass(frozen=True)
class PairedAUC(Interval):
    """The difference of two AUCs on the same records.

    Attributes:
        value: AUC_a − AUC_b, with `low` and `high`.
        p: two-sided p-value of no difference.
        a: the first AUC with its own interval.
        b: the second.
    """

    p: float
    a: Interval
    b: Interval


def auc(
    member_scores: ArrayLike,
    nonmember_scores: ArrayLike,
    level: float = 0.95,
    member_groups: Iterable[object] | None = None,
    nonmember_groups: Iterable[object] | None = None,
) -> Interval:
    """P(a member scores above a non-member), ties counted ½, with DeLong's interval on the logit scale.

    O(n log n). Where all pairs are concordant, and wherever else the variance is estimated as zero or cannot be (a
    single record or group on one side), the interval is Clopper-Pearson's for k independent pairs, k the smaller
    number of records (groups) of the two sides: m·n concordant pairs hold at least k disjoint ones, so for AUC = 1
    the lower bound ((1 − level)/2)^(1/k) is conservative. It is never [1, 1].

    Args:
        member_scores: [M] scores, higher = more likely a member; infinite scores rank like any other.
        nonmember_scores: [N] scores.
        level: confidence level of the two-sided interval.
        member_groups: [M] labels of clusters (subject, document) within which records are dependent; None or NaN
            among them marks a record on its own. A label on both sides is one cluster.
        nonmember_groups: [N] labels; given if and only if `member_groups` is.

    Raises DataError for an empty side, NaN scores (with their number) or groups that do not fit; UsageError for a
    level outside (0, 1).

    >>> f"{auc([3, 4, 5, 2], [1, 2, 3, 0]):.4f}"    # 13 pairs right, 1 wrong, 2 ties: 14 / 16
    '0.8750 [0.4270, 0.9850]'
    """
    x, y = two_sides(member_scores, nonmember_scores)
    clusters = _both_codes(len(x), len(y), member_groups, nonmember_groups)
    return _interval(*components(x, y), clusters, level)


def paired_auc(
    members_a: ArrayLike,
    nonmembers_a: ArrayLike,
    members_b: ArrayLike,
    nonmembers_b: ArrayLike,
    level: float = 0.95,
    member_groups: Iterable[object] | None = None,
    nonmember_groups: Iterable[object] | None = None,
) -> PairedAUC:
    """AUC_a − AUC_b on the same records in the same order: paired DeLong, clustered where groups are given.

    The variance of a difference is the variance of the differences of the structural components, so the
    correlation between a and b is used. Two rankings that agree in every component differ by exactly 0: the
    interval is [0, 0] and p = 1. Where the variance is otherwise zero or cannot be estimated, interval and p come
    from Hoeffding's (1963) inequality for k = min(M, N) independent pairs: half-width √(2 ln(2/(1−level))/k).

    Args and errors as in `auc`; DataError also where a and b differ in length.

    >>> difference = paired_auc([2, 3, 4], [0, 1, 2], [2, 1, 4], [0, 3, 2])    # 8.5/9 and 5.5/9
    >>> f"{difference:.2f}", round(difference.p, 2)
    ('0.33 [-0.20, 0.87]', 0.22)
    """
    (x_a, y_a), (x_b, y_b) = two_sides(members_a, nonmembers_a), two_sides(members_b, nonmembers_b)
    if (len(x_a), len(y_a)) != (len(x_b), len(y_b)):
        raise DataError(
            f"a paired comparison needs the same records twice: a has {len(x_a)} members and {len(y_a)} non-members, "
            f"b has {len(x_b)} and {len(y_b)}."
        )
    clusters = _both_codes(len(x_a), len(y_a), member_groups, nonmember_groups)
    (a_M, a_N), (b_M, b_N) = components(x_a, y_a), components(x_b, y_b)
    a, b = _interval(a_M, a_N, clusters, level), _interval(b_M, b_N, clusters, level)
    value, half, p = _difference(a_M - b_M, a_N - b_N, clusters, level)
    return PairedAUC(value, max(-1.0, value - half), min(1.0, value + half), p, a, b)


def codes(labels: Iterable[object]) -> Codes:
    """Integer codes 0, 1, … of labels by first appearance; every None or NaN is a code of its own.

    >>> codes(["s1", None, "s2", "s1", None]).tolist()
    [0, 1, 2, 0, 3]
    """
    seen: dict[object, int] = {}
    keys = (object() if label is None or label != label else label for label in labels)
    return np.array([seen.setdefault(key, len(seen)) for key in keys], np.int64)


def _both_codes(
    M: int, N: int, member_groups: Iterable[object] | None, nonmember_groups: Iterable[object] | None
) -> tuple[Codes, Codes]:
    """Cluster codes of members and of non-members, from one numbering."""
    if member_groups is None and nonmember_groups is None:
        return np.arange(M), np.arange(M, M + N)
    if member_groups is None or nonmember_groups is None:
        raise DataError("groups are given for one side only: give both, with None for a record on its own.")
    of_members, of_nonmembers = list(member_groups), list(nonmember_groups)
    if (len(of_members), len(of_nonmembers)) != (M, N):
        raise DataError(
            f"every score needs a group: {M} and {N} scores, {len(of_members)} and {len(of_nonmembers)} groups."
        )
    both = codes(of_members + of_nonmembers)
    return both[:M], both[M:]


def components(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """DeLong's structural components: [M] the share of non-members each member beats, [N] of members that beat each."""
    return _beaten(x, y) / len(y), 1 - _beaten(y, x) / len(x)


def _beaten(scores: Floats, others: Floats) -> Floats:
    """How many of `others` lie below each score, ties ½: its mid-rank among them."""
    ranked = np.sort(others)
    return (np.searchsorted(ranked, scores, "left") + np.searchsorted(ranked, scores, "right")) / 2


def _variance(v_M: Floats, v_N: Floats, clusters: tuple[Codes, Codes]) -> float:
    """Variance of mean(v_M) = mean(v_N) by Obuchowski's sums per cluster; NaN with a single cluster on a side."""
    I_M, I_N, I = _cluster_counts(clusters)
    if min(I_M, I_N) < 2:
        return math.nan
    size = 1 + max(int(c.max()) for c in clusters)
    s_M = np.bincount(clusters[0], v_M - v_M.mean(), minlength=size) / len(v_M)
    s_N = np.bincount(clusters[1], v_N - v_N.mean(), minlength=size) / len(v_N)
    # The last term is zero unless a cluster has records on both sides.
    return float(I_M / (I_M - 1) * s_M @ s_M + I_N / (I_N - 1) * s_N @ s_N + 2 * I / (I - 1) * s_M @ s_N)


def _cluster_counts(clusters: tuple[Codes, Codes]) -> tuple[int, int, int]:
    """Clusters with members, clusters with non-members, clusters in all."""
    return len(np.unique(clusters[0])), len(np.unique(clusters[1])), len(np.unique(np.concatenate(clusters)))


def _independent_pairs(clusters: tuple[Codes, Codes]) -> int:
    """How many (member, non-member) pairs can be formed with no cluster used twice."""
    I_M, I_N, I = _cluster_counts(clusters)
    return max(1, min(I_M, I_N, I // 2))


def _interval(v_M: Floats, v_N: Floats, clusters: tuple[Codes, Codes], level: float) -> Interval:
    tail = (1 - checked_level(level)) / 2
    value, variance = float(v_M.mean()), _variance(v_M, v_N, clusters)
    if not variance > ZERO:  # also NaN
        k = _independent_pairs(clusters)
        return Interval(value, *clopper_pearson(value * k, k, level))
    half = -ndtri(tail) * math.sqrt(variance) / (value * (1 - value))
    return Interval(value, float(expit(logit(value) - half)), float(expit(logit(value) + half)))


def _difference(d_M: Floats, d_N: Floats, clusters: tuple[Codes, Codes], level: float) -> tuple[float, float, float]:
    """Mean of the component differences, half-width of its interval, two-sided p."""
    if not d_M.any() and not d_N.any():
        return 0.0, 0.0, 1.0
    value, variance = float(d_M.mean()), _variance(d_M, d_N, clusters)
    if not variance > ZERO:  # also NaN
        k = _independent_pairs(clusters)
        return value, math.sqrt(2 * math.log(2 / (1 - level)) / k), min(1.0, 2 * math.exp(-k * value**2 / 2))
    error = math.sqrt(variance)
    return value, float(-ndtri((1 - level) / 2) * error), float(2 * ndtr(-abs(value) / error))
