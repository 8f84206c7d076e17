"""The summary of a grid: in a terminal, or as Markdown."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import pandas as pd
from rich.console import Console

from imprint.report import sheet
from imprint.report.apart import Section, sections
from imprint.report.audited import about, title
from imprint.report.blocks import blocks, narrow_blocks
from imprint.report.notes import all_notes
from imprint.report.proven import proven
from imprint.report.readings import curves
from imprint.report.tables import summary
from imprint.report.text import escaped, markdown, print_block, printable
from imprint.report.validity import Validity, gate_lines, validity
from imprint.rows import Grid

MOST = 10
"""Rows of subgroups and of exposed records; the report has more."""


def print_summary(grid: Grid, frame: pd.DataFrame, console: Console) -> None:
    """Print the gates, the tables of results, subgroups and exposed records, and what was left out."""
    found = validity(grid)
    shut = _withheld(found)
    rows = summary(grid, frame, shut)
    _lines([title(grid)] if about(grid) else [], console, "bold")
    _lines(about(grid), console)
    _lines(["Validity gates"], console, "bold")
    _lines(gate_lines(found), console)
    console.print()
    for block in narrow_blocks(grid, rows):
        print_block(block.title, block.keys, block.columns, block.rows, console)
    for section in [*sections(grid, curves(frame), shut, MOST), *proven(grid, shut, MOST // 2)]:
        _lines([_heading(section)], console, "bold")
        _lines(section.lead, console)
        console.print()
        for one in section.sheets:
            sheet.print_sheet(one, console)
            console.print()
    _lines(all_notes(grid, rows), console)


def _heading(section: Section) -> str:
    return f"{section.title} (not valid as they stand)" if section.doubt else section.title


def _lines(lines: Iterable[str], console: Console, style: str = "") -> None:
    for line in lines:
        console.print(printable(line, console, style), highlight=False)


def _withheld(found: list[Validity]) -> Collection[str]:
    return {one.base for one in found if one.withheld}


def to_markdown(grid: Grid, frame: pd.DataFrame) -> str:
    """The same as Markdown."""
    found = validity(grid)
    shut = _withheld(found)
    rows = summary(grid, frame, shut)
    told = [f"**{escaped(title(grid))}**", *map(escaped, about(grid))] if about(grid) else []
    told += ["**Validity gates**", "\n".join(f"- {escaped(line)}" for line in gate_lines(found))]
    for block in blocks(grid, rows):
        told += [f"**{block.title}**", markdown([*block.keys, *block.columns], block.rows)]
    for section in [*sections(grid, curves(frame), shut, MOST), *proven(grid, shut, MOST // 2)]:
        told += [f"**{_heading(section)}**", escaped(" ".join(section.lead))]
        told += [sheet.to_markdown(one).rstrip() for one in section.sheets]
    notes = "\n".join(f"- {escaped(note)}" for note in all_notes(grid, rows))
    return "\n\n".join([*told, notes]) + "\n"
