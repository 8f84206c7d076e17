"""Attacks that ask models tuned on random halves of the records what a record's loss is with and without it.

Losses are means over a text's tokens, so the likelihood here is p(x) = exp(−L(x)), the geometric mean of its tokens'
probabilities: of a whole text it would be zero in floating point, and mostly its length. LiRA reads its logit
φ = log p/(1 − p), Carlini et al.'s scale, on which it varies about normally: −L where a text is surprising, −log L
where it is known by heart.

Higher = more likely a member. A record with a NaN among its losses, or with fewer than two shadow models of a kind that
an attack asks for, scores NaN. The doctests' shadow models are two that hold a record and two that do not.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

from imprint.attacks.evidence import LEAST_SHADOWS
from imprint.errors import InvalidAudit, UsageError
from imprint.types import Floats, Shadows, TokenStats

FEWEST_OF_A_KIND = 2
"""Shadow models that hold (or do not hold) a record, below which nothing is said of it."""
POOLED_BELOW = 64
"""With fewer shadow models than this all records share one variance: each one's own is too uncertain (Carlini et al.
2022)."""
CERTAIN = 1e-6
"""Least loss in nats per token: below is float32's rounding, and at 0 the logit is infinite."""
LEAST_SPREAD = 1e-6
"""Least standard deviation of φ, for models that do not differ."""


def lira(target: TokenStats, shadows: Shadows) -> Floats:
    """LiRA: log N(φ | in) − log N(φ | out), φ = logit of exp(−L(x)). Carlini et al. 2022.

    The two normal laws have the mean and the standard deviation of φ under the shadow models that hold the record
    (μ_in, σ_in) and under those that do not (μ_out, σ_out). With fewer than `POOLED_BELOW` shadow models each σ is one
    number for all records, the root of the mean squared deviation from a record's own μ. Needs the target's pass and
    shadow models. Returns [N] log likelihood ratios; NaN for a record that fewer than two models hold or do not hold.
    Raises InvalidAudit with fewer than `LEAST_SHADOWS` models, or where that is so for every record.

    >>> from imprint.attacks.worked import TARGET
    >>> phi = np.array([[-2.0, -4.0, -4.0, -6.0], [-2.0, -4.0, -4.0, -6.0]])   # in: -3 ± √2, out: -5 ± √2
    >>> shadows = Shadows(np.logaddexp(0, -phi), np.array([[True, True, False, False]] * 2))
    >>> logits(TARGET.nll).round(3).tolist()
    [-2.949, -3.982]
    >>> lira(TARGET, shadows).round(3).tolist()         # ((φ + 5)² - (φ + 3)²) / (2·2) = φ + 4
    [1.051, 0.018]
    """
    phi = logits(target.nll)
    inside, outside = _normal(shadows, True), _normal(shadows, False)
    return _log_density(phi, *inside) - _log_density(phi, *outside)


def lira_offline(target: TokenStats, shadows: Shadows) -> Floats:
    """LiRA offline: (φ − μ_out) / σ_out, in the order of Pr[Z ≤ φ | out]. Carlini et al. 2022.

    The published score is the distribution function itself (some released code takes the density, which falls again
    for members it should be surest of). Its argument is given here: it ranks the same, and records far out, which
    matter most, are not all 1. Variances are pooled as in `lira`. Needs the target's pass and shadow models that do
    not hold the record. Returns [N] standard deviations; NaN for a record with fewer than two such models.
    Raises InvalidAudit as `lira`.

    >>> from imprint.attacks.worked import TARGET
    >>> phi = np.array([[-2.0, -4.0, -4.0, -6.0], [-2.0, -4.0, -4.0, -6.0]])
    >>> shadows = Shadows(np.logaddexp(0, -phi), np.array([[True, True, False, False]] * 2))
    >>> lira_offline(TARGET, shadows).round(3).tolist()       # (-2.949 + 5)/√2 and (-3.982 + 5)/√2
    [1.45, 0.72]
    """
    phi = logits(target.nll)
    mean, spread = _normal(shadows, False)
    return (phi - mean) / spread


def rmia(
    target: TokenStats,
    shadows: Shadows,
    population: NDArray[np.bool_],
    gamma: float = 1.0,
    a: float | None = None,
) -> Floats:
    """RMIA: share of the population z with r(x)/r(z) > γ, r(x) = p_t(x)/p̄(x), p = exp(−L). Zarifzadeh et al. 2024.

    p̄(x) = ½[(1 + a)·mean p_out(x) + (1 − a)] (the offline attack: no shadow model holds z). In it a·p_out + (1 − a)
    stands for the p of models that hold x. The a = .3 of classifiers, whose p is near 1, makes p̄ nearly constant for
    texts, and the attack LOSS: by default a is fitted to the records that shadow models hold (`fitted_a`).

    The share rises with r(x) whatever γ is: it ranks as r does, in as many steps as there are z, and γ only says where
    they lie. The published γ of 2 asks for log 2 nats *per token* more than z gained, which few texts reach.

    Needs the target's pass, shadow models that do not hold the record, and the population, whose records nobody tuned
    on and nobody evaluates. Returns [N] shares from 0 to 1; NaN for a record with fewer than two such models.
    Raises UsageError unless γ > 0 and 0 ≤ a ≤ 1; InvalidAudit with fewer than `LEAST_SHADOWS` models or no z.

    >>> from imprint.attacks.worked import TARGET                          # p = e⁻³, e⁻⁴
    >>> shadows = Shadows(np.array([[3.5] * 4, [4.0] * 4]), np.array([[True, True, False, False], [False] * 4]))
    >>> rmia(TARGET, shadows, np.array([False, True]), a=1.0).tolist()     # r = e^.5 and 1
    [1.0, 0.0]
    """
    if not gamma > 0 or not (a is None or 0 <= a <= 1):
        raise UsageError(f"rmia needs gamma > 0 and a from 0 to 1, not {gamma} and {a}.")
    outside = _log_mean_likelihood(shadows, False)
    a = fitted_a(shadows) if a is None else a
    with np.errstate(divide="ignore", invalid="ignore"):  # a = 1 leaves no constant; NaN stays NaN
        log_mean = np.logaddexp(np.log((1 + a) / 2) + outside, np.log((1 - a) / 2))
    log_ratio = -target.nll - log_mean
    z = np.sort(log_ratio[np.asarray(population, np.bool_) & ~np.isnan(log_ratio)])
    if not len(z):
        raise InvalidAudit(
            "attack 'rmia' compares with records that nobody tuned on and nobody evaluates, and there are none: set "
            "`data.validation` or `data.auxiliary` in the recipe."
        )
    share = np.searchsorted(z, log_ratio - np.log(gamma), "left") / len(z)
    return np.where(np.isnan(log_ratio), np.nan, share)


