"""What a run should cost and what it did: floating point operations by a stated formula, and this machine's peak.

One multiply and add are two operations. With B the weights of the backbone's matrices that a token meets (of a mixture
of experts its chosen ones), H = V · D those of the output layer, A = layers · heads · head size, for N tokens, virtual
ones included, of which S are scored, and C pairs of a query and a key it may see:

    forward                    2 B N + 2 H S + 4 A C
    training below the head    forward + 2 B N + 2 H S + 8 A C      gradients of the inputs, whatever trains
    weights' gradients         2 × (trained weights of matrices) × (tokens that meet them)
    LoRA                       6 × (weights of A and B) × N          instead of the line above
    FT head on kept states     4 H S                                 forward and the weights' gradient, nothing below

Norms, activations, softmax, the embedding and the optimiser are left out: they move bytes rather than multiply.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from imprint.data.tokens import Encoded
from imprint.engine.products import product
from imprint.tuning.models import base_of, expert_share, head_of, numel, trainable

if TYPE_CHECKING:
    from imprint.engine.forward import Forward
    from imprint.tuning.train import EpochReport, Trainer


@dataclass(frozen=True)
class Costs:
    """The sizes that the formula needs of a tuned model.

    Attributes:
        backbone: B, weights of matrices that a token meets below the output layer.
        head: H.
        attention: A.
        low_rank: weights of LoRA's matrices.
        trained: trained weights of the backbone's own matrices.
        head_trains: whether the output layer trains.
        virtual: virtual tokens in front of the texts.
        kept: whether hidden states are computed once and kept.
    """

    backbone: int
    head: int
    attention: int
    low_rank: int
    trained: int
    head_trains: bool
    virtual: int
    kept: bool

    def forward(self, records: Sequence[Encoded], virtual_tokens: int = 0) -> float:
        """Operations of one pass over records; `virtual_tokens` are computed besides."""
        lengths = [len(record) for record in records]
        tokens = sum(lengths) + virtual_tokens
        pairs = sum(t * (t + 1) / 2 + t * self.virtual for t in lengths)
        scored = sum(len(record.predictors) for record in records)
        return 2.0 * (self.backbone + self.low_rank) * tokens + 2.0 * self.head * scored + 4.0 * self.attention * pairs

    def scoring(self, records: Sequence[Encoded]) -> float:
        """One pass over the scored records of a checkpoint."""
        if self.kept:
            return 2.0 * self.head * sum(len(record.predictors) for record in records)
        return self.forward(records, self.virtual)

    def training(self, records: Sequence[Encoded], steps: int) -> float:
        """One epoch over the tuned records."""
        scored, tokens = sum(len(r.predictors) for r in records), sum(len(r) for r in records) + steps * self.virtual
        if self.kept:
            return 4.0 * self.head * scored
        once = self.forward(records, steps * self.virtual)
        pairs = sum(len(r) * (len(r) + 1) / 2 + len(r) * self.virtual for r in records)
        weights = 2.0 * (self.trained + self.low_rank) * tokens + 2.0 * self.head * scored * self.head_trains
        return 2 * once + 4.0 * self.attention * pairs + weights


def costs_of(model: nn.Module, kept: bool = False) -> Costs:
    """Read off the modules of a tuned model."""
    base, head = base_of(model), head_of(model)
    config: Any = base.config
    config = config.get_text_config()
    share = expert_share(config)
    trains = {id(parameter) for parameter in trainable(model).values()}
    backbone = low_rank = trained = 0
    for name, module in base.named_modules():
        met = share if "experts" in name.split(".") or "Experts" in type(module).__name__ else 1.0
        if "lora_" in name:
            low_rank += int(met * sum(p.numel() for p in module.parameters(recurse=False)))
        elif module is not head:
            sizes = {id(p): int(met * numel(p)) for p in _matrices(module)}
            backbone += sum(sizes.values())
            trained += sum(size for one, size in sizes.items() if one in trains)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    peft: Any = getattr(model, "active_peft_config", None)
    return Costs(
        backbone=backbone,
        head=config.vocab_size * config.hidden_size,
        attention=config.num_hidden_layers * config.num_attention_heads * size,
        low_rank=low_rank,
        trained=trained,
        head_trains=any(id(parameter) in trains for parameter in head.parameters()),
        virtual=getattr(peft, "num_virtual_tokens", None) or 0,
        kept=kept,
    )


def _matrices(module: nn.Module) -> list[nn.Parameter]:
    """The matrices of a linear layer, of the experts of a layer in one parameter each, or of a router."""
    if isinstance(module, nn.Linear | Conv1D):
        return [p for name, p in module.named_parameters(recurse=False) if name == "weight"]
    router = "Router" in type(module).__name__
    return [p for p in module.parameters(recurse=False) if p.ndim == 3 or (router and p.ndim == 2)]


@cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a plain large product on this machine, the best of a few; measured once a process."""
    size = 1024 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        product(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2.0 * size**3 / best


def peak_memory(device: torch.device) -> int:
    """Bytes: on a GPU the most that was allocated since `forget_peak`, elsewhere the most this process ever held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":  # which keeps no such count within reach
        return 0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def measured(
    model: nn.Module,
    forward: Forward,
    trainer: Trainer,
    scored: Sequence[Encoded],
    report: EpochReport,
    seconds_scoring: float,
) -> dict[str, Any]:
    """What an epoch cost: seconds by part, operations by the formula, memory; this machine's peak for comparison."""
    cost = measured_scoring(model, forward, scored, seconds_scoring)
    training = costs_of(model, kept=forward.kept).training(trainer.records, trainer.steps)
    return {**cost, "seconds": {**report.seconds, **cost["seconds"]}, "flops": training + cost["flops"]}


def measured_scoring(model: nn.Module, forward: Forward, scored: Sequence[Encoded], seconds: float) -> dict[str, Any]:
    """The same of a checkpoint that was only scored."""
    device = next(model.parameters()).device
    return {
        "seconds": {"scoring": seconds},
        "flops": costs_of(model, kept=forward.kept).scoring(scored),
        "peak_memory": peak_memory(device),
        "peak_flops": peak_flops(device, base_of(model).config.dtype),
    }
