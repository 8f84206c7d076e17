"""Look-ups in the table of results, and the two decisions a report rests on: the best epoch and the budget."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import pandas as pd

from imprint.attacks import ATTACKS, evidence_needed
from imprint.evidence import TUNED_ONLY, says_nothing_of_base
from imprint.rows import Cell, Grid
from imprint.types import Interval

LIMITS = {"auc": "AUC", "tpr_at_10pct_fpr": "TPR at 10% FPR", "tpr_at_1pct_fpr": "TPR at 1% FPR"}
"""The metrics a budget may limit, and what people call them."""
UNFINISHED = ("failed", "unfinished")


def needs_reference(attack: str) -> bool:
    """Whether an attack compares with the base, so that on the base itself it knows nothing by definition.

    >>> needs_reference("ref"), needs_reference("loss")
    (True, False)
    """
    return attack in ATTACKS and says_nothing_of_base(attack) and not {*evidence_needed(attack)} & {*TUNED_ONLY}


@dataclass(frozen=True)
class Reading:
    """One measurement: `interval` is None where it was refused (`status` says why), its bounds NaN where unknown."""

    interval: Interval | None
    status: str

    @property
    def value(self) -> float:
        """NaN where refused."""
        return self.interval.value if self.interval else math.nan


ABSENT = Reading(None, "not measured")


@dataclass(frozen=True)
class Curve:
    """Everything measured of one cell, by (epoch, attack, metric)."""

    readings: Mapping[tuple[int, str, str], Reading]

    def perplexity(self, epoch: int) -> Reading:
        """Of the validation records."""
        return self.readings.get((epoch, "", "perplexity"), ABSENT)

    def get(self, epoch: int, attack: str, metric: str = "auc") -> Reading:
        """A measure of an attack."""
        return self.readings.get((epoch, attack, metric), ABSENT)

    @cached_property
    def epochs(self) -> list[int]:
        """Every epoch with a row, in order; the last of a diverged run has no values."""
        return sorted({epoch for epoch, _, _ in self.readings})

    @cached_property
    def last(self) -> int | None:
        """The newest tuned epoch; None before there is one."""
        return self.epochs[-1] if self.epochs and self.epochs[-1] > 0 else None

    @cached_property
    def last_finite(self) -> int | None:
        """The newest tuned epoch that has values."""
        return max((e for e in self.epochs if e > 0 and self.perplexity(e).interval), default=None)

    @cached_property
    def best(self) -> int | None:
        """The epoch of lowest validation perplexity, the earliest of equals; 0 is the untouched base."""
        finite = [(self.perplexity(e).value, e) for e in self.epochs if math.isfinite(self.perplexity(e).value)]
        return min(finite)[1] if finite else None


def curves(frame: pd.DataFrame) -> dict[str, Curve]:
    """The results table as one `Curve` per run id."""
    found: dict[str, dict[tuple[int, str, str], Reading]] = {}
    columns = ("run_id", "epoch", "attack", "metric", "value", "low", "high", "status")
    for run_id, epoch, attack, metric, value, low, high, status in zip(*(frame[c] for c in columns), strict=True):
        interval = None if pd.isna(value) else Interval(float(value), _bound(low), _bound(high))
        found.setdefault(run_id, {})[int(epoch), attack, metric] = Reading(interval, status)
    return {run_id: Curve(readings) for run_id, readings in found.items()}


def _bound(x: float | None) -> float:
    return math.nan if x is None or pd.isna(x) else float(x)


def leading_attack(grid: Grid, found: Iterable[Curve]) -> str:
    """The attack that the budget names; else that of the highest AUC of any cell at its last epoch."""
    if named := (grid.budget or {}).get("attack"):
        return str(named)
    lasts = [(curve, curve.last) for curve in found if curve.last is not None]

    def highest(attack: str) -> float:
        return max((r.value for curve, last in lasts if (r := curve.get(last, attack)).interval), default=0.0)

    return max(grid.attacks, key=highest)


def keeps_budget(grid: Grid, curve: Curve, cell: Cell) -> bool | None:
    """Whether the *upper* bounds at the epoch that is judged are all below the budget's limits.

    Held to each limit is the named attack or, where none is named, every attack of the grid.

    Returns:
        None where nobody can say: no budget; a cell that failed, is unfinished, or diverged before it was ever better
        than the base; a bound that was refused or never measured while no other is over its limit.
    """
    status, epoch = cell.outcome["status"], judged_epoch(cell, curve)
    if status in UNFINISHED or epoch is None or (epoch == 0 and status != "done"):
        return None
    return keeps_at(grid, curve, epoch)


def judged_epoch(cell: Cell, curve: Curve) -> int | None:
    """What one would ship: the epoch of best validation perplexity; of a model tuned elsewhere, the last checkpoint."""
    return curve.last if cell.training is None else curve.best


def keeps_at(grid: Grid, curve: Curve, epoch: int) -> bool | None:
    """Whether the upper bounds at an epoch are all below the budget's limits; None where nobody can say."""
    limits = {metric: (grid.budget or {}).get(metric) for metric in LIMITS}
    named = (grid.budget or {}).get("attack")
    kept = [
        _below(curve.get(epoch, attack, metric), limit, fixed=epoch == 0 and needs_reference(attack))
        for attack in ([named] if named else grid.attacks)
        for metric, limit in limits.items()
        if limit is not None
    ]
    if False in kept:
        return False
    return True if kept and None not in kept else None


def _below(reading: Reading, limit: float, fixed: bool) -> bool | None:
    """`fixed`: nothing has been tuned, and an attack that compares with the base is at .5 with no uncertainty."""
    bound = math.nan if reading.interval is None else reading.interval.value if fixed else reading.interval.high
    return None if math.isnan(bound) else bound < limit
