"""The summary: one row per cell, at its last epoch and at its epoch of best validation perplexity."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import pandas as pd

from imprint.report import words
from imprint.report.readings import ABSENT, Curve, Reading, curves, keeps_budget, needs_reference
from imprint.results import Cell, Grid

BASE = "base (epoch 0)"
VERDICTS = {True: "within", False: "over", None: "cannot tell"}


@dataclass(frozen=True)
class Point:
    """What was measured at one epoch."""

    epoch: int
    perplexity: Reading
    auc: dict[str, Reading]


@dataclass(frozen=True)
class Row:
    """One cell, or the untouched base that it and others started from (`run_id` is None)."""

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


@dataclass(frozen=True)
class Entry:
    """A table cell."""

    text: str
    """The number, or the word in its place."""
    low: str = ""
    high: str = ""
    """The bounds of its interval, where there is one to show."""
    aside: str = ""
    """What only a page has room for."""
    exact: str = ""
    """The number in full."""

    @property
    def interval(self) -> str:
        """The bounds in brackets."""
        return f"[{self.low} {self.high}]" if self.low else ""


@dataclass(frozen=True)
class Column:
    """How a row is shown in one column; key columns say which row it is."""

    title: str
    entry: Callable[[Row], Entry]
    number: bool = True
    key: bool = False
    meaning: str = ""
    """The title in full, where a page has room for it."""


def summary(grid: Grid, frame: pd.DataFrame) -> list[Row]:
    """One row per cell in the grid's order; before those that share a base, the base itself.

    Args:
        grid: what `load_grid` returns.
        frame: what `results` or `write_results` returns.
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
            rows.append(_row(cell, names, measured.get(cell.run_id, Curve({})), grid))
    return rows


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
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.base.name, []).append(cell)
    return list(groups.values())


def _data_document(cell: Cell) -> dict[str, object]:
    document = cell.spec.data.model_dump()
    source = document.pop("source")
    return {"source": source.pop("name"), **source, **document}


def _base_row(cell: Cell, names: tuple[str, str, str], curve: Curve, grid: Grid) -> Row:
    point = _point(curve, 0, grid) if 0 in curve.epochs else None
    status = "done" if point else "not measured"
    return Row(None, BASE, *names, cell.spec.seed, None, None, None, status, "", 0, 0, point, point, None)


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
        planned=cell.spec.train.epochs,
        last=None if curve.last is None else _point(curve, curve.last, grid),
        best=None if best is None else _point(curve, best, grid),
        budget=keeps_budget(grid, curve, cell),
    )


def _point(curve: Curve, epoch: int, grid: Grid) -> Point:
    return Point(epoch, curve.perplexity(epoch), {attack: curve.get(epoch, attack) for attack in grid.attacks})


def key_columns(rows: Sequence[Row]) -> list[Column]:
    """Method, and whatever of model, data and seed differs within the grid."""
    columns = [Column("method", lambda row: Entry(row.label), number=False, key=True)]
    for name in ("model", "data", "seed"):
        if len({getattr(row, name) for row in rows}) > 1:
            columns.append(Column(name, _attribute(name), number=name == "seed", key=True))
    return columns


def _attribute(name: str) -> Callable[[Row], Entry]:
    return lambda row: Entry(str(getattr(row, name)))


def cost_columns() -> list[Column]:
    """What was trained."""
    return [Column("trainable", _trainable), Column("of all", _share)]


def outcome_columns() -> list[Column]:
    """How long it took and how it ended."""
    return [Column("time", _time), Column("status", _status, number=False)]


def point_columns(attacks: Sequence[str], of: Callable[[Row], Point | None]) -> list[Column]:
    """Epoch, validation perplexity and the AUC of every attack at a point of each row."""
    return [
        Column("epoch", lambda row: Entry(_epoch(row, of(row)))),
        Column("val. ppl", _perplexity(of), meaning="validation perplexity"),
        *(Column(words.clean(attack), _auc(of, attack), meaning=f"AUC, {words.clean(attack)}") for attack in attacks),
    ]


def budget_columns(grid: Grid) -> list[Column]:
    """The verdict on the budget, where there is one."""
    if not grid.budget:
        return []
    return [Column("budget", lambda row: Entry("" if row.run_id is None else VERDICTS[row.budget]), number=False)]


def _trainable(row: Row) -> Entry:
    return Entry("" if row.trainable is None else f"{row.trainable:,}", exact=str(row.trainable or ""))


def _share(row: Row) -> Entry:
    known = row.trainable is not None and row.parameters
    return Entry(words.percent(row.trainable or 0, row.parameters or 0) if known else "")


def _time(row: Row) -> Entry:
    return Entry("" if row.seconds is None else words.clock(row.seconds))


def _status(row: Row) -> Entry:
    return Entry("" if row.run_id is None and row.last else row.status, aside=row.reason)


def _epoch(row: Row, point: Point | None) -> str:
    if point is None:
        return "-"
    short = row.status == "unfinished" or row.status == "failed"
    return f"{point.epoch} of {row.planned}" if short and point.epoch else str(point.epoch)


def _perplexity(of: Callable[[Row], Point | None]) -> Callable[[Row], Entry]:
    def entry(row: Row) -> Entry:
        point = of(row)
        reading = point.perplexity if point else _missing(row)
        x = reading.interval
        if x is None:
            return Entry(words.refused(reading))
        known = math.isfinite(x.low) and math.isfinite(x.high)
        aside = f"[{words.perplexity(x.low)} {words.perplexity(x.high)}]" if known else ""
        return Entry(words.perplexity(x.value), aside=aside, exact=repr(x.value))

    return entry


def _auc(of: Callable[[Row], Point | None], attack: str) -> Callable[[Row], Entry]:
    def entry(row: Row) -> Entry:
        point = of(row)
        reading = point.auc[attack] if point else _missing(row)
        x = reading.interval
        if x is None:
            return Entry(words.refused(reading))
        fixed = point is not None and point.epoch == 0 and needs_reference(attack)  # an interval would mean nothing
        known = math.isfinite(x.low) and math.isfinite(x.high) and not fixed
        low, high = (words.share(x.low), words.share(x.high)) if known else ("", "")
        return Entry(words.share(x.value), low, high, exact=repr(x.value))

    return entry


def _missing(row: Row) -> Reading:
    return ABSENT if row.status == "done" else Reading(None, row.status)
