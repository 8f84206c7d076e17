"""Attacks that compare the target with a reference model, by default the same base before tuning.

Higher = more likely a member. The doctests use the two texts of `imprint.attacks.worked`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from imprint.attacks.single import min_k_plus
from imprint.errors import UsageError
from imprint.types import Floats, TokenStats

WINDOWS = (2, 3, 4, 6, 9, 13, 18, 25, 32, 40)
"""Tokens in WBC's windows, those of its authors."""


def ref(target: TokenStats, reference: TokenStats) -> Floats:
    """Ref: L_r(x) − L_t(x), what tuning gained on the text. Carlini et al. 2021, Mireshghallah et al. 2022.

    Needs the target's and the reference's pass over the same tokens. Returns [N] scores in nats per token.

    >>> from imprint.attacks.worked import REFERENCE, TARGET
    >>> ref(TARGET, REFERENCE).tolist()
    [2.0, 0.0]
    """
    return reference.nll - target.nll


def ratio(target: TokenStats, reference: TokenStats) -> Floats:
    """Ratio: −L_t(x) / L_r(x), the share of the surprise that tuning left. Used as FLoRA's score, among others.

    −1 says that tuning changed nothing, 0 that it left no surprise at all. Where L_r = 0 the reference was
    already certain: the score is the limit −∞ if the target is not, and −1 ("nothing changed") if it is too.
    Needs the target's and the reference's pass over the same tokens. Returns [N] scores, without unit.

    >>> from imprint.attacks.worked import REFERENCE, TARGET
    >>> ratio(TARGET, REFERENCE).tolist()    # -3/5 and -4/4
    [-0.6, -1.0]
    """
    # log p can come out a rounding error above 0; a negative L_r would turn the sign of the score.
    L_t, L_r = np.maximum(target.nll, 0.0), np.maximum(reference.nll, 0.0)
    limit = np.where(L_t > 0, -np.inf, np.where(L_t == 0, -1.0, np.nan))
    return np.divide(-L_t, L_r, out=limit, where=L_r != 0)


def wbc(target: TokenStats, reference: TokenStats, windows: Sequence[int] = WINDOWS) -> Floats:
    """WBC: mean over window sizes of the share of windows with Σ nll_r > Σ nll_t. Chen et al. 2026.

    Every run of w tokens votes, a tie for both sides by half, so that a text tuning did not touch scores .5. Of the
    `windows` those count that fit; a text shorter than all of them is one window. Needs the target's and the
    reference's pass over the same tokens. Returns [N] shares. Raises UsageError unless all windows are at least 1.

    >>> from imprint.attacks.worked import PREFIXED, REFERENCE, TARGET
    >>> wbc(TARGET, REFERENCE).tolist()    # "a": two windows of 2, one of 3, all won; "b": one of 1, a tie
    [1.0, 0.5]
    >>> wbc(PREFIXED, TARGET).tolist()     # gains of -2, .5 and -3: every window is lost
    [0.0, 0.5]
    """
    if not windows or min(windows) < 1:
        raise UsageError(f"windows are sizes in tokens: at least one, all at least 1, not {tuple(windows)}.")
    starts, lengths = target.offsets[:-1], target.lengths
    gain_R = _gain(target, reference)
    left_R = np.repeat(target.offsets[1:], lengths) - np.arange(len(gain_R))  # tokens from here to the text's end
    shares, fitting = np.zeros(len(target)), np.zeros(len(target), np.int64)
    for w in sorted(windows):
        vote_R = np.where(left_R >= w, (np.sign(_window_sums(gain_R, w)) + 1) / 2, 0.0)
        fits = lengths >= w
        shares += np.where(fits, np.add.reduceat(vote_R, starts) / np.maximum(lengths - w + 1, 1), 0.0)
        fitting += fits
    whole = (np.sign(np.add.reduceat(gain_R, starts)) + 1) / 2
    return np.where(fitting > 0, shares / np.maximum(fitting, 1), whole)


def ez_mia(target: TokenStats, reference: TokenStats) -> Floats:
    """EZ-MIA: Σ Δ⁺ / Σ |Δ⁻|, Δ = log p_t − log p_r, where x_t is not the target's likeliest token. Ilić et al. 2026.

    Where the target errs, what it learned of the text still shows. 1 says that as much was gained as lost, and is the
    score where nothing moved: all Δ are 0, or neither model errs, so the untouched base ties on all texts. +∞ where
    something was gained and nothing lost, and where the target errs nowhere but the reference did (the authors' code
    gives these strongest members 0). Needs the target's and the reference's pass over the same tokens. Returns [N]
    scores, without unit, from 0.

    >>> from imprint.attacks.worked import PREFIXED, REFERENCE, TARGET
    >>> ez_mia(TARGET, REFERENCE).tolist()    # three times +2; nothing moved
    [inf, 1.0]
    >>> ez_mia(TARGET, PREFIXED).tolist()     # against other stats: Δ = 2, -.5, 3, so 5/.5
    [10.0, 1.0]
    """
    starts, error_R, gain_R = target.offsets[:-1], ~target.top, _gain(target, reference)
    gained: Floats = np.add.reduceat(np.where(error_R, np.maximum(gain_R, 0.0), 0.0), starts)
    lost: Floats = np.add.reduceat(np.where(error_R, np.maximum(-gain_R, 0.0), 0.0), starts)
    mended = ~np.logical_or.reduceat(error_R, starts) & ~np.logical_and.reduceat(reference.top, starts)
    without_loss = np.where((gained > 0) | mended, np.inf, 1.0)
    scores = np.divide(gained, lost, out=without_loss, where=lost != 0)
    return np.where(np.logical_or.reduceat(np.isnan(gain_R), starts), np.nan, scores)


def ref_min_k_plus(target: TokenStats, reference: TokenStats, k: float = 0.2) -> Floats:
    """Ref-Min-K%++: Min-K%++ of the target − Min-K%++ of the reference. After Zhang et al. 2024.

    Each model has its own lowest tokens. Needs the target's and the reference's pass over the same tokens. Returns [N]
    scores in standard deviations. Raises UsageError unless 0 < k ≤ 1.

    >>> from imprint.attacks.worked import REFERENCE, TARGET
    >>> ref_min_k_plus(TARGET, REFERENCE).tolist()    # (-6 + 2)/2 - (-8 + 2)/2; nothing moved
    [1.0, 0.0]
    """
    return min_k_plus(target, k) - min_k_plus(reference, k)


def _gain(target: TokenStats, reference: TokenStats) -> Floats:
    """[R] log p_t − log p_r, exact: the difference of two float32 in float64."""
    return target.logp.astype(np.float64) - reference.logp


def _window_sums(values_R: Floats, w: int) -> Floats:
    """[R] sums of w values from each place on, fewer at the end, put together from sums of 1, 2, 4, ... of them.

    Differences of running sums over all texts would let a text's rounding, and so a tie, depend on those before it.

    >>> _window_sums(np.array([1.0, 2.0, 4.0, 8.0]), 3).tolist()
    [7.0, 14.0, 12.0, 8.0]
    """
    sums, run, done, length = np.zeros_like(values_R), values_R, 0, 1
    while True:
        if w & length:
            sums[: max(0, len(sums) - done)] += run[done:]
            done += length
        if done == w:
            return sums
        longer = run.copy()
        longer[:-length] += run[length:]
        run, length = longer, 2 * length
