"""Small ridge regressions by Newton's method: logistic, least squares, and of a variance.

Some attacks are fitted on records whose membership is known. They have a dozen features and some hundred records, and
are recomputed whenever a report is: these sixty lines need no solver that warns, and always give the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from imprint.types import Floats

RIDGES = (1000.0, 100.0, 10.0, 1.0, 0.1)
"""The penalties that `logistic` chooses from, the strongest first: of equally good ones it is taken."""
FOLDS = 5
_MOST_STEPS = 200
_CLOSE = 1e-12
"""Newton's decrement, about twice what is left to gain of the objective, at which it ends."""

Loss = Callable[[Floats], tuple[Floats, Floats, Floats]]
"""[N] η → [N] losses, which are convex in η, and their first and second derivatives."""


@dataclass(frozen=True)
class Linear:
    """η(x) = intercept + Σ_f weights_f · (x_f − centre_f) / spread_f.

    Attributes:
        centre: [F] means of the features over the records it was fitted on.
        spread: [F] their standard deviations; 1 for a feature that is constant there.
        weights: [F] per standard deviation.
        intercept: η at the centre.
    """

    centre: Floats
    spread: Floats
    weights: Floats
    intercept: float

    def __call__(self, features: Floats) -> Floats:
        """[N] η of [N, F] features; each record's by itself, to the bit."""
        eta: Floats = np.sum((features - self.centre) / self.spread * self.weights, axis=1) + self.intercept
        return eta


def fit(features: Floats, loss: Loss, ridge: float, start: float = 0.0) -> Linear:
    """The `Linear` that minimises Σ_n loss(η_n) + ½·ridge·Σ_f weights_f², the intercept free.

    Args:
        features: [N, F], finite.
        start: where the intercept begins.
    """
    centre, spread = features.mean(axis=0), features.std(axis=0)
    spread = np.where(spread > 1e-12 * np.abs(centre), spread, 1.0)  # of a constant, rounding may be left
    X = np.column_stack([np.ones(len(features)), (features - centre) / spread])
    penalty = np.full(X.shape[1], ridge)
    penalty[0] = 0.0

    def objective(w: Floats) -> float:
        return float(np.sum(loss(X @ w)[0]) + w @ (penalty * w) / 2)

    w = np.zeros(X.shape[1])
    w[0] = start
    for _ in range(_MOST_STEPS):
        _, slope, curvature = loss(X @ w)
        gradient = X.T @ slope + penalty * w
        step = np.linalg.solve(X.T @ (curvature[:, None] * X) + np.diag(penalty), gradient)
        decrement, value, size = float(gradient @ step), objective(w), 1.0
        if decrement < _CLOSE * (1 + abs(value)):
            w = w - step
            break
        while size > 1e-9 and not objective(w - size * step) <= value - 1e-4 * size * decrement:
            size /= 2
        w = w - size * step
    return Linear(centre, spread, w[1:], float(w[0]))


def logistic(features: Floats, labels: NDArray[np.bool_], ridge: float | None = None) -> Linear:
    """Ridge logistic regression, both classes weighing the same: η are log-odds at even prior odds.

    Args:
        features: [N, F], finite.
        labels: [N] with both classes among them.
        ridge: the penalty on standardised weights, 1/C of scikit-learn; None chooses from `RIDGES` by the held-out
            loss of five folds.

    >>> model = logistic(np.array([[-1.0], [1.0], [-1.0], [1.0]]), np.array([False, False, True, True]), ridge=1.0)
    >>> model(np.array([[5.0]])).tolist()       # nothing to be learned
    [0.0]
    """
    if ridge is None:
        ridge = min(RIDGES, key=lambda one: _held_out_loss(features, labels, one))
    return fit(features, _log_loss(labels), ridge)


def variance(features: Floats, squares: Floats, ridge: float) -> Linear:
    """The log variance, linear in the features, of residuals with these squares, as if normal (Harvey 1976).

    Args:
        features: [N, F], finite.
        squares: [N] squared residuals, not all 0.
    """
    start = float(np.log(squares.mean()))

    def loss(eta: Floats) -> tuple[Floats, Floats, Floats]:
        ratio = squares * np.exp(np.minimum(-eta, 700.0))  # a first step may go far
        return (eta + ratio) / 2, (1 - ratio) / 2, ratio / 2

    return fit(features, loss, ridge, start)


def least_squares(features: Floats, values: Floats, ridge: float) -> tuple[Linear, Floats]:
    """Ridge regression, and [N] what each value differs from its prediction by a fit without it."""
    line = fit(features, lambda eta: ((values - eta) ** 2 / 2, eta - values, np.ones_like(eta)), ridge)
    X = np.column_stack([np.ones(len(features)), (features - line.centre) / line.spread])
    inverse = np.linalg.inv(X.T @ X + np.diag([0.0] + [ridge] * features.shape[1]))
    leverage = np.sum(X @ inverse * X, axis=1)
    left_out: Floats = (values - line(features)) / (1 - leverage)
    return line, left_out


def _log_loss(labels: NDArray[np.bool_]) -> Loss:
    sign = np.where(labels, 1.0, -1.0)
    share = np.where(labels, labels.mean(), 1 - labels.mean())
    weight = 0.5 / share

    def loss(eta: Floats) -> tuple[Floats, Floats, Floats]:
        wrong = np.exp(-np.logaddexp(0.0, sign * eta))  # the probability of the other class
        return weight * np.logaddexp(0.0, -sign * eta), -weight * sign * wrong, weight * wrong * (1 - wrong)

    return loss


def _held_out_loss(features: Floats, labels: NDArray[np.bool_], ridge: float) -> float:
    """Sum over the folds of the mean loss of the records that a fit has not seen."""
    total = 0.0
    for held_out in _folds(labels):
        model = fit(features[~held_out], _log_loss(labels[~held_out]), ridge)
        total += float(np.mean(_log_loss(labels[held_out])(model(features[held_out]))[0]))
    return total


def _folds(labels: NDArray[np.bool_]) -> Iterator[NDArray[np.bool_]]:
    """[N] masks of the records held out: of each class every fifth."""
    place = np.where(labels, np.cumsum(labels), np.cumsum(~labels))
    for fold in range(FOLDS):
        yield place % FOLDS == fold
