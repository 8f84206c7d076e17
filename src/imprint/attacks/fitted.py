"""Attacks that are fitted on records whose membership is known, and applied to the others.

`known` [N] holds 1 for records that are known to have been tuned on, 0 for records known not to have been, NaN for
those that are evaluated; `population` [N] says who is known not to have been. Nothing is fitted on a record that is
evaluated: whatever stands there, the weights are the same to the bit. Known records have scores too, of records that
were fitted on: they look better than they are.

Higher = more likely a member. A record with a NaN in what an attack reads scores NaN, and is not fitted on.
The doctests repeat the two texts of `imprint.attacks.worked`, "a" a member and "b" not, and score both once more.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from imprint.attacks.reference import ez_mia, ratio, ref, ref_min_k_plus, wbc
from imprint.attacks.regression import Linear, least_squares, logistic, variance
from imprint.attacks.sequence import sequence_features
from imprint.attacks.single import loss, min_k, min_k_plus, zlib
from imprint.errors import InvalidAudit, UsageError
from imprint.types import Floats, TokenStats

FEWEST = 20
"""Known members, and known non-members, that `camia` and `ensemble` are fitted on at least."""
FEWEST_NONMEMBERS = 50
"""Non-members that `quantile` is fitted on at least: six features shape both a mean and a spread."""
RIDGE = 1.0
"""Penalty of `quantile`'s regression of the mean, as if one more record said that no feature mattered."""
SPREAD_RIDGE = 10.0
"""Penalty of its regression of the spread, of which a record says much less than of the mean."""
FLOOR = 0.1
"""Least predicted spread, as a share of the spread over the whole population: no feature makes a record certain."""
ROUNDING = 1e-5
"""Least predicted spread in nats per token: differences below it are float32's."""
FAR = 1e3
"""Mean deviations from the median beyond which a score is taken to lie just there; ±∞ too."""

Rows = NDArray[np.bool_]


def camia(target: TokenStats, known: Floats) -> Floats:
    """CAMIA-like: log-odds of a member given −L(x) and the shape of its log p sequence. After Chang et al. 2025.

    Which way a feature points and what it weighs is learned from known records alone: a ridge logistic regression
    (`regression.logistic`) on −L and `sequence_features`, each squashed as in `ensemble`. Needs the target's pass.
    Returns [N] log-odds, natural logarithm, where members and non-members are equally many.
    Raises InvalidAudit with fewer than `FEWEST` known members or known non-members.

    >>> from imprint.attacks.worked import TARGET
    >>> known = np.array([1.0, 0.0] * 20 + [np.nan, np.nan])
    >>> scores = camia(TARGET.select(np.tile([0, 1], 21)), known)
    >>> bool(scores[40] > 0 > scores[41])
    True
    """
    return _log_odds(np.column_stack([loss(target), sequence_features(target)]), known, "camia")


def ensemble(target: TokenStats, reference: TokenStats, zlib_bytes: NDArray[np.int64], known: Floats) -> Floats:
    """Ensemble: log-odds of a member given its scores by the attacks of one pass. Stacking, Wolpert 1992.

    The attacks are LOSS, Ref, Zlib, Min-K%, Min-K%++, Ratio, Ref-Min-K%++, WBC and EZ-MIA. Every score becomes
    arcsinh((s − median)/mean deviation from it) over the known records: linear in the middle, logarithmic in the
    tails, so that far and infinite scores do not outweigh the rest; the order stays. Then a ridge logistic regression
    (`regression.logistic`), both classes weighing the same, its penalty chosen by cross-validation among the known
    records. What it knows it must learn: where little leaks and few records are known, it finds less than Ref does.

    Needs the target's and the reference's pass and [N] sizes of the zlib-compressed texts. Returns [N] log-odds,
    natural logarithm, where members and non-members are equally many; else add the logarithm of their ratio.
    Raises InvalidAudit with fewer than `FEWEST` known members or known non-members.

    >>> from imprint.attacks.worked import REFERENCE, TARGET, ZLIB_BYTES
    >>> twice, known = np.tile([0, 1], 21), np.array([1.0, 0.0] * 20 + [np.nan, np.nan])
    >>> scores = ensemble(TARGET.select(twice), REFERENCE.select(twice), ZLIB_BYTES[twice], known)
    >>> bool(scores[40] > 0 > scores[41])
    True
    """
    scores = (
        loss(target),
        ref(target, reference),
        zlib(target, zlib_bytes),
        min_k(target),
        min_k_plus(target),
        ratio(target, reference),
        ref_min_k_plus(target, reference),
        wbc(target, reference),
        ez_mia(target, reference),
    )
    return _log_odds(np.column_stack(scores), known, "ensemble")


