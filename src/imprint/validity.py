"""The validity gates of a grid, recomputed from its evidence: shown before any result, and able to withhold it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from imprint.attacks import evidence_needed, one_pass
from imprint.evidence import TUNED_ONLY
from imprint.gates.judge import (
    Gate,
    Groups,
    base_control,
    blind_baseline,
    direction,
    missing,
    overlap_gate,
    positive_control,
    power,
)
from imprint.gates.overlap import Overlap
from imprint.rows import Cell, Grid
from imprint.store import read_json, read_stats, read_table, write_json


def gates(grid: Grid) -> dict[str, list[Gate]]:
    """The five gates of every base of a grid, by the base's key, in the order in which bases appear."""
    first = {cell.base.name: cell for cell in reversed(grid.cells)}
    keys = dict.fromkeys(cell.base.name for cell in grid.cells)
    budget = (grid.budget or {}).get("auc")
    return {key: gates_of(first[key], grid.attacks, budget) for key in keys}


def write_gates(grid: Grid) -> None:
    """`gates.json`: what `gates` says, for other programs."""
    document = {key: [asdict(gate) for gate in found] for key, found in gates(grid).items()}
    write_json(grid.path / "gates.json", document)


def gates_of(cell: Cell, attacks: Sequence[str], budget: float | None = None) -> list[Gate]:
    """The five gates of the base of a cell; of a model tuned elsewhere also whether its sides are what they are called.

    Args:
        attacks: those whose results are to be believed.
        budget: the AUC that an upper bound has to stay below, if the claim is one.
    """
    if not (cell.base / "stats.parquet").exists():
        names = ("base control", "blind baseline", "overlap", "power", "positive control")
        return [missing(name, "The base was never scored.") for name in names]
    free = [name for name in dict.fromkeys(("loss", *attacks)) if not {*evidence_needed(name)} & {*TUNED_ONLY}]
    scores = {name: cell.sides(found) for name, found in cell.scores(0, free).items()}
    groups = list(cell.groups("member")), list(cell.groups("nonmember"))
    found = [
        base_control(scores, groups),
        _blind(cell, groups),
        _overlap(cell.base / "gates" / "overlap.json"),
        power(scores["loss"], groups, budget),
        _positive(cell, attacks),
    ]
    if cell.training is None and cell.epochs:
        tuned = {name: cell.sides(scored) for name, scored in cell.scores(cell.epochs, attacks).items()}
        found.append(direction(tuned, groups))
    return found


def _why(cell: Cell, part: str) -> str:
    file = cell.base / "gates" / "meta.json"
    reason = read_json(file).get(part) if file.exists() else None
    return f"Not measured: {reason.rstrip('.')}." if reason else "Not measured."


def _blind(cell: Cell, groups: Groups) -> Gate:
    file = cell.base / "gates" / "blind.parquet"
    if not file.exists():
        return missing("blind baseline", _why(cell, "blind"))
    table = read_table(file)
    columns = {name: table.column(name).to_numpy() for name in table.column_names if name != "id"}
    count = len(groups[0])  # members come first
    return blind_baseline({name: (found[:count], found[count:]) for name, found in columns.items()}, groups)


def _overlap(file: Path) -> Gate:
    return overlap_gate(Overlap(**read_json(file))) if file.exists() else missing("overlap", "Not measured.")


def _positive(cell: Cell, attacks: Sequence[str]) -> Gate:
    file = cell.base / "gates" / "positive.parquet"
    if not file.exists():
        return missing("positive control", _why(cell, "positive"))
    target = read_stats(file)
    place = {key: n for n, key in enumerate(cell.records["id"])}
    rows = np.array([place[key] for key in target.ids])
    member = (cell.records["role"].to_numpy() == "member")[rows]
    scores = cell.scored(target, one_pass(attacks) or ["loss"], rows)
    return positive_control({name: (found[member], found[~member]) for name, found in scores.items()})
