"""`train` is a generator: it yields after each epoch and the caller measures, saves, stops early.

Bit-equal resume. The order of the records, the dropout masks and the learning rate of an epoch are functions of
(seed, epoch) alone, so the whole state is what trains and the two moments of AdamW.

Every optimiser step sees the same `batch_size` records whatever the memory: they are split under the token budget and
each part's loss is divided by the step's scored tokens, so accumulation is exact in tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from imprint.data.tokens import Encoded, batches
from imprint.scoring.score import Logits, from_texts
from imprint.spec import TrainSpec
from imprint.tuning.models import trainable, training_mode

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class EpochReport:
    """What an epoch of training leaves besides the weights.

    Attributes:
        training_loss: mean negative log-likelihood per scored token while training, nats.
        tokens: tokens that went through the model, padding excluded.
        seconds: wall time.
        diverged: why the run stopped, or "".
    """

    epoch: int
    training_loss: float
    tokens: int
    seconds: float
    diverged: str = ""


class Trainer:
    """The state of one training: the model, its optimiser and the schedule."""

    def __init__(
        self,
        model: nn.Module,
        records: Sequence[Encoded],
        spec: TrainSpec,
        learning_rate: float,
        seed: int,
        budget: int,
        logits: Logits | None = None,
    ) -> None:
        """`logits`: where they come from (default: the whole model)."""
        from accelerate import Accelerator

        self.spec, self.records, self.seed, self.budget, self.peak = spec, records, seed, budget, learning_rate
        self.parameters = trainable(model)
        optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=learning_rate, weight_decay=spec.weight_decay, fused=_fusable(model)
        )
        self.device = next(model.parameters()).device
        self.accelerator = Accelerator(cpu=self.device.type == "cpu")
        self.model, self.logits = model, logits or from_texts(model)
        self.optimizer = self.accelerator.prepare_optimizer(optimizer, device_placement=False)

    @property
    def steps(self) -> int:
        """Optimiser steps of an epoch."""
        return math.ceil(len(self.records) / self.spec.batch_size)

    def epoch(self, number: int, progress: Callable[[int], None] | None = None) -> EpochReport:
        """Train for one epoch, the first being 1; a loss or gradient that is not finite ends it."""
        started, total, scored, tokens = time.perf_counter(), 0.0, 0, 0
        torch.manual_seed(_seed(self.seed, number))
        order = np.random.default_rng([self.seed, number]).permutation(len(self.records))
        training_mode(self.model)
        for step in range(self.steps):
            chosen = order[step * self.spec.batch_size : (step + 1) * self.spec.batch_size]
            rate = self.peak * schedule(self.spec, (number - 1) * self.steps + step, self.spec.epochs * self.steps)
            loss, count, why = self._step([self.records[n] for n in chosen], rate)
            total, scored = total + loss, scored + count
            tokens += sum(len(self.records[n]) for n in chosen)
            if why:
                return EpochReport(number, math.nan, tokens, time.perf_counter() - started, f"{why} in epoch {number}")
            if progress:
                progress(sum(len(self.records[n]) for n in chosen))
        return EpochReport(number, total / scored, tokens, time.perf_counter() - started)

    def _step(self, records: list[Encoded], rate: float) -> tuple[float, int, str]:
        """One optimiser step: (summed loss, scored tokens, why it could not be made)."""
        count, total = sum(int(record.scored.sum()) for record in records), 0.0
        for group in batches([len(record) for record in records], self.budget):
            loss = nn.functional.cross_entropy(*self.logits([records[n] for n in group]), reduction="sum")
            self.accelerator.backward(loss / count)
            total += loss.item()
        norm = self.accelerator.clip_grad_norm_(self.parameters.values(), self.spec.max_grad_norm)
        if not math.isfinite(total):
            return total, count, "the loss stopped being finite"
        if not math.isfinite(float(norm)):
            return total, count, "the gradient stopped being finite"
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total, count, ""

    def state(self) -> State:
        """Everything that resuming needs: what trains, and the optimiser's moments."""
        state = {f"weights/{name}": p.detach() for name, p in self.parameters.items()}
        moments = self.optimizer.state
        for name, parameter in self.parameters.items():
            state |= {f"optimizer/{key}/{name}": value for key, value in moments[parameter].items()}
        return {key: value.cpu().clone().contiguous() for key, value in state.items()}

    @torch.no_grad()
    def restore(self, state: State) -> None:
        """The inverse of `state`."""
        moments: dict[str, State] = {name: {} for name in self.parameters}
        for key, value in state.items():
            if key.startswith("optimizer/"):
                _, kind, name = key.split("/", 2)
                moments[name][kind] = value
        for name, parameter in self.parameters.items():
            parameter.copy_(state[f"weights/{name}"])
        document = self.optimizer.state_dict()  # parameters by their place; without moments where none had a gradient
        document["state"] = {place: one for place, one in enumerate(moments.values()) if one}
        self.optimizer.load_state_dict(document)


def train(trainer: Trainer, done: int = 0, progress: Callable[[int], None] | None = None) -> Iterator[EpochReport]:
    """Yield after each epoch that is not done yet; a diverged one is the last."""
    for number in range(done + 1, trainer.spec.epochs + 1):
        report = trainer.epoch(number, progress)
        yield report
        if report.diverged:
            return


def schedule(spec: TrainSpec, step: int, steps: int) -> float:
    """Share of the peak learning rate at an optimiser step, the first being 0.

    >>> [schedule(TrainSpec(warmup=0.25), step, 4) for step in range(4)]
    [1.0, 1.0, 0.6666666666666667, 0.33333333333333337]
    """
    warm = math.ceil(round(spec.warmup * steps, 6))  # .07 * 100 is a little more than 7
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / (steps - warm)
    if spec.schedule == "linear":
        return 1 - done
    if spec.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1.0


def _fusable(model: nn.Module) -> bool:
    return next(model.parameters()).device.type in ("cpu", "cuda")


def _seed(seed: int, epoch: int) -> int:
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
