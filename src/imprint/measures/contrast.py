"""The difference of two AUCs of different records, whose members and non-members are compared among themselves.

Its interval is put together from those of the two AUCs (Newcombe 1998; with the correlation that subjects with records
in both bring, Zou and Donner 2008): it holds its level where an AUC is near 1 and the error of a difference is not
normal, and where nothing varies it is as wide as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import expit, logit, ndtri

from imprint.measures.auc import ZERO, Codes, components
from imprint.measures.tpr import checked_level, clopper_pearson, two_sides
from imprint.types import Floats, Interval

Mask = NDArray[np.bool_]
Sides = tuple[Floats, Floats]
"""[M] scores of the members, [N] of the non-members; higher = more likely a member."""


def auc_difference(
    sides: Sides, inside: tuple[Mask, Mask], subjects: tuple[Codes, Codes], level: float = 0.95
) -> tuple[Interval, float]:
    """AUC of the records inside less that of those outside, with its interval, and the p-value of no difference.

    p is told down to 2e-12. Subjects with both members and non-members count as one on either side.

    Args:
        sides: [M] scores of members, [N] of non-members.
        inside: [M] and [N] whether a record is inside.
        subjects: [M] and [N] codes of subjects.

    Raises:
        DataError: members or non-members are wanting inside or outside, or a score is NaN.
        UsageError: a level outside (0, 1).
    """
    a, b = (_auc(sides, here, subjects) for here in (inside, (~inside[0], ~inside[1])))
    correlation = float(a.sums @ b.sums) / (a.error * b.error) if a.error * b.error > 0 else 0.0
    # k subjects cannot prove that two AUCs move as one, which would leave their difference no error at all.
    correlation = min(correlation, 1 - 1 / min(a.pairs, b.pairs))
    value = a.value - b.value

    def bounds(tail: float) -> tuple[float, float]:
        (a_low, a_high), (b_low, b_high) = a.reach(tail), b.reach(tail)
        return value - _joined(a_low, b_high, correlation), value + _joined(a_high, b_low, correlation)

    low, high = bounds((1 - checked_level(level)) / 2)
    return Interval(value, max(-1.0, low), min(1.0, high)), _p(bounds, value)


@dataclass(frozen=True)
class _AUC:
    """An AUC as `auc` finds it, open to bounds at any level.

    Attributes:
        value: P(a member scores above a non-member).
        sums: [subjects of both sides] its structural components by subject, whose squares add up to its variance.
        pairs: independent pairs of a member and a non-member, for where nothing varies.
    """

    value: float
    sums: Floats
    pairs: int

    @property
    def error(self) -> float:
        variance = float(self.sums @ self.sums)
        return math.sqrt(variance) if variance > ZERO else 0.0

    def reach(self, tail: float) -> tuple[float, float]:
        """How far the lower and the upper bound lie from the value."""
        if self.error > 0:
            half = -ndtri(tail) * self.error / (self.value * (1 - self.value))
            low, high = expit(logit(self.value) + np.array([-half, half]))
        else:
            low, high = clopper_pearson(self.value * self.pairs, self.pairs, 1 - 2 * tail)
        return self.value - float(low), float(high) - self.value


def _auc(sides: Sides, here: tuple[Mask, Mask], subjects: tuple[Codes, Codes]) -> _AUC:
    v_M, v_N = components(*two_sides(sides[0][here[0]], sides[1][here[1]]))
    of = subjects[0][here[0]], subjects[1][here[1]]
    counts = [len(np.unique(owners)) for owners in of]
    span = 1 + max(int(owners.max()) for owners in subjects)
    sums = [
        math.sqrt(count / max(1, count - 1)) * np.bincount(owners, v - v.mean(), minlength=span) / len(v)
        for v, owners, count in zip((v_M, v_N), of, counts, strict=True)
    ]
    known = float(min(counts) > 1)  # a single subject on a side has no variance to estimate
    return _AUC(float(v_M.mean()), known * np.concatenate(sums), min(counts))


def _joined(one: float, other: float, correlation: float) -> float:
    """The distance of a bound of the difference, from those of the two numbers in the directions that add up."""
    return math.sqrt(max(0.0, one**2 + other**2 - 2 * correlation * one * other))


def _p(bounds: Callable[[float], tuple[float, float]], value: float) -> float:
    """Twice the tail at which the interval ends at 0."""

    def end(log_tail: float) -> float:
        return bounds(math.exp(log_tail))[int(value < 0)] * math.copysign(1.0, value)

    least, most = math.log(1e-12), math.log(0.499999)
    if value == 0 or end(most) <= 0:
        return 1.0
    return 2 * math.exp(brentq(end, least, most)) if end(least) < 0 else 2e-12
