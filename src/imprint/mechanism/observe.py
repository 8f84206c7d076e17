"""What a model's attention reads, seen through Transformers' own interface while the model runs as it is.

The arithmetic is that of `eager`; masks follow from the shapes (one text a row, padding on the right, which causal
attention never looks at). An architecture for which that is not what its own attention computes is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AttentionInterface

from imprint.data.tokens import Encoded, batches, pad, unusable
from imprint.engine.attention import attending
from imprint.errors import DataError, ImprintError
from imprint.tuning.models import autocast, base_of, head_of

NAME = "imprint_observed"
ENTRIES = 2**22
"""Attention weights of one batch over all layers: 16 MiB in float32, near enough to a cache."""


@dataclass(frozen=True)
class Attended:
    """One layer's attention in one pass, after rotary embedding; keys and values repeated where queries share them.

    Attributes:
        query: [B, H, Q, D].
        key, value: [B, H, K, D], K ≥ Q: the last Q keys stand at the places of the queries.
        scale: what scores are multiplied by.
        window: how many keys back a query sees, itself included; None: all.
        cap: scores are squashed to ± cap (Gemma 2); None: not.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float
    window: int | None
    cap: float | None

    def weights(self, queries: int, keys: int, dtype: torch.dtype) -> torch.Tensor:
        """[B, H, queries, keys] how the last `queries` queries would attend if there were only the last `keys` keys.

        Leaving keys out of a softmax is the same as renormalising over the others, without the loss of digits.
        """
        q, k = self.query[:, :, -queries:].to(dtype), self.key[:, :, -keys:].to(dtype)
        scores = q @ k.transpose(2, 3) * self.scale
        if self.cap is not None:
            scores = torch.tanh(scores / self.cap) * self.cap
        return scores.masked_fill(~self._seen(queries, keys), -torch.inf).softmax(-1)

    def _seen(self, queries: int, keys: int) -> torch.Tensor:
        """[queries, keys]"""
        at = torch.arange(keys, device=self.key.device)
        back = at[keys - queries :, None] - at  # how many places each key lies behind each query
        return (back >= 0) if self.window is None else (back >= 0) & (back < self.window)


See = Callable[[Attended], None]
"""Called once per layer, in the order in which the layers run."""

_SEE: ContextVar[See | None] = ContextVar("see", default=None)


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
    """[B, H, Q, D] and [B, H, K, D] → [B, Q, H, D].

    Raises:
        ImprintError: attention sinks, position biases, attention that is not causal.
    """
    see, causal = _SEE.get(), module.is_causal if is_causal is None else is_causal
    if see is None or s_aux is not None or position_bias is not None or dropout or not causal:
        raise ImprintError(f"{type(module).__name__} attends with sinks, biases or both ways: it cannot be observed")
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    call = Attended(query, key, value, scale, sliding_window, softcap)
    with torch.autocast(query.device.type, enabled=False):
        see(call)
        weights = call.weights(query.shape[2], key.shape[2], at_least_single(query.dtype))
        return (weights.to(value.dtype) @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _attend)


def at_least_single(dtype: torch.dtype) -> torch.dtype:
    """The precision in which attention weights are computed: the model's, and never below float32."""
    return torch.promote_types(dtype, torch.float32)


@torch.no_grad()
def states(model: nn.Module, ids: torch.Tensor, see: See | None = None, **inputs: Any) -> tuple[torch.Tensor, ...]:
    """L + 1 residual streams [B, T, D] (prompt and P-tuning: [B, P + T, D]): embeddings, then after each layer.

    Most architectures normalise the last one. Without `see` the model's own attention runs. Logits are not computed.
    """
    config = base_of(model).config
    hook = head_of(model).register_forward_pre_hook(lambda _, args: (args[0][:, :0], *args[1:]))
    try:
        with autocast(model), attending(config, NAME, _SEE, see) if see else _unobserved():
            out = model(input_ids=ids, use_cache=False, output_hidden_states=True, **inputs)
    finally:
        hook.remove()
    return tuple(out.hidden_states)


@contextmanager
def _unobserved() -> Iterator[None]:
    yield


@dataclass(frozen=True)
class Batch:
    """Some of the records, padded on the right.

    Attributes:
        places: [B] which of the records.
        ids: [B, T].
        predicts: [B, T] float64, of each record's positions that predict a scored token 1 / their number, others 0: a
            weighted sum is the record's mean.
    """

    places: list[int]
    ids: torch.Tensor
    predicts: torch.Tensor


def record_batches(model: nn.Module, records: Sequence[Encoded]) -> Iterator[Batch]:
    """The records in batches, longest first, few enough at a time to keep their attention weights.

    Raises:
        DataError: there is no record, or one without a token to score.
    """
    if not records:
        raise DataError("there is no record to measure.")
    for record in records:
        if why := unusable(record):
            raise DataError(f"record {record.id!r} cannot be measured: {why}")
    config, device = base_of(model).config.get_text_config(), next(model.parameters()).device
    lengths = [len(record) for record in records]
    each = config.num_hidden_layers * config.num_attention_heads * max(lengths)
    for places in batches(lengths, max(1, ENTRIES // each)):
        ids, scored = pad([records[n] for n in places])
        predicts = np.zeros(ids.shape)
        predicts[:, :-1] = scored[:, 1:] / scored.sum(1, keepdims=True)
        yield Batch(places, *(torch.from_numpy(array).to(device) for array in (ids, predicts)))


def check_observed(model: nn.Module, records: Sequence[Encoded]) -> None:
    """The model must compute the same while it is observed: rounding is a millionth, a wrong mask a tenth.

    Raises:
        ImprintError: it does not, or its attention is not reached.
    """
    longest = max(records, key=len)
    ids = torch.from_numpy(longest.ids.astype(np.int64))[None].to(next(model.parameters()).device)
    calls: list[None] = []
    found = states(model, ids, lambda call: calls.append(None))[-1].double()
    wanted = states(model, ids)[-1].double()
    rounding = 5e-2 if base_of(model).config.dtype in (torch.float16, torch.bfloat16) else 1e-4
    if not calls or not (found - wanted).abs().mean() <= rounding * wanted.abs().mean():
        raise ImprintError(
            f"the attention of {type(base_of(model)).__name__} cannot be observed: it is not causal attention with at "
            "most a sliding window and a cap that goes through Transformers' attention interface"
        )


def virtual_tokens(model: nn.Module) -> int:
    """How many virtual tokens stand in front of a text: P, or 0."""
    from peft import PeftModel

    if not isinstance(model, PeftModel) or not model.active_peft_config.is_prompt_learning:
        return 0
    return int(model.active_peft_config.num_virtual_tokens)