def fitted_a(shadows: Shadows) -> float:
    """The a of p_in ≈ a·p_out + (1 − a), by least squares over the records that shadow models hold; in [0, 1].

    >>> p = np.array([[0.6, 0.6, 0.2, 0.2]])       # 1 - .6 = a(1 - .2)
    >>> round(fitted_a(Shadows(-np.log(p), np.array([[True, True, False, False]]))), 6)
    0.5
    """
    out, held = (1 - np.exp(_log_mean_likelihood(shadows, inside)) for inside in (False, True))
    both = ~np.isnan(out + held)
    if not both.any():
        raise UsageError("rmia cannot fit a, as no record lies inside two shadow models and outside two: give a.")
    squares = float(out[both] @ out[both])
    return float(np.clip(out[both] @ held[both] / squares, 0, 1)) if squares else 1.0


def logits(losses: Floats) -> Floats:
    """log p/(1 − p) of p = exp(−loss), with loss floored at `CERTAIN`.

    >>> logits(np.array([np.log(2), 800.0])).tolist()         # p = ½; p = e⁻⁸⁰⁰ is 0 in floating point
    [0.0, -800.0]
    """
    floored = np.maximum(losses, CERTAIN)
    return -floored - np.log(-np.expm1(-floored))


def _sides(shadows: Shadows, inside: bool) -> NDArray[np.bool_]:
    """[N, S] which shadow models hold (or do not hold) a record that two of the kind are there for."""
    if shadows.losses.ndim != 2 or shadows.losses.shape != shadows.inside.shape:
        raise UsageError(
            f"shadows must hold [N, S] losses and [N, S] whether inside, not {shadows.losses.shape} and "
            f"{shadows.inside.shape}."
        )
    if (S := shadows.losses.shape[1]) < LEAST_SHADOWS:
        raise InvalidAudit(
            f"attacks by shadow models need at least {LEAST_SHADOWS} of them, and there are {S}: set `shadows` in "
            "the recipe."
        )
    side: NDArray[np.bool_] = shadows.inside == inside
    side = side & (side.sum(axis=1, keepdims=True) >= FEWEST_OF_A_KIND)
    if len(side) and not side.any():
        raise InvalidAudit(
            f"no record lies {'inside' if inside else 'outside'} {FEWEST_OF_A_KIND} shadow models: set more `shadows` "
            "in the recipe."
        )
    return side


def _normal(shadows: Shadows, inside: bool) -> tuple[Floats, Floats]:
    """[N] mean and [N] standard deviation of φ over the models of a kind; NaN where they are too few."""
    side, phi = _sides(shadows, inside), logits(shadows.losses)
    count = side.sum(axis=1)
    mean = np.divide(np.sum(phi, axis=1, where=side), count, out=np.full(len(phi), np.nan), where=count > 0)
    squares = np.sum((phi - mean[:, None]) ** 2, axis=1, where=side)
    told = (count > 0) & ~np.isnan(squares)
    freedom = np.where(told, count - 1, 0)
    if shadows.losses.shape[1] < POOLED_BELOW and told.any():
        squares, freedom = np.full(len(phi), squares[told].sum()), np.full(len(phi), freedom.sum())
    variance = np.divide(squares, freedom, out=np.full(len(phi), np.nan), where=freedom > 0)
    return mean, np.maximum(np.sqrt(variance), LEAST_SPREAD)


def _log_density(phi: Floats, mean: Floats, spread: Floats) -> Floats:
    """log N(φ; μ, σ) up to a constant."""
    density: Floats = -(((phi - mean) / spread) ** 2) / 2 - np.log(spread)
    return density


def _log_mean_likelihood(shadows: Shadows, inside: bool) -> Floats:
    """[N] log of the mean of exp(−loss) over the models of a kind; NaN where they are too few."""
    side = _sides(shadows, inside)
    told = side.any(axis=1)
    log_mean = np.full(len(shadows), np.nan)
    likelihoods = np.where(side, -shadows.losses, -np.inf)[told]
    log_mean[told] = logsumexp(likelihoods, axis=1) - np.log(side[told].sum(axis=1))
    return log_mean
