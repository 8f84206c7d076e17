"""The output layer, applied to scored positions only and in pieces: no [B, T, V] tensor is ever built.

Scoring takes a piece of [tokens, vocabulary] that fits a core's cache, reads from it all that any attack needs
(maximum, sum, first and second moment, the target's logit) and throws it away; the pieces of a row are then joined as
Chan, Golub and LeVeque (1983) join the moments of samples. Memory does not grow with vocabulary times length.

Training needs the gradient with respect to the hidden states, w (Σ_v softmax(z)_v W_v - W_x) for a loss
Σ w (log Σ_v e^{z_v} - z_x): a softmax-weighted mean of rows, taken piece by piece as fused attention takes its values
(Dao et al. 2022), four FLOPs per parameter and token. Where the layer itself trains, its gradient needs the softmax, so
a second pass computes the logits again: that takes less time than writing [R, V] and reading it back.

Most architectures have logits = W h + b; some scale them or squash them by c·tanh(·/c) (Gemma, Cohere, Granite). Which
numbers those are is found by comparing with the model's own code on hidden states of every size; a model that none of
them explains is computed by its own code, in pieces of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from imprint.engine.compiled import compiled
from imprint.engine.layout import rounded
from imprint.engine.products import product
from imprint.errors import ImprintError
from imprint.tuning.models import autocast, base_of, head_of

LEAST = -1e4
"""Stands for log 0 where a model gives a token no chance at all, so that moments stay finite."""
CPU_TOKENS, CPU_VOCABULARY = 1024, 1024
"""A piece of logits on a CPU: 4 MB, read while it is still in the cache."""
LOG2_E = math.log2(math.e)
"""exp y = 2 ** (y log₂ e): torch's exp2 takes a quarter of the time of its exp on a CPU."""
GPU_LOGITS = 1 << 26
"""Logits of a piece on a GPU, where launches cost more than a few passes."""

