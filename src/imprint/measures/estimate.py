"""Statistics that records move: sums, differences and averages of them with the error that sampling records leaves.

An AUC and a log perplexity are, to first order, sums over records (DeLong et al. 1988; Cochran 1977): each record has
an influence. What is linear in such statistics (a difference of two methods, a mean over seeds, an interpolation
between two checkpoints) has the same sum of influences, so records that two statistics share are compared pairwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.special import expit, logit, stdtr, stdtrit

from imprint.errors import DataError
from imprint.measures.auc import Codes, codes, components
from imprint.measures.perplexity import sums
from imprint.measures.tpr import checked_level, clopper_pearson, two_sides
from imprint.types import Floats, Interval, TokenStats


@dataclass(frozen=True)
class Stratum:
    """The records of one side: [n] influences, and the clusters of dependent ones; clusters never span two strata."""

    influence: Floats
    clusters: Codes

    @property
    def variance(self) -> float:
        """Of the sum of the influences; NaN with fewer than two clusters."""
        sums_I = np.bincount(self.clusters, self.influence)
        count = len(np.unique(self.clusters))
        return float(count / (count - 1) * sums_I @ sums_I) if count > 1 else math.nan


@dataclass(frozen=True)
class Estimate:
    """A number, and how each record of each stratum moves it.

    Two estimates may be added, subtracted and multiplied by numbers; strata of the same name are the same records.
    """

    value: float
    strata: dict[str, Stratum] = field(default_factory=dict)

    @property
    def variance(self) -> float:
        """Sampling variance over records; strata are drawn independently of one another."""
        return math.fsum(stratum.variance for stratum in self.strata.values())

    def __mul__(self, factor: float) -> Estimate:
        strata = {name: Stratum(factor * s.influence, s.clusters) for name, s in self.strata.items()}
        return Estimate(factor * self.value, strata)

    __rmul__ = __mul__

    def __add__(self, other: Estimate) -> Estimate:
        strata = dict(self.strata)
        for name, theirs in other.strata.items():
            mine = strata.get(name)
            if mine is not None and len(mine.influence) != len(theirs.influence):
                raise DataError(
                    f"{name}: the same records are meant, but their numbers are {len(mine.influence)} and "
                    f"{len(theirs.influence)}."
                )
            strata[name] = Stratum(mine.influence + theirs.influence, mine.clusters) if mine else theirs
        return Estimate(self.value + other.value, strata)

    def __sub__(self, other: Estimate) -> Estimate:
        return self + -1.0 * other


def mean(estimates: Sequence[Estimate]) -> Estimate:
    """The average of at least one."""
    total = estimates[0]
    for one in estimates[1:]:
        total = total + one
    return total * (1 / len(estimates))


def auc_estimate(
    members: Floats,
    nonmembers: Floats,
    member_groups: Iterable[object] | None = None,
    nonmember_groups: Iterable[object] | None = None,
    names: tuple[str, str] = ("members", "nonmembers"),
) -> Estimate:
    """`auc` with its influences: DeLong's structural components less their mean, over the number of records.

    Args:
        members: [M] scores, higher = more likely a member.
        nonmembers: [N] scores.
        member_groups: [M] labels of clusters (default: every record is its own).
        nonmember_groups: [N] labels.
        names: of the two strata: estimates on the same records must give the same.

    >>> estimate = auc_estimate(np.array([3.0, 4, 5, 2]), np.array([1.0, 2, 3, 0]))
    >>> estimate.value, round(estimate.variance, 4)
    (0.875, 0.0156)
    """
    x, y = two_sides(members, nonmembers)
    sides = zip(names, components(x, y), (member_groups, nonmember_groups), strict=True)
    strata = {name: Stratum((v - v.mean()) / len(v), _clusters(v, groups)) for name, v, groups in sides}
    return Estimate(float(components(x, y)[0].mean()), strata)


def log_perplexity_estimate(
    stats: TokenStats, groups: Iterable[object] | None = None, name: str = "validation"
) -> Estimate:
    """Log of `perplexity`, nats per token, with its influences: (nll_i − H·T_i) / Σ T."""
    nll_N, T_N = sums(stats)
    H = float(nll_N.sum() / T_N.sum())
    influence = (nll_N - H * T_N) / T_N.sum()
    return Estimate(H, {name: Stratum(influence, _clusters(influence, groups))})


def _clusters(values: Floats, groups: Iterable[object] | None) -> Codes:
    labels = list(range(len(values)) if groups is None else groups)
    if len(labels) != len(values):
        raise DataError(f"every record needs a group: {len(values)} records, {len(labels)} groups.")
    return codes(labels)


@dataclass(frozen=True)
class Effect(Interval):
    """A number averaged over training seeds, with an interval for other records *and* other seeds.

    Attributes:
        p: two-sided p-value of its being zero.
        error: standard error from sampling records.
        spread: standard deviation between training seeds; NaN with one seed, whose interval covers records alone.
        seeds: how many.
    """

    p: float
    error: float
    spread: float
    seeds: int


def over_seeds(estimates: Sequence[Estimate], level: float = 0.95) -> Effect:
    """The mean over seeds; its variance is that of sampling records plus that of drawing seeds.

    V = V_records + s²/S, with V_records of the averaged influences, and s² the variance between seeds on the same
    records. Where seeds drew their records themselves s² holds sampling error already, which is subtracted.
    Student's t with Satterthwaite's degrees of freedom: only the seeds' part is estimated from few.

    Raises:
        DataError: no estimate.
    """
    value, variance, spread, freedom = _moments(estimates)
    tail = (1 - checked_level(level)) / 2
    averaged = mean(estimates)
    sampling = math.sqrt(averaged.variance) if averaged.variance >= 0 else math.nan
    if variance == 0:
        half, p = (0.0, 1.0) if value == 0 else _hoeffding(value, averaged, level)
    else:
        error = math.sqrt(variance)
        half, p = float(-stdtrit(freedom, tail)) * error, float(2 * stdtr(freedom, -abs(value) / error))
    return Effect(value, value - half, value + half, p, sampling, spread, len(estimates))


def auc_over_seeds(estimates: Sequence[Estimate], level: float = 0.95) -> Effect:
    """Like `over_seeds` for an AUC: the interval on the logit scale, `p` of its being .5."""
    value, variance, spread, freedom = _moments(estimates)
    averaged = mean(estimates)
    tail = (1 - checked_level(level)) / 2
    error = math.sqrt(averaged.variance) if averaged.variance >= 0 else math.nan
    if not variance > 0 or value in (0.0, 1.0):
        k = _pairs(averaged)
        low, high = clopper_pearson(value * k, k, level)
        return Effect(value, low, high, 1.0 if value == 0.5 else math.nan, error, spread, len(estimates))
    scale = math.sqrt(variance) / (value * (1 - value))
    half = float(-stdtrit(freedom, tail)) * scale
    p = float(2 * stdtr(freedom, -abs(float(logit(value))) / scale))
    low, high = float(expit(logit(value) - half)), float(expit(logit(value) + half))
    return Effect(value, low, high, p, error, spread, len(estimates))


def _moments(estimates: Sequence[Estimate]) -> tuple[float, float, float, float]:
    """Mean, its variance, standard deviation between seeds, degrees of freedom."""
    if not estimates:
        raise DataError("an average over seeds needs at least one run.")
    S, averaged = len(estimates), mean(estimates)
    if S == 1:
        return averaged.value, averaged.variance, math.nan, math.inf
    between = float(np.var([one.value for one in estimates], ddof=1))
    if any(one.strata.keys() != estimates[0].strata.keys() for one in estimates):
        between = max(0.0, between - float(np.mean([one.variance for one in estimates])))
    variance = averaged.variance + between / S
    freedom = variance**2 / ((between / S) ** 2 / (S - 1)) if between > 0 else math.inf
    return averaged.value, variance, math.sqrt(between), freedom


def _pairs(estimate: Estimate) -> int:
    """Clusters of the smallest stratum."""
    return min(len(np.unique(stratum.clusters)) for stratum in estimate.strata.values())


def _hoeffding(value: float, estimate: Estimate, level: float) -> tuple[float, float]:
    """Where nothing varies (two rankings that are both perfect, in opposite directions): Hoeffding's bound."""
    k = _pairs(estimate)
    return math.sqrt(2 * math.log(2 / (1 - level)) / k), min(1.0, 2 * math.exp(-k * value**2 / 2))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p-values: a family of tests holds its level if each is compared with it.

    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    adjusted, highest = [1.0] * len(p_values), 0.0
    for rank, n in enumerate(sorted(range(len(p_values)), key=lambda n: p_values[n])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[n]))
        adjusted[n] = highest
    return adjusted
