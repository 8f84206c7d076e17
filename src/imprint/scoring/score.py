"""One pass per text and checkpoint: log-probability, vocabulary moments and argmax of every scored token.

This is the only place where logits are read, for training and for scoring alike.

The output layer is applied to the scored positions only. A hook in front of it picks those hidden states, so the model
itself does the rest: architectures that scale or cap their logits (Gemma, Cohere, Granite) stay right, and no
[B, T, V] tensor is built. Virtual tokens lengthen the hidden states, [B, P + T, D] (prompt and P-tuning), or do not
(prefix tuning): counted from the right end, position T - t is the same token either way.

Where the backbone and its inputs stay as they are, `features.py` gives the same logits from hidden states kept once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import nn

from imprint.data.tokens import Encoded, batches, pad
from imprint.errors import ImprintError
from imprint.tuning.models import base_of, head_of
from imprint.types import TokenStats

LEAST = -1e4
"""Stands for log 0 where a model gives a token no chance at all, so that moments stay finite."""
CPU_CHUNK, GPU_CHUNK = 1 << 17, 1 << 26
"""Logits handled at once when moments are taken: few enough for a core's cache; many where launches cost more."""


def autocast(model: nn.Module) -> AbstractContextManager[object]:
    """Mixed precision where the base was loaded in 16 bits: what trains is stored in float32, the products are not.

    The base, and whatever is tuned on top of it, are scored in the same precision, or their difference would be noise.
    """
    dtype = base_of(model).config.dtype
    if dtype not in (torch.bfloat16, torch.float16):
        return nullcontext()
    return torch.autocast(next(model.parameters()).device.type, dtype)  # type: ignore[arg-type]


def scored_logits(model: nn.Module, ids_BT: torch.Tensor, scored_BT: torch.Tensor) -> torch.Tensor:
    """[R, V] float32 logits that predict the scored tokens, example after example.

    Args:
        model: a causal language model, tuned or not.
        ids_BT: token ids, right-padded.
        scored_BT: which of them are scored; never those at position 0.
    """
    rows, columns = scored_BT.nonzero(as_tuple=True)
    width = ids_BT.shape[1]

    def pick(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden = args[0]  # [B, P + T, D]
        return (hidden[rows, columns - 1 + hidden.shape[1] - width][None], *args[1:])

    hook = head_of(model).register_forward_pre_hook(pick)
    try:
        with autocast(model):
            logits: torch.Tensor = model(input_ids=ids_BT, use_cache=False).logits
    finally:
        hook.remove()
    if logits.shape[:2] != (1, len(rows)):
        raise ImprintError(
            f"{type(model).__name__} does not pass its hidden states through its output layer: it cannot be scored"
        )
    return logits[0].float()


Logits = Callable[[Sequence[Encoded]], tuple[torch.Tensor, torch.Tensor]]
"""Records → ([R, V] logits, [R] the tokens they predict), record after record."""


def from_texts(model: nn.Module) -> Logits:
    """Logits by the whole model."""
    device = next(model.parameters()).device

    def logits(records: Sequence[Encoded]) -> tuple[torch.Tensor, torch.Tensor]:
        ids, scored = (torch.from_numpy(array).to(device) for array in pad(records))
        return scored_logits(model, ids, scored), ids[scored]

    return logits


def token_stats(
    model: nn.Module,
    records: Sequence[Encoded],
    budget: int,
    progress: Callable[[int], None] | None = None,
    logits: Logits | None = None,
) -> TokenStats:
    """Score every record once; the result does not depend on how the records are batched.

    Args:
        model: left in evaluation mode.
        records: N encoded records, each with at least one scored token.
        budget: tokens per forward pass, padding included.
        progress: called with the number of tokens after each batch.
        logits: where the logits come from (default: the whole model).

    Raises:
        ImprintError: a record has nothing to score.
    """
    if empty := [record.id for record in records if not record.scored.any()]:
        raise ImprintError(f"record {empty[0]!r} has no token to score")
    model.eval()
    logits = logits or from_texts(model)
    offsets = np.concatenate([[0], np.cumsum([int(r.scored.sum()) for r in records])]).astype(np.int64)
    logp, mean, std = (np.empty(offsets[-1], np.float32) for _ in range(3))
    top = np.empty(offsets[-1], bool)
    with torch.inference_mode():
        for group in batches([len(r) for r in records], budget):
            values = _moments(*logits([records[n] for n in group]))
            where = np.concatenate([np.arange(offsets[n], offsets[n + 1]) for n in group])
            logp[where], mean[where], std[where], top[where] = (v.cpu().numpy() for v in values)
            if progress:
                progress(sum(len(records[n]) for n in group))
    tokens = np.concatenate([r.ids[r.scored] for r in records])
    return TokenStats(np.array([r.id for r in records], np.str_), offsets, tokens, logp, mean, std, top)


def _moments(logits_RV: torch.Tensor, targets_R: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """log p of the target, mean and deviation of log p under p, and whether the target is the argmax; each [R]."""
    chunk = CPU_CHUNK if logits_RV.device.type == "cpu" else GPU_CHUNK
    step = max(1, chunk // logits_RV.shape[1])
    parts = [_chunk(x, y) for x, y in zip(torch.split(logits_RV, step), torch.split(targets_R, step), strict=True)]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def _chunk(logits_RV: torch.Tensor, targets_R: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """In place wherever it can be: the time goes to moving [R, V], not to arithmetic."""
    logp_RV = logits_RV.log_softmax(-1).clamp_min_(LEAST)
    p_RV = logp_RV.exp()
    picked_R = logp_RV.gather(-1, targets_R[:, None])[:, 0]
    top_R = logits_RV.argmax(-1) == targets_R  # of the logits: log-softmax could round two of them to a tie
    mean_R = torch.linalg.vecdot(p_RV, logp_RV)
    centred_RV = logp_RV.sub_(mean_R[:, None])  # centred first: E[x²] - E[x]² would lose the small variances
    variance_R = torch.linalg.vecdot(p_RV.mul_(centred_RV), centred_RV)
    return picked_R, mean_R, variance_R.clamp_min(0).sqrt(), top_R
