"""The shape of a text's log p sequence: features that a fitted attack weighs, not scores of their own.

After CAMIA (Chang et al. 2025): how log p changes along the text, how much of it is sure, how regular it is. Which way
each points is learned from records whose membership is known, so no feature is oriented here. Every function takes
the target's `TokenStats` and returns [N]; a text with a NaN among its log p gets NaN. They work on all texts at once:
a checkpoint of 1,000 texts of 100 tokens takes some hundredths of a second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from numpy.typing import NDArray

from imprint.errors import UsageError
from imprint.types import Floats, TokenStats

FIRST = 200
"""Tokens at the start of a text that the two measures of regularity look at, as in the authors' code: approximate
entropy costs the square of the length, and counts in a byte."""
BLOCK = 1 << 16
"""Log p, padding included, that are looked at together: what fits a processor's cache."""


def slope(target: TokenStats) -> Floats:
    """[N] slope of log p over the position in the text, by least squares, nats per token; 0 for a text of one token.

    >>> from imprint.attacks.worked import TARGET
    >>> slope(TARGET).tolist()         # -1, -2, -6: (-1·-1 + 0·-2 + 1·-6) / (1 + 0 + 1); one token
    [-2.5, 0.0]
    """
    T_R = np.repeat(target.lengths, target.lengths)
    from_middle_R = _position(target) - (T_R - 1) / 2
    products: Floats = np.add.reduceat(from_middle_R * _finite(target), target.offsets[:-1])
    T = target.lengths.astype(np.float64)
    squares = T * (T * T - 1) / 12  # Σ (t - mean t)²
    return np.divide(products, squares, out=products + 0.0, where=squares > 0)  # + 0: no -0 for one token


def share_above(target: TokenStats, threshold: float = -1.0) -> Floats:
    """[N] share of the text's tokens with log p above the threshold, in nats.

    >>> from imprint.attacks.worked import TARGET
    >>> share_above(TARGET, threshold=-2.5).tolist()
    [0.6666666666666666, 0.0]
    """
    above_R = (target.logp > threshold).astype(np.float64)
    above: Floats = np.add.reduceat(above_R, target.offsets[:-1])
    return _or_nan(above / target.lengths, target)


def lempel_ziv(target: TokenStats, bins: int = 4) -> Floats:
    """[N] complexity c·log_bins(T)/T of the binned sequence: c the phrases of its LZ78 parse, T its length.

    Log p is told in `bins` symbols, equally wide between the text's lowest and highest; a text of one value has one
    symbol. A phrase is the shortest stretch not yet seen as one; a repeated end is none. c/T alone falls with the
    length; the factor takes that out (for a random sequence c·log T/T tends to its entropy). The first `FIRST` tokens
    count. Lempel & Ziv 1978, in CAMIA without the factor. Raises UsageError unless bins ≥ 2.

    >>> from imprint.attacks.worked import TARGET
    >>> lempel_ziv(TARGET, bins=3).round(4).tolist()    # symbols 2 2 0, phrases 2 and 20: 2·log_3(3)/3; log(1) = 0
    [0.6667, 0.0]
    """
    if bins < 2:
        raise UsageError(f"bins is the number of symbols that log p is told in: at least 2, not {bins}.")
    phrases = np.zeros(len(target))
    for rows, logp in _blocks(target):
        lowest = np.min(logp, axis=0, initial=np.inf, where=~np.isnan(logp))
        spread = np.max(logp, axis=0, initial=-np.inf, where=~np.isnan(logp)) - lowest
        level = np.minimum(bins * (logp - lowest) / np.where(spread > 0, spread, 1.0), bins - 1)
        phrases[rows] = _phrases(np.where(np.isnan(level), -1, level).astype(np.intp), bins)
    T = np.minimum(target.lengths, FIRST)
    return _or_nan(phrases * np.log(T) / (np.log(bins) * T), target)


def approximate_entropy(target: TokenStats, m: int = 8, r: float = 0.8) -> Floats:
    """[N] approximate entropy φ_m − φ_{m+1} of the sequence, nats: 0 where what comes next follows from m tokens.

    φ_m is the mean, over the T − m + 1 stretches of m tokens, of the logarithm of the share of stretches that lie
    within r standard deviations of it at every token, itself included. 0 for a text of at most m + 1 tokens. The
    first `FIRST` tokens count. Pincus 1991; m and r as in CAMIA. Raises UsageError unless m ≥ 1 and r ≥ 0.

    >>> from imprint.attacks.worked import TARGET
    >>> approximate_entropy(TARGET, m=1).round(4).tolist()    # r·σ = .8·2.16: -1 and -2 are alike, -6 is alone
    [0.0566, 0.0]
    """
    if m < 1 or not r >= 0:
        raise UsageError(f"approximate entropy compares stretches of m >= 1 tokens within r >= 0, not m={m}, r={r}.")
    entropy = np.zeros(len(target))
    for rows, logp in _blocks(target):
        T = np.sum(~np.isnan(logp), axis=0)
        if (long := m + 1 < T).any():
            shorter, longer = _alike(logp[:, long], m, r)
            entropy[rows[long]] = np.abs(_phi(shorter, T[long] - m + 1) - _phi(longer, T[long] - m))
    return _or_nan(entropy, target)


