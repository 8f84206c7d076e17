"""Leakage at equal utility: a run's path through (perplexity, AUC) read where it has learned as much as another.

Methods differ in how much they learn in an epoch, so an AUC after so many epochs compares unlike things. Here a run
is stopped at the *first* point of its path where validation perplexity is down to a given value: early stopping.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from imprint.measures.estimate import Estimate


@dataclass(frozen=True)
class Checkpoint:
    """One epoch of a run.

    Attributes:
        epoch: 0 is the untouched base.
        log_perplexity: of the validation records, nats per token.
        auc: by attack.
    """

    epoch: int
    log_perplexity: Estimate
    auc: dict[str, Estimate]


@dataclass(frozen=True)
class Stop:
    """Where a path reaches a perplexity: `share` of the way from the checkpoint before `epoch` to `epoch`.

    Attributes:
        auc: read in a straight line between the two; too high where the path bends upwards, as most do.
        before, after: the AUC at the checkpoints on either side; both are the one that is reached exactly.
    """

    epoch: int
    share: float
    auc: Estimate
    before: Estimate
    after: Estimate


def best(path: Sequence[Checkpoint]) -> Checkpoint:
    """The checkpoint of lowest validation perplexity, the earliest of equals; the base counts."""
    return min(path, key=lambda point: (point.log_perplexity.value, point.epoch))


def at_perplexity(path: Sequence[Checkpoint], target: Estimate, attack: str) -> Stop | None:
    """The AUC where the path first comes down to `target` (log perplexity); None where it never does.

    Between two checkpoints both the log perplexity and the AUC are taken to be linear:
    A = (1 − w)·A₀ + w·A₁ with w = (H₀ − target) / (H₀ − H₁). The influences of A include those of w, so the interval
    also covers the uncertainty of both perplexities on the validation records.

    Args:
        path: checkpoints in the order of training, beginning with the base.
        target: log perplexity to reach, nats per token.
    """
    for before, after in itertools.pairwise(path):
        H0, H1 = before.log_perplexity, after.log_perplexity
        if H1.value <= target.value < H0.value:
            w = (H0.value - target.value) / (H0.value - H1.value)
            a, b = before.auc[attack], after.auc[attack]
            slope = (b.value - a.value) / (H0.value - H1.value)
            moved = slope * ((1 - w) * H0 + w * H1 - target)  # of value 0: what it holds are influences
            return Stop(after.epoch, w, (1 - w) * a + w * b + moved, b if w == 1 else a, b)
    return None


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (perplexity, leakage) to which no other is better or equal in both, by perplexity.

    >>> pareto([(9.0, 0.5), (8.0, 0.6), (8.5, 0.7), (7.0, 0.9), (7.0, 0.95)])
    [3, 1, 0]
    """
    front: list[int] = []
    for n in sorted(range(len(points)), key=lambda n: points[n]):
        if not front or points[n][1] < points[front[-1]][1]:
            front.append(n)
    return front