Moments = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""log p of the target, mean and deviation of log p under p, whether the target is the argmax; each [R]."""


@dataclass(frozen=True)
class OutputLayer:
    """From hidden states [R, D] to what is asked of the logits [R, V], V never in memory for more than a piece.

    Attributes:
        weight: [V, D]; what trains if the head does.
        bias: [V] or None.
        scale, cap: logits = cap · tanh(scale · (W h + b) / cap); no cap: scale · (W h + b).
        opaque: the model's own code from hidden states to logits, where the formula does not reproduce it.
        fused: whether what reads the logits is compiled first (`compiled.pays`).
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    cap: float | None = None
    opaque: Callable[[torch.Tensor], torch.Tensor] | None = None
    fused: bool = False

    @property
    def vocabulary(self) -> int:
        return self.weight.shape[0]

    @torch.no_grad()
    def moments(self, hidden_RD: torch.Tensor, targets_R: torch.Tensor) -> Moments:
        """Everything that scoring keeps of a token."""
        tokens, _ = self._piece()
        parts = [self._moments(h, x) for h, x in _pieces(tokens, *_filled(hidden_RD, targets_R))]
        columns = (torch.cat(column)[: len(targets_R)] for column in zip(*parts, strict=True))
        return tuple(columns)  # type: ignore[return-value]

    def loss_and_gradient(
        self, hidden_RD: torch.Tensor, targets_R: torch.Tensor, weights_R: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """([R] negative log-likelihoods, [R, D] gradient of Σ w · nll with respect to the hidden states).

        Where the layer trains, its gradient is added to `weight.grad` and `bias.grad`; where the hidden states ask for
        none, theirs is None.
        """
        work = self._opaque_gradient if self.opaque else self._gradient
        (step, _), below = self._piece(), hidden_RD.requires_grad
        filled, count = _filled(hidden_RD.detach(), targets_R, weights_R), len(targets_R)
        nll, gradient = zip(*(work(h, x, w, below) for h, x, w in _pieces(step, *filled)), strict=True)
        return torch.cat(nll)[:count], torch.cat(gradient)[:count].to(hidden_RD.dtype) if below else None

    def _piece(self) -> tuple[int, int]:
        """Tokens and vocabulary entries of a piece."""
        if self.weight.device.type == "cpu" and not self.opaque:
            return CPU_TOKENS, CPU_VOCABULARY
        return max(1, (GPU_LOGITS if self.weight.device.type != "cpu" else 1 << 21) // self.vocabulary), self.vocabulary

    def _logits(self, hidden: torch.Tensor, begin: int = 0, end: int | None = None) -> torch.Tensor:
        """[R, end - begin] float32 logits of a stretch of the vocabulary, in memory of their own."""
        if self.opaque:
            return self.opaque(hidden).float()
        bias = None if self.bias is None else self.bias[begin:end]
        x = _product32(hidden, self.weight[begin:end], bias)
        if self.scale != 1.0:
            x = x.mul_(self.scale)
        return x if self.cap is None else x.div_(self.cap).tanh_().mul_(self.cap)

    def _moments(self, hidden: torch.Tensor, targets: torch.Tensor) -> Moments:
        """Per stretch of the vocabulary its maximum, Σ e, Σ e y and Σ e y², y = z - maximum; then all joined."""
        _, width = self._piece()
        parts = torch.empty(4, math.ceil(self.vocabulary / width), len(hidden), device=hidden.device)
        picked = torch.empty(len(hidden), device=hidden.device)
        first = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
        sums = compiled(_sums, hidden.device.type) if self.fused else _sums
        for begin, z, rows, places in self._stretches(hidden, targets):
            n, top = begin // width, z.amax(1)
            picked[rows] = z[rows, places]
            first[rows] = _first_of_the_largest(z, top, rows, places)
            parts[0, n] = top
            parts[1:, n] = torch.stack(sums(z, top))
        return _joined(parts, picked, first & (parts[0].argmax(0) == targets // width))

    @torch.no_grad()
    def _gradient(
        self, hidden: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, below: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Σ e^z and Σ e^z W over the stretches, about a maximum that grows, as fused attention does: one pass."""
        top = torch.full((len(hidden),), -torch.inf, device=hidden.device)
        total, picked = torch.zeros_like(top), torch.empty_like(top)
        summed, once = torch.zeros(hidden.shape, device=hidden.device), below and not self._needs_softmax
        for begin, z, rows, places in self._stretches(hidden, targets):
            picked[rows] = z[rows, places]
            before, top = top, torch.maximum(top, z.amax(1))
            e, kept = z.sub_(top[:, None]).mul_(LOG2_E).exp2_(), (before - top).exp_()
            total = total.mul_(kept).add_(e.sum(1))
            if once:
                summed.mul_(kept[:, None]).add_(_product32(e, self.weight[begin : begin + z.shape[1]].t()))
        nll = total.log() + top - picked
        w = (weights * self.scale)[:, None]
        if once:
            return nll, (summed / total[:, None] - self.weight[targets].float()).mul_(w)
        if self._needs_softmax:
            return nll, self._from_softmax(hidden, targets, top + total.log(), w, below)
        return nll, None

    @property
    def _needs_softmax(self) -> bool:
        """Whether the gradient asks for more than Σ softmax W: the layer trains, or a cap has a slope of its own."""
        return self.cap is not None or any(t is not None and t.requires_grad for t in (self.weight, self.bias))

    def _from_softmax(
        self, hidden: torch.Tensor, targets: torch.Tensor, log_total: torch.Tensor, w: torch.Tensor, below: bool
    ) -> torch.Tensor | None:
        """A second pass, with the softmax itself: the layer's own gradients are added, the hidden states' returned."""
        summed = torch.zeros(hidden.shape, device=hidden.device) if below else None
        weighted = (hidden * w).to(hidden.dtype)
        for parameter in (self.weight, self.bias):
            if parameter is not None and parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for begin, z, rows, places in self._stretches(hidden, targets):
            stretch = slice(begin, begin + z.shape[1])
            slope = None if self.cap is None else (z / self.cap).square_().neg_().add_(1)
            p = z.sub_(log_total[:, None]).exp_()  # to the last digit: AdamW divides small gradients by themselves
            p[rows, places] -= 1
            p = p if slope is None else p.mul_(slope)
            if self.weight.grad is not None and self.weight.requires_grad:
                self.weight.grad[stretch] += _product32(p.t(), weighted.t())
            if self.bias is not None and self.bias.requires_grad and self.bias.grad is not None:
                self.bias.grad[stretch] += (p.t() @ w)[:, 0]
            if summed is not None:
                summed += _product32(p, self.weight[stretch].t())
        return None if summed is None else summed.mul_(w)

    def _stretches(
        self, hidden: torch.Tensor, targets: torch.Tensor
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Of the vocabulary: (begin, logits [R, width], rows whose target lies in it, where in it)."""
        _, width = self._piece()
        for begin in range(0, self.vocabulary, width):
            rows = ((targets >= begin) & (targets < begin + width)).nonzero()[:, 0]
            z = self._logits(hidden, begin, begin + width)
            if self.bias is not None:  # only a bias can be -inf: such a token weighs nothing
                z.clamp_min_(LEAST)
            yield begin, z, rows, targets[rows] - begin

    def _opaque_gradient(
        self, hidden: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, below: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        leaf = hidden.clone().requires_grad_(below)
        with torch.enable_grad():
            nll = F.cross_entropy(self._logits(leaf), targets, reduction="none")
            (nll * weights).sum().backward()  # type: ignore[no-untyped-call]
        return nll.detach(), leaf.grad


def _pieces(step: int, *columns: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    return zip(*(torch.split(column, step) for column in columns), strict=True)


def _filled(*columns: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Rows of zeros up to a round number: they weigh nothing and are cut off again."""
    more = rounded(len(columns[0])) - len(columns[0])
    return tuple(F.pad(column, (0, 0) * (column.ndim - 1) + (0, more)) for column in columns)


def _product32(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x Wᵀ + b in float32: on a GPU of 16-bit matrices as they are, added up in 32; else 32 throughout."""
    sixteen = {x.dtype, weight.dtype} & {torch.bfloat16, torch.float16}
    if sixteen and x.device.type == "cuda" and _adds_in_32():
        dtype = sixteen.pop()
        y = torch.mm(x.to(dtype), weight.to(dtype).t(), out_dtype=torch.float32)
        return y if bias is None else y.add_(bias)
    return product(x.float(), weight.float(), None if bias is None else bias.float())


@cache
def _adds_in_32() -> bool:
    """Whether this torch multiplies 16-bit matrices on a GPU into a 32-bit one."""
    try:
        one = torch.ones(16, 16, dtype=torch.bfloat16, device="cuda")
        return torch.mm(one, one, out_dtype=torch.float32).dtype == torch.float32
    except (TypeError, RuntimeError):
        return False


def _first_of_the_largest(z: torch.Tensor, top: torch.Tensor, rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Whether z[rows, places] is what argmax would return; only rows that reach their maximum are looked at."""
    largest = z[rows, places] >= top[rows]
    found = largest.clone()
    found[largest] = z[rows[largest]].argmax(1) == places[largest]
    return found


def _sums(z: torch.Tensor, top: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Σ e, Σ e y, Σ e y² of each row, y = z - top, e = exp y; z is used up."""
    y = z.sub_(top[:, None]).mul_(LOG2_E)  # in units of ln 2
    e = y.exp2()
    total = e.sum(1)
    first = e.mul_(y).sum(1).div_(LOG2_E)
    return total, first, e.mul_(y).sum(1).div_(LOG2_E**2)


def _joined(parts: torch.Tensor, picked: torch.Tensor, top_R: torch.Tensor) -> Moments:
    """The stretches [4, K, R] of each row as one, in float64.

    Taken about its own maximum, a stretch's Σ e y² has lost nothing: what weighs most lies near y = 0.
    """
    top, total, first, second = parts.double()
    peak = top.amax(0)
    weight = total * (top - peak).exp()  # of each stretch, about the row's maximum
    whole = weight.sum(0)
    centre = top - peak + first / total  # mean of z - peak within the stretch
    spread = (second / total - (first / total).square()).clamp_min(0)
    share = weight / whole
    mean = (share * centre).sum(0)
    variance = (share * (spread + (centre - mean).square())).sum(0)
    log_whole = whole.log()
    logp = (picked.double() - peak - log_whole).clamp_min(LEAST)
    return logp.float(), (mean - log_whole).float(), variance.sqrt().float(), top_R


def output_layer(model: nn.Module) -> OutputLayer:
    """The output layer of a causal language model, its formula checked against the model's own code.

    Raises:
        ImprintError: the model does not pass its hidden states through its output layer.
    """
    head = head_of(model)
    own, vocabulary, width = _own_code(model)
    weight: Any = getattr(head, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.shape == (vocabulary, width) and weight.is_floating_point():
        bias: Any = getattr(head, "bias", None)
        some = slice(0, min(vocabulary, 256))
        rows = _of_all_sizes(weight[some].detach().float())
        wanted = own(rows.to(weight.dtype))[:, some].float()
        for scale, cap in _candidates(base_of(model).config):
            formula = OutputLayer(weight[some].detach(), None if bias is None else bias[some].detach(), scale, cap)
            if _agree(formula._logits(rows.to(weight.dtype)), wanted, base_of(model).config.dtype):
                return OutputLayer(weight, bias, scale, cap)
    return OutputLayer(torch.empty(vocabulary, 0, device=next(model.parameters()).device), opaque=own)


def _own_code(model: nn.Module) -> tuple[Callable[[torch.Tensor], torch.Tensor], int, int]:
    """([R, D] → [R, V] by the model itself, V, D): one token goes through it, and what meets the head is replaced."""
    base, head = base_of(model), head_of(model)
    token = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    widths: list[int] = []

    def run(hidden: torch.Tensor | None) -> torch.Tensor:
        def replace(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            widths.append(args[0].shape[-1])
            return args if hidden is None else (hidden[None], *args[1:])

        hook = head.register_forward_pre_hook(replace)
        try:
            with autocast(model):
                return base(input_ids=token, use_cache=False).logits[0]  # type: ignore[no-any-return]
        finally:
            hook.remove()

    with torch.no_grad():
        vocabulary = run(None).shape[-1]
    if not widths:
        raise ImprintError(
            f"{type(base).__name__} does not pass its hidden states through its output layer: it cannot be scored"
        )
    return run, vocabulary, widths[0]


def _of_all_sizes(weight: torch.Tensor) -> torch.Tensor:
    """[16, D] hidden states whose largest logits run from .01 to 100, so that no cap goes unnoticed."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(16, weight.shape[1], generator=generator).to(weight.device)
    largest = (rows @ weight.t()).abs().amax(1, keepdim=True)
    return rows / largest.clamp_min(1e-9) * torch.logspace(-2, 2, 16, device=weight.device)[:, None]


def _candidates(config: Any) -> Iterator[tuple[float, float | None]]:
    """(scale, cap): none; then every number in the configuration, as a factor, a divisor, a cap."""
    stated = config.get_text_config().to_dict().values()
    numbers = sorted({float(x) for x in stated if isinstance(x, int | float) and not isinstance(x, bool) and x > 0})
    scales = [1.0, *numbers, *(1 / x for x in numbers)]
    yield from ((scale, cap) for cap in (None, *numbers) for scale in scales)


def _agree(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> bool:
    """Row by row, within the rounding of the model's precision; where the model says -inf, so must the formula."""
    finite = torch.isfinite(wanted)
    gap = (found - wanted).abs().where(finite, 0).amax(1)
    size = wanted.abs().where(finite, 0).amax(1)
    rounding = 1e-5 if dtype == torch.float32 else 2e-2
    return bool(torch.equal(finite, torch.isfinite(found)) and (gap <= rounding * size).all())
