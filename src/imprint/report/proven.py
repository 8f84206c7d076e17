"""What goes beyond a division into members and non-members: canaries, and records ranked by shadow models."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from imprint.planted import Planted, all_planted
from imprint.ranking import Ranking, ranking
from imprint.report import words
from imprint.report.apart import Section
from imprint.report.sheet import Entry, Sheet
from imprint.risk import Agreement
from imprint.rows import Cell, Grid
from imprint.types import Interval


def proven(grid: Grid, withheld: Collection[str]) -> list[Section]:
    """Canaries, where records are some; agreement of attacks with shadow models, where there are any.

    Args:
        withheld: keys of bases whose gates are not all green.
    """
    return [*_canaries(grid), *_rankings(grid, withheld)]


# ---- canaries: coins decided, so no gate is needed for them


def _canaries(grid: Grid) -> Iterator[Section]:
    found = all_planted(grid.cells)
    if not found:
        return
    claims = any(row.claimed is not None for _, row in found)
    header = ("cell", "copies", "canaries", "AUC", "ε at least", "of one record", "at most provable")
    rows = [_canary(cell, row, claims) for cell, row in found]
    notes = (
        "A coin decided of each canary whether it was tuned on, so that these numbers need no validity gate. ε at "
        "least: for all copies together; of one record: divided by their number. At most provable: what so many "
        "canaries would prove if every guess were right. All rows together hold with 95% confidence.",
        *dict.fromkeys(words.clean(row.reason) for _, row in found if row.reason),
    )
    sheet = Sheet("Canaries at the last epoch", (*header, *(["claimed ε"] if claims else [])), tuple(rows), notes, 2)
    yield Section("Canaries", (_canary_finding([row for _, row in found]),), (sheet,))


def _canary(cell: Cell, row: Planted, claims: bool) -> tuple[Entry | str, ...]:
    bound, one, ceiling = (
        (row.found.epsilon, row.epsilon, row.found.ceiling) if row.found is not None else (None, None, None)
    )
    return (
        words.clean(cell.label),
        str(row.copies),
        Entry(f"{row.canaries:,}"),
        _interval(row.auc),
        *(Entry("" if x is None else f"{x:.2f}") for x in (bound, one, ceiling)),
        *([Entry("" if row.claimed is None else f"{row.claimed:.2f}")] if claims else []),
    )


def _canary_finding(rows: list[Planted]) -> str:
    known = [row.epsilon for row in rows if row.epsilon is not None]
    broken = [row for row in rows if row.claimed is not None and row.epsilon is not None and row.epsilon > row.claimed]
    if broken:
        return "A lower bound exceeds the ε that training claims: the claim is false, or the canaries were not as told."
    if not known:
        return "Nothing can be said of ε."
    if max(known) == 0:
        return "The canaries prove no leakage: every ε remains possible, since a lower bound of 0 is no upper bound."
    return f"With 95% confidence no claim of an ε below {max(known):.2f} for one record would be true of every cell."


def _interval(x: Interval | None) -> Entry:
    return Entry("") if x is None else Entry(words.share(x.value), words.share(x.low), words.share(x.high))


# ---- shadow models


def _rankings(grid: Grid, withheld: Collection[str]) -> Iterator[Section]:
    found = [(cell, one) for cell in grid.cells if (one := ranking(cell, grid.attacks))]
    if not found:
        return
    rows = [
        (words.clean(cell.label), words.clean(attack), *_agreement(value))
        for cell, one in found
        for attack, value in _ordered(one)
        if isinstance(value, Agreement)
    ]
    refused = {words.clean(x) for _, one in found for x in one.agreements.values() if isinstance(x, str)}
    notes = (
        "Rank correlation with the counterfactual memorization of each member (Zhang et al. 2021), and the share of "
        "the most remembered tenth that an attack puts into its own highest tenth; .100 by chance. For an attack that "
        "uses shadow models these are divided in two: it has one half, the truth the other.",
        *sorted(refused),
    )
    lead = [
        f"{words.clean(cell.label)}: by {one.shadows} shadow models; a ranking by the truth itself would correlate by "
        f"about {words.share(one.truth.ceiling)}."
        for cell, one in found
    ]
    sheet = Sheet("Who is at risk: attacks against shadow models", _HEADER, tuple(rows), notes, 2)
    yield Section("Records ranked", tuple(lead), (sheet,), any(cell.base.name in withheld for cell, _ in found))


_HEADER = ("cell", "attack", "rank correlation", "of the top tenth")


def _ordered(one: Ranking) -> list[tuple[str, Agreement | str]]:
    def key(item: tuple[str, Agreement | str]) -> float:
        return -item[1].spearman.value if isinstance(item[1], Agreement) else 0.0

    return sorted(one.agreements.items(), key=key)


def _agreement(found: Agreement) -> tuple[Entry, Entry]:
    return _interval(found.spearman), _interval(found.precision)
