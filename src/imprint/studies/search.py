"""A learning rate for each method, chosen on validation perplexity alone: a small search that is recorded.

One rate for all methods compares a method at its best with another that has hardly moved, or has long overfitted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from imprint.rows import Cell
from imprint.spec import CellSpec, RunSpec, canonical_json
from imprint.studies.setting import RATES


@dataclass(frozen=True)
class Trial:
    """One rate of one variant.

    Attributes:
        variant: everything but the rate and the seed.
        rate: peak learning rate.
        perplexity: the lowest on the validation records, over all epochs; infinite where the run failed.
        epoch: where that was.
        chosen: whether it is the lowest of all rates.
        edge: whether it is chosen and the smallest or largest rate searched: the best may lie beyond.
    """

    variant: str
    cell: Cell
    rate: float
    perplexity: float
    epoch: int
    chosen: bool = False
    edge: bool = False


def variant(spec: CellSpec) -> str:
    """What a run is but for its learning rate and its seed."""
    document = spec.identity()
    document["method"]["options"].pop("learning_rate")
    document.pop("seed")
    return canonical_json(document)


def document(spec: RunSpec, rates: Iterable[float], seeds: Iterable[int]) -> dict[str, Any]:
    """The recipe of a resolved run, at other rates and seeds."""
    data = {key: value for key, value in spec.data.model_dump(mode="json").items() if value is not None}
    data.pop("fingerprint")
    data["source"] = {key: value for key, value in data["source"].items() if value is not None}
    model = {key: value for key, value in spec.model.model_dump(mode="json").items() if value is not None}
    model.pop("fingerprint")
    options = {**spec.method.options, "learning_rate": list(rates)}
    train = {key: value for key, value in spec.train.model_dump(mode="json").items() if value is not None}
    return {"model": model, "data": data, "method": {spec.method.name: options}, "train": train, "seed": list(seeds)}


def search(specs: Iterable[RunSpec]) -> list[dict[str, Any]]:
    """The recipe that tries `RATES` times each run's own rate, with the first seed."""
    return [document(s, [_short(s.method.options["learning_rate"] * r) for r in RATES], [s.seed]) for s in specs]


def trials(cells: Iterable[Cell]) -> list[Trial]:
    """What the search found, a row per rate, the chosen one of each variant marked."""
    by_variant: dict[str, list[Trial]] = {}
    for cell in cells:
        found, epoch = _best(cell)
        trial = Trial(variant(cell.spec), cell, cell.spec.method.options["learning_rate"], found, epoch)
        by_variant.setdefault(trial.variant, []).append(trial)
    marked = []
    for of_one in by_variant.values():
        of_one.sort(key=lambda trial: trial.rate)
        best = min(of_one, key=lambda trial: (trial.perplexity, trial.rate))
        if not math.isfinite(best.perplexity):
            continue  # no rate has worked: its runs are named among those that have not finished
        edge = len(of_one) > 1 and best in (of_one[0], of_one[-1])
        marked += [
            Trial(t.variant, t.cell, t.rate, t.perplexity, t.epoch, t is best, t is best and edge) for t in of_one
        ]
    return marked


def _best(cell: Cell) -> tuple[float, int]:
    if cell.outcome["status"] != "done":
        return math.inf, 0
    epoch = cell.folder.best_epoch()
    return float(cell.folder.meta(epoch)["validation_perplexity"]), epoch


def _short(rate: float) -> float:
    """Two digits, so that it reads well and hashes the same everywhere."""
    return float(f"{rate:.1e}")
