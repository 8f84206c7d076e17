"""What stands under a table: why cells have no numbers, the budget in words, and who was counted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from imprint.report import words
from imprint.report.readings import LIMITS, needs_reference
from imprint.report.tables import Row, by_base, places
from imprint.report.terms import Terms, terms
from imprint.rows import Cell, Grid
from imprint.store import read_json


@dataclass(frozen=True)
class Records:
    """The records behind one base; `known` is False where the base was never scored."""

    place: str
    known: bool
    counts: dict[str, int]
    dropped: dict[str, int]
    truncated: dict[str, int]
    max_length: int | None


def all_notes(grid: Grid, rows: Sequence[Row]) -> list[str]:
    """Everything that belongs under the summary, a sentence or two each."""
    return [
        *reasons(rows, terms(grid)),
        *refused_note(grid),
        *budget_note(grid),
        *fixed_note(grid.attacks),
        *record_notes(grid),
    ]


def refused(grid: Grid) -> dict[str, str]:
    """Attack → why it has no number somewhere."""
    file = grid.path / "refused.json"
    return dict(read_json(file)) if file.exists() else {}


def refused_note(grid: Grid) -> list[str]:
    """The same in sentences."""
    told = refused(grid).items()
    return [f"{words.clean(attack)} is refused: {words.clean(reason).rstrip('.')}." for attack, reason in told]


def reasons(rows: Iterable[Row], called: Terms) -> list[str]:
    """One sentence for each cell that is not done, or that never became better than the base."""
    cells = {row.run_id: row for row in rows if row.run_id is not None}.values()
    told = [row for row in cells if row.status != "done" or row.reason or _useless(row)]
    return [f"{called.whole or name(row)}: {state(row, called)}." for row in told]


def _useless(row: Row) -> bool:
    return row.best is not None and row.best.epoch == 0


def name(row: Row) -> str:
    """A row's name where no columns tell its model, data and seed."""
    return f"{row.label} ({row.place})" if row.place else row.label


def state(row: Row, called: Terms) -> str:
    """How a cell ended, after how many epochs, and why; of an audit nobody knows how many there would have been."""
    of = f"{row.epochs} of " if called.planned else ""
    text = f"{row.status} after {of}{words.plural(row.planned, called.point)}"
    reason = row.reason.rstrip(".")
    if row.status == "unfinished" and not reason:
        reason = "the same command again continues it"
    if row.status == "done" and _useless(row):
        reason = "validation perplexity never fell below the base's, so the best epoch is 0, the base itself"
    return f"{text}: {reason}" if reason else text


def budget_note(grid: Grid) -> list[str]:
    """What the budget column compares."""
    budget = grid.budget or {}
    given = {title: budget[key] for key, title in LIMITS.items() if budget.get(key) is not None}
    limits = [f"{title} below {words.share(limit)}" for title, limit in given.items()]
    if not limits:
        return []
    who = f"the {words.clean(budget['attack'])} attack" if budget.get("attack") else "every attack"
    return [
        f"Budget: {words.listed(limits)}, by {who}, {terms(grid).judged}. The upper bound of the interval must stay "
        "below the limit."
    ]


def fixed_note(attacks: Iterable[str]) -> list[str]:
    """Why some attacks have no control."""
    fixed = [words.clean(attack) for attack in attacks if needs_reference(attack)]
    if not fixed:
        return []
    verb = "compares" if len(fixed) == 1 else "compare"
    return [f"{words.listed(fixed)} {verb} with the base: on the base itself the AUC is .500 by definition."]


def records(grid: Grid) -> list[Records]:
    """Who was counted, for every base of the grid."""
    of_place = places(grid)
    return [_records(cells[0], of_place[cells[0].run_id]) for cells in by_base(grid.cells)]


def _records(cell: Cell, place: str) -> Records:
    if not (cell.base / "meta.json").exists():
        return Records(place, False, {}, {}, {}, None)
    meta: dict[str, Any] = cell.base_meta
    dropped = {words.clean(reason): n for reason, n in meta["dropped"].items() if n}
    return Records(place, True, meta["counts"], dropped, meta["truncated"], meta.get("max_length"))


def record_notes(grid: Grid) -> list[str]:
    """Members, non-members, validation, dropped and truncated; once where it is the same for every base."""
    found = [(one.place, _sentence(one, terms(grid))) for one in records(grid)]
    if len({sentence for _, sentence in found}) == 1:
        return [f"Records: {found[0][1]}"]
    return [f"Records of {place}: {sentence}" for place, sentence in found]


def _sentence(one: Records, called: Terms) -> str:
    if not one.known:
        return "not counted: the base was never scored."
    n = one.counts
    tuned = f" ({n['tuned']:,} tuned on)" if "tuned" in called.counts else ""
    validation = f", {n['validation']:,} for validation" if "validation" in called.counts else ""
    apart = f", {n['auxiliary']:,} auxiliary on either side" if n.get("auxiliary") else ""
    apart += f", {n['canaries']:,} canaries" if n.get("canaries") else ""
    text = f"{n['members']:,} members{tuned}, {n['nonmembers']:,} non-members{validation}{apart}."
    return f"{text} Dropped: {dropped_text(one)}. Truncated{limit_text(one)}: {truncated_text(one)}."


def dropped_text(one: Records) -> str:
    """
    >>> dropped_text(Records("", True, {}, {"duplicate": 3, "empty": 1}, {}, None))
    '3 duplicate, 1 empty'
    """
    return ", ".join(f"{n:,} {reason}" for reason, n in one.dropped.items()) or "none"


def truncated_text(one: Records) -> str:
    """
    >>> truncated_text(Records("", True, {}, {}, {"prompt": 2, "target": 1}, 64))
    '2 prompts, 1 target'
    """
    return ", ".join(words.plural(n, part) for part, n in one.truncated.items() if n) or "none"


def limit_text(one: Records) -> str:
    """The length at which texts were cut."""
    return f" at {one.max_length:,} tokens" if one.max_length else ""
