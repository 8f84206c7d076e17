"""The annex of the report: everything that was run, in full, and the true-positive rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from imprint import __version__
from imprint.report import words
from imprint.report.notes import Records, dropped_text, records, state, truncated_text
from imprint.report.readings import Curve, Reading
from imprint.report.tables import Row, by_base, places
from imprint.report.terms import Terms, point_names, terms
from imprint.rows import FALSE_POSITIVE_RATES, Cell, Grid
from imprint.spec import MEASUREMENT_VERSION, canonical_json
from imprint.store import Store

Table = tuple[list[str], list[list[str]]]
"""A header and rows."""


COUNTED = {"members": "members", "tuned": "tuned on", "nonmembers": "non-members", "validation": "validation"}


def records_table(grid: Grid) -> Table:
    """Who was counted, dropped and cut, for every base."""
    found, counts = records(grid), terms(grid).counts
    header = [*(COUNTED[key] for key in counts), "dropped", "truncated", "cut at"]
    if len(found) == 1:
        return header, [_counts(found[0], counts)]
    return ["records of", *header], [[one.place, *_counts(one, counts)] for one in found]


def _counts(one: Records, counts: Sequence[str]) -> list[str]:
    if not one.known:
        return ["not counted", *[""] * (len(counts) + 2)]
    numbers = [f"{one.counts[key]:,}" for key in counts]
    limit = f"{one.max_length:,} tokens" if one.max_length else ""
    return [*numbers, dropped_text(one), truncated_text(one), limit]


def cells_table(grid: Grid, rows: Sequence[Row]) -> Table:
    """Every cell with its options, seed, epochs, parameters, time, status, reason and run id.

    Model, data and training options have columns only where they differ; `training_text` has the common ones.
    """
    of_cell = {cell.run_id: cell for cell in grid.cells}
    places = [name for name in ("model", "data") if len({getattr(row, name) for row in rows}) > 1]
    training = ["training"] if _differ(grid) else []
    header = ["method", "options", *training, *places, "seed", "trainable", "of", "time", "ended", "run id"]
    cells = [(row, of_cell[row.run_id]) for row in rows if row.run_id is not None]
    return header, [_cell(row, cell, header, terms(grid)) for row, cell in cells]


def _differ(grid: Grid) -> bool:
    return len({canonical_json(cell.training) for cell in grid.cells}) > 1


def training_text(grid: Grid) -> str:
    """The training options that all cells share; empty where they differ."""
    same = None if _differ(grid) else grid.cells[0].training
    return f"Training, the same for every cell: {pairs(same)}." if same else ""


def _cell(row: Row, cell: Cell, header: Sequence[str], called: Terms) -> list[str]:
    shown = {
        "method": row.label,
        "options": pairs(cell.spec.method.options),
        "training": pairs(cell.training or {}),
        "model": row.model,
        "data": row.data,
        "seed": str(row.seed),
        "trainable": "" if row.trainable is None else f"{row.trainable:,}",
        "of": "" if row.parameters is None else f"{row.parameters:,}",
        "time": "" if row.seconds is None else words.clock(row.seconds),
        "ended": state(row, called),
        "run id": cell.run_id,
    }
    return [shown[title] for title in header]


def sources_table(grid: Grid) -> Table:
    """Every model and data set with the settings and fingerprints that identify them."""
    header = ["base", "seed", "model", "data"]
    return header, [_source(cells[0]) for cells in by_base(grid.cells)]


def _source(cell: Cell) -> list[str]:
    model, data = cell.spec.model.model_dump(), cell.spec.data.model_dump()
    source = {key: value for key, value in data.pop("source").items() if value is not None}
    return [words.clean(cell.base.name), str(cell.spec.seed), pairs(model), pairs({**source, **data})]


def pairs(options: Mapping[str, Any]) -> str:
    """
    >>> pairs({"rank": 4, "targets": ["q", "v"], "path": None})
    'rank=4, targets=[q, v]'
    """
    return ", ".join(f"{words.clean(key)}={_value(value)}" for key, value in options.items() if value not in (None, ""))


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(_value(item) for item in value)}]"
    if isinstance(value, float):
        return f"{value:g}"
    return words.clean(value)


def tpr_table(grid: Grid, measured: Mapping[str, Curve]) -> Table:
    """True-positive rates at the last epoch and that of best validation perplexity, or at every checkpoint."""
    header = ["method", terms(grid).point, "attack", *(_rate(metric) for metric in FALSE_POSITIVE_RATES)]
    of_place, rows = places(grid), []
    for cell in grid.cells:
        curve = measured.get(cell.run_id, Curve({}))
        label = words.clean(cell.label)
        label = f"{label} ({of_place[cell.run_id]})" if of_place[cell.run_id] else label
        for epoch, title in (_epochs(curve) if cell.training else point_names(cell)).items():
            for attack in grid.attacks:
                shown = [tpr_text(curve.get(epoch, attack, metric)) for metric in FALSE_POSITIVE_RATES]
                rows.append([label, title, words.clean(attack), *shown])
    return header, rows


def _rate(metric: str) -> str:
    return f"TPR at {100 * FALSE_POSITIVE_RATES[metric]:g}% FPR"


def _epochs(curve: Curve) -> dict[int, str]:
    last, best = curve.last_finite, curve.best
    if last is None:
        return {}
    titles = {last: f"{last} (last)"}
    if best == last:
        titles[last] = f"{last} (last, best)"
    elif best:
        titles[best] = f"{best} (best)"
    return titles


def tpr_text(reading: Reading) -> str:
    """A rate with its interval; `indicative` where the threshold is uncertain; words where it was refused."""
    if reading.interval is None:
        return words.refused(reading)
    mark = "" if reading.status == "ok" else f" {reading.status}"
    return words.interval(reading.interval) + mark


def recipe_text(grid: Grid) -> str:
    """The recipe as YAML."""
    lines = yaml.safe_dump(grid.recipe, sort_keys=False, allow_unicode=True, width=100).splitlines()
    return "\n".join(" " * (len(line) - len(line.lstrip())) + words.clean(line) for line in lines)


def versions(grid: Grid) -> str:
    """What wrote the evidence and what wrote this report."""
    ran = words.clean(Store(grid.path).lock().get("imprint") or "an unrecorded version")
    numbers = words.listed(sorted({str(cell.spec.version) for cell in grid.cells}))
    return (
        f"Measured with Imprint {ran}, measurement version {numbers}; reported with Imprint {__version__}, measurement "
        f"version {MEASUREMENT_VERSION}."
    )
