"""The validity gates as they are shown, before any result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from imprint.gates.judge import Gate, withheld
from imprint.report import words
from imprint.report.tables import sources
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
    found, titles = gates(grid), sources(grid)
    own = {cell.base.name: (*titles[cell.run_id], f"split {cell.spec.data.seed}") for cell in reversed(grid.cells)}
    differ = [len(set(column)) > 1 for column in zip(*own.values(), strict=True)]
    place = {base: ", ".join(p for p, d in zip(parts, differ, strict=True) if d) for base, parts in own.items()}
    shown: list[Validity] = []
    for base, listed in found.items():
        clean = [replace(gate, finding=words.clean(gate.finding)) for gate in listed]
        shown.append(Validity(base, place[base], clean, withheld(listed)))
    return shown


def all_withheld(found: Sequence[Validity]) -> str:
    """Why numbers are withheld, for every base of which some are; else empty."""
    return " ".join(f"{one.place}: {one.withheld}" if one.place else one.withheld for one in found if one.withheld)


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
