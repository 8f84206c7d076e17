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
from scipy.optimize import brentq
from scipy.special import expit, logit, ndtr, ndtri, stdtr, stdtrit

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
    v_M, v_N = components(*two_sides(members, nonmembers))
    sides = zip(names, (v_M, v_N), (member_groups, nonmember_groups), strict=True)
    strata = {name: Stratum((v - v.mean()) / len(v), _clusters(v, groups)) for name, v, groups in sides}
    return Estimate(float(v_M.mean()), strata)


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


@dataclass(frozen=True)
class _Spread:
    """Standard errors of a mean over seeds: of drawing records, which is known, and of drawing seeds, from few."""

    sampling: float
    between: float
    freedom: int

    def half_width(self, tail: float) -> float:
        """√(z²·V_records + t²·s²/S), z and t the normal's and Student's quantiles that leave `tail` above them."""
        drawn = float(-stdtrit(self.freedom, tail)) * self.between if self.between > 0 else 0.0
        return math.hypot(float(-ndtri(tail)) * self.sampling, drawn)

    def p(self, value: float) -> float:
        """Twice the tail at which the half-width is |value|: each part by itself would leave less."""
        if not self.sampling >= 0:
            return math.nan
        size = abs(value)
        alone = float(ndtr(-size / self.sampling)) if self.sampling > 0 else 0.0
        if self.between > 0:
            alone = max(alone, float(stdtr(self.freedom, -size / self.between)))
        if not 0 < alone < 0.5:
            return 2 * alone

        def beyond(log_tail: float) -> float:
            return self.half_width(math.exp(log_tail)) - size

        least = math.log(alone)
        tail = brentq(beyond, least, math.log(0.5)) if beyond(least) > 0 else least  # else one part is all there is
        return 2 * math.exp(tail)


def over_seeds(estimates: Sequence[Estimate], level: float = 0.95) -> Effect:
    """The mean over seeds, with an interval for drawing other records and other seeds.

    The half-width is √(z²·V_records + t²·s²/S), with V_records of the averaged influences, s² the variance between
    the S seeds on the same records, and t of Student's distribution with S − 1 degrees of freedom; p is where the
    interval ends at 0. It holds its level at any ratio of the two parts, however few the seeds (Banerjee 1960: the
    distribution function of χ² with one degree of freedom is concave). Where seeds drew their records themselves s²
    holds sampling error already: `spread` is without it, the interval counts it twice.

    Raises:
        DataError: no estimate.
    """
    averaged, errors, spread = _moments(estimates)
    tail, value = (1 - checked_level(level)) / 2, averaged.value
    if errors.sampling == errors.between == 0:
        half, p = (0.0, 1.0) if value == 0 else _hoeffding(value, averaged, level)
    else:
        half, p = errors.half_width(tail), errors.p(value)
    return Effect(value, value - half, value + half, p, errors.sampling, spread, len(estimates))


def auc_over_seeds(estimates: Sequence[Estimate], level: float = 0.95) -> Effect:
    """Like `over_seeds` for an AUC: the interval on the logit scale, `p` of its being .5."""
    averaged, errors, spread = _moments(estimates)
    tail, value = (1 - checked_level(level)) / 2, averaged.value
    if not errors.sampling + errors.between > 0 or value in (0.0, 1.0):
        k = _pairs(averaged)
        low, high = clopper_pearson(value * k, k, level)
        return Effect(value, low, high, 1.0 if value == 0.5 else math.nan, errors.sampling, spread, len(estimates))
    slope, centre = 1 / (value * (1 - value)), float(logit(value))
    scaled = _Spread(slope * errors.sampling, slope * errors.between, errors.freedom)
    half = scaled.half_width(tail)
    low, high = float(expit(centre - half)), float(expit(centre + half))
    return Effect(value, low, high, scaled.p(centre), errors.sampling, spread, len(estimates))


def _moments(estimates: Sequence[Estimate]) -> tuple[Estimate, _Spread, float]:
    """Mean, its standard errors, standard deviation between seeds."""
    if not estimates:
        raise DataError("an average over seeds needs at least one run.")
    S, averaged = len(estimates), mean(estimates)
    sampling = math.sqrt(averaged.variance) if averaged.variance >= 0 else math.nan
    if S == 1:
        return averaged, _Spread(sampling, 0.0, 0), math.nan
    between = total = float(np.var([one.value for one in estimates], ddof=1))
    if any(one.strata.keys() != estimates[0].strata.keys() for one in estimates):
        between = max(0.0, between - float(np.mean([one.variance for one in estimates])))
    return averaged, _Spread(sampling, math.sqrt(total / S), S - 1), math.sqrt(between)


def _pairs(estimate: Estimate) -> int:
    """Clusters of the smallest stratum."""
    return min(len(np.unique(stratum.clusters)) for stratum in estimate.strata.values())


def _hoeffding(value: float, estimate: Estimate, level: float) -> tuple[float, float]:
    """Where nothing varies (two rankings that are both perfect, in opposite directions): Hoeffding's bound."""
    k = _pairs(estimate)
    return math.sqrt(2 * math.log(2 / (1 - level)) / k), min(1.0, 2 * math.exp(-k * value**2 / 2))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p-values: a family of tests holds its level if each is compared with it.

    A NaN is a test that could not be made: it stays NaN and is not counted.

    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03, math.nan])]
    [0.03, 0.06, 0.06, nan]
    """
    made = sorted((n for n, p in enumerate(p_values) if not math.isnan(p)), key=lambda n: p_values[n])
    adjusted, highest = [math.nan] * len(p_values), 0.0
    for rank, n in enumerate(made):
        highest = max(highest, min(1.0, (len(made) - rank) * p_values[n]))
        adjusted[n] = highest
    return adjusted
