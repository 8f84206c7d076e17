"""What an overall number hides: subgroups, and the members that are given away most, beside what chance allows."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from imprint.exposed import ExposedRecord, Exposure, exposed
from imprint.report import words
from imprint.report.readings import Curve, leading_attack
from imprint.report.sheet import Entry, Sheet
from imprint.report.terms import point_names, terms
from imprint.rows import Cell, Grid
from imprint.store import read_table
from imprint.subgroups import RATES, SubgroupRow, subgroups
from imprint.types import Interval

SIGNIFICANT = 0.05
NAMED = 5
"""Up to so many subgroups are named in a sentence."""
LONGEST = 400
"""Characters of a record's text."""
OWNER = "group "
"""How `records.parquet` begins the subject of a record that may share it."""
ROUGHLY = "~"


@dataclass(frozen=True)
class Section:
    """Tables that belong together, and what has to be read before them."""

    title: str
    lead: tuple[str, ...]
    sheets: tuple[Sheet, ...]
    doubt: bool = False
    """Whether a gate on which they rest is not green."""


def sections(
    grid: Grid, measured: Mapping[str, Curve], withheld: Collection[str], most: int, texts: bool = False
) -> list[Section]:
    """Subgroups, where the records have any; exposed records, where there is one cell, whose records they are.

    Args:
        withheld: keys of bases whose gates are not all green.
        most: rows of a table.
        texts: whether texts are shown, where the evidence has them.
    """
    return [*_subgroups(grid, measured, withheld, most), *_exposed(grid, withheld, most, texts)]


# ---- subgroups


def _subgroups(grid: Grid, measured: Mapping[str, Curve], withheld: Collection[str], most: int) -> Iterator[Section]:
    attack = leading_attack(grid, measured.values())
    found = [(cell, row) for cell in grid.cells if cell.epochs for row in subgroups(cell, cell.epochs, [attack])]
    if not found:
        return
    shown = [(cell, row) for cell, row in found if row.auc]
    where = (
        f"Members against non-members of the same subgroup, by {words.clean(attack)}, at the last {terms(grid).point}."
    )
    doubt = any(cell.base.name in withheld for cell, _ in found)
    refused = _few([f"{_named(grid, cell, row)}: {row.reason}" for cell, row in found if row.reason], most)
    if not shown:
        yield Section("Subgroups", ("Every subgroup has too few records.", *refused), (), doubt)
        return
    lead = where, _finding([(_named(grid, cell, row), row) for cell, row in shown])
    yield Section("Subgroups", lead, (_subgroup_sheet(grid, attack, shown, refused, most),), doubt)


def _few(sentences: list[str], most: int) -> list[str]:
    left = len(sentences) - most
    more = [f"{left:,} more have too few records; subgroups.parquet counts them."] if left > 0 else []
    return [*sentences[:most], *more]


def _subgroup_sheet(
    grid: Grid, attack: str, shown: Sequence[tuple[Cell, SubgroupRow]], refused: Sequence[str], most: int
) -> Sheet:
    several = len(grid.cells) > 1
    header = ["subgroup", "members", "non-members", "AUC", "TPR at 10% FPR", "TPR at 1% FPR", "vs. others", "p"]
    rows = [(*([words.clean(cell.label)] if several else []), *_subgroup(row)) for cell, row in shown[:most]]
    notes = [
        "vs. others: the AUC less that of all other records. p: of as large a difference by chance, corrected for the "
        "number of subgroups (Holm)."
    ]
    if any(rate.status == "indicative" for _, row in shown[:most] for rate in row.tpr.values()):
        notes.append(f"{ROUGHLY} indicative: fewer than ten false positives are expected.")
    if len(shown) > most:
        notes.append(f"Shown are {most} of {len(shown):,}, the largest first; subgroups.parquet has all.")
    title = f"Subgroups, by {words.clean(attack)}"
    return Sheet(title, (*(["cell"] if several else []), *header), tuple(rows), (*notes, *refused), group=1 + several)


def _named(grid: Grid, cell: Cell, row: SubgroupRow) -> str:
    label = words.clean(row.label)
    return f"{label} ({words.clean(cell.label)})" if len(grid.cells) > 1 else label


def _subgroup(row: SubgroupRow) -> list[Entry | str]:
    rates = [row.tpr[metric] for metric in RATES]
    return [
        row.label,
        Entry(f"{row.members:,}"),
        Entry(f"{row.nonmembers:,}"),
        _entry(row.auc),
        *(_entry(rate.interval, rate.status) for rate in rates),
        _entry(row.difference, signed=True),
        Entry("" if row.p is None else words.probability(row.p)),
    ]


