"""Perplexity of a set of texts, with an interval over texts: tokens of one text are not independent."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from scipy.special import stdtrit

from imprint.errors import DataError
from imprint.measures.auc import codes
from imprint.measures.tpr import checked_level
from imprint.types import Floats, Interval, TokenStats


def perplexity(stats: TokenStats, level: float = 0.95, groups: Iterable[object] | None = None) -> Interval:
    """exp(Σ nll / Σ tokens), token-weighted, with an interval for another draw of *texts* of this kind.

    H = Σ nll_i / Σ T_i is a ratio of two sums over texts; its variance is linearised (Cochran 1977, §6.4) as
    G/(G−1) · Σ (nll_i − H·T_i)² / (Σ T_i)², over G texts, or over groups of dependent texts with the residuals
    summed in each. The interval is exp(H ± t·se) with Student's t at G − 1 degrees of freedom.
    **One text (or one group) says nothing about the next: `low` and `high` are NaN.** Texts with the same mean
    throughout, such as those of a uniform model, give zero width. A value beyond the floats is inf.

    Args:
        stats: the scored texts; nll in nats.
        level: confidence level of the two-sided interval.
        groups: [N] labels of clusters; None or NaN among them marks a text on its own.

    Raises DataError for no texts, a text without a scored token, non-finite log-probabilities (with their number),
    or groups that do not fit; UsageError for a level outside (0, 1).

    >>> from imprint.attacks.worked import TARGET
    >>> f"{perplexity(TARGET).value:.4f}"    # exp((1 + 2 + 6 + 4) / 4)
    '25.7903'
    """
    tail = (1 - checked_level(level)) / 2
    nll_N, T_N = sums(stats)
    labels = list(range(len(stats)) if groups is None else groups)
    if len(labels) != len(stats):
        raise DataError(f"every text needs a group: {len(stats)} texts, {len(labels)} groups.")
    H = float(nll_N.sum() / T_N.sum())
    residual_G = np.bincount(codes(labels), nll_N - H * T_N)
    G = len(residual_G)
    if G < 2:
        return Interval(_exp(H), math.nan, math.nan)
    error = math.sqrt(G / (G - 1) * float(residual_G @ residual_G)) / float(T_N.sum())
    half = float(-stdtrit(G - 1, tail)) * error
    return Interval(_exp(H), _exp(H - half), _exp(H + half))


def sums(stats: TokenStats) -> tuple[Floats, Floats]:
    """[N] summed nll in nats and [N] number of scored tokens of each text."""
    if not len(stats):
        raise DataError("perplexity needs at least one text; there is none.")
    empty = int(np.sum(stats.lengths < 1))
    if empty:
        raise DataError(f"{empty} of {len(stats)} texts have no scored token: leave them out before scoring.")
    bad = int(np.sum(~np.isfinite(stats.logp)))
    if bad:
        raise DataError(f"{bad} of {len(stats.logp)} token log-probabilities are not finite: has the run diverged?")
    return stats.nll * stats.lengths, stats.lengths.astype(np.float64)


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf
