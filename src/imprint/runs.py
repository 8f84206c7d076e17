"""One run, top to bottom; a grid is its cells in order. Whatever is in the store is not done again."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from imprint.audit import Audit, prepare
from imprint.checkpoint import resume, write_epoch
from imprint.claim import claim
from imprint.errors import ImprintError, UsageError, first_line
from imprint.progress import Progress
from imprint.recipe import Plan, PlannedCell, plan, read_recipe
from imprint.rows import Grid, load_grid, write_results
from imprint.spec import MethodSpec, Runtime
from imprint.store import Store, atomic_folder, read_stats, write_json, write_stats, write_table
from imprint.tuning.methods import METHODS
from imprint.types import TokenStats

LARGEST_LOSS = 700.0
"""Nats per token of one record, beyond which its perplexity is no float: such a model has diverged."""

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

    from imprint.scoring.score import Logits


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
    with claim(store, planned):
        run_cells(planned, audits, store, runtime, progress)
        return finish(load_grid(store.path))


def run_cells(planned: Plan, audits: dict[str, Audit], store: Store, runtime: Runtime, progress: Progress) -> None:
    """One cell after the other; what fails in one leaves the others alone, unless it is the request that is wrong."""
    for number, cell in enumerate(planned.cells):
        folder = store.cell(cell.spec.run_id)
        if folder.done:
            folder.drop_states(keep=0)  # a run killed in its last moment leaves one
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
        except Exception as error:  # out of memory, for one: the other cells may still fit
            reason = " ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
            folder.fail(reason, traceback.format_exc())
            progress.note(f"{cell.label}: failed: {reason} (traceback in {folder.path / 'failed.json'})")


def finish(grid: Grid) -> pd.DataFrame:
    """Recompute the results of everything that has evidence.

    Raises:
        ImprintError: no cell of the grid finished; the reason is the first one's.
    """
    frame = write_results(grid)
    outcomes = [cell.outcome for cell in grid.cells]
    if all(outcome["status"] == "failed" for outcome in outcomes):
        raise ImprintError(f"no cell of {grid.path} finished: {outcomes[0]['reason']}")
    return frame


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
        raise ImprintError(f"{method.name} does not work with {type(model).__name__}: {first_line(error)}") from error


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


def _broken(stats: TokenStats | None, epoch: int) -> str:
    """Why the scores cannot be used, or ""."""
    if stats is None:
        return ""
    if bad := int((~np.isfinite(stats.logp) | ~np.isfinite(stats.std)).sum()):
        return f"{bad:,} of {len(stats.logp):,} token scores are not finite in epoch {epoch}"
    if (loss := float(stats.nll.max())) > LARGEST_LOSS:
        return f"a record's loss reached {loss:.0f} nats per token in epoch {epoch}"
    return ""
