"""Attacks on the target model alone: one pass over the texts is all they need.

Higher = more likely a member. A text with a NaN among its statistics scores NaN, so that it is counted
where scores are measured, never dropped. The doctests use the two texts of `imprint.attacks.worked`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from imprint.errors import UsageError
from imprint.types import Floats, TokenStats

MIN_STD = 1e-4
"""Floor of Min-K%++'s σ. Where the model is certain, σ and the numerator both vanish; float32 leaves about 1e-6
of rounding in the numerator, which this floor keeps below .01 of a standard deviation."""


def loss(target: TokenStats) -> Floats:
    """LOSS: −L(x), the mean log-likelihood of the text. Yeom et al. 2018.

    Needs the target's pass. Returns [N] scores in nats per token.

    >>> from imprint.attacks.worked import TARGET
    >>> loss(TARGET).tolist()
    [-3.0, -4.0]
    """
    return -target.nll


def zlib(target: TokenStats, zlib_bytes: NDArray[np.int64]) -> Floats:
    """Zlib: −L(x) / bytes(zlib(x)), surprise corrected for how compressible the text is. Carlini et al. 2021.

    L is the *mean* over tokens and the bytes are the *total*, as in the paper, so long texts score nearer to 0.
    Needs the target's pass and [N] sizes in bytes of the zlib-compressed UTF-8 scored text.
    Returns [N] scores in nats per token and byte.

    >>> from imprint.attacks.worked import TARGET, ZLIB_BYTES
    >>> zlib(TARGET, ZLIB_BYTES).tolist()
    [-0.1, -0.2]
    """
    return -target.nll / zlib_bytes


def min_k(target: TokenStats, k: float = 0.2) -> Floats:
    """Min-K%: mean of the lowest share k of the text's log p(x_t | x_<t). Shi et al. 2024.

    n = max(1, int(k·T)) tokens are averaged: a text of fewer than 1/k tokens is judged by its worst one.
    Needs the target's pass. Returns [N] scores in nats per token. Raises UsageError unless 0 < k ≤ 1.

    >>> from imprint.attacks.worked import TARGET
    >>> min_k(TARGET).tolist()         # n = max(1, int(.2·3)) = 1: the -6; and the -4
    [-6.0, -4.0]
    >>> min_k(TARGET, k=0.7).tolist()  # n = int(.7·3) = 2: (-6 - 2) / 2
    [-4.0, -4.0]
    """
    return lowest_mean(target.logp.astype(np.float64), target.offsets, k)


def min_k_plus(target: TokenStats, k: float = 0.2) -> Floats:
    """Min-K%++: Min-K% of (log p(x_t | x_<t) − μ_t) / σ_t. Zhang et al. 2024.

    μ_t and σ_t are the mean and standard deviation of log p over the vocabulary *under p* at position t;
    σ_t is floored at `MIN_STD`. Needs the target's pass. Returns [N] scores in standard deviations.
    Raises UsageError unless 0 < k ≤ 1.

    >>> from imprint.attacks.worked import TARGET
    >>> min_k_plus(TARGET).tolist()    # (-6 + 2) / 2 and (-4 + 2) / 4
    [-2.0, -0.5]
    """
    deviation_R = target.logp.astype(np.float64) - target.mean
    return lowest_mean(deviation_R / np.maximum(target.std.astype(np.float64), MIN_STD), target.offsets, k)


def lowest_mean(values_R: Floats, offsets: NDArray[np.int64], k: float) -> Floats:
    """[N] mean of the n = max(1, int(k·T)) lowest values of each of N ragged rows; NaN where a row holds a NaN.

    >>> lowest_mean(np.array([5.0, 1.0, 3.0, 7.0]), np.array([0, 3, 4]), k=0.7).tolist()
    [2.0, 7.0]
    """
    if not 0 < k <= 1:
        raise UsageError(f"k is the share of a text's tokens that is averaged: 0 < k <= 1, not {k}.")
    lengths_N = np.diff(offsets)
    n_N = np.maximum(1, (k * lengths_N).astype(np.int64))
    row_R = np.repeat(np.arange(len(lengths_N)), lengths_N)
    # A NaN sorts last and would be cut off with the high values; as the lowest key it always stays in.
    order_R = np.lexsort((np.where(np.isnan(values_R), -np.inf, values_R), row_R))
    rank_R = np.arange(len(values_R)) - offsets[row_R]
    kept_R = np.where(rank_R < n_N[row_R], values_R[order_R], 0.0)
    sums: Floats = np.add.reduceat(kept_R, offsets[:-1])
    return sums / n_N
