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


def zlib_sum(target: TokenStats, zlib_bytes: NDArray[np.int64]) -> Floats:
    """Zlib, summed: −T·L(x) / bytes(zlib(x)), nats per compressed byte whatever the length. After Carlini et al. 2021.

    T is the number of tokens: the *total* surprise over the total bytes. `zlib` divides the mean surprise instead, so
    that length alone moves it; on texts of mixed lengths the two may rank almost opposite. Needs the target's pass and
    [N] sizes in bytes of the zlib-compressed UTF-8 scored text. Returns [N] scores in nats per byte.

    >>> from imprint.attacks.worked import TARGET, ZLIB_BYTES
    >>> zlib_sum(TARGET, ZLIB_BYTES).tolist()    # (-1 - 2 - 6)/30 and -4/20
    [-0.3, -0.2]
    """
    return -target.nll * target.lengths / zlib_bytes


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


def surp(target: TokenStats, k: float = 0.4, max_entropy: float = 2.0) -> Floats:
    """SURP: mean log p(x_t | x_<t) over the lowest share k whose entropy is below 2 nats. Zhang and Wu 2024.

    Such tokens surprise: the model was certain, −μ_t < `max_entropy`, and wrong. The lowest n = max(1, int(k·T)) log p
    are looked at, of equal ones the earlier. Of a text without a surprising token all n are averaged, as by `min_k`:
    neither one on which the model is never certain nor one that it knows by heart shall come first or last for want of
    evidence (a public version gives both −100). Needs the target's pass. Returns [N] scores in
    nats per token. Raises UsageError unless 0 < k ≤ 1.

    >>> from imprint.attacks.worked import TARGET
    >>> surp(TARGET, max_entropy=2.5).tolist()    # entropy 2; n = int(.4·3) = 1: the -6; and the -4
    [-6.0, -4.0]
    >>> surp(TARGET, k=0.7).tolist()              # no entropy below 2: all of n = int(.7·3) = 2
    [-4.0, -4.0]
    """
    order_R, lowest_R, row_R = _lowest(target.logp.astype(np.float64), target.offsets, k, stable=True)
    logp_R, entropy_R = target.logp.astype(np.float64)[order_R], -target.mean[order_R]
    surprising_R = lowest_R & (entropy_R < max_entropy)
    some_N = np.logical_or.reduceat(surprising_R, target.offsets[:-1])
    averaged_R = np.where(some_N[row_R], surprising_R, lowest_R)
    sums: Floats = np.add.reduceat(np.where(averaged_R, logp_R, 0.0), target.offsets[:-1])
    scores: Floats = sums / np.add.reduceat(averaged_R.astype(np.int64), target.offsets[:-1])
    return np.where(_holds_nan(target.logp + target.mean, target.offsets), np.nan, scores)


def dc_pdd(target: TokenStats, token_counts: NDArray[np.int64], cap: float = 0.01) -> Floats:
    """DC-PDD: mean of min(p·log(1/f), .01) over the first place of every token in the text. Zhang et al. 2024.

    p = p(x_t | x_<t); f = (count + 1)/(Σ counts + V) is the token's share of a corpus nobody tuned on. The divergence
    is high where the model is surer of a token than its frequency makes it. `cap` is the paper's a. Needs the target's
    pass with its tokens, and [V] `token_counts` by the same tokenizer. Returns [N] scores in nats. Raises UsageError
    for tokens beyond V, and where the tokens were not kept: all are 0, over more than one record.

    >>> from imprint.attacks.worked import TARGET, TOKEN_COUNTS
    >>> dc_pdd(TARGET, TOKEN_COUNTS, cap=1.0).round(4).tolist()    # (.8471 + .4054 + .0074)/3; f = 2/20, 1/20
    [0.42, 0.0549]
    >>> dc_pdd(TARGET, TOKEN_COUNTS).round(4).tolist()             # (.01 + .01 + .0074)/3
    [0.0091, 0.01]
    """
    if len(target) > 1 and not target.tokens.any():
        raise UsageError(
            "attack 'dc_pdd' needs the tokens, which a private audit does not keep: give --show-text, or leave it out."
        )
    V = len(token_counts)
    if len(target.tokens) and target.tokens.max() >= V:
        raise UsageError(
            f"token_counts covers {V} tokens and a text holds token {target.tokens.max()}: count with the tokenizer of "
            "the model."
        )
    frequency_V = (np.asarray(token_counts, np.float64) + 1) / (np.sum(token_counts) + V)
    calibrated_R = np.exp(target.logp.astype(np.float64)) * -np.log(frequency_V[target.tokens])
    row_R = np.repeat(np.arange(len(target)), target.lengths)
    _, first = np.unique(row_R * V + target.tokens, return_index=True)
    first_R = np.zeros(len(row_R), np.bool_)
    first_R[first] = True
    sums: Floats = np.add.reduceat(np.where(first_R, np.minimum(calibrated_R, cap), 0.0), target.offsets[:-1])
    scores: Floats = sums / np.add.reduceat(first_R.astype(np.int64), target.offsets[:-1])
    return np.where(_holds_nan(target.logp, target.offsets), np.nan, scores)


def lowest_mean(values_R: Floats, offsets: NDArray[np.int64], k: float) -> Floats:
    """[N] mean of the n = max(1, int(k·T)) lowest values of each of N ragged rows; NaN where a row holds a NaN.

    >>> lowest_mean(np.array([5.0, 1.0, 3.0, 7.0]), np.array([0, 3, 4]), k=0.7).tolist()
    [2.0, 7.0]
    """
    order_R, lowest_R, _ = _lowest(values_R, offsets, k)
    sums: Floats = np.add.reduceat(np.where(lowest_R, values_R[order_R], 0.0), offsets[:-1])
    return sums / np.add.reduceat(lowest_R.astype(np.int64), offsets[:-1])


def _lowest(
    values_R: Floats, offsets: NDArray[np.int64], k: float, stable: bool = False
) -> tuple[NDArray[np.intp], NDArray[np.bool_], NDArray[np.intp]]:
    """[R] each ragged row's places by rising value, whether that one is among its n lowest, and its row.

    Which of equal values comes first matters to those alone who look at more than the values: `stable`, by place.
    """
    if not 0 < k <= 1:
        raise UsageError(f"k is the share of a text's tokens that is averaged: 0 < k <= 1, not {k}.")
    lengths_N = np.diff(offsets)
    n_N = np.maximum(1, (k * lengths_N).astype(np.int64))
    row_R = np.repeat(np.arange(len(lengths_N)), lengths_N)
    # A NaN sorts last and would be cut off with the high values; as the lowest key it always stays in.
    order_R = np.argsort(np.where(np.isnan(values_R), -np.inf, values_R), kind="stable" if stable else None)
    few = np.uint16 if len(lengths_N) < 1 << 16 else np.int64  # which numpy sorts by radix, several times quicker
    order_R = order_R[np.argsort(row_R[order_R].astype(few), kind="stable")]
    rank_R = np.arange(len(values_R)) - offsets[row_R]
    return order_R, rank_R < n_N[row_R], row_R


def _holds_nan(values_R: NDArray[np.floating], offsets: NDArray[np.int64]) -> NDArray[np.bool_]:
    holds: NDArray[np.bool_] = np.logical_or.reduceat(np.isnan(values_R), offsets[:-1])
    return holds
