"""One run, top to bottom; a grid is its cells in order. Whatever is in the store is not done again."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
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
from imprint.spec import Runtime
from imprint.store import Store, atomic_folder, read_stats, write_json, write_stats, write_table
from imprint.types import TokenStats

LARGEST_LOSS = 700.0
"""Nats per token of one record, beyond which its perplexity is no float: such a model has diverged."""

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

    from imprint.engine.forward import Forward
    from imprint.tuning.base import Base


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
    """Cells that share a base follow each other; what fails in one leaves the others alone, unless the request is wrong."""
    from imprint.tuning.base import Base

    base: Base | None = None
    for number, cell in enumerate(by_base(planned.cells)):
        folder = store.cell(cell.spec.run_id)
        if folder.done:
            folder.drop_states(keep=0)  # a run killed in its last moment leaves one
            progress.note(f"{cell.label}: already done")
            continue
        progress.cell(cell.label, number + 1, len(planned.cells))
        try:
            base = base if base and base.serves(cell) else Base.of(cell, runtime)
            run_cell(cell, base, audits[cell.base], store, runtime, progress)
        except UsageError:
            raise  # what was asked for cannot be done: every cell would say so
        except ImprintError as error:
            folder.fail(str(error))
            progress.note(f"{cell.label}: failed: {error}")
        except Exception as error:  # out of memory, for one: the other cells may still fit
            reason = " ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
            folder.fail(reason, traceback.format_exc())
            progress.note(f"{cell.label}: failed: {reason} (traceback in {folder.path / 'failed.json'})")


def by_base(cells: Sequence[PlannedCell]) -> list[PlannedCell]:
    """The cells in an order in which each model is loaded, and each split's features are computed, only once."""
    models = list(dict.fromkeys((cell.located.fingerprint, cell.spec.model.dtype) for cell in cells))
    bases = list(dict.fromkeys(cell.base for cell in cells))
    return sorted(
        cells, key=lambda c: (models.index((c.located.fingerprint, c.spec.model.dtype)), bases.index(c.base))
    )


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


def run_cell(
    cell: PlannedCell, base: Base, audit: Audit, store: Store, runtime: Runtime, progress: Progress
) -> None:
    """Tune one model by one method and score it after every epoch; resumes after the last finished epoch."""
    from imprint.engine.costs import measured
    from imprint.tuning.models import count_parameters
    from imprint.tuning.train import Trainer, train

    spec, folder = cell.spec, store.cell(cell.spec.run_id)
    reference = score_base(cell, audit, base, store, runtime, progress)  # before a tuner exists
    model = base.tuned(spec.method, spec.seed)
    forward = forward_for(model, base, cell, audit, store, runtime)
    trainer = Trainer(model, audit.tuned, spec.train, spec.method.options["learning_rate"], spec.seed)
    counts = dict(zip(("trainable", "parameters"), count_parameters(model), strict=True))
    write_json(folder.path / "spec.json", spec.model_dump(mode="json"))
    done = resume(folder, trainer)
    progress.start(audit, spec.train.epochs, done)
    for [report] in train([trainer], forward, runtime.token_budget, done, progress.trained):
        assert report is not None
        started = time.perf_counter()
        stats = audit.stats(model, runtime.token_budget, progress.scored, forward) if not report.diverged else None
        if reason := report.diverged or _broken(stats, report.epoch):
            folder.finish(status="diverged", reason=reason, **counts)
            progress.note(f"{cell.label}: diverged: {reason}")
            return
        assert stats is not None
        cost = measured(model, forward, trainer, audit.scored, report, time.perf_counter() - started)
        write_epoch(folder, report, stats, trainer, audit, cost)
        progress.epoch(report, stats, reference, audit)
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


def forward_for(
    model: nn.Module, base: Base, cell: PlannedCell, audit: Audit, store: Store, runtime: Runtime
) -> Forward:
    """From hidden states computed once where only the output layer trains, else from the texts."""
    from imprint.engine.compiled import pays
    from imprint.engine.features import kept_forward
    from imprint.engine.forward import forward_of
    from imprint.tuning.models import only_head_trains

    if only_head_trains(model):
        records = (*audit.tuned, *audit.scored)
        forward = kept_forward(model, base.features(cell.base, records, runtime.token_budget, store.path))
    else:
        forward = forward_of(model)
    logits = audit.scored_tokens * forward.output.vocabulary * (cell.spec.train.epochs + 1)
    return forward.compiled() if pays(logits, base.device) else forward


def score_base(
    cell: PlannedCell, audit: Audit, base: Base, store: Store, runtime: Runtime, progress: Progress
) -> TokenStats:
    """Epoch 0: the untouched base on the same records, once per (model, data, seed) and shared by all methods."""
    path = store.base(cell.base)
    if not path.is_dir():
        started = time.perf_counter()
        stats = audit.stats(base.model, runtime.token_budget)
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
