"""Matrix products, and the modules whose slow way is replaced while the engine is at work.

Three things are exchanged, each for the same function:

* float32 products on a CPU go through oneDNN, which uses the whole vector unit of every x86 maker; the default of a
  torch wheel (MKL) reaches half of it on some (benchmarks/RESULTS.md);
* LoRA (Hu et al. 2021), y = x Wᵀ + s (x Aᵀ) Bᵀ, adds its second term in place, forward and backward: no [T, D]
  tensor is written besides the two that any layer needs. A frozen W gets no gradient: 2 FLOPs per parameter and token
  forward, 2 backward, and 2 more only where W trains;
* GPT-2's activation, spelled out in eight steps, takes five in place on a CPU and one on a GPU.

Classes of modules are exchanged for the length of a `with` block only; outside it the model is the one that was loaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D


@cache
def _onednn() -> Any:
    """torch's product by oneDNN, or None where this build has none."""
    try:
        found = torch.ops.mkldnn._linear_pointwise
        x, weight = torch.ones(2, 3), torch.ones(3, 4).t()
        return found if torch.equal(found(x, weight, None, "none", [], ""), x @ weight.t()) else None
    except (AttributeError, RuntimeError, TypeError):
        return None


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x Wᵀ + b, x: [..., in], weight: [out, in] of any strides. Knows no gradients on a CPU: call it without them."""
    plain = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and x.numel() > 0
    if plain and _onednn() and not torch.is_autocast_enabled("cpu"):
        return _onednn()(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]
    return F.linear(x, weight, bias)


@dataclass(frozen=True)
class LowRank:
    """A LoRA update of one matrix: A [r, in], B [out, r], and what their product is multiplied by."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float


@dataclass(frozen=True)
class Updates:
    """The LoRA updates of a pass: which rows of the packed tokens belong to which run, and its matrices.

    Attributes:
        spans: [begin, end) of each run's tokens.
        of: module → the update of each run, None where it has none there.
        merged: module → its weight with the update of the only run added, for a pass without gradients.
    """

    spans: Sequence[tuple[int, int]]
    of: Mapping[nn.Module, Sequence[LowRank | None]]
    merged: Mapping[nn.Module, torch.Tensor] = field(default_factory=dict)


def merged(of: Mapping[nn.Module, Sequence[LowRank | None]]) -> dict[nn.Module, torch.Tensor]:
    """Copies [out, in] of float32 matrices with the update of the only run added: W + s B A, a few millionths off.

    Sixteen-bit weights would round small updates away: they keep them apart.
    """
    made = {}
    for module, [update] in of.items():
        weight: torch.Tensor = module.weight  # type: ignore[assignment]
        if update and weight.dtype == torch.float32:
            weight = weight if isinstance(module, nn.Linear) else weight.t()
            made[module] = torch.addmm(weight, update.b, update.a, alpha=update.scale)
    return made


_UPDATES: ContextVar[Updates | None] = ContextVar("updates", default=None)


