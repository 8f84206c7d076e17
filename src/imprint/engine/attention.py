"""Attention over a packed row, through Transformers' own interface.

The models' code stays as it is; only the name of the attention differs while a packed row goes through. What this
attention cannot do (sinks, position biases) it refuses, and `forward.py` pads such an architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface

from imprint.engine.layout import Group, Layout

NAME = "imprint_packed"
_LAYOUT: ContextVar[Layout | None] = ContextVar("layout", default=None)


@contextmanager
def packed(config: Any, row: Layout) -> Iterator[None]:
    """The models that share `config` attend as `row` says."""
    with attending(config, NAME, _LAYOUT, row):
        yield


@contextmanager
def attending(config: Any, name: str, held: ContextVar[Any], value: Any) -> Iterator[None]:
    """The models that share `config` attend by the registered function `name`, which finds `value` in `held`."""
    before = config._attn_implementation
    config._attn_implementation = name
    token = held.set(value)
    try:
        yield
    finally:
        held.reset(token)
        config._attn_implementation = before


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """[1, H, N, D] each → [1, N, H, D]; what this cannot do is refused, and the model is then padded.

    Raises:
        NotImplementedError: attention sinks, position biases, attention that is not causal, dropout.
    """
    row = _LAYOUT.get()
    causal = module.is_causal if is_causal is None else is_causal
    if row is None or s_aux is not None or position_bias is not None or dropout or not causal:
        raise NotImplementedError(f"{type(module).__name__} attends in a way that packed texts cannot")
    layer: int = module.layer_idx  # type: ignore[assignment]
    if row.kept is not None:
        row.kept[layer] = (key, value)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    attend = _plain if softcap is None else _capped(softcap)
    done = []
    for group in row.groups:
        q, k, v = (_padded(x, group) for x in (query, key, value))
        front = 0
        if group.run is not None:
            (begin, end), shared = row.prompts[group.run], row.shared[group.run]
            pair = shared[layer] if shared else (key[:, :, begin:end], value[:, :, begin:end])
            front = pair[0].shape[2]
            if front:
                k, v = (_in_front(x, own) for x, own in zip(pair, (k, v), strict=True))
        if (groups := q.shape[1] // k.shape[1]) > 1:
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        out = attend(q, k, v, row.mask(group.width, front, sliding_window), scale)
        out = out.transpose(1, 2).reshape(group.count * group.width, *out.shape[1::2])
        done.append(out if group.places is None else out.index_select(0, group.places))
    return torch.cat(done)[None], None


def _padded(x: torch.Tensor, group: Group) -> torch.Tensor:
    """[1, H, N, D] → [count, H, width, D]."""
    own = x[0, :, group.begin : group.end].transpose(0, 1)
    if group.places is not None:
        own = own.new_zeros(group.count * group.width, *own.shape[1:]).index_copy(0, group.places, own)
    return own.reshape(group.count, group.width, *own.shape[1:]).transpose(1, 2)


def _in_front(shared: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Shared keys or values [1, H, P, D] before each text's own [B, H, T, D]."""
    return torch.cat([shared.to(own.dtype).expand(own.shape[0], -1, -1, -1), own], dim=2)


Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, "torch.Tensor | None", float], torch.Tensor]


def _plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)


def _capped(cap: float) -> Attend:
    """Gemma 2 squashes the scores before the softmax; no fused kernel of torch's does."""

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float
    ) -> torch.Tensor:
        scores = torch.tanh(q @ k.transpose(2, 3) * (scale / cap)) * cap
        seen = torch.ones_like(scores[0, 0], dtype=torch.bool).tril() if mask is None else mask
        return scores.masked_fill(~seen, -torch.inf).softmax(-1, dtype=torch.float32).to(v.dtype) @ v

    return attend


AttentionInterface.register(NAME, _attend)
