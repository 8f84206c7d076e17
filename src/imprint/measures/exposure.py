"""Exposure: how many bits less a canary leaves to guess, because a model was tuned on it.

Carlini, Liu, Erlingsson, Kos and Song 2019, "The Secret Sharer". A canary is one of a space R of texts of one form,
each as likely as the other before training. Exact exposure ranks it among all of them; where they cannot be counted, a
skew-normal distribution fitted to the losses of canaries that were not inserted stands for the rest of the space.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize
from scipy.special import log_ndtr, ndtr, owens_t

from imprint.errors import DataError, InvalidAudit
from imprint.types import Floats

FEWEST = 20
"""References that a distribution is fitted to, at least."""
CANCELS = 1e-6
"""Below this Φ(z) − 2T(z, α), a difference, has lost too many digits."""
_LAGUERRE = np.polynomial.laguerre.laggauss(64)


def exposure(losses: ArrayLike, canary: float) -> float:
    """log2|R| − log2 rank: the canary's rank by loss among all candidates of its space, rank 1 = the lowest loss.

    The rank is the number of candidates whose loss is at most the canary's, as in the paper, so that ties count against
    it: where all losses are equal exposure is 0. log2|R| at most.

    Args:
        losses: [|R|] of every candidate, the canary's own among them; nats, per token or in all.
        canary: its own loss, the very number that stands in `losses`.

    Raises:
        DataError: a loss is NaN, fewer than two candidates, or the canary's loss is not among them.

    >>> exposure([5.0, 3.0, 4.0, 1.0, 2.0, 6.0, 7.0, 8.0], 2.0)    # second of eight: 3 − 1
    2.0
    """
    space = _without_nan(losses, "candidates")
    if len(space) < 2:
        raise DataError(f"a canary is ranked among at least 2 candidates: there are {len(space)}.")
    if not np.any(space == canary):
        raise DataError(
            f"the canary's own loss {canary} is not among those of its {len(space)} candidates: score all in one pass, "
            "and take its loss from there."
        )
    return math.log2(len(space)) - math.log2(int(np.sum(space <= canary)))


def exposure_fitted(losses: ArrayLike, references: ArrayLike) -> Floats:
    """−log2 P[a canary that was not inserted has so low a loss], under a skew-normal fitted to some that were not.

    Beyond log2 of the number of references it extrapolates. Nothing bounds it: where the size of the space is known,
    log2|R| does. The logarithm is computed without the probability, which underflows: at forty deviations it still
    tells one canary from another.

    Args:
        losses: of inserted canaries, any shape; nats. NaN gives NaN.
        references: [n] losses of canaries of the same form that were not inserted, under the same model.

    Returns:
        Bits, of the shape of `losses`.

    Raises:
        InvalidAudit: fewer than 20 references, or all of one loss.
        DataError: a reference is NaN or infinite.

    >>> references = np.linspace(3, 5, 21)
    >>> exposure_fitted([4.0, 3.0, 1.0], references).round(1).tolist()
    [1.0, 4.3, 21.4]
    """
    others = _without_nan(references, "references")
    if not np.isfinite(others).all():
        raise DataError(f"{int(np.isinf(others).sum())} of {len(others)} references have an infinite loss.")
    if len(others) < FEWEST:
        raise InvalidAudit(
            f"a distribution is fitted to at least {FEWEST} canaries that were not inserted: there are {len(others)}."
        )
    if np.ptp(others) <= 1e-12 * np.max(np.abs(others)):
        raise InvalidAudit(f"all {len(others)} references have the same loss: no distribution can be fitted to them.")
    location, scale, shape = fit_skew_normal(others)
    z = (np.asarray(losses, np.float64) - location) / scale
    bits = [-log_cdf(float(one), shape) / math.log(2) for one in z.ravel()]
    found: Floats = np.maximum(0.0, np.reshape(bits, z.shape)) + 0.0  # NaN stays NaN, −0 becomes 0
    return found


def fit_skew_normal(x: Floats) -> tuple[float, float, float]:
    """Location ξ, scale ω and shape α by penalised maximum likelihood. Azzalini and Arellano-Valle 2013.

    The plain maximum often lies at α = ∞, where nothing is possible below ξ and any canary there would have an exposure
    of millions of bits (`scipy.stats.skewnorm.fit` does so on a quarter of samples of 25 with α = 3).
    """
    mean, deviation = float(x.mean()), float(x.std())
    y = (x - mean) / deviation
    skew = min(max(float(np.mean(y**3)), -0.9), 0.9)  # a skew-normal's is below .9953
    ratio = np.cbrt(2 * skew / (4 - math.pi))
    centre = ratio / math.sqrt(1 + ratio**2)
    delta = centre * math.sqrt(math.pi / 2)
    spread = 1 / math.sqrt(1 - centre**2)

    def cost(parameters: Floats) -> float:
        location, log_scale, shape = parameters
        z = (y - location) / math.exp(log_scale)
        return float(0.875913 * np.log1p(0.856250 * shape**2) - np.sum(_log_density(z, shape) - log_scale))

    moments = [-spread * centre, math.log(spread), delta / math.sqrt(1 - delta**2)]
    location, log_scale, shape = minimize(cost, moments).x
    return mean + deviation * float(location), deviation * math.exp(log_scale), float(shape)


def log_cdf(z: float, shape: float) -> float:
    """The logarithm of the skew-normal's distribution function, exact to 1e-9 in either tail.

    Where Φ(z) − 2T(z, α) cancels, to the left of the mode, the density is integrated relative to that at z
    (Gauss-Laguerre): it is log-concave and so falls at least as quickly as exp(−slope · distance).

    >>> round(log_cdf(-40.0, 0.0), 4), round(log_cdf(-1.0, 5.0), 4)    # log Φ(−40); nearly nothing
    (-804.6084, -19.1163)
    """
    if math.isnan(z) or math.isinf(z):
        return math.nan if math.isnan(z) else min(z, 0.0)
    direct = float(ndtr(z) - 2 * owens_t(z, shape))
    if direct > CANCELS:
        return math.log(direct)
    mills = math.exp(-((shape * z) ** 2) / 2 - 0.5 * math.log(2 * math.pi) - float(log_ndtr(shape * z)))
    slope, here = shape * mills - z, float(_log_density(z, shape))
    u, weights = _LAGUERRE
    area = weights @ np.exp(_log_density(z - u / slope, shape) - here + u)
    return here - math.log(slope) + math.log(area)


def _log_density(z: Floats | float, shape: float) -> Floats:
    """log 2φ(z)Φ(αz)."""
    density: Floats = 0.5 * math.log(2 / math.pi) - np.square(z) / 2 + log_ndtr(shape * np.asarray(z))
    return density


def _without_nan(losses: ArrayLike, what: str) -> Floats:
    found = np.asarray(losses, np.float64)
    if found.ndim != 1:
        raise DataError(f"losses of {what} must be a vector, not of shape {found.shape}.")
    bad = int(np.isnan(found).sum())
    if bad:
        raise DataError(f"{bad} of {len(found)} {what} have a NaN loss: find out why, rather than dropping them.")
    return found
