"""The validity gates as they are shown, before any result."""

from __future__ import annotations

from dataclasses import dataclass, replace

from imprint.gates.judge import Gate, withheld
from imprint.report import words
from imprint.report.tables import places
from imprint.rows import Grid
from imprint.validity import gates


@dataclass(frozen=True)
class Validity:
    """The gates of one base, and why the numbers that rest on it are withheld ("" where all are green)."""

    base: str
    place: str
    """What sets its cells apart within the grid, in words; empty where there is no other base."""
    gates: list[Gate]
    withheld: str


def validity(grid: Grid) -> list[Validity]:
    """One for every base, in the grid's order."""
    found, of_place = gates(grid), places(grid)
    shown: list[Validity] = []
    for base, listed in found.items():
        own = dict.fromkeys(of_place[cell.run_id] for cell in grid.cells if cell.base.name == base)
        clean = [replace(gate, finding=words.clean(gate.finding)) for gate in listed]
        shown.append(Validity(base, "; ".join(own) if len(found) > 1 else "", clean, withheld(listed)))
    return shown


def gate_lines(found: list[Validity]) -> list[str]:
    """A line per gate where there is one base; of several, one for each that is green and the findings of the others.

    The last lines say what is withheld.
    """
    lines = []
    for one in found:
        name = f"{one.place}: " if one.place else ""
        if len(found) > 1 and not one.withheld:
            lines.append(f"{name}all {len(one.gates)} gates are green")
            continue
        for gate in one.gates:
            advice = f" {gate.advice}" if gate.advice else ""
            lines.append(f"{name}{gate.name} {gate.state}: {gate.finding}{advice}")
    for one in found:
        if one.withheld:
            lines.append(f"Headline withheld{f' ({one.place})' if one.place else ''}. {one.withheld}")
    return lines