class _Linear(torch.autograd.Function):
    """y = x Wᵀ + b, and for the rows of each span + s (x Aᵀ) Bᵀ."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        spans: Sequence[tuple[int, int]],
        scales: Sequence[float],
        *pairs: torch.Tensor,
    ) -> torch.Tensor:
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        flat = x.reshape(-1, x.shape[-1]).to(dtype)
        weight, pairs = weight.to(dtype), tuple(matrix.to(dtype) for matrix in pairs)
        y = product(flat, weight, bias if bias is None else bias.to(dtype))
        lows = []
        for (begin, end), scale, a, b in zip(spans, scales, pairs[::2], pairs[1::2], strict=True):
            low = product(flat[begin:end], a)
            y[begin:end].addmm_(low, b.t(), alpha=scale)
            lows.append(low)
        keep = flat if pairs or ctx.needs_input_grad[1] else None
        ctx.save_for_backward(keep, weight, *pairs, *lows)
        ctx.spans, ctx.scales, ctx.shape, ctx.dtype = spans, scales, x.shape, x.dtype
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        flat, weight, *rest = ctx.saved_tensors
        count = len(ctx.spans)
        pairs, lows = rest[: 2 * count], rest[2 * count :]
        g = gradient.reshape(-1, gradient.shape[-1])
        dx = product(g, weight.t()) if ctx.needs_input_grad[0] else None
        grads: list[torch.Tensor] = []
        for (begin, end), scale, a, b, low in zip(ctx.spans, ctx.scales, pairs[::2], pairs[1::2], lows, strict=True):
            gb = product(g[begin:end], b.t()).mul_(scale)  # [T, r]
            if dx is not None:
                dx[begin:end].addmm_(gb, a)
            # thin matrix first, both times: several times faster on a CPU than the transposed product
            grads += [product(gb.t(), flat[begin:end].t()), product(low.t(), g[begin:end].t()).mul_(scale).t()]
        dweight = product(g.t(), flat.t()) if ctx.needs_input_grad[1] else None
        dbias = g.sum(0) if ctx.needs_input_grad[2] else None
        return (None if dx is None else dx.view(ctx.shape).to(ctx.dtype)), dweight, dbias, None, None, *grads


def _linear(module: nn.Module, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    updates = _UPDATES.get()
    bias: torch.Tensor | None = module.bias  # type: ignore[assignment]
    if updates and module in updates.merged:
        return product(x, updates.merged[module], bias)
    found = updates.of.get(module, ()) if updates else ()
    own = [(span, update) for span, update in zip(updates.spans, found, strict=False) if update] if updates else []
    pairs = [matrix for _, update in own for matrix in (update.a, update.b)]
    if not torch.is_grad_enabled() and not pairs:
        return product(x, weight, bias)
    spans, scales = [span for span, _ in own], [update.scale for _, update in own]
    return _Linear.apply(x, weight, bias, spans, scales, *pairs)  # type: ignore[no-any-return, no-untyped-call]


class _FastLinear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _linear(self, x, self.weight)


class _FastConv1D(Conv1D):  # type: ignore[misc]
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _linear(self, x, self.weight.t())


class _FastGELU(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type == "cpu" and x.dtype == torch.float32:
            return _GELU.apply(x) if torch.is_grad_enabled() else _gelu(x)  # type: ignore[no-untyped-call]
        return F.gelu(x, approximate="tanh")


SLOPE, CUBIC = math.sqrt(8 / math.pi), 0.044715
"""½ (1 + tanh(√(2/π) (x + .044715 x³))) = sigmoid(√(8/π) (x + .044715 x³)), which torch computes faster."""


def _gate(x: torch.Tensor) -> torch.Tensor:
    return torch.addcmul(torch.full((), SLOPE), x, x, value=SLOPE * CUBIC).mul_(x).sigmoid_()


def _gelu(x: torch.Tensor) -> torch.Tensor:
    return _gate(x).mul_(x)


class _GELU(torch.autograd.Function):
    """x s, s = sigmoid(v): the gradient is s + x s (1 - s) v'; only x is kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return _gelu(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        s = _gate(x)
        change = torch.addcmul(torch.full((), SLOPE), x, x, value=3 * SLOPE * CUBIC)  # v'
        return torch.addcmul(s, s, s, value=-1).mul_(x).mul_(change).add_(s).mul_(gradient)


SLOW_GELU = {type(ACT2FN[name]) for name in ("gelu_new", "gelu_pytorch_tanh")}
FAST: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: _FastLinear, Conv1D: _FastConv1D}
"""Layers of weights that have a fast way; other classes, quantised ones among them, keep their own."""


def exchanges(model: nn.Module, adapted: set[nn.Module]) -> list[tuple[nn.Module, type[nn.Module]]]:
    """What to exchange in a model: (module, class to take on).

    Args:
        adapted: modules that carry a LoRA update; on a GPU the others are fast as they are.
    """
    made: list[tuple[nn.Module, type[nn.Module]]] = []
    head = model.get_output_embeddings()  # type: ignore[operator]
    for module in model.modules():
        if module is head:  # `output.py` does its work
            continue
        if type(module) in SLOW_GELU:
            made.append((module, _FastGELU))
        elif fast := FAST.get(type(module)):
            weight: torch.Tensor = module.weight  # type: ignore[assignment]
            if module in adapted or (weight.device.type == "cpu" and weight.dtype == torch.float32):
                made.append((module, fast))
    return made


@contextmanager
def engaged(made: Sequence[tuple[nn.Module, type[nn.Module]]], updates: Updates | None = None) -> Iterator[None]:
    """The modules in their fast classes, with the LoRA updates of this pass."""
    before = [type(module) for module, _ in made]
    token = _UPDATES.set(updates)
    for module, fast in made:
        module.__class__ = fast
    try:
        yield
    finally:
        for (module, _), slow in zip(made, before, strict=True):
            module.__class__ = slow
        _UPDATES.reset(token)
