"""The report: one HTML file that needs no network and no script, and trusts no name it prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup

from imprint.release import INVALID, LEAKS, PASS, release
from imprint.report import annex, gate, words
from imprint.report.apart import Section, sections
from imprint.report.audited import about, audited_table, checkpoints_table, title
from imprint.report.blocks import Block, blocks
from imprint.report.costs import costs_table
from imprint.report.notes import all_notes
from imprint.report.pages import page_table, style, template, write_page
from imprint.report.panels import Panels, about_curves, curve_panels, density_panels, frontier_panels, worth_drawing
from imprint.report.proven import proven
from imprint.report.readings import Curve, curves
from imprint.report.tables import Row, summary
from imprint.report.terms import audited, terms
from imprint.report.validity import validity
from imprint.report.verdict import budget_verdict, verdicts
from imprint.rows import Grid, load_grid, results

_NAMED = 8
"""Up to so many methods are named under the title."""
_MOST = 20
"""Exposed records that are listed, and subgroups of a table."""
_STATES = {PASS: "green", LEAKS: "red", INVALID: "red"}
"""The colour of a verdict on a budget."""


def write_report(path: str | Path) -> Path:
    """Write `report.html` of an output folder from its evidence and `results.parquet`; the same input, the same bytes.

    Args:
        path: output folder of a grid or an audit, finished or not.

    Returns:
        The file.

    Raises:
        ImprintError: the folder holds no run, no results, or damaged evidence.
    """
    grid = load_grid(path)
    page = template("report.html.j2").render(_content(grid, results(path)))
    return write_page(Path(path) / "report.html", page)


def _content(grid: Grid, frame: pd.DataFrame) -> dict[str, Any]:
    found, measured = validity(grid), curves(frame)
    shut = {one.base for one in found if one.withheld}
    rows = summary(grid, frame, shut)
    drawn = worth_drawing(measured)
    return {
        **style(),
        "terms": terms(grid),
        "title": title(grid),
        "what": _what(grid),
        "validity": found,
        **(_release(grid, frame) if audited(grid) else _comparison(grid, rows, measured, shut)),
        "results": [_table(block) for block in blocks(grid, rows)],
        "notes": all_notes(grid, rows),
        "drawn": drawn,
        "frontier": [_marked(panels) for panels in frontier_panels(grid, measured)] if drawn else [],
        "curves_note": about_curves(grid, measured),
        "curves": [_marked(panels) for panels in curve_panels(grid, measured)] if drawn else [],
        "sections": [
            _section(one) for one in [*sections(grid, measured, shut, _MOST, texts=True), *proven(grid, shut, _MOST)]
        ],
        "densities": [_marked(panels) for panels in density_panels(grid, measured)],
        "records": annex.records_table(grid),
        **(_audit_annex(grid) if audited(grid) else _run_annex(grid, rows)),
        "costs": costs_table(grid),
        "tpr": annex.tpr_table(grid, measured),
        "recipe": annex.recipe_text(grid),
        "versions": annex.versions(grid),
    }


def _release(grid: Grid, frame: pd.DataFrame) -> dict[str, Any]:
    """The head of an audit: the verdict of `imprint gate`."""
    found = release(grid, frame)
    state = _STATES.get(found.code, "grey") if found.budget or found.code else "grey"
    head = {"word": gate.word(found), "state": state, "code": found.code, "text": " ".join(gate.sentences(found))}
    return {"release": head, "verdicts": [], "budget": ""}


def _comparison(grid: Grid, rows: Sequence[Row], measured: dict[str, Curve], shut: set[str]) -> dict[str, Any]:
    """The head of a run: its methods beside each other."""
    return {"release": None, "verdicts": verdicts(grid, measured, shut), "budget": budget_verdict(grid, rows)}


def _audit_annex(grid: Grid) -> dict[str, Any]:
    tables = [
        ("What was audited, and how", audited_table(grid)),
        ("Checkpoints, with the fingerprints of their weights", checkpoints_table(grid)),
    ]
    return {"training": "", "tables": tables}


def _run_annex(grid: Grid, rows: Sequence[Row]) -> dict[str, Any]:
    sources = "Models and data, with the fingerprints of their content"
    tables = [("Every cell", annex.cells_table(grid, rows)), (sources, annex.sources_table(grid))]
    return {"training": annex.training_text(grid), "tables": tables}


def _section(one: Section) -> Mapping[str, Any]:
    sheets = [page_table(sheet) for sheet in one.sheets]
    return {"title": one.title, "doubt": one.doubt, "lead": one.lead, "sheets": sheets}


def _table(block: Block) -> dict[str, Any]:
    columns = [*block.keys, *block.columns]
    rows = [(row.run_id is None, [column.entry(row) for column in columns]) for row in block.rows]
    return {"title": block.title, "columns": columns, "rows": rows}


def _marked(panels: Panels) -> tuple[str, list[Markup]]:
    return panels.title, [Markup(chart) for chart in panels.charts]  # figures escape their own text


def _what(grid: Grid) -> str:
    """What was run or audited, and how it ended."""
    attacks = words.listed([words.clean(attack) for attack in grid.attacks])
    if told := about(grid):
        return " ".join([*told, f"Attacks: {attacks}."])
    labels = list(dict.fromkeys(words.clean(cell.label) for cell in grid.cells))
    methods = words.listed(labels) if len(labels) <= _NAMED else str(len(labels))
    epochs = words.listed(sorted({str(cell.planned) for cell in grid.cells}, key=int))
    seeds = sorted({str(cell.spec.seed) for cell in grid.cells}, key=int)
    states = [words.clean(cell.outcome["status"]) for cell in grid.cells]
    ended = words.listed([f"{states.count(state)} {state}" for state in dict.fromkeys(states)])
    return (
        f"Methods: {methods}. Epochs: {epochs}. {'Seed' if len(seeds) == 1 else 'Seeds'}: {words.listed(seeds)}. "
        f"Attacks: {attacks}. Cells: {ended}."
    )
