"""What a recipe will cost on this machine, from operations counted exactly and a few steps measured."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from imprint.data.tokens import Encoded
from imprint.engine.clock import Clock
from imprint.engine.costs import costs_of, peak_flops, peak_memory
from imprint.engine.features import features, kept_forward
from imprint.engine.forward import Forward, forward_of
from imprint.recipe import Plan, PlannedCell
from imprint.records import Audit, tuned_for
from imprint.scoring.score import token_stats
from imprint.spec import Runtime
from imprint.store import Store
from imprint.tuning.base import Base
from imprint.tuning.models import base_of, only_head_trains
from imprint.tuning.train import Trainer, backward


@dataclass(frozen=True)
class Prediction:
    """What is left of a cell.

    Attributes:
        epochs: epochs that are missing.
        tokens: tokens that they train on and score.
        flops: by the formulas of `engine.costs`.
        seconds: at the rate of a measured step and a measured scoring pass.
        peak_memory: bytes, after those: of the process on a CPU, allocated on a GPU.
        share_of_peak: of this machine's plain matrix product.
    """

    label: str
    epochs: int
    tokens: int
    flops: float
    seconds: float
    peak_memory: int
    share_of_peak: float


def predict(plan: Plan, audits: Mapping[str, Audit], store: Store, runtime: Runtime) -> list[Prediction]:
    """A prediction per cell of the plan, and one for the shadow models of each; nothing is written.

    Raises:
        ImprintError: a method does not fit the model.
    """
    base: Base | None = None
    predictions: list[Prediction] = []
    counted: set[str] = set()
    for cell in plan.cells:
        shadows = [one for one in plan.shadows_of(cell) if one.spec.run_id not in counted]
        counted |= {one.spec.run_id for one in shadows}
        told = f"{cell.label}: {len(shadows)} shadow models"
        for label, alike in ((cell.label, [cell]), *([(told, shadows)] if shadows else [])):
            left = [_left(one, store) for one in alike]
            if not sum(left):
                predictions.append(Prediction(label, 0, 0, 0.0, 0.0, 0, math.nan))
                continue
            base = base if base and base.serves(cell) else Base.of(cell.located, cell.spec.model, runtime)
            first = alike[int(np.argmax(left))]
            found = _measure(first, base, tuned_for(audits[first.base], first.spec), sum(left))
            predictions.append(replace(found, label=label))
    return predictions


def _left(cell: PlannedCell, store: Store) -> int:
    """Epochs that are missing."""
    folder = store.cell(cell.spec.run_id)
    return 0 if folder.done else cell.spec.train.epochs - folder.finished_epochs()


def _measure(cell: PlannedCell, base: Base, audit: Audit, left: int) -> Prediction:
    model = base.tuned(cell.spec.method, cell.spec.seed)
    batch = _spread(audit.tuned, cell.spec.train.batch_size)
    scored = _spread(audit.scored, max(8, 2 * base.budget // max(1, audit.tokens // len(audit.scored))))
    kept, once = only_head_trains(model), 0.0
    costs = costs_of(model, kept)
    forward: Forward
    if kept:
        sample = (*batch, *scored)
        everything = (*audit.tuned, *audit.scored)
        rate = _rate(costs_of(model).forward(sample), lambda: features(model, sample, base.budget), base.device)
        once = costs_of(model).forward(everything) / rate
        forward = kept_forward(model, features(model, sample, base.budget))
    else:
        forward = forward_of(model)
        forward.spare_memory(audit.tuned, base.budget)
    trainer = Trainer(model, batch, cell.spec.train, 0.0, cell.spec.seed)

    def step() -> None:
        [loss] = backward(forward, [batch], base.budget, Clock(base.device))
        trainer.update(1, 0, loss)

    training = costs.training(audit.tuned, math.ceil(len(audit.tuned) / cell.spec.train.batch_size))
    scoring = costs.scoring(audit.scored)
    train_rate = _rate(costs.training(batch, 1), step, base.device)
    score_rate = _rate(
        costs.scoring(scored), lambda: token_stats(model, scored, base.budget, None, forward), base.device
    )
    seconds = once + left * (training / train_rate + scoring / score_rate)
    flops = left * (training + scoring)
    peak = peak_flops(base.device, base_of(model).config.dtype)
    tokens = left * (audit.tokens + sum(len(record) for record in audit.tuned))
    memory = peak_memory(base.device)
    return Prediction(cell.label, left, tokens, flops, seconds, memory, flops / seconds / peak)


def _spread(records: Sequence[Encoded], count: int) -> list[Encoded]:
    """Records of every length in the proportions of all."""
    ordered = sorted(records, key=len)
    count = min(count, len(ordered))
    return [ordered[(2 * n + 1) * len(ordered) // (2 * count)] for n in range(count)]


def _rate(flops: float, work: Callable[[], object], device: torch.device) -> float:
    """Operations per second of `work`, the better of two after one that warms up."""
    work()
    best = math.inf
    for _ in range(2):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return flops / best
