"""The norm of the loss's gradient by what was tuned: small where the model has nothing left to learn from a record."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from imprint.passes.bench import norms_table

if TYPE_CHECKING:
    from torch import nn

    from imprint.passes.bench import Bench


def measure(bench: Bench) -> pa.Table:
    """[N] L2 norm of the gradient of each record's mean loss, one record at a time, without dropout.

    By the parameters that train; of a model that is frozen by those that its adapter adds or, where there is none, by
    all. The model is left as it was.
    """
    import torch

    from imprint.engine.clock import Clock
    from imprint.engine.forward import forward_of
    from imprint.tuning.train import backward

    norms = []
    bench.model.eval()
    with tuned_parameters(bench.model) as parameters, torch.enable_grad():
        forward = bench.forward or forward_of(bench.model)
        for record in bench.audit.scored:
            backward(forward, [[record]], len(record), Clock(torch.device("cpu")))
            each = [torch.linalg.vector_norm(p.grad, dtype=torch.float32) for p in parameters if p.grad is not None]
            norms.append(math.hypot(*map(float, each)))
            for parameter in parameters:
                parameter.grad = None
    return norms_table(bench.audit, np.array(norms))


@contextmanager
def tuned_parameters(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """What was tuned, able to take gradients and without any; flags and gradients are then put back."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    tuned = [parameter for parameter, trains, _ in before if trains] or _added(model)
    try:
        for parameter, _, _ in before:
            parameter.requires_grad_(False).grad = None
        for parameter in tuned:
            parameter.requires_grad_(True)
        yield tuned
    finally:
        for parameter, trains, gradient in before:
            parameter.requires_grad_(trains).grad = gradient


def _added(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that an adapter adds to its base; all, where there is no adapter."""
    from peft import PeftModel

    from imprint.auditing.live import pristine

    below = {id(parameter) for parameter in pristine(model).parameters()} if isinstance(model, PeftModel) else set()
    return [parameter for parameter in model.parameters() if id(parameter) not in below]
