"""The summary: a row per cell, at its last epoch and that of best validation perplexity, or per checkpoint audited."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

import pandas as pd

from imprint.report import words
from imprint.report.readings import Curve, Reading, curves, keeps_at, keeps_budget
from imprint.report.terms import audited, point_names, terms
from imprint.rows import Cell, Grid


@dataclass(frozen=True)
class Point:
    """What was measured at one epoch."""

    epoch: int
    perplexity: Reading
    auc: dict[str, Reading]


@dataclass(frozen=True)
class Row:
    """One cell, one checkpoint of an audit, or the untouched base that they started from (`run_id` is None)."""

    run_id: str | None
    label: str
    place: str
    """Whatever of model, data and seed differs within the grid, in words; empty where nothing does."""
    model: str
    data: str
    seed: int
    trainable: int | None
    parameters: int | None
    seconds: float | None
    status: str
    reason: str
    epochs: int
    """Finished epochs."""
    planned: int
    """Epochs asked for."""
    last: Point | None
    """At the last epoch; None before one is finished. A run that diverged has no values there."""
    best: Point | None
    """At the epoch of lowest validation perplexity, which may be 0."""
    budget: bool | None
    step: int | None = None
    """Of training, where a checkpoint says so."""


def summary(grid: Grid, frame: pd.DataFrame, withheld: Collection[str] = ()) -> list[Row]:
    """One row per cell in the grid's order, or per checkpoint of an audit; before those that share a base, the base.

    Args:
        grid: what `load_grid` returns.
        frame: what `results` or `write_results` returns.
        withheld: keys of bases whose gates are not all green: nobody can say whether their cells keep a budget.
    """
    measured = curves(frame)
    titles, of_place = sources(grid), places(grid)
    rows: list[Row] = []
    for cells in by_base(grid.cells):
        first = cells[0].run_id
        of_base = next((measured[c.run_id] for c in cells if c.run_id in measured), Curve({}))
        rows.append(_base_row(cells[0], (of_place[first], *titles[first]), of_base, grid))
        for cell in cells:
            names = (of_place[cell.run_id], *titles[cell.run_id])
            row = _row(cell, names, measured.get(cell.run_id, Curve({})), grid)
            points = _checkpoints(cell, row, measured.get(cell.run_id, Curve({})), grid) if audited(grid) else [row]
            rows += [replace(one, budget=None) for one in points] if cell.base.name in withheld else points
    return rows


def _checkpoints(cell: Cell, row: Row, curve: Curve, grid: Grid) -> list[Row]:
    """A row for each checkpoint, each held to the budget; the cell's own row where there is none."""
    found = []
    for number, name in point_names(cell).items():
        meta, point = cell.folder.meta(number), _point(curve, number, grid)
        of_point = replace(row, label=name, last=point, best=point, budget=keeps_at(grid, curve, number))
        found.append(replace(of_point, step=meta.get("step")))
    return found or [row]


def sources(grid: Grid) -> dict[str, tuple[str, str]]:
    """run id -> names of model and data, with whatever sets apart those that share a name."""
    models = words.names([cell.spec.model.model_dump() for cell in grid.cells], "name")
    data = words.names([_data_document(cell) for cell in grid.cells], "source")
    return {cell.run_id: (model, source) for cell, model, source in zip(grid.cells, models, data, strict=True)}


def places(grid: Grid) -> dict[str, str]:
    """run id -> whatever of model, data and seed differs within the grid, in words."""
    titles = sources(grid)
    parts = {cell.run_id: (*titles[cell.run_id], f"seed {cell.spec.seed}") for cell in grid.cells}
    differ = [len(set(column)) > 1 for column in zip(*parts.values(), strict=True)]
    return {run: ", ".join(p for p, d in zip(part, differ, strict=True) if d) for run, part in parts.items()}


def by_base(cells: Iterable[Cell]) -> list[list[Cell]]:
    """Cells that share (model, data, seed), and with them one untouched base, in order of appearance."""
    groups: dict[tuple[str, int], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.base.name, cell.spec.seed), []).append(cell)
    return list(groups.values())


def _data_document(cell: Cell) -> dict[str, object]:
    document = cell.spec.data.model_dump()
    if document["seed"] == cell.spec.seed:
        document.pop("seed")  # the seed has a column of its own
    source = document.pop("source")
    return {"source": source.pop("name"), **source, **document}


def _base_row(cell: Cell, names: tuple[str, str, str], curve: Curve, grid: Grid) -> Row:
    point = _point(curve, 0, grid) if 0 in curve.epochs else None
    status = "done" if point else "not measured"
    return Row(None, terms(grid).base, *names, cell.spec.seed, None, None, None, status, "", 0, 0, point, point, None)


def _row(cell: Cell, names: tuple[str, str, str], curve: Curve, grid: Grid) -> Row:
    outcome = cell.outcome
    best = curve.best if curve.last is not None else None
    return Row(
        run_id=cell.run_id,
        label=words.clean(cell.label),
        place=names[0],
        model=names[1],
        data=names[2],
        seed=cell.spec.seed,
        trainable=outcome.get("trainable"),
        parameters=outcome.get("parameters"),
        seconds=cell.seconds if cell.epochs else None,
        status=words.clean(outcome["status"]),
        reason=words.clean(outcome.get("reason") or ""),
        epochs=cell.epochs,
        planned=cell.planned,
        last=None if curve.last is None else _point(curve, curve.last, grid),
        best=None if best is None else _point(curve, best, grid),
        budget=keeps_budget(grid, curve, cell),
    )


def _point(curve: Curve, epoch: int, grid: Grid) -> Point:
    return Point(epoch, curve.perplexity(epoch), {attack: curve.get(epoch, attack) for attack in grid.attacks})
