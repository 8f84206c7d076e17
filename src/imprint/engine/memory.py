"""Activations of a training pass: how many bytes they take, and how to do without them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

SHARE = 0.6
"""Of the free memory, what activations may take before they are computed again instead of kept."""


@contextmanager
def recomputed(blocks: Sequence[nn.Module], inside: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Gradient checkpointing (Chen et al. 2016): of each block only the input is kept; `inside` is entered again."""
    before = [vars(block).get("forward") for block in blocks]  # a model spread over devices has its own
    for block in blocks:
        again = partial(checkpoint, block.forward, use_reentrant=False, context_fn=lambda: (nullcontext(), inside()))
        block.forward = again
    try:
        yield
    finally:
        for block, own in zip(blocks, before, strict=True):
            del block.forward
            if own is not None:
                block.forward = own


def blocks_of(model: Any) -> list[nn.Module]:
    """The decoder blocks of a causal language model."""
    count = model.config.get_text_config().num_hidden_layers
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    return list(lists[0]) if lists else []


def kept_bytes(work: Callable[[], object], model: nn.Module) -> int:
    """Bytes that `work` keeps for its backward pass, the model's weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    seen: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        result = work()  # held, so that no storage is used twice
    del result
    return sum(seen.values())


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free on a device; None where that cannot be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), None)
