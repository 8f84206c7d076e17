"""The report: one HTML file that needs no network and no script, and trusts no name it prints."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from imprint.report import annex, words
from imprint.report.columns import Column, budget_columns, cost_columns, key_columns, outcome_columns, point_columns
from imprint.report.costs import costs_table
from imprint.report.notes import all_notes
from imprint.report.panels import Panels, curve_panels, density_panels, frontier_panels
from imprint.report.readings import Curve, curves
from imprint.report.tables import Row, sources, summary
from imprint.report.validity import Validity, validity
from imprint.report.verdict import budget_verdict, verdicts
from imprint.rows import Grid, load_grid, results
from imprint.store import atomic_file

_NAMED = 8
"""Up to so many methods are named under the title."""


def write_report(path: str | Path) -> Path:
    """Write `report.html` of an output folder from its evidence and `results.parquet`; the same input, the same bytes.

    Args:
        path: output folder of a grid, finished or not.

    Returns:
        The file.

    Raises:
        ImprintError: the folder holds no run, no results, or damaged evidence.
    """
    grid = load_grid(path)
    frame = results(path)
    found = validity(grid)
    rows = summary(grid, frame, {one.base for one in found if one.withheld})
    page = template("report.html.j2").render(_content(grid, rows, curves(frame), found))
    file = Path(path) / "report.html"
    with atomic_file(file) as temporary:
        temporary.write_text(page, encoding="utf-8", newline="\n")
    return file


def template(name: str) -> jinja2.Template:
    """One of our own templates; what is put into it is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(asset),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def asset(name: str) -> str:
    """One of our own files."""
    return files("imprint.report").joinpath(name).read_text(encoding="utf-8")


def _content(grid: Grid, rows: Sequence[Row], measured: dict[str, Curve], found: Sequence[Validity]) -> dict[str, Any]:
    style = asset("report.css") + asset("study.css")
    shut = {one.base for one in found if one.withheld}
    keys = key_columns(rows)
    last = [*point_columns(grid.attacks, lambda row: row.last), *cost_columns(), *outcome_columns()]
    best = [*point_columns(grid.attacks, lambda row: row.best), *budget_columns(grid)]
    return {
        "style": Markup(style),  # our own file: the only text besides the figures that is not escaped
        "style_hash": base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        "title": _title(grid),
        "what": _what(grid),
        "validity": found,
        "verdicts": verdicts(grid, measured, shut),
        "budget": budget_verdict(grid, rows),
        "last": _table([*keys, *last], rows),
        "best": _table([*keys, *best], rows),
        "notes": all_notes(grid, rows),
        "frontier": [_marked(panels) for panels in frontier_panels(grid, measured)],
        "curves": [_marked(panels) for panels in curve_panels(grid, measured)],
        "densities": [_marked(panels) for panels in density_panels(grid, measured)],
        "records": annex.records_table(grid),
        "cells": annex.cells_table(grid, rows),
        "training": annex.training_text(grid),
        "costs": costs_table(grid),
        "tpr": annex.tpr_table(grid, measured),
        "sources": annex.sources_table(grid),
        "recipe": annex.recipe_text(grid),
        "versions": annex.versions(grid),
    }


def _table(columns: Sequence[Column], rows: Sequence[Row]) -> dict[str, Any]:
    return {
        "columns": columns,
        "rows": [(row.run_id is None, [column.entry(row) for column in columns]) for row in rows],
    }


def _marked(panels: Panels) -> tuple[str, list[Markup]]:
    return panels.title, [Markup(chart) for chart in panels.charts]  # figures escape their own text


def _title(grid: Grid) -> str:
    models, data = (sorted(set(column)) for column in zip(*sources(grid).values(), strict=True))
    return f"{words.listed(models)} tuned on {words.listed(data)}"


def _what(grid: Grid) -> str:
    """What was run, and how it ended."""
    labels = list(dict.fromkeys(words.clean(cell.label) for cell in grid.cells))
    methods = words.listed(labels) if len(labels) <= _NAMED else str(len(labels))
    epochs = words.listed(sorted({str(cell.planned) for cell in grid.cells}, key=int))
    seeds = sorted({str(cell.spec.seed) for cell in grid.cells}, key=int)
    states = [words.clean(cell.outcome["status"]) for cell in grid.cells]
    ended = words.listed([f"{states.count(state)} {state}" for state in dict.fromkeys(states)])
    attacks = words.listed([words.clean(attack) for attack in grid.attacks])
    return (
        f"Methods: {methods}. Epochs: {epochs}. {'Seed' if len(seeds) == 1 else 'Seeds'}: {words.listed(seeds)}. "
        f"Attacks: {attacks}. Cells: {ended}."
    )
