"""Training, an epoch at a time: the caller measures, saves and stops in between.

Bit-equal resume. The order of the records, the dropout masks and the learning rate of an epoch are functions of
(seed, epoch) alone, so the whole state is what trains and the two moments of AdamW.

Every optimiser step sees the same `batch_size` records whatever the memory: they are split under the token budget and
each token's loss is divided by the step's scored tokens, so accumulation is exact in tokens.

Several runs on one base may share their passes: each has its own records, order, rate and optimiser, and ends where it
would have ended alone, to float precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from imprint.data.tokens import Encoded
from imprint.data.tokens import batches as budgeted
from imprint.engine.clock import Clock
from imprint.engine.forward import Forward
from imprint.spec import TrainSpec
from imprint.tuning.models import trainable, training_mode

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class EpochReport:
    """What an epoch of training leaves besides the weights.

    Attributes:
        training_loss: mean negative log-likelihood per scored token while training, nats.
        tokens: tokens of the run's records that went through the model.
        seconds: by part of the work (`clock.PARTS`); of a shared pass, the run's share by tokens.
        diverged: why the run stopped, or "".
    """

    epoch: int
    training_loss: float
    tokens: int
    seconds: dict[str, float]
    diverged: str = ""


class Trainer:
    """The state of one training: what trains, its optimiser and the schedule."""

    def __init__(
        self, model: nn.Module, records: Sequence[Encoded], spec: TrainSpec, learning_rate: float, seed: int
    ) -> None:
        self.model, self.records, self.spec, self.peak, self.seed = model, records, spec, learning_rate, seed
        self.parameters = trainable(model)
        self.device = next(model.parameters()).device
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=learning_rate,
            weight_decay=spec.weight_decay,
            fused=self.device.type in ("cpu", "cuda"),
        )

    @property
    def steps(self) -> int:
        """Optimiser steps of an epoch."""
        return math.ceil(len(self.records) / self.spec.batch_size)

    def batches(self, epoch: int) -> list[list[Encoded]]:
        """The records of each step."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.records))
        size = self.spec.batch_size
        return [[self.records[n] for n in order[step * size : (step + 1) * size]] for step in range(self.steps)]

    def update(self, epoch: int, step: int, loss: float) -> str:
        """Clip the gradients and move; or say why that cannot be, and move nothing."""
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.spec.max_grad_norm)
        if not math.isfinite(loss):
            return f"the loss stopped being finite in epoch {epoch}"
        if not math.isfinite(float(norm)):
            return f"the gradient stopped being finite in epoch {epoch}"
        done, whole = (epoch - 1) * self.steps + step, self.spec.epochs * self.steps
        for group in self.optimizer.param_groups:
            group["lr"] = self.peak * schedule(self.spec, done, whole)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return ""

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


def train(
    trainers: Sequence[Trainer],
    forward: Forward,
    budget: int,
    done: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Iterator[list[EpochReport | None]]:
    """Yield after each epoch that is not done yet a report per run; a run that has diverged has None from then on.

    Args:
        trainers: the runs that share the passes of `forward`, in its order; one of them in most cases.
        budget: tokens per pass.
        done: epochs that are finished.
        progress: called with the number of tokens after each step.
    """
    alive = list(trainers)
    for number in range(done + 1, trainers[0].spec.epochs + 1):
        reports = _epoch(trainers, [t in alive for t in trainers], forward, budget, number, progress)
        yield reports
        alive = [t for t, report in zip(trainers, reports, strict=True) if report and not report.diverged]
        if not alive:
            return


def _epoch(
    trainers: Sequence[Trainer],
    alive: list[bool],
    forward: Forward,
    budget: int,
    number: int,
    progress: Callable[[int], None] | None,
) -> list[EpochReport | None]:
    """One epoch, the first being 1; a loss or gradient that is not finite ends it for its run."""
    clock, runs = Clock(trainers[0].device), range(len(trainers))
    loss, scored, tokens, why = [0.0 for _ in runs], [0 for _ in runs], [0 for _ in runs], ["" for _ in runs]
    torch.manual_seed(_seed(trainers[0].seed, number))
    for trainer in trainers:
        training_mode(trainer.model)
    with clock("data"):
        batches = [trainer.batches(number) if alive[n] else [] for n, trainer in enumerate(trainers)]
    for step in range(max(len(own) for own in batches)):
        chosen = [own[step] if step < len(own) and not why[n] else [] for n, own in enumerate(batches)]
        if not any(chosen):
            break
        sums = backward(forward, chosen, budget, clock)
        with clock("optimizer"):
            for n in [n for n in runs if chosen[n]]:
                why[n] = trainers[n].update(number, step, sums[n])
                loss[n], scored[n] = loss[n] + sums[n], scored[n] + _scored(chosen[n])
                tokens[n] += sum(len(record) for record in chosen[n])
        if progress:
            progress(sum(len(record) for records in chosen for record in records))
    seconds = clock.read()
    reports: list[EpochReport | None] = []
    for n in runs:
        own = {part: value * tokens[n] / sum(tokens) for part, value in seconds.items()}
        mean = math.nan if why[n] else loss[n] / max(scored[n], 1)
        reports.append(EpochReport(number, mean, tokens[n], own, why[n]) if alive[n] else None)
    return reports


def backward(forward: Forward, chosen: Sequence[Sequence[Encoded]], budget: int, clock: Clock) -> list[float]:
    """Gradients of each run's mean loss over its records' scored tokens are added up; the summed losses returned.

    Args:
        chosen: the records of each run in this step.
        budget: tokens per pass: as many passes are made as it takes, with the same gradients.
    """
    items = [(run, record) for run, records in enumerate(chosen) for record in records]
    sums = torch.zeros(len(chosen), device=forward.output.weight.device)
    each = [1 / max(_scored(records), 1) for records in chosen]
    for group in budgeted([len(record) for _, record in items], budget):
        asked: list[list[Encoded]] = [[] for _ in chosen]
        for run, record in (items[n] for n in group):
            asked[run].append(record)
        sizes = torch.tensor([_scored(records) for records in asked])
        with clock("forward"):
            hidden, targets = forward.hidden(asked)
        with clock("output"):
            weights = torch.repeat_interleave(torch.tensor(each), sizes).to(hidden.device)
            nll, gradient = forward.output.loss_and_gradient(hidden, targets, weights)
            sums += torch.stack([part.sum() for part in torch.split(nll, sizes.tolist())])
        if gradient is not None:
            with clock("backward"):
                hidden.backward(gradient)  # type: ignore[no-untyped-call]
    return sums.tolist()


def _scored(records: Sequence[Encoded]) -> int:
    return sum(len(record.predictors) for record in records)


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


def _seed(seed: int, epoch: int) -> int:
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
