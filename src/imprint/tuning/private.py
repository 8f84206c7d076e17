"""Differentially private training: DP-SGD (Abadi et al. 2016) with AdamW, by Opacus (Yousefpour et al. 2021).

At each step every record is drawn by itself (Poisson sampling), the gradient of its mean loss per scored token is
clipped to a norm, normal noise is added to their sum, and AdamW moves by that. What (ε, δ) promises: with any record
left out, or one more, the weights of all epochs would have come out much the same. It is promised to a *record*: the
owner of several is protected less. It covers the weights, not what else is written here about members.

Sampling and noise are functions of (seed, epoch), so that a measurement can be repeated and a run goes on bit-equal. To
whoever knows the seed the noise is no noise: weights that shall leave the house need a seed that is drawn at random and
kept secret, and one training each.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import nn

from imprint.data.tokens import Encoded
from imprint.engine.clock import Clock
from imprint.engine.forward import Forward
from imprint.errors import UsageError
from imprint.spec import TrainSpec
from imprint.tuning.models import training_mode
from imprint.tuning.per_sample import Passes, way_for
from imprint.tuning.train import EpochReport, Trainer, schedule

NUMERICALLY = 0.1, 20.0
"""From which to which ε privacy is accounted for numerically (Gopi et al. 2021): below that takes all memory, beyond it
overflows. Elsewhere by moments (Mironov et al. 2019), which asks for more noise."""


def require() -> None:
    """
    Raises:
        UsageError: Opacus is not installed.
    """
    if find_spec("opacus") is None:
        raise UsageError('train.dp needs Opacus, which is not installed: pip install "imprint-audit[dp]"')


class PrivateTrainer(Trainer):
    """The state of one private training.

    Attributes:
        rate: probability with which a step draws a record, so that an epoch draws each once on average.
        delta: the δ of the guarantee.
        noise: standard deviation of the noise, in units of the clipping norm.
    """

    def __init__(
        self, model: nn.Module, records: Sequence[Encoded], spec: TrainSpec, learning_rate: float, seed: int
    ) -> None:
        """
        Raises:
            UsageError: Opacus is not installed, a record is tuned on more than once an epoch, what trains lies on
                several devices, or no noise is enough.
        """
        require()
        assert spec.dp is not None
        super().__init__(model, records, spec, learning_rate, seed)
        [(most, times)] = Counter(record.id for record in records).most_common(1)
        if times > 1:
            raise UsageError(
                f"train.dp: record {most!r} is tuned on {times} times an epoch, and privacy is promised to what is "
                "there once: set data.repeat to 1, and plant canaries once"
            )
        if len({parameter.device for parameter in self.parameters.values()}) > 1:
            raise UsageError("train.dp needs what trains on one device: leave device_map out")
        self.rate, self.delta = 1 / self.steps, spec.dp.delta or 1 / (2 * len(records))
        self.noise = noise_multiplier(spec.dp.epsilon, self.delta, self.rate, spec.epochs * self.steps)

    def batches(self, epoch: int) -> list[list[Encoded]]:
        """The records of each step, each drawn by itself; there may be none."""
        drawn = np.random.default_rng([self.seed, epoch, 1]).random((self.steps, len(self.records))) < self.rate
        return [[self.records[n] for n in np.flatnonzero(row).tolist()] for row in drawn]

    def spent(self, epoch: int) -> float:
        """The ε that is spent after an epoch."""
        assert self.spec.dp is not None
        return epsilon(self.noise, self.delta, self.rate, epoch * self.steps, self.spec.dp.epsilon)

    def private_optimizer(self, epoch: int) -> Any:
        """Opacus' optimiser around the run's own, with an epoch's noise."""
        from opacus.optimizers import DPOptimizer

        assert self.spec.dp is not None
        [seed] = np.random.SeedSequence([self.seed, epoch, 2]).generate_state(1, np.uint64).tolist()
        device = next(iter(self.parameters.values())).device
        return DPOptimizer(
            self.optimizer,
            noise_multiplier=self.noise,
            max_grad_norm=self.spec.dp.clip,
            expected_batch_size=len(self.records) * self.rate,
            generator=torch.Generator(device).manual_seed(seed),
        )


