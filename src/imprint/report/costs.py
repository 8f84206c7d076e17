"""What the finished epochs of each cell cost: the annex's table."""

from __future__ import annotations

from imprint.report import words
from imprint.report.tables import places
from imprint.rows import Cell, Grid

PARTS = ("data", "forward", "output", "backward", "optimizer", "scoring")
"""Of `engine.clock`; `output` is the output layer of a training step with its gradient."""


def costs_table(grid: Grid) -> tuple[list[str], list[list[str]]]:
    """A row per cell that has finished an epoch: tokens, operations, seconds by part, memory, share of the peak."""
    of_place = places(grid)
    header = ["method", "epochs", "tokens", "operations", *PARTS, "peak memory", "share of peak"]
    return header, [_row(cell, of_place[cell.run_id]) for cell in grid.cells if cell.costs]


def _row(cell: Cell, place: str) -> list[str]:
    label = words.clean(cell.label)
    seconds = {part: sum(cost["seconds"].get(part, 0.0) for cost in cell.costs) for part in PARTS}
    flops, took = sum(cost.get("flops", 0.0) for cost in cell.costs), sum(seconds.values())
    peak = max(cost.get("peak_flops", 0.0) for cost in cell.costs)
    memory = max(cost.get("peak_memory", 0) for cost in cell.costs)
    return [
        f"{label} ({place})" if place else label,
        str(len(cell.costs)),
        f"{cell.tokens:,}",
        words.operations(flops),
        *(f"{seconds[part]:.1f} s" for part in PARTS),
        words.size(memory),
        f"{flops / took / peak:.0%}" if took and peak else "",
    ]
