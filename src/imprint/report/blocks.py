"""The tables of results: of a run its last epoch and its best one, of an audit its checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from imprint.report.columns import (
    Column,
    budget_columns,
    cost_columns,
    key_columns,
    outcome_columns,
    point_columns,
    step_columns,
)
from imprint.report.tables import Row
from imprint.report.terms import audited, terms
from imprint.rows import Grid

LAST = "At the last epoch"
BEST = "At the epoch of best validation perplexity (0 is the base itself)"
CHECKPOINTS = "Every checkpoint: AUC by each attack, its 95% interval"


@dataclass(frozen=True)
class Block:
    """A table of results.

    Attributes:
        title: what stands above it.
        keys, columns: which row it is, and what was measured.
        rows: those that have something to show.
    """

    title: str
    keys: list[Column]
    columns: list[Column]
    rows: Sequence[Row]


def blocks(grid: Grid, rows: Sequence[Row]) -> list[Block]:
    """What was measured, with what it took."""
    keys = key_columns(rows, terms(grid))
    if audited(grid):
        return [Block(CHECKPOINTS, keys, [*_measured(grid, rows), *budget_columns(grid)], rows)]
    last, best = _measured(grid, rows), point_columns(grid.attacks, lambda row: row.best, terms(grid))
    return [
        Block(LAST, keys, [*last, *cost_columns(), *outcome_columns()], rows),
        Block(BEST, keys, [*best, *budget_columns(grid)], rows),
    ]


def narrow_blocks(grid: Grid, rows: Sequence[Row]) -> list[Block]:
    """The same for a terminal: what was trained, and the verdict on the budget, have a table of their own."""
    if audited(grid):
        return blocks(grid, rows)
    keys, tuned = key_columns(rows, terms(grid)), [row for row in rows if row.run_id is not None]
    trained = [*cost_columns(), *outcome_columns(), *budget_columns(grid)]
    return [
        Block("What was trained", keys, trained, tuned),
        Block(f"{LAST}: AUC by each attack, its 95% interval", keys, _measured(grid, rows), rows),
        Block(BEST, keys, point_columns(grid.attacks, lambda row: row.best, terms(grid)), rows),
    ]


def _measured(grid: Grid, rows: Sequence[Row]) -> list[Column]:
    """Everything at the last point of each row."""
    first, *others = point_columns(grid.attacks, lambda row: row.last, terms(grid))
    return [first, *step_columns(rows), *others]
