"""One run, top to bottom; a grid is its cells in order. Whatever is in the store is not done again."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from imprint.audit import Audit, prepare
from imprint.errors import ImprintError, UsageError
from imprint.progress import Progress
from imprint.recipe import Plan, PlannedCell, plan, read_recipe
from imprint.results import load_grid, write_results
from imprint.spec import MethodSpec, RunSpec, Runtime
from imprint.store import CellFolder, Store, atomic_folder, read_stats, write_json, write_stats, write_table
from imprint.tuning.methods import METHODS
from imprint.types import TokenStats

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

    from imprint.scoring.score import Logits
    from imprint.tuning.train import EpochReport, Trainer


def run(
    recipe: str | Path | Mapping[str, Any],
    out: str | Path,
    overrides: Iterable[str] = (),
    runtime: Runtime | None = None,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Do what is missing of a recipe and return its measurements.

    Args:
        recipe: a YAML file or the same as plain data.
        out: output folder; the same recipe and folder again finish what is missing.
        overrides: `key.subkey=value`, applied to the recipe first.
        runtime: device and memory.
        progress: where to report; silent by default.

    Returns:
        One row per measurement, as in `<out>/results.parquet`.

    Raises:
        UsageError: the recipe, the data or the model cannot be used; nothing has been written.
        ImprintError: every cell failed; what was measured is kept.
    """
    from imprint.tuning.models import resolve_device, resolve_dtype

    runtime, progress = runtime or Runtime(), progress or Progress()
    device = resolve_device(runtime.device)
    planned = plan(read_recipe(recipe, overrides), lambda name: resolve_dtype(name, device))
    store = Store(Path(out))
    audits = prepare_audits(planned, store)
    claim(store, planned)
    for number, cell in enumerate(planned.cells):
        folder = store.cell(cell.spec.run_id)
        if folder.done:
            progress.note(f"{cell.label}: already done")
            continue
        progress.cell(cell.label, number + 1, len(planned.cells))
        try:
            run_cell(cell, audits[cell.base], store, runtime, progress)
        except UsageError:
            raise  # what was asked for cannot be done: every cell would say so
        except ImprintError as error:
            folder.fail(str(error))
            progress.note(f"{cell.label}: failed: {error}")
    return write_results(load_grid(store.path))


def run_cell(cell: PlannedCell, audit: Audit, store: Store, runtime: Runtime, progress: Progress) -> None:
    """Tune one model by one method and score it after every epoch; resumes after the last finished epoch."""
    import torch

    from imprint.tuning.models import count_parameters, load_model, resolve_device
    from imprint.tuning.train import Trainer, train

    spec, folder = cell.spec, store.cell(cell.spec.run_id)
    model = load_model(cell.located, spec.model.dtype, resolve_device(runtime.device))
    base = score_base(cell, audit, model, store, runtime, progress)  # before a tuner exists
    torch.manual_seed(spec.seed)
    model = attach(model, spec.method)
    rate = spec.method.options["learning_rate"]
    logits = logits_of(model, audit, runtime.token_budget)
    trainer = Trainer(model, audit.tuned, spec.train, rate, spec.seed, runtime.token_budget, logits)
    counts = dict(zip(("trainable", "parameters"), count_parameters(model), strict=True))
    write_json(folder.path / "spec.json", spec.model_dump(mode="json"))
    done = resume(folder, trainer)
    progress.start(audit, spec.train.epochs, done)
    for report in train(trainer, done, progress.trained):
        started = time.perf_counter()
        stats = audit.stats(model, runtime.token_budget, progress.scored, logits) if not report.diverged else None
        if reason := report.diverged or _broken(stats, report.epoch):
            folder.finish(status="diverged", reason=reason, **counts)
            progress.note(f"{cell.label}: diverged: {reason}")
            return
        assert stats is not None
        write_epoch(folder, report, stats, trainer, time.perf_counter() - started, audit)
        progress.epoch(report, stats, base, audit)
    folder.finish(status="done", reason=None, **counts)


def prepare_audits(planned: Plan, store: Store) -> dict[str, Audit]:
    """The data of every base that still has something to do, split and encoded before anything is written.

    Raises:
        DataError: fewer usable records than asked for, or a record too long where `overlong` is `refuse`.
    """
    from imprint.tuning.models import load_tokenizer

    audits: dict[str, Audit] = {}
    for cell in planned.cells:
        if cell.base not in audits and not store.cell(cell.spec.run_id).done:
            tokenizer = load_tokenizer(cell.located)
            audits[cell.base] = prepare(cell.pool, cell.spec.data, cell.spec.seed, tokenizer)
    return audits


def attach(model: nn.Module, method: MethodSpec) -> nn.Module:
    """The model made tunable.

    Raises:
        UsageError: an option does not fit this model.
        ImprintError: the method does not work with this architecture; the reason is the library's own first line.
    """
    try:
        return METHODS[method.name].attach(model, method.options)
    except ImprintError:
        raise
    except Exception as error:  # peft raises many kinds where an architecture lacks what a method needs
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise ImprintError(f"{method.name} does not work with {type(model).__name__}: {reason[0]}") from error


def logits_of(model: nn.Module, audit: Audit, budget: int) -> Logits:
    """From hidden states computed once where only the output layer trains, else from the texts."""
    from imprint.scoring.features import from_features
    from imprint.scoring.score import from_texts
    from imprint.tuning.models import only_head_trains

    if only_head_trains(model):
        return from_features(model, (*audit.tuned, *audit.scored), budget)
    return from_texts(model)


