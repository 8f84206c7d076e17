"""What the canaries in a run prove: one training, and coins that decided what went into it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from imprint.canaries.judge import centred
from imprint.errors import ImprintError
from imprint.evidence import Evidence
from imprint.measures import auc
from imprint.measures.epsilon import OneRun, one_run_audit
from imprint.rows import Cell
from imprint.types import Floats, Interval

SIGNIFICANCE = 0.05
"""Probability that a bound exceeds the true ε, at most."""


@dataclass(frozen=True)
class Planted:
    """The canaries of a cell that are told equally often, those that its coins left out among them.

    Attributes:
        epoch: of the model that was asked.
        copies: of each canary that is in.
        canaries: how many there are, in and out.
        auc: of those in against those out, by what tuning gained on them; None where that cannot be said.
        found: the lower bound on ε that holds for `copies` records together; None where that cannot be said.
        claimed: the ε of one record that training claimed to spend, None where it claimed none.
        reason: why something cannot be said, else empty.
    """

    epoch: int
    copies: int
    canaries: int
    auc: Interval | None
    found: OneRun | None
    claimed: float | None
    reason: str = ""

    @property
    def epsilon(self) -> float | None:
        """Of one record: what holds for k copies together is at most k times as much (group privacy, for δ = 0)."""
        if self.found is None or (self.found.delta and self.copies > 1):
            return None
        return self.found.epsilon / self.copies


def all_planted(cells: Sequence[Cell]) -> list[tuple[Cell, Planted]]:
    """The canaries of several cells: all bounds together hold with 95% confidence (Bonferroni)."""
    count = sum(len(_numbers(cell)) for cell in cells)
    return [(cell, row) for cell in cells for row in planted(cell, SIGNIFICANCE / max(count, 1))]


def planted(cell: Cell, significance: float = SIGNIFICANCE) -> list[Planted]:
    """What the canaries of the last finished epoch prove, those told least often first; empty where there are none.

    A score is what tuning gained on a canary in nats, less the mean gain of its family told as often, in or out: what
    they have in common is no sign of any of them, and a mean over both knows nothing of the coins.
    """
    if not len(_numbers(cell)):
        return []
    gain = Evidence(cell, cell.epochs).score("ref") * cell.records["scored_tokens"].to_numpy()
    return list(_by_copies(cell, gain, significance))


def _by_copies(cell: Cell, gain: Floats, significance: float) -> Iterator[Planted]:
    copies, families = _copies(cell), cell.records["family"].to_numpy()
    inside, spent = cell.role_in("canary_in"), cell.folder.meta(cell.epochs).get("privacy") or {}
    for count in _numbers(cell):
        rows = copies == count
        scores, coins = centred(gain[rows], families[rows].tolist()), inside[rows]
        interval, found, reason = None, None, ""
        try:
            interval = auc(scores[coins], scores[~coins])
            found = one_run_audit(scores, coins, delta=spent.get("delta", 0.0), significance=significance)
        except ImprintError as error:
            reason = str(error)
        yield Planted(cell.epochs, int(count), int(rows.sum()), interval, found, spent.get("epsilon"), reason)


def _copies(cell: Cell) -> Floats:
    """[N] how often each record is told as a canary; 0: it is none."""
    copies: Floats = cell.records["repetitions"].to_numpy(np.float64, na_value=0.0)
    return copies


def _numbers(cell: Cell) -> Floats:
    """The different numbers of copies; none where there are no canaries, or nothing was tuned."""
    if not cell.epochs or "repetitions" not in cell.records:
        return np.zeros(0)
    copies = _copies(cell)
    return np.unique(copies[copies > 0])
