"""Attacks that compare the text with a changed one, or behind another context, and the norm of its gradient.

All cost more passes over every checkpoint. Higher = more likely a member. L is the mean loss, LL = −L the mean
log-likelihood. The doctests use the two texts of `imprint.attacks.worked`.
"""

from __future__ import annotations

import numpy as np

from imprint.errors import UsageError
from imprint.types import Floats, TokenStats


def lowercase(target: TokenStats, lowercase: TokenStats) -> Floats:
    """Lowercase: L(lower(x)) / L(x), what the text's own case is worth to the model. Carlini et al. 2021.

    Where L(x) = 0 the model knows the text: the score is the limit +∞ if lower case costs anything, 1 if it does not. A
    text without capitals scores 1. Needs the target's pass over the texts and over them in lower case. Returns [N]
    scores, without unit.

    >>> from imprint.attacks.worked import LOWERCASE, TARGET
    >>> lowercase(TARGET, LOWERCASE).tolist()    # 6/3 and 4/4
    [2.0, 1.0]
    """
    return _times_larger(lowercase, target)


def neighbourhood(target: TokenStats, neighbours: Floats) -> Floats:
    """Neighbourhood: mean over n neighbours x̃ of L(x̃) − L(x), each with one word changed. Mattern et al. 2023.

    A text that was tuned on lies in a hollow of the loss. Needs the target's pass and [N, n] losses of the neighbours
    in nats per token. Returns [N] scores in nats per token. Raises UsageError for anything but [N, n], n ≥ 1.

    >>> from imprint.attacks.worked import NEIGHBOURS, TARGET
    >>> neighbourhood(TARGET, NEIGHBOURS).tolist()    # (5 + 4)/2 - 3 and (4 + 3)/2 - 4
    [1.5, -0.5]
    """
    if neighbours.ndim != 2 or not neighbours.shape[1]:
        raise UsageError(f"neighbours must be [N, n] losses of n >= 1 neighbours, not of shape {neighbours.shape}.")
    mean: Floats = neighbours.mean(axis=1)
    return mean - target.nll


def recall(target: TokenStats, prefixed: TokenStats) -> Floats:
    """ReCaLL: LL(x | P) / LL(x), P texts that nobody tuned on. Xie et al. 2024.

    Behind strange texts a member's log-likelihood falls further than another's, and both are negative: members have the
    higher ratio. Where L(x) = 0 the score is the limit +∞ if P costs anything, 1 if it does not. Needs the target's
    pass over the texts, and over the same tokens behind P. Returns [N] scores, without unit.

    >>> from imprint.attacks.worked import PREFIXED, TARGET
    >>> recall(TARGET, PREFIXED).tolist()    # -4.5/-3 and -4/-4
    [1.5, 1.0]
    """
    return _times_larger(prefixed, target)


def con_recall(target: TokenStats, prefixed: TokenStats, prefixed_members: TokenStats, gamma: float = 1.0) -> Floats:
    """Con-ReCall: (LL(x | P) − γ·LL(x | M)) / LL(x), P texts nobody tuned on and M tuned ones. Wang et al. 2024.

    Behind tuned texts a member loses little, behind strange ones much: its difference is the more negative, as LL(x)
    is, and its ratio the higher. Where L(x) = 0 the score is the limit ±∞ by the sign of what is divided, and 1 − γ,
    "nothing changed", where that is 0 too. Needs the target's pass over the texts, and over the same tokens behind P
    and behind M. Returns [N] scores, without unit.

    >>> from imprint.attacks.worked import PREFIXED, PREFIXED_MEMBERS, TARGET
    >>> con_recall(TARGET, PREFIXED, PREFIXED_MEMBERS).tolist()    # (-4.5 + 3)/-3 and (-4 + 5)/-4
    [0.5, -0.25]
    """
    L, behind_P, behind_M = _loss(target), _loss(prefixed), _loss(prefixed_members)
    return _over(behind_P - gamma * behind_M, L, unchanged=1 - gamma)


def grad_norm(gradient_norm: Floats) -> Floats:
    """GradNorm: −‖∇L(x)‖ by the weights that were tuned. After Nasr et al. 2019; in MIMIR (Duan et al. 2024).

    The norm is small where tuning has nothing left to learn. Needs a backward pass per text. Returns [N] scores in nats
    per token and unit of weight.

    >>> from imprint.attacks.worked import GRADIENT_NORM
    >>> grad_norm(GRADIENT_NORM).tolist()
    [-0.5, -2.0]
    """
    return -np.asarray(gradient_norm, np.float64)


def _times_larger(changed: TokenStats, plain: TokenStats) -> Floats:
    return _over(_loss(changed), _loss(plain), unchanged=1.0)


def _over(numerator: Floats, L: Floats, unchanged: float) -> Floats:
    """numerator / L, and its limit where L = 0."""
    limit = np.where(numerator == 0, unchanged, np.copysign(np.inf, numerator))
    return np.divide(numerator, L, out=np.where(np.isnan(numerator), np.nan, limit), where=L != 0)


def _loss(stats: TokenStats) -> Floats:
    """[N] L(x); log p can come out a rounding error above 0, and a negative L would turn the sign of a ratio."""
    return np.maximum(stats.nll, 0.0)