def quantile(target: TokenStats, reference: TokenStats, population: Rows) -> Floats:
    """Quantile: (s(x) − μ(x)) / σ(x), s = L_r − L_t against non-members like x. Bertran et al. 2023.

    μ and log σ² are linear in features that tuning does not touch (`reference_features`): ridge regressions fitted on
    known non-members, σ on residuals that leave the record itself out. σ is at least `FLOOR` of their overall spread.
    Under a normal law 1.64 is the 95% quantile of s among non-members like x. Needs the target's and the reference's
    pass and the population, no known member and no shadow model. Returns [N] scores in standard deviations.
    Raises InvalidAudit with fewer than `FEWEST_NONMEMBERS` records in the population.

    >>> from imprint.attacks.worked import REFERENCE, TARGET
    >>> rows = np.array([1] * 50 + [0, 1])                              # 50 times "b", which gained nothing
    >>> scores = quantile(TARGET.select(rows), REFERENCE.select(rows), np.arange(52) < 50)
    >>> [round(float(score)) for score in scores[-2:]]                  # "a" gained 2 nats, over ROUNDING = 1e-5
    [200000, 0]
    """
    features, gain = reference_features(reference), ref(target, reference)
    rows = np.asarray(population, np.bool_) & ~np.isnan(np.column_stack([features, gain])).any(axis=1)
    if rows.sum() < FEWEST_NONMEMBERS:
        raise InvalidAudit(
            f"attack 'quantile' is fitted on at least {FEWEST_NONMEMBERS} records that nobody tuned on and nobody "
            f"evaluates, and there are {rows.sum()}: raise `data.validation` or set `data.auxiliary` in the recipe."
        )
    mean, residuals = least_squares(features[rows], gain[rows], RIDGE)
    overall = float(np.sqrt(np.mean(residuals**2)))
    least = max(FLOOR * overall, ROUNDING)
    if overall < ROUNDING:
        return (gain - mean(features)) / least
    log_variance = variance(features[rows], residuals**2, SPREAD_RIDGE)(features)
    return (gain - mean(features)) / np.maximum(np.exp(np.clip(log_variance, -100, 100) / 2), least)


def reference_features(reference: TokenStats) -> Floats:
    """[N, 6] what a text is like to a model that was not tuned on it: mean and standard deviation of log p, mean
    entropy, mean spread of log p under p, share of tokens that are the likeliest, log of the number of tokens.

    >>> from imprint.attacks.worked import REFERENCE
    >>> reference_features(REFERENCE).round(3).tolist()     # "a": (3 + 4 + 8)/3 = 5, √((4 + 1 + 9)/3) = 2.160, log 3
    [[-5.0, 2.16, 2.0, 2.0, 0.0, 1.099], [-4.0, 0.0, 2.0, 4.0, 0.0, 0.0]]
    """

    def mean(values_R: NDArray[np.floating]) -> Floats:
        sums: Floats = np.add.reduceat(values_R.astype(np.float64), reference.offsets[:-1])
        return sums / reference.lengths

    from_mean_R = reference.logp + np.repeat(reference.nll, reference.lengths)
    return np.column_stack(
        [
            -reference.nll,
            np.sqrt(mean(from_mean_R**2)),
            mean(-reference.mean),
            mean(reference.std),
            mean(reference.top.astype(np.float64)),
            np.log(reference.lengths),
        ]
    )


def fitted_on(features: Floats, known: Floats, attack: str) -> Linear:
    """The logistic regression behind `camia` and `ensemble`, of [N, F] squashed features."""
    members, nonmembers = (_known(known, side, features) for side in (1, 0))
    if min(members.sum(), nonmembers.sum()) < FEWEST:
        raise InvalidAudit(
            f"attack {attack!r} is fitted on at least {FEWEST} known members and {FEWEST} known non-members, and "
            f"there are {members.sum()} and {nonmembers.sum()}: set `data.auxiliary` in the recipe."
        )
    rows = members | nonmembers
    return logistic(features[rows], members[rows])


def squashed(features: Floats, known: Floats) -> Floats:
    """[N, F] arcsinh of each feature's deviation from the median, in mean deviations, both of the known records.

    >>> known = np.array([0.0, 1.0, 0.0, np.nan])       # median 2, mean deviation 5/3: arcsinh of -.6, 0, 2.4, FAR
    >>> squashed(np.array([[1.0], [2.0], [6.0], [np.inf]]), known).round(3).tolist()
    [[-0.569], [0.0], [1.609], [7.601]]
    """
    columns = [_squashed(column, column[~np.isnan(known) & np.isfinite(column)]) for column in features.T]
    return np.column_stack(columns)


def _squashed(column: Floats, known: Floats) -> Floats:
    middle = float(np.median(known)) if len(known) else 0.0
    deviation = float(np.mean(np.abs(known - middle))) if len(known) else 0.0
    return np.arcsinh(np.clip((column - middle) / (deviation or 1.0), -FAR, FAR))


def _log_odds(features: Floats, known: Floats, attack: str) -> Floats:
    squeezed = squashed(features, known)
    return fitted_on(squeezed, known, attack)(squeezed)


def _known(known: Floats, side: int, features: Floats) -> Rows:
    """[N] whether a record is known to be on that side and has all its features."""
    wrong = ~(np.isnan(known) | (known == 0) | (known == 1))
    if wrong.any():
        raise UsageError(
            f"known must hold 1 (known member), 0 (known non-member) or NaN (evaluated), and record "
            f"{int(np.flatnonzero(wrong)[0])} has {known[wrong][0]}."
        )
    rows: Rows = (known == side) & ~np.isnan(features).any(axis=1)
    return rows
