"""Cells at work: tune, score after every epoch, write; alone, or as a crew that shares its passes over one base.

A crew pays where a step of one run is too small to keep the machine busy (`benchmarks/training.py` measures when). Each
run ends where it would have ended alone, to float precision.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from imprint.attacks import run_attack
from imprint.checkpoint import resume, write_epoch
from imprint.controls import measure_controls
from imprint.engine.compiled import pays
from imprint.engine.costs import measured
from imprint.engine.features import kept_forward
from imprint.engine.forward import Forward, forward_of, joined
from imprint.errors import ImprintError
from imprint.measures import auc
from imprint.progress import Progress
from imprint.recipe import AnyCell, PlannedCell
from imprint.records import Audit, tuned_for, without_some
from imprint.store import CellFolder, Store, atomic_folder, read_stats, write_json, write_stats, write_table
from imprint.tuning.base import Base
from imprint.tuning.models import count_parameters, only_head_trains, vocabulary
from imprint.tuning.private import PrivateTrainer, train_privately
from imprint.tuning.train import EpochReport, Trainer, train
from imprint.types import TokenStats

LARGEST_LOSS = 700.0
"""Nats per token of one record, beyond which its perplexity is no float: such a model has diverged."""
CREW_ROOM = {"cpu": 100_000, "cuda": 4_000_000}
"""Numbers [tokens, width] that the runs of a crew may have between layers, all together. On a CPU more would leave the
cache; the figure for a GPU has not been measured."""


@dataclass(frozen=True)
class Work:
    """A cell that is ready to go on after `done` finished epochs; `reference` is what the base says."""

    cell: PlannedCell
    folder: CellFolder
    audit: Audit
    reference: TokenStats
    model: nn.Module
    forward: Forward
    trainer: Trainer
    done: int


def prepare_cell(cell: PlannedCell, base: Base, audit: Audit, store: Store, progress: Progress) -> Work:
    """Score the base if nobody has, attach the method, and restore the last finished epoch."""
    spec, folder, audit = cell.spec, store.cell(cell.spec.run_id), tuned_for(audit, cell.spec)
    reference = score_base(cell, audit, base, store)  # before a tuner exists
    progress.base(cell.label, reference, audit)
    measure_controls(cell, audit, base, store)
    model = base.tuned(spec.method, spec.seed)
    forward = forward_for(model, base, cell, audit, store)
    kind = PrivateTrainer if spec.train.dp else Trainer
    trainer = kind(model, audit.tuned, spec.train, spec.method.options["learning_rate"], spec.seed)
    write_json(folder.path / "spec.json", spec.model_dump(mode="json"))
    return Work(cell, folder, audit, reference, model, forward, trainer, resume(folder, trainer))


def crews(
    cells: Sequence[PlannedCell], audits: Mapping[str, Audit], store: Store, device: str
) -> list[list[PlannedCell]]:
    """The cells in an order in which each model is loaded, and each split's features are computed, only once.

    Neighbours on one model that may share their passes are together, as many as there is room for.
    """
    models = list(dict.fromkeys(cell.model_key for cell in cells))
    bases = list(dict.fromkeys(cell.base for cell in cells))
    ordered = sorted(cells, key=lambda cell: (models.index(cell.model_key), bases.index(cell.base)))
    found: list[list[PlannedCell]] = []
    room, last = 0.0, None
    for cell in ordered:
        alike = (cell.model_key, cell.spec.train.epochs, store.cell(cell.spec.run_id).finished_epochs())
        size = _numbers(cell, audits[cell.base])
        if _may_join(cell) and alike == last and size <= room:
            found[-1].append(cell)
            room -= size
        else:
            found.append([cell])
            room = CREW_ROOM.get(device, 0) - size
        last = alike if _may_join(cell) else None
    return found


def _may_join(cell: PlannedCell) -> bool:
    options = cell.spec.method.options
    if cell.spec.train.dp:
        return False
    return cell.spec.method.name in ("lora", "prefix", "prompt", "p_tuning") and not options.get("dropout")


def _numbers(cell: PlannedCell, audit: Audit) -> float:
    """[tokens, width] of a mean optimiser step."""
    steps = math.ceil(len(audit.tuned) / cell.spec.train.batch_size)
    return sum(len(record) for record in audit.tuned) / steps * cell.located.hidden_size


def run_crew(crew: Sequence[Work], base: Base, progress: Progress) -> None:
    """Train and score the epochs that are missing; a run that diverges or leaks too much ends, the others go on."""
    first = crew[0]
    forward = first.forward if len(crew) == 1 else joined([w.model for w in crew], first.forward.output)
    epochs = first.cell.spec.train.epochs
    progress.start([work.audit for work in crew], epochs, first.done)
    if first.done == epochs:  # killed between its last epoch and its mark
        for work in crew:
            _finish(work, "")
        return
    over: set[str] = set()
    for reports in _epochs([work.trainer for work in crew], forward, base.budget, first.done, progress.trained):
        for work, report in zip(crew, reports, strict=True):
            if report is None or work.cell.spec.run_id in over:
                continue
            status, reason = finish_epoch(work, report, base.budget, progress)
            if reason or report.epoch == epochs:
                over.add(work.cell.spec.run_id)
                _finish(work, reason, status)
                if reason:
                    progress.note(f"{work.cell.label}: {'' if status == 'done' else 'diverged: '}{reason}")
        if len(over) == len(crew):
            return


def _epochs(trainers: list[Trainer], *how: Any) -> Iterator[list[EpochReport | None]]:
    if isinstance(trainers[0], PrivateTrainer):
        return train_privately([one for one in trainers if isinstance(one, PrivateTrainer)], *how)
    return train(trainers, *how)


def finish_epoch(work: Work, report: EpochReport, budget: int, progress: Progress) -> tuple[str, str]:
    """Score the checkpoint and write the epoch, unless training ends before it: how it then ends and why, else ""."""
    if report.diverged:
        return "diverged", report.diverged
    started = time.perf_counter()
    stats = work.audit.stats(work.model, budget, progress.scored, work.forward)
    if reason := broken(stats, report.epoch):
        return "diverged", reason
    if reason := _leaks(work, stats, report.epoch):
        return "done", reason
    seconds = time.perf_counter() - started
    cost = measured(work.model, work.forward, work.trainer, work.audit.scored, report, seconds)
    write_epoch(work.folder, report, stats, work.trainer, work.audit, cost)
    progress.epoch(work.cell.label, report, stats, work.audit)
    return "done", ""


def _leaks(work: Work, stats: TokenStats, epoch: int) -> str:
    """Why training ends with the epoch before this one, where `train.stop` says so."""
    stop = work.cell.spec.train.stop
    if stop is None:
        return ""
    records = work.audit.records()
    evidence = {"target": stats, "reference": work.reference, "zlib_bytes": records.column("zlib_bytes").to_numpy()}
    scores = run_attack(stop.attack, **evidence)
    members, nonmembers = (scores[np.array(work.audit.roles) == role] for role in ("member", "nonmember"))
    found = auc(members, nonmembers).value
    if found <= stop.auc:
        return ""
    return f"stopped early: the AUC of {stop.attack} reached {found:.3f} in epoch {epoch}, over {stop.auc:g}"


def _finish(work: Work, reason: str, status: str = "done") -> None:
    trainable, parameters = count_parameters(work.model)
    work.folder.finish(status=status, reason=reason or None, trainable=trainable, parameters=parameters)
    if work.cell.spec.shadow is not None:
        work.folder.drop_adapters(keep=set())  # there are many, and nobody ships one


def forward_for(model: nn.Module, base: Base, cell: PlannedCell, audit: Audit, store: Store) -> Forward:
    """From hidden states computed once where only the output layer trains, else from the texts."""
    if only_head_trains(model):
        k = cell.spec.train.goldfish
        also = without_some(audit.scored, k) if k else ()  # what any shadow model may be tuned on
        records, key = (*audit.tuned, *audit.scored, *also), f"{cell.base} {k}"
        forward = kept_forward(model, base.features(key, records, store.path))
    else:
        forward = forward_of(model)
        forward.spare_memory(audit.tuned, base.budget)
    logits = audit.scored_tokens * forward.output.vocabulary * (cell.spec.train.epochs + 1)
    return forward.compiled() if pays(logits, base.device) else forward


def score_base(cell: AnyCell, audit: Audit, base: Base, store: Store) -> TokenStats:
    """Epoch 0: the untouched base on the same records, once per (model, data, seed) and shared by all methods."""
    path = store.base(cell.base)
    if not path.is_dir():
        started = time.perf_counter()
        stats = audit.stats(base.model, base.budget)
        if reason := broken(stats, 0):
            raise ImprintError(f"the base model itself cannot be used: {reason}")
        with atomic_folder(path) as folder:
            write_stats(folder / "stats.parquet", audit.kept(stats))
            write_table(folder / "records.parquet", audit.records())
            summary = {**audit.summary(), "max_length": cell.spec.data.max_length, "vocabulary": vocabulary(base.model)}
            write_json(folder / "meta.json", {**summary, "seconds": time.perf_counter() - started})
    return read_stats(path / "stats.parquet")


def broken(stats: TokenStats, epoch: int) -> str:
    """Why the scores cannot be used, or ""."""
    if bad := int((~np.isfinite(stats.logp) | ~np.isfinite(stats.std)).sum()):
        return f"{bad:,} of {len(stats.logp):,} token scores are not finite in epoch {epoch}"
    if (loss := float(stats.nll.max())) > LARGEST_LOSS:
        return f"a record's loss reached {loss:.0f} nats per token in epoch {epoch}"
    return ""
