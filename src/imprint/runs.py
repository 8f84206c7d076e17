"""One run, top to bottom; a grid is its cells in order. Whatever is in the store is not done again."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from imprint.claim import claim
from imprint.details import write_details
from imprint.errors import ImprintError, UsageError
from imprint.probes import measure_passes, missing_passes
from imprint.progress import Progress
from imprint.recipe import Plan, PlannedCell, RecipeLike, plan, read_recipe
from imprint.records import Audit, prepare
from imprint.rows import Grid, load_grid, write_results
from imprint.spec import Runtime
from imprint.store import Store
from imprint.validity import write_gates

if TYPE_CHECKING:
    import pandas as pd

    from imprint.cells import Work
    from imprint.predict import Prediction
    from imprint.tuning.base import Base


def run(
    recipe: RecipeLike,
    out: str | Path,
    overrides: Iterable[str] = (),
    runtime: Runtime | None = None,
    progress: Progress | None = None,
    evidence: str | Path | None = None,
) -> pd.DataFrame:
    """Do what is missing of a recipe and return its measurements.

    Args:
        recipe: a YAML file or the same as plain data.
        out: output folder; the same recipe and folder again finish what is missing.
        overrides: `key.subkey=value`, applied to the recipe first.
        runtime: device and memory.
        progress: where to report; silent by default.
        evidence: a folder above `out` that holds the cells of several recipes (default: `out` holds its own).

    Returns:
        One row per measurement, as in `<out>/results.parquet`.

    Raises:
        UsageError: the recipe, the data or the model cannot be used; nothing has been written.
        ImprintError: every cell failed; what was measured is kept.
    """
    runtime, progress = runtime or Runtime(), progress or Progress()
    planned = plan_for(recipe, runtime, overrides)
    store = Store(Path(out), Path(evidence) if evidence else None)
    audits = prepare_audits(planned, store)
    with claim(store, planned):
        run_cells(planned, audits, store, runtime, progress)
        measure_passes(planned, audits, store, runtime, progress)
        return finish(load_grid(store.path))


def plan_for(recipe: RecipeLike, runtime: Runtime, overrides: Iterable[str] = ()) -> Plan:
    """The cells of a recipe, in the precision that this machine gives them.

    Raises:
        UsageError: the recipe, the data or the model cannot be used.
    """
    from imprint.tuning.models import resolve_device, resolve_dtype

    device = resolve_device(runtime.device)
    return plan(read_recipe(recipe, overrides), lambda name: resolve_dtype(name, device))


def predicted(
    recipe: RecipeLike,
    out: str | Path,
    overrides: Iterable[str] = (),
    runtime: Runtime | None = None,
) -> list[Prediction]:
    """What `run` with the same arguments would cost here; nothing is written.

    Raises:
        UsageError: the recipe, the data or the model cannot be used.
    """
    from imprint.predict import predict

    runtime = runtime or Runtime()
    planned = plan_for(recipe, runtime, overrides)
    store = Store(Path(out))
    return predict(planned, prepare_audits(planned, store), store, runtime)


def run_cells(planned: Plan, audits: dict[str, Audit], store: Store, runtime: Runtime, progress: Progress) -> None:
    """What is missing, model by model; what fails in one cell leaves the others alone, unless the request is wrong."""
    missing, base = [], None
    for cell in planned.trained:
        if store.cell(cell.spec.run_id).done:
            store.cell(cell.spec.run_id).drop_states(keep=0)  # a run killed in its last moment leaves one
            if cell.spec.shadow is None:
                progress.note(f"{cell.label}: already done")
        else:
            missing.append(cell)
    left = {cell.base for cell in missing}
    unguarded = {c.base: c for c in planned.trained if c.base not in left and not store.gates(c.base).is_dir()}
    if not missing and not unguarded:
        return
    from imprint.cells import crews, score_base
    from imprint.controls import measure_controls
    from imprint.tuning.base import Base
    from imprint.tuning.models import resolve_device

    for cell in unguarded.values():  # its runs are done, and the evidence of its gates has been removed
        base = base if base and base.serves(cell) else Base.of(cell.located, cell.spec.model, runtime)
        score_base(cell, audits[cell.base], base, store)
        measure_controls(cell, audits[cell.base], base, store)
    device = resolve_device(runtime.device).type
    for crew in crews(missing, audits, store, device):
        base = base if base and base.serves(crew[0]) else Base.of(crew[0].located, crew[0].spec.model, runtime)
        progress.cells(
            [cell.label for cell in crew], [planned.trained.index(cell) + 1 for cell in crew], len(planned.trained)
        )
        _together(crew, base, audits, store, progress)


def _together(
    crew: Sequence[PlannedCell], base: Base, audits: dict[str, Audit], store: Store, progress: Progress
) -> None:
    """A crew; where something is in the way of its sharing, or it fails, its cells one after the other."""
    from imprint.cells import prepare_cell, run_crew
    from imprint.engine.forward import may_join

    works: list[Work] = []
    try:
        for cell in crew:
            works.append(prepare_cell(cell, base, audits[cell.base], store, progress))
        if len(works) == 1 or may_join([work.forward for work in works]):
            return run_crew(works, base, progress)
    except UsageError:
        raise  # what was asked for cannot be done: every cell would say so
    except Exception as error:  # out of memory, for one: the other cells may still fit
        if len(crew) == 1:
            return _failed(crew[0], error, store, progress)
    works.clear()
    for cell in crew:
        _together([cell], base, audits, store, progress)


def _failed(cell: PlannedCell, error: Exception, store: Store, progress: Progress) -> None:
    folder = store.cell(cell.spec.run_id)
    if isinstance(error, ImprintError):
        folder.fail(str(error))
        return progress.note(f"{cell.label}: failed: {error}")
    reason = " ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
    folder.fail(reason, "".join(traceback.format_exception(error)))
    progress.note(f"{cell.label}: failed: {reason} (traceback in {folder.path / 'failed.json'})")


def finish(grid: Grid) -> pd.DataFrame:
    """Recompute the results of everything that has evidence.

    Raises:
        ImprintError: no cell of the grid finished; the reason is the first one's.
    """
    frame = write_results(grid)
    write_gates(grid)
    write_details(grid)
    outcomes = [cell.outcome for cell in grid.cells]
    if all(outcome["status"] == "failed" for outcome in outcomes):
        raise ImprintError(f"no cell of {grid.path} finished: {outcomes[0]['reason']}")
    return frame


def prepare_audits(planned: Plan, store: Store) -> dict[str, Audit]:
    """The data of every base that still has something to do, split and encoded before anything is written.

    Raises:
        DataError: fewer usable records than asked for, or a record too long where `overlong` is `refuse`.
    """
    from imprint.tuning.models import load_tokenizer

    audits: dict[str, Audit] = {}
    for cell in planned.trained:
        left = not store.cell(cell.spec.run_id).done or not store.gates(cell.base).is_dir()
        left = left or bool(missing_passes(planned, cell, store))
        if left and cell.base not in audits:
            tokenizer = load_tokenizer(cell.located)
            audits[cell.base] = prepare(cell.pool, cell.spec.data, tokenizer)
    return audits
