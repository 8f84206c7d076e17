"""How much each record is remembered, by models tuned with and without it, and how near an attack's ranking comes.

An audit says how much a model gives away; shadow models say what it gives away of whom: the counterfactual memorization
of a record (Zhang et al. 2021) is what having been tuned on does for it. It is the truth that cheap attacks, which see
one model, approximate; it has an error of its own, which says how well an attack could agree with it at best.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

from imprint.errors import DataError, InvalidAudit
from imprint.measures.auc import codes
from imprint.measures.bootstrap import DRAWS, draw
from imprint.measures.tpr import checked_level, clopper_pearson
from imprint.types import Floats, Interval, Shadows

TOP = 0.1
"""The share of the records that counts as the most remembered."""
FEWEST = 20
"""Records, and groups, that an agreement needs: two among the top tenth."""
SPLITS = 20
"""Random divisions of the shadow models in two, over which the reliability is averaged."""
_CHUNK = 100


@dataclass(frozen=True)
class Memorization:
    """Counterfactual memorization, in nats per token; NaN for a record without two models of either kind.

    Attributes:
        values: [N] mean log-likelihood of the models that hold the record minus that of those that do not; higher =
            more remembered.
        errors: [N] standard errors.
        low, high: [N] confidence interval of each record by itself.
        reliability: rank correlation to be expected with the values of as many other shadow models, 0 to 1; NaN where
            it cannot be told. A ranking that knew the truth would correlate with the values by about its root.
    """

    values: Floats
    errors: Floats
    low: Floats
    high: Floats
    reliability: float

    def __len__(self) -> int:
        return len(self.values)

    @property
    def ceiling(self) -> float:
        """The rank correlation with `values` that the truth itself would have (Spearman 1904)."""
        return float(np.sqrt(self.reliability))


@dataclass(frozen=True)
class Agreement:
    """How an attack's ranking of records agrees with their memorization.

    Attributes:
        spearman: rank correlation.
        precision: share of the most remembered tenth that lies in the highest tenth of scores.
        chance: the precision of a random ranking.
        records: that were ranked.
    """

    spearman: Interval
    precision: Interval
    chance: float
    records: int


def counterfactual(shadows: Shadows, level: float = 0.95, seed: int = 0) -> Memorization:
    """What it does for a record's likelihood to be tuned on: mean of −loss inside minus outside (Zhang et al. 2021).

    The intervals are Welch's, for two variances that differ; models are the sample, the record is given.

    Args:
        shadows: of N records and S models.
        level: of the intervals.
        seed: draws the divisions behind `reliability`.

    >>> found = counterfactual(Shadows(np.array([[1.0, 2, 3, 4]]), np.array([[True, True, False, False]])))
    >>> value, error = found.values[0], found.errors[0]         # 3.5 - 1.5; √(½/2 + ½/2), 2 degrees of freedom
    >>> float(value), round(float(error), 4), round(float(found.low[0]), 4)                # 2 - 4.3027·.7071
    (2.0, 0.7071, -1.0424)
    """
    tail = (1 - checked_level(level)) / 2
    (mean_in, v_in, n_in), (mean_out, v_out, n_out) = (_moments(shadows, side) for side in (True, False))
    values, variance = mean_in - mean_out, v_in + v_out
    with np.errstate(invalid="ignore"):  # 0/0 where no model differs from another: no error, whatever the freedom
        freedom = variance**2 / (v_in**2 / (n_in - 1) + v_out**2 / (n_out - 1))
    errors = np.sqrt(variance)
    half = np.where(variance == 0, 0.0, -stdtrit(freedom, tail) * errors)
    return Memorization(values, errors, values - half, values + half, _reliability(shadows, seed))


def agreement(
    scores: ArrayLike,
    truth: ArrayLike,
    groups: Iterable[object] | None = None,
    level: float = 0.95,
    count: int = DRAWS,
    seed: int = 0,
) -> Agreement:
    """How well scores rank records by their memorization, with bootstrap intervals over whole groups.

    Records that tie at the edge of a tenth belong to it in part, as if the tie were broken at random.
    The interval of the precision contains Clopper and Pearson's for as many independent records as there are groups
    among the top tenth: a bootstrap of nothing but hits would leave no room for chance.

    Args:
        scores: [N] of an attack, higher = more likely a member.
        truth: [N] `Memorization.values` of the same records.
        groups: [N] labels of records that are dependent; None among them marks a record on its own.
        count: draws.

    Raises:
        DataError: the numbers of records differ, or a value is NaN.
        InvalidAudit: fewer than `FEWEST` records or groups, or all scores (or all truths) are equal.

    >>> found = agreement(np.arange(40.0), np.arange(40.0) ** 3)
    >>> found.spearman.value, found.precision.value, found.chance
    (1.0, 1.0, 0.1)
    """
    checked_level(level)
    pair = _ranked(scores, truth)
    labels = range(len(pair[0])) if groups is None else list(groups)
    if len(labels) != len(pair[0]):
        raise DataError(f"every score needs a group: {len(pair[0])} scores, {len(labels)} groups.")
    independent = len(set(codes(labels).tolist()))
    if independent < FEWEST:
        raise InvalidAudit(
            f"the agreement with memorization needs {FEWEST} records or groups, and {len(labels)} records form "
            f"{independent}: score more of them."
        )
    drawn = draw(labels, (), count, seed)
    once = np.ones((1, len(labels)))
    values = [float(found[0]) for found in _agree(pair, once)]
    chunks = [_agree(pair, drawn.times[0][n : n + _CHUNK][:, drawn.subjects[0]]) for n in range(0, count, _CHUNK)]
    tail = (1 - level) / 2
    spearman, precision = (
        Interval(value, *(float(bound) for bound in np.nanquantile(np.concatenate(part), [tail, 1 - tail])))
        for value, part in zip(values, zip(*chunks, strict=True), strict=True)
    )
    k = round(TOP * independent)
    low, high = clopper_pearson(precision.value * k, k, level)
    widened = Interval(precision.value, min(low, precision.low), max(high, precision.high))
    return Agreement(spearman, widened, TOP, len(labels))


def _moments(shadows: Shadows, inside: bool) -> tuple[Floats, Floats, Floats]:
    """[N] mean of −loss, its squared standard error, and the number of models; NaN for fewer than two."""
    side = shadows.inside == inside
    n = side.sum(axis=1).astype(np.float64)
    n[n < 2] = np.nan
    mean = -np.sum(shadows.losses, axis=1, where=side) / n
    squares = np.sum((-shadows.losses - mean[:, None]) ** 2, axis=1, where=side)
    return mean, squares / (n - 1) / n, n


def _reliability(shadows: Shadows, seed: int) -> float:
    """Rank correlation of the values of one half of the models with those of the other, stepped up to all of them.

    Of records that have a model inside and one outside in both halves. Spearman 1910, Brown 1910: 2r/(1 + r).
    """
    from scipy.stats import spearmanr

    rng = np.random.Generator(np.random.PCG64(seed))
    S, found = shadows.losses.shape[1], []
    for _ in range(SPLITS):
        order = rng.permutation(S)
        one, other = (_difference(shadows, half) for half in (order[: S // 2], order[S // 2 :]))
        told = ~np.isnan(one + other)
        if told.sum() >= FEWEST and np.ptp(one[told]) > 0 and np.ptp(other[told]) > 0:
            found.append(float(spearmanr(one[told], other[told]).statistic))
    if not found:
        return float("nan")
    r = max(0.0, float(np.mean(found)))
    return 2 * r / (1 + r)


def _difference(shadows: Shadows, models: NDArray[np.intp]) -> Floats:
    """[N] mean of −loss inside minus outside over some of the models; NaN where one kind is not among them."""
    losses, inside = shadows.losses[:, models], shadows.inside[:, models]
    means = []
    for side in (inside, ~inside):
        n = side.sum(axis=1).astype(np.float64)
        n[n == 0] = np.nan
        means.append(-np.sum(losses, axis=1, where=side) / n)
    difference: Floats = means[0] - means[1]
    return difference


def _ranked(scores: ArrayLike, truth: ArrayLike) -> tuple[Floats, Floats]:
    pair = np.asarray(scores, np.float64), np.asarray(truth, np.float64)
    if pair[0].ndim != 1 or pair[0].shape != pair[1].shape:
        raise DataError(f"scores and truth must be of the same records: {pair[0].shape} and {pair[1].shape}.")
    for name, values in zip(("scores", "values of memorization"), pair, strict=True):
        if missing := int(np.isnan(values).sum()):
            raise DataError(f"{missing} of {len(values)} {name} are NaN: leave these records out and say so.")
        if len(values) and (values == values[0]).all():
            raise InvalidAudit(f"all {len(values)} {name} are {values[0]:g}: there is no order to agree with.")
    return pair


def _agree(pair: tuple[Floats, Floats], times: NDArray[Any]) -> tuple[Floats, Floats]:
    """[B] rank correlation and [B] precision, where record n stands there times[b, n] times."""
    (rank_a, top_a), (rank_b, top_b) = (_ranks(values, times) for values in pair)
    total = times.sum(axis=1, keepdims=True)
    a, b = rank_a - (total + 1) / 2, rank_b - (total + 1) / 2  # the mean rank
    with np.errstate(invalid="ignore"):  # a draw of one value alone has no correlation
        spearman = (times * a * b).sum(1) / np.sqrt((times * a**2).sum(1) * (times * b**2).sum(1))
    return spearman, (times * top_a * top_b).sum(1) / (TOP * total[:, 0])


def _ranks(values: Floats, times: NDArray[Any]) -> tuple[Floats, Floats]:
    """[B, N] mid-ranks, the lowest 1, and [B, N] which part of a record belongs to the highest tenth."""
    _, tie = np.unique(values, return_inverse=True)
    order = np.argsort(tie, kind="stable")
    starts = np.flatnonzero(np.diff(tie[order], prepend=-1))
    size = np.add.reduceat(times[:, order].astype(np.float64), starts, axis=1)
    through = np.cumsum(size, axis=1)
    total = through[:, -1:]
    part = np.divide(TOP * total - (total - through), size, out=np.zeros_like(size), where=size > 0)
    return (through - (size - 1) / 2)[:, tie], np.clip(part, 0, 1)[:, tie]
