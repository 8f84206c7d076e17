"""What goes beyond a division into members and non-members: canaries, and records ranked by shadow models."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import islice

import pandas as pd

from imprint.planted import Planted, all_planted
from imprint.report import words
from imprint.report.apart import Section
from imprint.report.sheet import Entry, Sheet
from imprint.rows import Cell, Grid
from imprint.store import read_table
from imprint.types import Interval


def proven(grid: Grid, withheld: Collection[str], most: int) -> list[Section]:
    """Canaries, where records are some; agreement of attacks with shadow models, where there are any.

    Args:
        withheld: keys of bases whose gates are not all green.
        most: attacks that are shown of each cell, those that rank best.
    """
    return [*_canaries(grid), *_rankings(grid, withheld, most)]


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


def _rankings(grid: Grid, withheld: Collection[str], most: int) -> Iterator[Section]:
    """From rankings.parquet, which took thousands of drawings (`details`)."""
    file = grid.path / "rankings.parquet"
    if not file.exists():
        return
    table = read_table(file).to_pandas()
    found = [(cell, rows) for cell in grid.cells if len(rows := table[table.run_id == cell.run_id])]
    if not found:
        return
    notes = (
        "Rank correlation with the counterfactual memorization of each member (Zhang et al. 2021), and the share of "
        "the most remembered tenth that an attack puts into its own highest tenth; .100 by chance. For an attack that "
        "uses shadow models these are divided in two: it has one half, the truth the other.",
        *sorted({words.clean(reason) for _, rows in found for reason in rows.reason if reason}),
    )
    body = tuple(line for cell, rows in found for line in islice(_ranked(cell, rows), most))
    if len(grid.attacks) > most:
        notes = (*notes, f"Shown are the {most} that rank best; rankings.parquet has all.")
    sheet = Sheet("Who is at risk: attacks against shadow models", _HEADER, body, notes, 2)
    lead = tuple(line for cell, rows in found for line in _reachable(cell, rows))
    yield Section("Records ranked", lead, (sheet,), any(cell.base.name in withheld for cell, _ in found))


_HEADER = ("cell", "attack", "rank correlation", "of the top tenth")


def _ranked(cell: Cell, rows: pd.DataFrame) -> Iterator[tuple[Entry | str, ...]]:
    """The attacks of a cell, the one that ranks best first."""
    known = rows[rows.value.notna()]
    top = known[known.metric == "top_tenth"].set_index("attack")
    for row in known[known.metric == "spearman"].sort_values("value", ascending=False, kind="stable").itertuples():
        tenth = top.loc[row.attack]
        pair = Interval(row.value, row.low, row.high), Interval(tenth.value, tenth.low, tenth.high)
        yield (words.clean(cell.label), words.clean(row.attack), *map(_interval, pair))


def _reachable(cell: Cell, rows: pd.DataFrame) -> Iterator[str]:
    ceilings = rows.ceiling.dropna()
    if len(ceilings):
        yield (
            f"{words.clean(cell.label)}: by {rows.shadows.iloc[0]} shadow models; a ranking by the truth itself would "
            f"correlate by about {words.share(float(ceilings.iloc[0]))}."
        )
