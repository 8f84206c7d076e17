"""What stands under a table: why cells have no numbers, the budget in words, and who was counted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from imprint.attacks import ATTACKS, evidence_needed
from imprint.report import words
from imprint.report.readings import LIMITS
from imprint.report.tables import Row, by_base, summary_names
from imprint.results import Cell, Grid

_LIMIT_NAMES = {"auc": "AUC", "tpr_at_10pct_fpr": "TPR at 10% FPR", "tpr_at_1pct_fpr": "TPR at 1% FPR"}


def reasons(rows: Iterable[Row]) -> list[str]:
    """One sentence for each cell that is not done."""
    return [f"{where(row)}: {state(row)}." for row in rows if row.run_id is not None and row.status != "done"]


def state(row: Row) -> str:
    """How a cell ended, after how many epochs, and why."""
    text = f"{row.status} after {row.epochs} of {words.plural(row.planned, 'epoch')}"
    reason = row.reason.rstrip(".")
    if row.status == "unfinished" and not reason:
        reason = "the same command again continues it"
    return f"{text}: {reason}" if reason else text


def where(row: Row) -> str:
    """A row's name in a sentence."""
    return row.label
