"""What the finished epochs of each cell cost: the annex's table."""

from __future__ import annotations

from collections.abc import Sequence

from imprint.report import words
from imprint.report.tables import places
from imprint.report.terms import terms
from imprint.rows import Cell, Grid

PARTS = ("data", "forward", "output", "backward", "optimizer", "scoring")
"""Of `engine.clock`; `output` is the output layer of a training step with its gradient."""


def costs_table(grid: Grid) -> tuple[list[str], list[list[str]]]:
    """A row per cell that has finished an epoch: tokens, operations, seconds by part, memory, share of the peak.

    Parts of which no cell has measured any have no column: an audit only scores.
    """
    of_place, cells = places(grid), [cell for cell in grid.cells if cell.costs]
    parts = [part for part in PARTS if any(part in cost["seconds"] for cell in cells for cost in cell.costs)]
    header = ["method", f"{terms(grid).point}s", "tokens", "operations", *parts, "peak memory", "share of peak"]
    return header, [_row(cell, of_place[cell.run_id], parts) for cell in cells]


def _row(cell: Cell, place: str, parts: Sequence[str]) -> list[str]:
    label = words.clean(cell.label)
    seconds = {part: sum(cost["seconds"].get(part, 0.0) for cost in cell.costs) for part in parts}
    flops, took = sum(cost.get("flops", 0.0) for cost in cell.costs), sum(seconds.values())
    peak = max(cost.get("peak_flops", 0.0) for cost in cell.costs)
    memory = max(cost.get("peak_memory", 0) for cost in cell.costs)
    return [
        f"{label} ({place})" if place else label,
        str(len(cell.costs)),
        f"{cell.tokens:,}",
        words.operations(flops),
        *(f"{seconds[part]:.1f} s" for part in parts),
        words.size(memory),
        f"{flops / took / peak:.0%}" if took and peak else "",
    ]