def train_privately(
    trainers: Sequence[PrivateTrainer],
    forward: Forward,
    budget: int,
    done: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Iterator[list[EpochReport | None]]:
    """The same as `train.train`, for one run, which goes alone; `train.max_grad_norm` has no part in it.

    Raises:
        ImprintError: the records' gradients do not come out apart for this method and model; nothing is trained.
    """
    [trainer] = trainers
    way = way_for(trainer.model, forward, trainer.records, budget)
    for number in range(done + 1, trainer.spec.epochs + 1):
        clock = Clock(trainer.device)
        with way(trainer.model, forward, budget, clock) as passes:
            report = _epoch(trainer, passes, clock, number, progress)
        yield [report]
        if report.diverged:
            return


def _epoch(
    trainer: PrivateTrainer, passes: Passes, clock: Clock, number: int, progress: Callable[[int], None] | None
) -> EpochReport:
    """One epoch, the first being 1; a loss or gradient that is not finite ends it."""
    optimizer, why = trainer.private_optimizer(number), ""
    torch.manual_seed(int(np.random.SeedSequence([trainer.seed, number]).generate_state(1)[0]))
    training_mode(trainer.model)
    loss, scored, tokens = 0.0, 0, 0
    with clock("data"):
        batches = trainer.batches(number)
    for step, records in enumerate(batches):
        for _, summed in passes(records):
            loss += summed
            with clock("optimizer"):
                _clip(optimizer)
        with clock("optimizer"):
            why = _move(trainer, optimizer, number, step, loss)
        if why:
            break
        scored, size = scored + sum(len(record.predictors) for record in records), sum(map(len, records))
        tokens += size
        if progress:
            progress(size)
    return EpochReport(number, math.nan if why else loss / max(scored, 1), tokens, clock.read(), why)


def _clip(optimizer: Any) -> None:
    """Each record's gradient, and add it to the step's."""
    optimizer.signal_skip_step()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _move(trainer: PrivateTrainer, optimizer: Any, epoch: int, step: int, loss: float) -> str:
    """Add noise and move, also where no record was drawn; or say why that cannot be, and move nothing."""
    for parameter in optimizer.params:
        parameter.grad_sample = parameter.new_zeros(0, *parameter.shape)
    sums = [p.summed_grad for p in optimizer.params if p.summed_grad is not None]
    if not math.isfinite(loss):
        return f"the loss stopped being finite in epoch {epoch}"
    if not all(bool(torch.isfinite(one).all()) for one in sums):
        return f"the gradient stopped being finite in epoch {epoch}"
    done, whole = (epoch - 1) * trainer.steps + step, trainer.spec.epochs * trainer.steps
    for group in optimizer.param_groups:
        group["lr"] = trainer.peak * schedule(trainer.spec, done, whole)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return ""


@cache
def noise_multiplier(target: float, delta: float, rate: float, steps: int) -> float:
    """The noise for which so many steps spend at most ε = `target`, and at least 99% of it.

    Raises:
        UsageError: none is found.
    """
    from opacus.accountants.utils import get_noise_multiplier

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the moments looked at; the bound holds whichever they are
            return float(
                get_noise_multiplier(
                    target_epsilon=target,
                    target_delta=delta,
                    sample_rate=rate,
                    steps=steps,
                    epsilon_tolerance=0.01 * target,
                    **_accountant(target),
                )
            )
    except ValueError:
        raise UsageError(
            f"train.dp: no noise is found to be enough for ε = {target:g} at δ = {delta:.2g} over {steps:,} steps: ask "
            "for a larger epsilon, fewer epochs or more records"
        ) from None


@cache
def epsilon(noise: float, delta: float, rate: float, steps: int, target: float) -> float:
    """The ε that so many steps spend, by the accountant of `target`."""
    from opacus.accountants import create_accountant

    if not steps:
        return 0.0
    options = _accountant(target)
    accountant = create_accountant(options.pop("accountant"))
    accountant.history = [(noise, rate, steps)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as above
        return float(accountant.get_epsilon(delta, **options))


def _accountant(target: float) -> dict[str, Any]:
    """Which one, and how far its bound may lie above the truth."""
    low, high = NUMERICALLY
    return {"accountant": "prv", "eps_error": 0.01 * target} if low <= target <= high else {"accountant": "rdp"}
