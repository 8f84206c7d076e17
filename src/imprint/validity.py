"""The validity gates of a grid, recomputed from its evidence: shown before any result, and able to withhold it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from imprint.attacks import one_pass
from imprint.errors import InvalidAudit, UsageError
from imprint.evidence import says_nothing_of_base
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
from imprint.types import Floats


def gates(grid: Grid) -> dict[str, list[Gate]]:
    """The five gates of every base of a grid, by the base's key, in the order in which bases appear."""
    first = {cell.base.name: cell for cell in reversed(grid.cells)}
    keys = dict.fromkeys(cell.base.name for cell in grid.cells)
    limits = grid.budget or {}
    return {key: gates_of(first[key], grid.attacks, limits.get("auc"), limits.get("attack")) for key in keys}


def write_gates(grid: Grid) -> None:
    """`gates.json`: what `gates` says, for other programs."""
    document = {key: [asdict(gate) for gate in found] for key, found in gates(grid).items()}
    write_json(grid.path / "gates.json", document)


def gates_of(cell: Cell, attacks: Sequence[str], budget: float | None = None, held: str | None = None) -> list[Gate]:
    """The five gates of the base of a cell; of a model tuned elsewhere also whether its sides are what they are called.

    Args:
        attacks: those whose results are to be believed.
        budget: the AUC that an upper bound has to stay below, if the claim is one.
        held: the attack that is held to it, where one is named.
    """
    if not (cell.base / "stats.parquet").exists():
        names = ("base control", "blind baseline", "overlap", "power", "positive control")
        return [missing(name, "The base was never scored.") for name in names]
    free = [name for name in dict.fromkeys(("loss", *attacks)) if not says_nothing_of_base(name)]
    scores = {name: cell.sides(found) for name, found in cell.scores(0, free).items()}
    groups = list(cell.groups("member")), list(cell.groups("nonmember"))
    found = [
        base_control(scores, groups),
        _blind(cell, groups),
        _overlap(cell.base / "gates" / "overlap.json"),
        power(scores["loss"], groups, budget),
        _positive(cell, attacks, held),
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


def _positive(cell: Cell, attacks: Sequence[str], held: str | None) -> Gate:
    file = cell.base / "gates" / "positive.parquet"
    if not file.exists():
        return missing("positive control", _why(cell, "positive"))
    target = read_stats(file)
    place = {key: n for n, key in enumerate(cell.records["id"])}
    rows = np.array([place[key] for key in target.ids])
    member = (cell.records["role"].to_numpy() == "member")[rows]
    tried = one_pass(attacks)
    if not tried or (held and held not in tried):
        why = f"The overfitted run was scored once, and {held or ', '.join(attacks)} cannot be tried on that"
        return missing("positive control", f"{why}: hold an attack of one pass to the budget, or name one beside it.")
    scores: dict[str, Floats] = {}
    for attack in tried:
        with suppress(UsageError, InvalidAudit):  # which is told where its results would stand
            scores |= cell.scored(target, [attack], rows)
    gate = positive_control({name: (found[member], found[~member]) for name, found in scores.items()})
    untried = [attack for attack in attacks if attack not in scores]
    said = f" Not tried, since one pass is not enough: {', '.join(untried)}." if untried else ""
    return (
        replace(gate, finding=gate.finding.replace("Every attack finds", "Every attack tried finds") + said)
        if said
        else gate
    )
