"""An interval for the share of members above a threshold that is known only by the non-members above it.

The true threshold is the one that a share `fpr` of all non-members there could be exceeds. How many of the n at hand
exceed it is not known, but its distribution is, whatever the scores: K ~ Bin(n, fpr). If K = k, it lies between the
k-th and the (k+1)-th largest of them, and Clopper and Pearson's bounds, given the members above it, are quantiles of
Beta distributions. The interval's ends are the quantiles of these distributions mixed over k by the probability of k
(generalised fiducial inference: Hannig 2009). With countless non-members it is Clopper and Pearson's, with countless
members that of order statistics: both are exact.

Where subjects own several records, records count for as many as the design effect of a proportion says (Korn and
Graubard 1998).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import betainc, betaincinv, ndtri, stdtrit

from imprint.types import Floats

RANKS = 32
"""Ranges of K, each taken at its middle: the ends move by some thousandths of the width."""


def rate_bounds(
    members: Floats, nonmembers: Floats, fpr: float, tail: float, effects: tuple[float, float] = (1.0, 1.0)
) -> tuple[float, float]:
    """Both ends of the interval, from ascending scores.

    Above the true threshold lie the members above the k-th largest non-member, and none but those above the (k+1)-th.

    Args:
        members: [M] scores.
        nonmembers: [n] scores.
        tail: probability left beyond either end.
        effects: design effects of members and of non-members.
    """
    M, n = len(members), len(nonmembers)
    k, weights = threshold_ranks(n, fpr, tail, effects[1])
    edges = np.concatenate([[-np.inf], nonmembers, [np.inf]])
    above_kth = M - np.searchsorted(members, edges[n + 1 - k], "right")
    above_next = M - np.searchsorted(members, edges[n - k], "right")
    above_next[k == n] = M  # also members at −∞
    least, most, trials = above_kth.mean(axis=0) / effects[0], above_next.mean(axis=0) / effects[0], M / effects[0]
    low = _quantile(least, trials - least + 1, weights, tail)
    return low, 1 - _quantile((trials - most)[::-1], most[::-1] + 1, weights[::-1], tail)


def threshold_ranks(n: float, fpr: float, tail: float, effect: float = 1.0) -> tuple[NDArray[np.int64], Floats]:
    """How many of n non-members may lie above the true threshold, and with what probability.

    Returns [2, R] the first and the last of every range of such numbers, at most `RANKS` of them, and [R] their
    probabilities. The outermost also stand for what lies beyond: less than a fiftieth of the tail.

    Args:
        effect: other than 1, n are worth n/effect independent ones.

    >>> k, weights = threshold_ranks(3, 0.5, 0.025)
    >>> k.tolist(), weights.round(3).tolist()
    ([[0, 1, 2, 3], [0, 1, 2, 3]], [0.125, 0.375, 0.375, 0.125])
    """
    z = -ndtri(tail / 100)
    spread, skew = z * math.sqrt(n * fpr * (1 - fpr) * effect), z * z * effect * (1 - 2 * fpr) / 3
    least = max(0, math.floor(n * fpr - spread + min(skew, 0)))
    most = min(math.floor(n), math.ceil(n * fpr + spread + max(skew, 0)))
    last = np.unique(np.linspace(least, most, min(RANKS, most - least + 1)).astype(np.int64))
    first = np.concatenate([[least], last[:-1] + 1])
    below = betainc(np.maximum(n - last, 1e-9) / effect, last / effect + 1, 1 - fpr)
    below[-1] = 1.0
    return np.stack([first, last]), np.diff(below, prepend=0.0)


def _quantile(a: Floats, b: Floats, weights: Floats, share: float) -> float:
    """The quantile of Beta(a, b) mixed by the weights, where a rises and b falls; Beta(0, b) is a mass at 0."""
    if weights[a <= 0].sum() >= share:
        return 0.0
    a = np.maximum(a, 1e-12)
    ends = betaincinv(a[[0, -1]], b[[0, -1]], share)
    if a[0] == a[-1]:
        return float(ends[0])
    goal, least = float(ndtri(share)), 1e-15

    def miss(t: float) -> float:  # all but linear in t
        return float(ndtri(min(max(float(weights @ betainc(a, b, t)), least), 1 - least))) - goal

    return float(brentq(miss, max(0.0, ends[0] - 1e-9), min(1.0, ends[1] + 1e-9), xtol=1e-8))


def inflation(hits: NDArray[np.bool_], subjects: NDArray[np.int64], level: float = 0.95) -> float:
    """The design effect of a share: by how much subjects that agree inflate its variance, at least 1.

    The variance is that of the sums per subject; for few subjects it is inflated as Student's t exceeds the normal
    quantile (Korn and Graubard 1998), subjects of unlike sizes taken as so many of one size. A share of 0 or 1, and a
    single subject, show no variance: there it is `worst`.

    Args:
        hits: [N] which records count.
        subjects: [N] small whole numbers, one for each subject.

    >>> inflation(np.array([True, False, True, False]), np.arange(4))
    1.0
    >>> inflation(np.ones(8, bool), np.repeat([0, 1, 2, 3], 2))
    2.0
    """
    sizes = np.bincount(subjects)
    N, share, I = len(hits), float(np.mean(hits)), int(np.count_nonzero(sizes))
    if I == N:
        return 1.0
    most = worst(subjects)
    if I < 2 or not 0 < share < 1:
        return most
    sums = np.bincount(subjects, hits - share)
    effect = max(1.0, I / (I - 1) * float(sums @ sums) / (share * (1 - share) * N * N / (N - 1)))
    student, normal = stdtrit([max(1, N / most - 1), N - 1], (1 - level) / 2)
    return min(effect * float(student / normal) ** 2, max(effect, most))


def worst(subjects: NDArray[np.int64]) -> float:
    """The design effect where all records of a subject agree, Σk²/Σk of k records each: subjects count. Kish 1965."""
    sizes = np.bincount(subjects)
    return float(sizes @ sizes) / len(subjects)