def _entry(x: Interval | None, status: str = "ok", signed: bool = False) -> Entry:
    if x is None:
        return Entry("" if status == "ok" else words.REFUSED.get(status, status))
    sign = "+" if signed and x.value > 0 else ROUGHLY if status == "indicative" else ""
    return Entry(f"{sign}{words.share(x.value)}", words.share(x.low), words.share(x.high))


def _finding(shown: Sequence[tuple[str, SubgroupRow]]) -> str:
    """Which subgroups leak more, or less, than all other records."""
    compared = [(name, row.difference, row.p) for name, row in shown if row.difference and row.p is not None]
    apart = [(name, x) for name, x, p in compared if p < SIGNIFICANT]
    if not apart:
        return (
            "None is told apart from all other records." if compared else "None can be compared with all other records."
        )
    more, less = ([(name, x) for name, x in apart if (x.value > 0) is side] for side in (True, False))
    told = [
        f"{verb} than all other records: {_some(names)}."
        for verb, names in (("Leaks more", more), ("Leaks less", less))
        if names
    ]
    return " ".join(told)


def _some(apart: Sequence[tuple[str, Interval]]) -> str:
    shown = [f"{name} (AUC {words.share(abs(x.value))} {'higher' if x.value > 0 else 'lower'})" for name, x in apart]
    return words.listed(shown if len(shown) <= NAMED else [*shown[:NAMED], f"{len(shown) - NAMED} more"])


# ---- exposed records


def _exposed(grid: Grid, withheld: Collection[str], most: int, texts: bool) -> Iterator[Section]:
    """Of a grid of several cells exposed.parquet has the lists."""
    if len(grid.cells) > 1 or not grid.cells[0].epochs:
        return
    [cell] = grid.cells
    found, names = exposed(cell, most), point_names(cell)
    if found.reason:
        yield Section("Most exposed records", (f"Not told: {found.reason}",), ())
        return
    sheets = [_record_sheet(found, names, _texts(cell) if texts else {})]
    if len(names) > 1:
        sheets.append(_count_sheet(found, names, terms(grid).point))
    yield Section("Most exposed records", (found.finding,), tuple(sheets), cell.base.name in withheld)


def _record_sheet(found: Exposure, names: Mapping[int, str], texts: Mapping[str, str]) -> Sheet:
    shared = any(row.subject.startswith(OWNER) for row in found.rows)
    header = ["rank", "record", *(["owner"] if shared else []), "gain", "p", "by chance", "tokens", "exposed since"]
    rows = [_record(row, names, shared) for row in found.rows]
    if texts:
        header.append("text")
        rows = [[*row, _brief(texts.get(one.id, ""))] for row, one in zip(rows, found.rows, strict=True)]
    notes = [
        "Gain: nats per token over the base. p: of so high a gain for a record that was not tuned on.",
        f"By chance: how many of {found.members:,} members would gain as much if nothing leaked.",
        f"Exposed: above the gain that {found.rate:.0%} of the non-members exceed.",
    ]
    title = (
        f"The {words.plural(len(rows), 'member')} of highest gain" if len(rows) != 1 else "The member of highest gain"
    )
    return Sheet(title, tuple(header), tuple(map(tuple, rows)), tuple(notes), group=2)


def _record(row: ExposedRecord, names: Mapping[int, str], shared: bool) -> list[Entry | str]:
    owner = row.subject.removeprefix(OWNER) if row.subject.startswith(OWNER) else ""
    return [
        str(row.rank),
        row.id,
        *([owner] if shared else []),
        Entry(f"{row.score:.2f}"),
        Entry(words.probability(row.p)),
        Entry(f"{row.chance:.1f}"),
        Entry(f"{row.tokens:,}"),
        "never" if row.first is None else names[row.first],
    ]


def _count_sheet(found: Exposure, names: Mapping[int, str], point: str) -> Sheet:
    rows = [
        (names[one.epoch], Entry(f"{one.exposed:,}"), Entry(f"{one.expected:.1f}"), Entry(words.probability(one.p)))
        for one in found.epochs
    ]
    notes = ("p: of as many by chance, for one row alone.",)
    return Sheet(f"Exposed members by {point}", (point, "exposed", "by chance", "p"), tuple(rows), notes)


def _brief(text: str) -> str:
    text = words.clean(text)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def _texts(cell: Cell) -> dict[str, str]:
    """Record id → its text, where the audit was allowed to write texts; else nothing."""
    file = cell.base / "texts.parquet"
    if not file.exists():
        return {}
    table = read_table(file)
    return dict(zip(table.column("id").to_pylist(), table.column("text").to_pylist(), strict=True))