FEATURES: dict[str, Callable[[TokenStats], Floats]] = {
    "slope": slope,
    "share_above_-1": partial(share_above, threshold=-1.0),
    "share_above_-2": partial(share_above, threshold=-2.0),
    "share_above_-3": partial(share_above, threshold=-3.0),
    "lempel_ziv": lempel_ziv,
    "approximate_entropy": approximate_entropy,
}
"""The columns of `sequence_features`; thresholds in nats, as in CAMIA."""


def sequence_features(target: TokenStats) -> Floats:
    """[N, F] the `FEATURES` of every text, in their order.

    >>> from imprint.attacks.worked import TARGET
    >>> sequence_features(TARGET).round(3).tolist()    # LZ: symbols 3 3 0, two phrases, 2·log_4(3)/3
    [[-2.5, 0.0, 0.333, 0.667, 0.528, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]]
    """
    return np.column_stack([feature(target) for feature in FEATURES.values()])


def _position(target: TokenStats) -> NDArray[np.int64]:
    """[R] place of every token in its text, from 0."""
    R = int(target.offsets[-1])
    return np.arange(R) - np.repeat(target.offsets[:-1], target.lengths)


def _finite(target: TokenStats) -> Floats:
    return np.where(np.isfinite(target.logp), target.logp.astype(np.float64), np.nan)


def _or_nan(values: Floats, target: TokenStats) -> Floats:
    return np.where(np.isfinite(target.nll), values, np.nan)


def _blocks(target: TokenStats) -> Iterator[tuple[NDArray[np.intp], Floats]]:
    """Texts of similar length together: their places [n], and [T, n] their first log p, NaN behind the end."""
    T_N = np.minimum(target.lengths, FIRST)
    rows_left, logp_R = np.argsort(T_N, kind="stable"), _finite(target)
    while len(rows_left):
        T = int(T_N[rows_left[-1]])
        # Texts of less than half the length are left for a block of their own, where they cost less.
        similar = int(np.searchsorted(2 * T_N[rows_left], T))
        rows = rows_left[max(similar, len(rows_left) - max(1, BLOCK // T)) :]
        rows_left = rows_left[: -len(rows)]
        t = np.arange(T)[:, None]
        inside = t < T_N[rows]
        yield rows, np.where(inside, logp_R[np.where(inside, target.offsets[rows] + t, 0)], np.nan)


def _phrases(symbols: NDArray[np.intp], bins: int) -> NDArray[np.intp]:
    """[n] phrases of the LZ78 parses of n sequences [T, n] of symbols below `bins`, -1 behind the end.

    The phrases of a sequence are the nodes of a tree, its root 0; all sequences walk down theirs at the same time.
    """
    T, n = symbols.shape
    child = np.zeros((n, (T + 1) * bins), np.intp)  # of node a by symbol s, at a·bins + s; 0: none yet
    row, node, phrases = np.arange(n), np.zeros(n, np.intp), np.zeros(n, np.intp)
    for symbol in symbols:
        edge = node * bins + np.maximum(symbol, 0)
        node = child[row, edge]
        new = (node == 0) & (symbol >= 0)
        phrases += new
        child[row[new], edge[new]] = phrases[new]
    return phrases


def _alike(logp: Floats, m: int, r: float) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """[T, n] how many stretches of m tokens, and of m + 1, are like the one that starts there, itself included.

    NaN, which stands behind the end, is like nothing.
    """
    T, n = logp.shape
    within = r * _std(logp)
    shorter, longer = np.ones((T, n), np.uint8), np.ones((T, n), np.uint8)
    for lag in range(1, T - m + 1):
        alike = np.abs(logp[lag:] - logp[:-lag]) <= within
        run, length = alike, 1
        while length < m:  # a run and the same run some tokens on: up to twice as long
            step = min(length, m - length)
            run, length = run[:-step] & run[step:], length + step
        _count(shorter, run, lag)
        _count(longer, run[:-1] & alike[m:], lag)
    return shorter, longer


def _count(counts: NDArray[np.uint8], run: NDArray[np.bool_], lag: int) -> None:
    """Stretches that are `lag` tokens apart and alike count for each other."""
    found = run.view(np.uint8)
    counts[: len(run)] += found
    counts[lag : lag + len(run)] += found


def _phi(counts: NDArray[np.uint8], stretches: NDArray[np.intp]) -> Floats:
    """[n] mean logarithm of the share of stretches that are alike, over each sequence's own number of stretches."""
    real = np.arange(len(counts))[:, None] < stretches
    return _sum(np.log(counts / stretches) * real) / stretches


def _std(logp: Floats) -> Floats:
    there = ~np.isnan(logp)
    size = there.sum(axis=0)
    mean = _sum(np.where(there, logp, 0.0)) / size
    deviation: Floats = np.sqrt(_sum(np.where(there, logp - mean, 0.0) ** 2) / size)
    return deviation


def _sum(values: Floats) -> Floats:
    """[n] sums over T, term by term, so that a text's padding changes not even the last bit."""
    total: Floats = np.cumsum(values, axis=0)[-1]
    return total
