"""One pass per text and checkpoint: log-probability, vocabulary moments and argmax of every scored token."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from imprint.data.tokens import Encoded, batches
from imprint.engine.forward import Forward, forward_of
from imprint.errors import ImprintError
from imprint.types import TokenStats


def token_stats(
    model: nn.Module,
    records: Sequence[Encoded],
    budget: int,
    progress: Callable[[int], None] | None = None,
    forward: Forward | None = None,
) -> TokenStats:
    """Score every record once; the result does not depend on how the records are batched.

    Args:
        model: left in evaluation mode.
        records: N encoded records, each with at least one scored token.
        budget: tokens per forward pass.
        progress: called with the number of tokens after each batch.
        forward: the way through the model, if it has been found before.

    Raises:
        ImprintError: a record has nothing to score, or the model cannot be scored.
    """
    if empty := [record.id for record in records if not record.scored.any()]:
        raise ImprintError(f"record {empty[0]!r} has no token to score")
    model.eval()
    forward = forward or forward_of(model)
    offsets = np.concatenate([[0], np.cumsum([int(r.scored.sum()) for r in records])]).astype(np.int64)
    logp, mean, std = (np.empty(offsets[-1], np.float32) for _ in range(3))
    top = np.empty(offsets[-1], bool)
    with torch.inference_mode():
        hidden = forward.checkpoint()
        for group in batches([len(r) for r in records], budget):
            values = forward.output.moments(*hidden([[records[n] for n in group]]))
            where = np.concatenate([np.arange(offsets[n], offsets[n + 1]) for n in group])
            logp[where], mean[where], std[where], top[where] = (v.cpu().numpy() for v in values)
            if progress:
                progress(sum(len(records[n]) for n in group))
    tokens = np.concatenate([r.ids[r.scored] for r in records])
    return TokenStats(np.array([r.id for r in records], np.str_), offsets, tokens, logp, mean, std, top)
