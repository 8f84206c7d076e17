"""What one training run proves about its privacy: a lower bound on ε from canaries that fair coins put in or left out.

If training is (ε, δ)-differentially private, then of r guesses which canaries were in, each is right with probability
q = 1/(1 + e^−ε) at most, as if a randomised response had told: so many right ones refute every smaller ε. Steinke, Nasr
and Jagielski 2023, "Privacy auditing with one (1) training run", theorem 5.2. It holds for coins that were flipped for
each canary by itself, not for a given division into members and non-members; `benchmarks/epsilon.py` measures how
often the bound exceeds the truth.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import bdtr, betainc, betaincinv, expit, gammaln, log_expit

from imprint.errors import DataError, InvalidAudit, UsageError
from imprint.types import Floats

SHARES = (0.1, 0.3, 0.8)
"""The numbers of guesses that are tried where none is given, as shares of the canaries: few where only the highest
scores tell anything, most where nearly all do. Not all: the coins seldom put in exactly half, so that some guess of all
is wrong whatever the scores."""
FEWEST = 10
"""Canaries and guesses: with fewer, guesses that are all right still prove next to nothing."""
UNFAIR = 1e-6
"""Coins that come up like this with less probability were not fair coins."""
_TIES = (0x696D7072, 0x696E74)
"""Seeds the order of equal scores: of two words, as no seed is that a user would flip the coins with."""


@dataclass(frozen=True)
class OneRun:
    """What the canaries of one run prove.

    Attributes:
        epsilon: with confidence 1 − significance training is not (ε′, δ)-private for any ε′ below; 0 proves nothing.
        ceiling: what it would be if every guess had been right.
        canaries: m.
        included: how many of them were in.
        guesses: r, one half of them "in" and one half "out".
        correct: v.
        tried: numbers of guesses that were tried; each is tested at significance/tried (Bonferroni).
        delta, significance: as given.
    """

    epsilon: float
    ceiling: float
    canaries: int
    included: int
    guesses: int
    correct: int
    tried: int
    delta: float
    significance: float


def one_run_audit(
    scores: ArrayLike,
    included: ArrayLike,
    guesses: int | None = None,
    delta: float = 0.0,
    significance: float = 0.05,
) -> OneRun:
    """Guess "in" for the highest scores and "out" for the lowest, and bound ε by the guesses that are right.

    Equal scores are ordered by a fixed draw that knows nothing of the coins, so that scores which say nothing are right
    by chance only.

    Args:
        scores: [m] of one canary each, higher = more likely in; infinite ones rank like any other.
        included: [m] whether the canary was in, by a fair coin of its own.
        guesses: how many to guess, fixed before the scores were seen; an odd one guesses "in" once more. None tries
            `SHARES` of the canaries and reports the best, each tested at its part of the significance.
        delta: δ of the claim.
        significance: probability that the bound exceeds the true ε, at most.

    Raises:
        InvalidAudit: fewer than ten canaries, or coins that were not fair (probability below 1e-6).
        DataError: NaN scores (with their number), vectors that do not fit, or coins other than true and false.
        UsageError: guesses that are none or more than canaries; delta or significance out of range.

    >>> found = one_run_audit(np.arange(100), np.arange(100) >= 50, guesses=100)
    >>> round(found.epsilon, 3), found.correct, round(found.ceiling, 3)
    (3.493, 100, 3.493)
    """
    s, inside = _checked(scores, included)
    _in_range(delta, significance)
    m = len(s)
    numbers = [guesses] if guesses is not None else sorted({max(FEWEST, 2 * round(share * m / 2)) for share in SHARES})
    order = np.lexsort((np.random.default_rng(_TIES).random(m), s))
    each = significance / len(numbers)
    found = []
    for r in numbers:
        ceiling = epsilon_ceiling(m, r, delta, each)  # which checks all that is given
        v = int(np.sum(inside[order[m - (r - r // 2) :]]) + np.sum(~inside[order[: r // 2]]))
        found.append((one_run_epsilon(m, r, v, delta, each), r, v, ceiling))
    epsilon, r, v, _ = max(found)
    ceiling = max(one[-1] for one in found)
    return OneRun(epsilon, ceiling, m, int(inside.sum()), r, v, len(numbers), delta, significance)


def one_run_epsilon(canaries: int, guesses: int, correct: int, delta: float = 0.0, significance: float = 0.05) -> float:
    """The least ε that `correct` right ones of `guesses` guesses about `canaries` canaries leave possible.

    ε_LB = sup{ε: p(ε) < significance} with p of `p_value`; 0 where there is none. For δ = 0 this is Clopper and
    Pearson's one-sided bound of q on the scale of ε. The number of guesses has to be fixed in advance.

    Args:
        canaries: m, each in or out by a fair coin of its own.
        guesses: r of them, guessed in or out.
        correct: v of these, guessed rightly.
        delta: δ of the claim.
        significance: probability that the bound exceeds the true ε, at most.

    Raises:
        UsageError: counts that contradict each other, delta outside [0, 1), significance outside (0, 1).

    >>> round(one_run_epsilon(1000, 100, 90), 4), round(one_run_epsilon(1000, 100, 50), 4)
    (1.6308, 0.0)
    """
    m, r, v = _counts(canaries, guesses, correct)
    _in_range(delta, significance)
    if v == 0:
        return 0.0
    right = float(betaincinv(v, r - v + 1, significance))  # q where β is the significance
    most = math.log(right) - math.log1p(-right)
    if delta == 0 or most <= 0:
        return max(0.0, most)

    def beyond(epsilon: float) -> float:
        return p_value(epsilon, m, r, v, delta) - significance

    if beyond(0.0) >= 0:
        return 0.0
    # α need not rise with ε, but it does while β is below 1/4, and p < significance held up to one ε for every r ≤ 40
    # and v, 2mδ from .001 to 10 and significance up to .99 that was tried.
    return float(brentq(beyond, 0.0, most, xtol=1e-12)) if beyond(most) > 0 else most


def epsilon_ceiling(canaries: int, guesses: int | None = None, delta: float = 0.0, significance: float = 0.05) -> float:
    """The bound if every guess is right: no better attack could prove more with so many. None guesses about all.

    Raises as `one_run_epsilon`.

    >>> [round(epsilon_ceiling(m), 1) for m in (10, 100, 1000)]
    [1.1, 3.5, 5.8]
    """
    r = canaries if guesses is None else guesses
    return one_run_epsilon(canaries, r, r, delta, significance)


def p_value(epsilon: float, canaries: int, guesses: int, correct: int, delta: float = 0.0) -> float:
    """The probability of so many right guesses under (ε, δ)-privacy, at most: min(1, β + 2mδα).

    β = P[Bin(r, q) ≥ v] and α = max_{1≤i≤v} P[v − i ≤ Bin(r, q) < v]/i, with q = 1/(1 + e^−ε).

    >>> round(p_value(0.0, 10, 10, 10), 6), p_value(0.0, 10, 10, 0)    # 2^−10
    (0.000977, 1.0)
    """
    m, r, v = _counts(canaries, guesses, correct)
    if v == 0:
        return 1.0
    beta = float(betainc(v, r - v + 1, expit(epsilon)))
    if delta == 0:
        return beta
    k = np.arange(v - 1, -1, -1)
    log_choose = gammaln(r + 1) - gammaln(k + 1) - gammaln(r - k + 1)
    below = np.cumsum(np.exp(log_choose + k * log_expit(epsilon) + (r - k) * log_expit(-epsilon)))
    return min(1.0, beta + 2 * m * delta * float(np.max(below / (v - k))))


def _counts(canaries: int, guesses: int, correct: int) -> tuple[int, int, int]:
    try:
        m, r, v = (operator.index(count) for count in (canaries, guesses, correct))
    except TypeError:
        raise UsageError(
            f"canaries, guesses and correct are whole numbers, not {canaries!r}, {guesses!r} and {correct!r}."
        ) from None
    if not 0 <= v <= r <= m or r < 1:
        raise UsageError(
            f"guesses are 1 to as many as canaries, correct ones 0 to as many as guesses: there are {m} canaries, "
            f"{r} guesses and {v} correct."
        )
    return m, r, v


def _in_range(delta: float, significance: float) -> None:
    if not 0 <= delta < 1:
        raise UsageError(f"delta must lie in [0, 1), not {delta}.")
    if not 0 < significance < 1:
        raise UsageError(f"significance must lie strictly between 0 and 1, not {significance}.")


def _checked(scores: ArrayLike, included: ArrayLike) -> tuple[Floats, NDArray[np.bool_]]:
    s, coins = np.asarray(scores, np.float64), np.asarray(included)
    if s.ndim != 1 or s.shape != coins.shape:
        raise DataError(f"every canary needs a score and a coin: scores are of shape {s.shape}, coins {coins.shape}.")
    if not np.isin(coins, (0, 1)).all():
        raise DataError("whether a canary was in is true or false: other values are given.")
    inside = coins.astype(bool)
    m, bad = len(s), int(np.isnan(s).sum())
    if bad:
        raise DataError(f"{bad} of {m} canaries have NaN scores: find out why, rather than dropping them.")
    if m < FEWEST:
        raise InvalidAudit(f"{m} canaries prove nothing about ε: at least {FEWEST} are needed, better some hundreds.")
    rarer = min(int(inside.sum()), int(m - inside.sum()))
    if 2 * bdtr(rarer, m, 0.5) < UNFAIR:
        raise InvalidAudit(
            f"{int(inside.sum())} of {m} canaries were in, which fair coins would not do: the bound holds only where "
            "each canary was put in or left out by a fair coin of its own."
        )
    return s, inside
