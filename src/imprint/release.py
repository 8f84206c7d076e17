"""May this model leave the house? The verdict of an output folder: an exit code, and what it rests on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import pandas as pd

from imprint.errors import UsageError, unknown
from imprint.gates.judge import Gate
from imprint.report.audited import title
from imprint.report.notes import Records, records, refused
from imprint.report.readings import (
    ABSENT,
    LIMITS,
    UNFINISHED,
    Curve,
    Reading,
    curves,
    judged_epoch,
    keeps_at,
    keeps_budget,
    needs_reference,
)
from imprint.report.tables import places
from imprint.report.terms import Terms, point_names, terms
from imprint.report.validity import validity
from imprint.report.words import clean, plural
from imprint.rows import Cell, Grid
from imprint.spec import Budget
from imprint.types import Interval

PASS, LEAKS, INVALID, UNABLE = 0, 1, 2, 3
"""The exit codes."""


@dataclass(frozen=True)
class Held:
    """One measure of one attack, held to its limit; without a budget there is none."""

    attack: str
    metric: str
    reading: Reading
    limit: float | None

    @property
    def excess(self) -> float:
        """By how much the upper bound is over the limit; below zero it is kept, NaN where nobody can say."""
        bound = self.reading.interval.high if self.reading.interval else math.nan
        return math.nan if self.limit is None else bound - self.limit


@dataclass(frozen=True)
class Judged:
    """One cell at the point that is judged.

    Attributes:
        name: of the method, and of the checkpoint where one is judged.
        kept: whether the budget is kept; None where nobody can say, or there is none.
        held: everything that the budget limits or, without one, every AUC.
        keeping: names of its checkpoints up to the first that does not keep the budget.
        points: how many checkpoints it has.
    """

    name: str
    kept: bool | None
    held: tuple[Held, ...]
    keeping: tuple[str, ...] = ()
    points: int = 0

    def worst(self, metric: str) -> Held | None:
        """Of a measure, the attack of the highest upper bound or, without a limit, of the highest value."""
        found = {
            one: x.value if one.limit is None else x.high
            for one in self.held
            if one.metric == metric and (x := one.reading.interval)
        }
        known = [one for one in found if not math.isnan(found[one])]
        return max(known, key=lambda one: found[one], default=None)

    @property
    def excess(self) -> float:
        """The largest of all its measures; infinite where none can be judged."""
        return max((one.excess for one in self.held if not math.isnan(one.excess)), default=math.inf)


@dataclass(frozen=True)
class Release:
    """The verdict.

    Attributes:
        code: 0 pass, 1 leakage over budget, 2 audit invalid, 3 could not finish.
        title: what was judged, as the report is headed.
        records: who was scored, for each base.
        gates: of every base; where there are several their names say of which.
        unable: cells that did not finish, with the reason.
    """

    code: int
    title: str
    budget: Budget | None
    cells: tuple[Judged, ...]
    records: tuple[Records, ...]
    gates: tuple[Gate, ...]
    unable: tuple[str, ...]

    @property
    def doubts(self) -> tuple[Gate, ...]:
        """The gates that are not green."""
        return tuple(gate for gate in self.gates if gate.state != "green")


def release(grid: Grid, frame: pd.DataFrame, budget: Budget | None = None, checkpoint: str | None = None) -> Release:
    """Judge an output folder.

    3 where a cell did not finish; else 2 where a gate is not green, or where nobody can say whether the budget is kept;
    else 1 where no cell keeps it; else 0. Without a budget nothing can exceed it.

    Args:
        frame: what `results` returns.
        budget: instead of the grid's own.
        checkpoint: the name of the checkpoint to judge (default: what one would ship, `judged_epoch`).

    Raises:
        UsageError: no checkpoint has that name.
    """
    if budget is not None:
        grid = replace(grid, budget=budget.model_dump())
    if checkpoint is not None:
        _check_name(grid, checkpoint)
    measured, of_place = curves(frame), places(grid)
    cells = [_judged(grid, measured.get(c.run_id, Curve({})), c, of_place[c.run_id], checkpoint) for c in grid.cells]
    failed = [cell for cell in grid.cells if cell.outcome["status"] in UNFINISHED]
    unable = tuple(f"{clean(cell.label)} ({_reason(cell, terms(grid))})" for cell in failed)
    found = _gates(grid)
    limits = Budget.model_validate(grid.budget) if grid.budget else None
    code = _code(cells, found, unable, limits)
    return Release(code, title(grid), limits, tuple(cells), tuple(records(grid)), found, unable)


def _check_name(grid: Grid, checkpoint: str) -> None:
    known = [name for cell in grid.cells for name in point_names(cell).values()]
    if checkpoint not in known:
        raise UsageError(f"--checkpoint: {unknown('checkpoint', checkpoint, dict.fromkeys(known))}")


def _reason(cell: Cell, called: Terms) -> str:
    stopped = f"it stopped after {plural(cell.epochs, called.point)}"
    return clean(cell.outcome.get("reason") or stopped).rstrip(".")


def _gates(grid: Grid) -> tuple[Gate, ...]:
    return tuple(
        replace(gate, name=f"{gate.name} ({one.place})" if one.place else gate.name)
        for one in validity(grid)
        for gate in one.gates
    )


def _code(cells: Sequence[Judged], found: Sequence[Gate], unable: Sequence[str], budget: Budget | None) -> int:
    if unable:
        return UNABLE
    if any(gate.state != "green" for gate in found):
        return INVALID
    if budget is None or any(one.kept for one in cells):
        return PASS
    return LEAKS if any(one.kept is False for one in cells) else INVALID


def _judged(grid: Grid, curve: Curve, cell: Cell, place: str, checkpoint: str | None) -> Judged:
    names, label = point_names(cell), clean(cell.label)
    label = f"{label} ({place})" if place else label
    epoch = judged_epoch(cell, curve)
    if checkpoint is not None:
        epoch = next((number for number, name in names.items() if name == checkpoint), None)
    if epoch is None or cell.outcome["status"] in UNFINISHED:
        return Judged(label, None, ())
    kept = keeps_budget(grid, curve, cell) if checkpoint is None else keeps_at(grid, curve, epoch)
    keeping = tuple(names[n] for n in takewhile(lambda n: keeps_at(grid, curve, n), names))
    held = tuple(_held(grid, curve, epoch))
    return Judged(f"{label}, {names.get(epoch, 'the base itself')}", kept, held, keeping, len(names))


def _held(grid: Grid, curve: Curve, epoch: int) -> list[Held]:
    budget: dict[str, Any] = grid.budget or {}
    attacks = [budget["attack"]] if budget.get("attack") else grid.attacks
    limits = {metric: budget[metric] for metric in LIMITS if budget.get(metric) is not None} or {"auc": None}
    why = refused(grid)
    return [
        Held(attack, metric, _reading(curve, epoch, attack, metric, why.get(attack)), limit)
        for metric, limit in limits.items()
        for attack in attacks
    ]


def _reading(curve: Curve, epoch: int, attack: str, metric: str, why: str | None) -> Reading:
    """With the reason where an attack was refused.

    On the base itself an attack that compares with it is at chance with no uncertainty.
    """
    found = curve.get(epoch, attack, metric)
    if found.interval is None and found.status in ("refused", ABSENT.status) and why:
        return replace(found, status=clean(why).rstrip("."))
    if epoch or found.interval is None or not needs_reference(attack):
        return found
    return replace(found, interval=Interval(*[found.interval.value] * 3))
