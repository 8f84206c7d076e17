"""From records to the hidden states that meet the output layer: the quickest way that gives what the model gives.

The quick way packs texts into one row (`packed.py`). It is compared with the plain way, padded texts through the tuned
model itself, before it is used; an architecture or an adapter that does not go along is padded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from imprint.data.tokens import Encoded, pad
from imprint.engine.output import OutputLayer, output_layer
from imprint.engine.packed import PackedRuns
from imprint.tuning.models import autocast, base_of, before_head

Hidden = Callable[[Sequence[Encoded]], tuple[torch.Tensor, torch.Tensor]]
"""Records → ([R, D] hidden states before the output layer, [R] the tokens they predict), record after record."""


@dataclass(frozen=True)
class Forward:
    """What training and scoring need of a tuned model.

    Attributes:
        output: the output layer.
        hidden: with gradients where something below the output layer trains.
        checkpoint: makes a `hidden` for a model that stays as it is for a while: what its texts share is computed once.
        packed: the pass over packed texts, where that is the way.
    """

    output: OutputLayer
    hidden: Hidden
    checkpoint: Callable[[], Hidden]
    packed: PackedRuns | None = None


def forward_of(model: nn.Module) -> Forward:
    """The quickest way through a model, tuned or not.

    Raises:
        ImprintError: the model does not pass its hidden states through its output layer.
    """
    output, padded = output_layer(model), padded_hidden(model)
    runs = PackedRuns([model])

    def checkpoint() -> Hidden:
        shared = runs.shared()
        return lambda records: runs.hidden([records], shared)

    if _agree(lambda records: runs.hidden([records]), padded, model):
        return Forward(output, lambda records: runs.hidden([records]), checkpoint, runs)
    return Forward(output, padded, lambda: padded)


def padded_hidden(model: nn.Module) -> Hidden:
    """The plain way: texts padded on the right, which causal attention never looks at, through the model as it is.

    Virtual tokens lengthen the hidden states, [B, P + T, D] (prompt and P-tuning), or do not (prefix tuning): counted
    from the right end, position T - t is the same token either way.
    """
    device = next(model.parameters()).device

    def hidden(records: Sequence[Encoded]) -> tuple[torch.Tensor, torch.Tensor]:
        ids, scored = (torch.from_numpy(array).to(device) for array in pad(records))
        rows, columns = scored.nonzero(as_tuple=True)
        with autocast(model):
            states = before_head(model, input_ids=ids)
        return states[rows, columns - 1 + states.shape[1] - ids.shape[1]], ids[scored]

    return hidden


@torch.no_grad()
def _agree(quick: Hidden, plain: Hidden, model: nn.Module) -> bool:
    """Whether texts of three lengths come out alike: rounding is a millionth, a wrong position or mask a tenth."""
    config = base_of(model).config.get_text_config()  # type: ignore[union-attr, operator]
    rng = np.random.default_rng(0)
    records = []
    for n, length in enumerate((7, 13, 4)):
        ids = rng.integers(0, config.vocab_size, length).astype(np.int32)
        records.append(Encoded(f"probe {n}", ids, np.arange(length) > 0, 0))
    model.eval()
    wanted, _ = plain(records)
    try:
        found, _ = quick(records)
    except (AttributeError, KeyError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return False
    rounding = 1e-4 if base_of(model).config.dtype == torch.float32 else 5e-2  # type: ignore[union-attr]
    return found.shape == wanted.shape and bool((found - wanted).abs().mean() <= rounding * wanted.abs().mean())
