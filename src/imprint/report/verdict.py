"""The verdict in plain words, derived from the numbers: what leaks most and least, and whether the audit can tell."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from imprint.measures import PairedAUC, paired_auc
from imprint.report import words
from imprint.report.readings import Curve, leading_attack, needs_reference
from imprint.report.tables import Row, by_base, places
from imprint.rows import Cell, Grid
from imprint.types import Floats, Interval

_NAMED = 6
"""Up to so many methods are named; of more, the number is given."""


@dataclass(frozen=True)
class Verdict:
    """What can be said about the cells that share a base."""

    place: str
    sentences: list[str]


@dataclass(frozen=True)
class Score:
    """A finished cell at its last epoch."""

    cell: Cell
    epoch: int
    auc: Interval
    perplexity: float

    @property
    def label(self) -> str:
        return words.clean(self.cell.label)

    def __str__(self) -> str:
        return (
            f"{self.label} (AUC {words.interval(self.auc)}, validation perplexity {words.perplexity(self.perplexity)})"
        )


def verdicts(grid: Grid, measured: dict[str, Curve], withheld: Collection[str] = ()) -> list[Verdict]:
    """One verdict for every model, data and seed, but for those whose base is among `withheld`."""
    of_place = places(grid)
    return [
        _verdict(grid, measured, cells, of_place[cells[0].run_id])
        for cells in by_base(grid.cells)
        if cells[0].base.name not in withheld
    ]


def _verdict(grid: Grid, measured: dict[str, Curve], cells: list[Cell], place: str) -> Verdict:
    done = [cell for cell in cells if cell.outcome["status"] == "done" and cell.run_id in measured]
    sentences = _ranking(grid, measured, done)
    finished = {cell.run_id for cell in done}
    if left := [words.clean(cell.label) for cell in cells if cell.run_id not in finished]:
        sentences.append(f"Not compared, because not finished: {_some(left, len(cells))}.")
    curve = next((measured[cell.run_id] for cell in cells if cell.run_id in measured), Curve({}))
    control = _control(curve, grid.attacks)
    return Verdict(place, [*sentences, control] if control else sentences)


def _ranking(grid: Grid, measured: dict[str, Curve], done: list[Cell]) -> list[str]:
    attack = leading_attack(grid, [measured[cell.run_id] for cell in done])
    scores = sorted(_scores(measured, done, attack), key=lambda score: -score.auc.value)
    if not scores:
        return ["No method has finished: there is nothing to compare yet."]
    why = "which the budget names" if (grid.budget or {}).get("attack") else "which finds most here"
    intro = f"At the last epoch the {words.clean(attack)} attack, {why}, tells members from non-members"
    seen = [score.label for score in scores if score.auc.low > 0.5]
    if len(scores) == 1:
        verb = "lies above .5" if seen else "does not lie above .5"
        return [f"{intro} as follows: {scores[0]}. The interval {verb}."]
    if not seen:
        above = "No method's interval lies above .5: this audit sees none of them remember its records."
    else:
        above = f"The interval lies above .5 for {_some(seen, len(scores))}."
    return [
        f"{intro} best after {scores[0]} and worst after {scores[-1]}.",
        _apart(scores[0], scores[-1], attack),
        above,
    ]


def _scores(measured: dict[str, Curve], done: list[Cell], attack: str) -> list[Score]:
    scores = []
    for cell in done:
        curve = measured[cell.run_id]
        reading = curve.get(curve.last or 0, attack)
        if curve.last is not None and reading.interval is not None:
            scores.append(Score(cell, curve.last, reading.interval, curve.perplexity(curve.last).value))
    return scores


def _some(labels: list[str], of: int) -> str:
    return words.listed(labels) if len(labels) <= _NAMED else f"{len(labels)} of {of} methods"


def _apart(most: Score, least: Score, attack: str) -> str:
    difference = _difference(most, least, attack)
    shown = f"On the same records the two differ by {words.interval(difference)}"
    return f"{shown}, too little to tell them apart." if 0 in difference else f"{shown}."


def _difference(a: Score, b: Score, attack: str) -> PairedAUC:
    members, nonmembers = a.cell.groups("member"), a.cell.groups("nonmember")
    of_a, of_b = _sides(a, attack), _sides(b, attack)
    return paired_auc(*of_a, *of_b, member_groups=members, nonmember_groups=nonmembers)


def _sides(score: Score, attack: str) -> tuple[Floats, Floats]:
    """Attack scores of members and of non-members."""
    return score.cell.sides(score.cell.scores(score.epoch, [attack])[attack])


def _control(curve: Curve, attacks: Sequence[str]) -> str:
    """What the attacks find on the untouched base, where there is nothing to find."""
    free = [attack for attack in attacks if not needs_reference(attack)]
    found = {words.clean(attack): x for attack in free if (x := curve.get(0, attack).interval) is not None}
    if not found:
        return ""
    shown = ", ".join(f"{attack} {words.interval(x)}" for attack, x in found.items())
    each = "the interval contains" if len(found) == 1 else "every interval contains"
    tail = f"; {each} .5, as it should" if all(0.5 in x for x in found.values()) else ""
    return f"Control, the untouched base: AUC by {shown}{tail}."


def budget_verdict(grid: Grid, rows: Sequence[Row]) -> str:
    """How many cells keep the budget; empty without one."""
    cells = [row for row in rows if row.run_id is not None]
    kept = [f"{row.label} ({row.place})" if row.place else row.label for row in cells if row.budget]
    if not grid.budget:
        return ""
    if all(row.budget is None for row in cells):
        return "Budget: nobody can tell whether a cell keeps it."
    if not kept:
        return f"Budget: kept by none of {words.plural(len(cells), 'cell')}."
    return f"Budget: kept by {len(kept)} of {words.plural(len(cells), 'cell')}: {_some(kept, len(cells))}."
