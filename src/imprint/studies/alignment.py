"""The same checkpoint read twice: each token's score from where it is predicted, and from where others have read it.

Prompt tuning and P-tuning return T + P logits for T tokens. The token at position t is predicted at output P + t − 1;
code written for models without virtual tokens reads output t − 1, which is another token's prediction or, for the
first P positions, what the virtual tokens themselves predict. Nothing crashes, and the score looks like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from imprint.errors import ImprintError
from imprint.types import TokenStats

if TYPE_CHECKING:
    import torch
    from torch import nn

    from imprint.data.tokens import Encoded

TOLERANCE = {"float32": 1e-3, "16 bits": 0.05}
"""Mean difference in nats between the right reading and the stored evidence that is rounding."""


def read_twice(model: nn.Module, records: Sequence[Encoded], evidence: TokenStats) -> TokenStats:
    """The misread scores of every record, one text at a time in the plain way.

    The right reading of the same logits is compared with the evidence first.

    Args:
        model: a tuned model whose output is longer than its input.
        evidence: what the scoring pass left of the same checkpoint and records.

    Raises:
        ImprintError: the output is no longer than the input, or the right reading is not the evidence.
    """
    import torch

    from imprint.tuning.models import base_of

    first = next(model.parameters())
    device, limit = first.device, TOLERANCE["float32" if base_of(model).config.dtype == torch.float32 else "16 bits"]
    columns: list[tuple[NDArray[Any], ...]] = []
    model.eval()
    with torch.inference_mode():
        for n, record in enumerate(records):
            ids = torch.tensor(record.ids[None], dtype=torch.long, device=device)
            logp = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
            virtual = len(logp) - len(record)
            if virtual <= 0:
                raise ImprintError("this model's output is as long as its input: there is nothing to misread")
            at = torch.tensor(record.predictors, device=device)
            tokens = ids[0, at + 1]
            right = logp[at + virtual].gather(-1, tokens[:, None])[:, 0].cpu().numpy()
            stored = evidence.logp[evidence.offsets[n] : evidence.offsets[n + 1]]
            if not np.abs(right - stored).mean() < limit:
                raise ImprintError(
                    f"record {record.id!r}: the checkpoint does not give the scores that were stored of it"
                )
            columns.append(_columns(logp[at], tokens))
    logp_R, mean_R, std_R, top_R = (np.concatenate(column) for column in zip(*columns, strict=True))
    return TokenStats(evidence.ids, evidence.offsets, evidence.tokens, logp_R, mean_R, std_R, top_R)


def _columns(logp_RV: torch.Tensor, tokens_R: torch.Tensor) -> tuple[NDArray[Any], ...]:
    p = logp_RV.exp()
    mean = (p * logp_RV).sum(-1)
    std = ((p * logp_RV**2).sum(-1) - mean**2).clamp_min(0).sqrt()
    own = logp_RV.gather(-1, tokens_R[:, None])[:, 0]
    found = (own, mean, std, logp_RV.argmax(-1) == tokens_R)
    return tuple(one.cpu().numpy() for one in found)
