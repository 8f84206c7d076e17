"""The validity gates as they are shown, before any result."""

from __future__ import annotations

from dataclasses import dataclass

from imprint.gates.judge import Gate, withheld
from imprint.report import words
from imprint.report.tables import by_base, places
from imprint.rows import Grid
from imprint.validity import gates


@dataclass(frozen=True)
class Validity:
    """The gates of one base, and why the numbers that rest on it are withheld ("" where all are green)."""

    base: str
    place: str
    gates: list[Gate]
    withheld: str


def validity(grid: Grid) -> list[Validity]:
    """One for every base, in the grid's order."""
    found, of_place = gates(grid), places(grid)
    place = {cells[0].base.name: of_place[cells[0].run_id] for cells in reversed(by_base(grid.cells))}
    return [Validity(base, place[base], listed, withheld(listed)) for base, listed in found.items()]


def gate_lines(found: list[Validity]) -> list[str]:
    """A line per gate where there is one base; of several, one for each that is green and the findings of the others.

    The last lines say what is withheld.
    """
    lines = []
    for one in found:
        name = f"{one.place}: " if one.place and len(found) > 1 else ""
        if len(found) > 1 and not one.withheld:
            lines.append(f"{name}all {len(one.gates)} gates are green")
            continue
        for gate in one.gates:
            advice = f" {gate.advice}" if gate.advice else ""
            lines.append(f"{name}{gate.name} {gate.state}: {words.clean(gate.finding)}{advice}")
    for one in found:
        if one.withheld:
            lines.append(
                f"Headline withheld{f' ({one.place})' if one.place and len(found) > 1 else ''}. {one.withheld}"
            )
    return lines