def score_base(
    cell: PlannedCell, audit: Audit, model: nn.Module, store: Store, runtime: Runtime, progress: Progress
) -> TokenStats:
    """Epoch 0: the untouched base on the same records, once per (model, data, seed) and shared by all methods."""
    path = store.base(cell.base)
    if not path.is_dir():
        started = time.perf_counter()
        stats = audit.stats(model, runtime.token_budget)
        if reason := _broken(stats, 0):
            raise ImprintError(f"the base model itself cannot be used: {reason}")
        with atomic_folder(path) as folder:
            write_stats(folder / "stats.parquet", stats)
            write_table(folder / "records.parquet", audit.records())
            summary = {**audit.summary(), "max_length": cell.spec.data.max_length}
            write_json(folder / "meta.json", {**summary, "seconds": time.perf_counter() - started})
    stats = read_stats(path / "stats.parquet")
    progress.base(stats, audit)
    return stats


def resume(folder: CellFolder, trainer: Trainer) -> int:
    """Restore the newest finished epoch and return its number; 0 where there is none."""
    from safetensors.torch import load_file

    done = folder.finished_epochs()
    if not done:
        return 0
    state = folder.epoch(done) / "state.safetensors"
    if not state.exists():
        raise ImprintError(f"{state} is missing: delete {folder.path} and run the same command again")
    trainer.restore(load_file(state))
    return done


def write_epoch(
    folder: CellFolder, report: EpochReport, stats: TokenStats, trainer: Trainer, seconds: float, audit: Audit
) -> None:
    """Evidence, weights and resume state of an epoch appear together; what they replace then goes.

    Weights are kept of the newest epoch and of the best one, which is what one would ship.
    """
    from safetensors.torch import save_file

    meta = {
        "epoch": report.epoch,
        "training_loss": report.training_loss,
        "tokens_trained": report.tokens,
        "seconds_training": report.seconds,
        "tokens_scored": audit.tokens,
        "validation_perplexity": audit.perplexity(stats),
        "seconds_scoring": seconds,
    }
    with atomic_folder(folder.epoch(report.epoch)) as path:
        write_stats(path / "stats.parquet", stats)
        write_json(path / "meta.json", meta)
        save_trained(path / "adapter", trainer.model)
        save_file(trainer.state(), path / "state.safetensors")
    folder.drop_states(keep=report.epoch)
    folder.drop_adapters(keep={report.epoch, folder.best_epoch()})


def save_trained(path: Path, model: nn.Module) -> None:
    """A PEFT adapter where the method is one; else the trained weights by name."""
    from peft import PeftModel
    from safetensors.torch import save_file

    from imprint.tuning.models import trainable

    path.mkdir()
    if isinstance(model, PeftModel):
        model.save_pretrained(str(path), save_embedding_layers=False)
    else:
        weights = {name: p.detach().cpu().contiguous() for name, p in trainable(model).items()}
        save_file(weights, path / "trained.safetensors")


def claim(store: Store, planned: Plan) -> None:
    """Make the folder this recipe's own; a recipe that only adds cells or attacks may continue another's.

    Raises:
        UsageError: the folder belongs to a different recipe, or cannot be written.
    """
    cells = [
        {"run_id": c.spec.run_id, "label": c.label, "base": c.base, "spec": c.spec.model_dump(mode="json")}
        for c in planned.cells
    ]
    lock = {
        "recipe": planned.recipe,
        "attacks": list(planned.attacks),
        "budget": planned.budget.model_dump() if planned.budget else None,
        "cells": cells,
    }
    try:
        if store.path.exists() and not store.path.is_dir():
            raise UsageError(f"--out {store.path} is a file: expected a folder")
        store.sweep()
        if (store.path / "recipe.lock.json").exists():
            _same_recipe(store, {c["run_id"] for c in cells}, planned)
        elif store.path.is_dir() and any(store.path.iterdir()):
            raise UsageError(f"--out {store.path} holds files that are not Imprint's: give an empty or new folder")
        write_json(store.path / "recipe.lock.json", lock)
    except OSError as error:
        raise UsageError(f"--out {store.path} cannot be written ({error.strerror}): give another folder") from None


def _same_recipe(store: Store, run_ids: set[str], planned: Plan) -> None:
    lost = [c for c in store.lock()["cells"] if c["run_id"] not in run_ids]
    if not lost:
        return
    old = RunSpec.model_validate(lost[0]["spec"]).model_dump(mode="json")
    new = [cell.spec.model_dump(mode="json") for cell in planned.cells]
    differ = sorted(
        f"{part}.{key}"
        for part in ("model", "data", "train")
        for key in old[part]
        if all(spec[part][key] != old[part][key] for spec in new)
    )
    what = ", ".join(differ) or "its methods or seeds"
    raise UsageError(
        f"--out {store.path} belongs to another recipe (it differs in {what}; {len(lost)} of its cells are not in this "
        "one): give another folder"
    )


def _broken(stats: TokenStats | None, epoch: int) -> str:
    """Why the scores cannot be used, or ""."""
    if stats is None:
        return ""
    bad = int((~np.isfinite(stats.logp) | ~np.isfinite(stats.std)).sum())
    return f"{bad:,} of {len(stats.logp):,} token scores stopped being finite in epoch {epoch}" if bad else ""
