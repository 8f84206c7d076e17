"""The output folder of an audit: the evidence of a base and of one checkpoint after another, as a run leaves it.

It is laid out as that of `imprint run` (`store.py`), with the checkpoints for epochs, so that results, gates and
reports are computed by the same code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from imprint.cells import broken, score_base
from imprint.claim import claim
from imprint.controls import measure_controls
from imprint.errors import ImprintError, UsageError
from imprint.passes.spec import EvidenceSpec
from imprint.probes import Missing, measure, missing
from imprint.progress import Progress
from imprint.recipe import AnyCell, AnyPlan
from imprint.records import Audit
from imprint.spec import AuditSpec, Budget, content_key
from imprint.store import CellFolder, Store, atomic_folder, write_json, write_stats, write_table
from imprint.types import TokenStats

if TYPE_CHECKING:
    from torch import nn

    from imprint.tuning.base import Base


@dataclass(frozen=True)
class Ledger:
    """An audit that is being written."""

    store: Store
    planned: AnyPlan
    audit: Audit

    @property
    def cell(self) -> AnyCell:
        return self.planned.cells[0]

    @property
    def folder(self) -> CellFolder:
        return self.store.cell(self.cell.spec.run_id)

    def measure_base(self, base: Base) -> TokenStats:
        """Epoch 0 and the evidence of the gates, if they are not there yet."""
        stats = score_base(self.cell, self.audit, base, self.store)
        measure_controls(self.cell, self.audit, base, self.store)
        return stats

    @property
    def has_base(self) -> bool:
        return self.store.gates(self.cell.base).is_dir()

    def write_texts(self, tokenizer: Any) -> None:
        """The scored records as text, for a report that was allowed to show it."""
        texts = [tokenizer.decode(record.ids) for record in self.audit.scored]
        table = pa.table({"id": [record.id for record in self.audit.scored], "text": texts})
        write_table(self.store.base(self.cell.base) / "texts.parquet", table)

    def written(self) -> list[dict[str, Any]]:
        """What is known of each checkpoint that has been scored: `name`, `fingerprint`, `step`, …"""
        return [self.folder.meta(number) for number in range(1, self.folder.finished_epochs() + 1)]

    def write(self, stats: TokenStats, name: str, cost: dict[str, Any], **about: Any) -> int:
        """Add a checkpoint; its number.

        Raises:
            ImprintError: its scores cannot be used.
        """
        number = self.folder.finished_epochs() + 1
        if reason := broken(stats, number):
            raise ImprintError(f"{name} cannot be audited: {reason}")
        meta = {
            "epoch": number,
            "name": name,
            "tokens_trained": 0,
            "tokens_scored": self.audit.tokens,
            "validation_perplexity": self.audit.perplexity(stats),
            "cost": cost,
            **about,
        }
        with atomic_folder(self.folder.epoch(number)) as path:
            write_stats(path / "stats.parquet", self.audit.kept(stats))
            write_json(path / "meta.json", meta)
        return number

    def missing_passes(self, number: int) -> list[Missing]:
        """Evidence that takes passes of its own and is not there yet, of a checkpoint; of the base for 0."""
        return missing(self.planned, self.cell, self.store, [number] if number else [], base=number == 0)

    def measure_passes(
        self, number: int, model: nn.Module, tokenizer: Any, budget: int, memo: dict[str, Any], progress: Progress
    ) -> None:
        """Measure it, on the checkpoint at hand."""
        if todo := self.missing_passes(number):
            progress.note(f"{self.cell.label}: further passes over {f'checkpoint {number}' if number else 'the base'}")
            measure(todo, model, self.cell, self.audit, tokenizer, budget, self.planned.passes, memo, progress.note)

    def reopen(self) -> None:
        """More checkpoints are to come."""
        (self.folder.path / "done.json").unlink(missing_ok=True)


def finish(folder: CellFolder) -> None:
    """Mark an audit complete, with the sizes of its last checkpoint."""
    last = folder.meta(folder.finished_epochs())
    folder.finish(status="done", reason=None, **{key: last.get(key) for key in ("trainable", "parameters")})


def base_key(spec: AuditSpec) -> str:
    """Names what is scored at epoch 0: (model compared with, data)."""
    identity = spec.identity()
    keys = ("model", "data", "version", *(["reference"] if spec.reference else []))
    return content_key({key: identity[key] for key in keys})


@contextmanager
def open_ledger(
    out: Path,
    cell: AnyCell,
    audit: Audit,
    attacks: Sequence[str],
    budget: Budget | None,
    document: dict[str, Any],
    passes: EvidenceSpec | None = None,
) -> Iterator[Ledger]:
    """Hold the folder and make it this audit's own.

    Args:
        document: what was asked for, for the report's annex.
        passes: how the evidence is made that takes passes of its own.

    Raises:
        UsageError: the folder belongs to something else, is in use, or cannot be written.
    """
    store = Store(out)
    planned = AnyPlan(document, (cell,), tuple(attacks), budget, passes or EvidenceSpec())
    with claim(store, planned):
        ledger = Ledger(store, planned, audit)
        write_json(ledger.folder.path / "spec.json", cell.spec.model_dump(mode="json"))
        yield ledger


def check_same(ledger: Ledger, fingerprints: Sequence[str]) -> int:
    """How many of the checkpoints have been scored already.

    Raises:
        UsageError: others have been.
    """
    known = [meta["fingerprint"] for meta in ledger.written()]
    if known != list(fingerprints[: len(known)]):
        raise UsageError(
            f"--out {ledger.store.path} holds the audit of other weights: give another folder for this adapter"
        )
    return len(known)


def check_texts(ledger: Ledger) -> None:
    """
    Raises:
        UsageError: the evidence holds texts and must not, or holds none and should.
    """
    base = ledger.store.base(ledger.cell.base)
    if base.is_dir() and (base / "texts.parquet").exists() is ledger.audit.private:
        told = "holds texts, written with --show-text" if ledger.audit.private else "was written without --show-text"
        raise UsageError(f"--out {ledger.store.path} {told}: give another folder")
