"""The columns of the summary: how a row is shown, wherever it is shown."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from imprint.report import words
from imprint.report.readings import ABSENT, UNFINISHED, Reading, needs_reference
from imprint.report.tables import Point, Row
from imprint.report.terms import Terms
from imprint.rows import Grid

VERDICTS = {True: "within", False: "over", None: "cannot tell"}


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


def key_columns(rows: Sequence[Row], called: Terms) -> list[Column]:
    """Method or checkpoint, and whatever of model, data and seed differs within the grid."""
    columns = [Column(called.key, lambda row: Entry(row.label), number=False, key=True)]
    for name in ("model", "data", "seed"):
        if len({getattr(row, name) for row in rows}) > 1:
            columns.append(Column(name, _attribute(name), number=name == "seed", key=True))
    return columns


def _attribute(name: str) -> Callable[[Row], Entry]:
    return lambda row: Entry(str(getattr(row, name)))


def step_columns(rows: Sequence[Row]) -> list[Column]:
    """The step of training, where a checkpoint knows it."""
    if all(row.step is None for row in rows):
        return []
    return [Column("step", lambda row: Entry("" if row.step is None else f"{row.step:,}"))]


def cost_columns() -> list[Column]:
    """What was trained."""
    return [Column("trainable", _trainable), Column("of all", _share)]


def outcome_columns() -> list[Column]:
    """How long it took and how it ended."""
    return [Column("time", _time), Column("status", _status, number=False)]


def point_columns(attacks: Sequence[str], of: Callable[[Row], Point | None], called: Terms) -> list[Column]:
    """Number, utility and the AUC of every attack at a point of each row."""
    return [
        Column(called.number, lambda row: Entry(_epoch(row, of(row)))),
        Column(called.short, _perplexity(of), meaning=called.utility),
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
    short = row.status in UNFINISHED and point.epoch and row.epochs < row.planned
    return f"{point.epoch} of {row.planned}" if short else str(point.epoch)


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
