"""How many records a claim needs, before anything is tuned: pure functions, the figures of `imprint plan`.

The model to plan for is one that leaks nothing: if it would not pass, no model can. The AUC follows the normal
approximation of the power gate (`gates.judge.power`), which says the same of records at hand. The TPR follows from the
order of exchangeable scores, all but exactly (`passes_tpr`).

Where subjects own several records give `effect`, the factor by which that inflates a variance (`design_effect`): that
many times more records are needed on both sides. Calls without `members` ask for equal numbers on both sides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
from scipy.optimize import brentq
from scipy.special import betainc, ndtr, ndtri

from imprint.errors import UsageError
from imprint.measures.auc import codes
from imprint.measures.threshold import threshold_ranks
from imprint.measures.tpr import ROUNDING, checked_level

POWER = 0.8
MOST = 10_000_000
"""Records beyond which the answer is that no number suffices."""


def auc_error(members: float, nonmembers: float) -> float:
    """Standard error of the AUC where nothing leaks: DeLong's, of records whose scores all differ.

    A member's structural component is then uniform on (j − ½)/m, j = 1 … m, with variance (m² − 1)/12m² · m/(m − 1) and
    its mean a 1/m of that: (1/m + 1/m²)/12, and likewise for non-members. The exact variance of the Mann-Whitney
    statistic, (m + n + 1)/12mn, has 1/mn in place of 1/m² + 1/n²: less, by under one part in the smaller number.

    >>> round(auc_error(500, 500), 4)
    0.0183
    """
    return math.sqrt((1 / members + 1 / members**2 + 1 / nonmembers + 1 / nonmembers**2) / 12)


def passes_auc(budget: float, members: float, nonmembers: float, level: float = 0.95) -> float:
    """Probability that the AUC's upper bound stays below the budget where nothing leaks: the power gate's `passes`."""
    error = auc_error(members, nonmembers)
    return float(ndtr((budget - 0.5) / error - _quantile(level)))


def finds_auc(auc: float, members: float, nonmembers: float, level: float = 0.95) -> float:
    """Probability that the AUC's lower bound exceeds .5 where this is the true one, by the error at .5.

    That error is the larger one, so the truth is a little better.
    """
    return passes_auc(auc, members, nonmembers, level)  # the same distance, covered the other way


def passes_tpr(budget: float, fpr: float, members: int, nonmembers: int, level: float = 0.95) -> float:
    """Probability that the upper bound of the TPR stays below the budget where nothing leaks.

    Members and non-members are exchangeable then: those members above the r-th largest non-member are beta-binomial.
    The bound (`measures.threshold`) weighs the members above many of the non-members; here they are put where they are
    expected, given the members above the r-th, and r is where the bound's weights lie, Vz/√(V + W) beyond fpr · n, V
    and W the variances of the threshold's and the members' ranks. What is left out makes the probability too high: by
    two points in the mean of 51 simulated cases, by five at most (`benchmarks/tpr.py`).

    Returns 0 where fpr · n < 1, as the TPR is refused there.

    >>> round(passes_tpr(0.02, 0.01, 1000, 1000), 2), passes_tpr(0.02, 0.01, 1000, 99)
    (0.38, 0.0)
    """
    from scipy.stats import betabinom  # half a second, needed here alone

    tail = (1 - checked_level(level)) / 2
    if fpr * nonmembers + ROUNDING < 1:
        return 0.0
    beyond = -ndtri(tail) * math.sqrt(nonmembers * fpr * (1 - fpr) * members / (members + nonmembers))
    r = min(nonmembers, fpr * nonmembers + 1 + beyond)
    ranges, weights = threshold_ranks(nonmembers, fpr, tail)
    k = ranges.mean(axis=0)
    higher, lower = np.minimum((k + 1) / r, 1), np.maximum(k + 1 - r, 0) / (nonmembers + 1 - r)

    def over(found: float) -> float:
        above = found * higher + (members - found) * lower  # the (k+1)-th largest
        return 1 - tail - float(weights @ betainc(above + 1, np.maximum(members - above, 1e-12), budget))

    if over(0) >= 0:
        return 0.0
    found = float(brentq(over, 0, members)) if over(members) > 0 else members + 1.0
    count = math.floor(found - 0.5)  # a mean over ranks is no whole number: the steps of the count are sloped
    below, above = betabinom.cdf([count, count + 1], members, r, nonmembers + 1 - r)
    return float(below + (found - 0.5 - count) * (above - below))


def for_auc_budget(
    budget: float, power: float = POWER, members: int | None = None, effect: float = 1.0, level: float = 0.95
) -> int:
    """Non-members with which a model that leaks nothing keeps its AUC's upper bound below a budget.

    Args:
        budget: more than .5; the bound is the upper one of the two-sided interval.
        power: with this probability at least.
        members: how many there are (default: as many as non-members).
        effect: the design effect of either side.

    Raises:
        UsageError: no number suffices, or an argument is out of its range.

    >>> for_auc_budget(0.55), for_auc_budget(0.55, members=1000)
    (525, 356)
    """
    if not 0.5 < budget <= 1:
        raise UsageError(
            f"an AUC budget must lie above .5, which a model that leaks nothing has, and be at most 1, not {budget:g}."
        )
    return _least(lambda m, n: passes_auc(budget, m, n, level), f"an AUC budget of {budget:g}", power, members, effect)


def for_auc(
    auc: float, power: float = POWER, members: int | None = None, effect: float = 1.0, level: float = 0.95
) -> int:
    """Non-members with which this AUC is told from .5. Arguments and errors as in `for_auc_budget`.

    >>> for_auc(0.6), for_auc(0.6, effect=4.0)
    (132, 528)
    """
    if not 0.5 < auc <= 1:
        raise UsageError(f"an AUC to be told from .5 must lie above it and be at most 1, not {auc:g}.")
    return _least(
        lambda m, n: finds_auc(auc, m, n, level), f"telling an AUC of {auc:g} from .5", power, members, effect
    )


def for_tpr_budget(
    budget: float,
    fpr: float,
    power: float = POWER,
    members: int | None = None,
    effect: float = 1.0,
    level: float = 0.95,
) -> int:
    """Non-members with which a model that leaks nothing keeps its TPR's upper bound below a budget.

    Args and errors as in `for_auc_budget`; UsageError also for a budget that does not exceed the rate itself, which is
    the TPR of a model that leaks nothing.

    >>> for_tpr_budget(0.05, 0.01), for_tpr_budget(0.05, 0.01, members=200)
    (288, 613)
    """
    _check_rate(fpr)
    if not fpr < budget <= 1:
        raise UsageError(
            f"a TPR budget must lie above the false positive rate {fpr:g}, which is the TPR of a model that leaks "
            f"nothing, and be at most 1, not {budget:g}."
        )

    def passing(m: float, n: float) -> float:
        return passes_tpr(budget, fpr, math.floor(m + ROUNDING), math.floor(n + ROUNDING), level)

    return _least(passing, f"a TPR budget of {budget:g} at {fpr:.1%} FPR", power, members, effect)


def for_tpr(fpr: float, expected: float = 1) -> int:
    """Non-members with which so many false positives are expected: 1 and the TPR is measured, 10 and it is firm.

    >>> for_tpr(0.01), for_tpr(0.01, expected=10)
    (100, 1000)
    """
    _check_rate(fpr)
    return math.ceil(expected / fpr - ROUNDING)


def design_effect(groups: Iterable[object], correlation: float = 1.0) -> float:
    """How many times the variance of a mean exceeds that of independent records: 1 + (Σk²/Σk − 1)·ρ. Kish 1965.

    With ρ = 1, where all records of a subject have one score, it is the safe bound: subjects count, not records.

    Args:
        groups: the subject of each record of a side, k of them the same; None marks a record on its own.
        correlation: ρ, between the scores of two records of a subject.

    Raises:
        UsageError: no record, or a correlation outside [0, 1].

    >>> design_effect(["a", "a", "b", "b", None, None])    # (4 + 4 + 1 + 1) / 6
    1.6666666666666667
    """
    if not 0 <= correlation <= 1:
        raise UsageError(f"the correlation within a subject must lie in [0, 1], not {correlation}.")
    sizes = np.bincount(codes(groups))
    if not len(sizes):
        raise UsageError("a design effect needs the groups of at least one record.")
    return 1 + (float(sizes @ sizes) / float(sizes.sum()) - 1) * correlation


def _least(chance: Callable[[float, float], float], what: str, power: float, members: int | None, effect: float) -> int:
    """The least number of non-members at which the chance reaches the power; counted in records."""
    if not 0 < power < 1:
        raise UsageError(f"power must lie strictly between 0 and 1, not {power}.")
    if not effect >= 1:
        raise UsageError(f"a design effect is at least 1, not {effect}.")
    if members is not None and members < 1:
        raise UsageError(f"members must be at least 1, not {members}.")

    found = _first(lambda n: chance(n if members is None else members / effect, n) >= power, MOST)
    if found is not None:
        return math.ceil(found * effect - ROUNDING)
    if members is None:
        raise UsageError(f"{what} with {power:.0%} power needs more than {MOST:,} records a side: ask for less.")
    fewest = _first(lambda m: chance(m, MOST) >= power, MOST)
    wanted = f"{math.ceil(fewest * effect):,}" if fewest else f"more than {MOST:,}"
    raise UsageError(
        f"{what} with {power:.0%} power is out of reach of {members} members, whatever the number of non-members: "
        f"at least {wanted} are needed."
    )


def _first(enough: Callable[[int], bool], limit: int) -> int | None:
    """The least number that is enough, where all larger ones are; None if there is none up to the limit."""
    high = 1
    while not enough(high):
        if high == limit:
            return None
        high = min(2 * high, limit)
    low = high // 2  # not enough, or 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _quantile(level: float) -> float:
    return float(-ndtri((1 - checked_level(level)) / 2))


def _check_rate(fpr: float) -> None:
    if not 0 < fpr < 1:
        raise UsageError(f"fpr must lie strictly between 0 and 1, not {fpr}.")
