"""From records to the hidden states that meet the output layer: the quickest way that gives what the model gives.

The quick way packs texts into one row (`packed.py`). It is compared with the plain way, padded texts through the tuned
model itself, before it is used; an architecture or an adapter that does not go along is padded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from imprint.data.tokens import Encoded, pad
from imprint.engine.memory import SHARE, blocks_of, free_bytes, kept_bytes
from imprint.engine.output import OutputLayer, output_layer
from imprint.engine.packed import PackedRuns
from imprint.tuning.models import autocast, base_of, before_head, head_of

Hidden = Callable[[Sequence[Sequence[Encoded]]], tuple[torch.Tensor, torch.Tensor]]
"""The records of each run → ([R, D] hidden states before the output layer, [R] the tokens they predict), run after run,
record after record."""


@dataclass(frozen=True)
class Forward:
    """What training and scoring need of a tuned model.

    Attributes:
        output: the output layer.
        hidden: with gradients where something below the output layer trains; of as many runs as the pass has.
        checkpoint: makes a `hidden` for a model that stays as it is for a while: what its texts share is computed once.
        packed: the pass over packed texts, where that is the way.
        kept: whether the hidden states were computed before and are only looked up.
    """

    output: OutputLayer
    hidden: Hidden
    checkpoint: Callable[[], Hidden]
    packed: PackedRuns | None = None
    kept: bool = False

    def spare_memory(self, records: Sequence[Encoded], budget: int) -> None:
        """From now on compute activations again in the backward pass, if those of a full pass would not fit.

        Args:
            records: the records that will be trained on.
            budget: tokens of a pass.
        """
        if self.packed is None:
            return
        few = sorted(records, key=len)[-2:]
        each = kept_bytes(lambda: self.hidden([few]), self.packed.host) / sum(len(record) for record in few)
        most = min(budget, sum(len(record) for record in records))
        free = free_bytes(next(self.packed.host.parameters()).device)
        if free is not None and each * max(most, len(few[-1])) > SHARE * free:
            self.packed.recompute = blocks_of(self.packed.host)

    def compiled(self) -> Forward:
        """With what reads the logits compiled."""
        return replace(self, output=replace(self.output, fused=True))


def forward_of(model: nn.Module) -> Forward:
    """The quickest way through a model, tuned or not.

    Raises:
        ImprintError: the model does not pass its hidden states through its output layer.
    """
    output, padded, quick = output_layer(model), padded_hidden(model), PackedRuns([model])
    if _agree(quick.hidden, padded, model):
        return _packed(output, quick)
    return Forward(output, padded, lambda: padded)


def may_join(forwards: Sequence[Forward]) -> bool:
    """Whether each goes the packed way by itself, with nothing that only its own modules can compute."""
    return all(forward.packed is not None and not forward.packed.alone for forward in forwards)


def joined(models: Sequence[nn.Module], output: OutputLayer) -> Forward:
    """One pass for several tuned models that share the weights of one base and go the packed way each."""
    return _packed(output, PackedRuns(models))


def _packed(output: OutputLayer, runs: PackedRuns) -> Forward:
    def checkpoint() -> Hidden:
        ready = runs.checkpoint()
        return lambda asked: runs.hidden(asked, ready)

    return Forward(output, runs.hidden, checkpoint, runs)


def padded_hidden(model: nn.Module) -> Hidden:
    """The plain way: texts padded on the right, which causal attention never looks at, through the model as it is.

    Virtual tokens lengthen the hidden states, [B, P + T, D] (prompt and P-tuning), or do not (prefix tuning): counted
    from the right end, position T - t is the same token either way.
    """
    device = next(model.parameters()).device

    def hidden(asked: Sequence[Sequence[Encoded]]) -> tuple[torch.Tensor, torch.Tensor]:
        [records] = asked
        ids, scored = (torch.from_numpy(array).to(device) for array in pad(records))
        rows, columns = scored.nonzero(as_tuple=True)
        with autocast(model):
            states = before_head(model, input_ids=ids)
        places = rows, columns - 1 + states.shape[1] - ids.shape[1]
        home = next(head_of(model).parameters()).device  # where layers are spread, not that of the first one
        return states[tuple(place.to(states.device) for place in places)].to(home), ids[scored].to(home)

    return hidden


@torch.no_grad()
def _agree(quick: Hidden, plain: Hidden, model: nn.Module) -> bool:
    """Whether texts of three lengths come out alike: rounding is a millionth, a wrong position or mask a tenth."""
    config = base_of(model).config.get_text_config()
    rng = np.random.default_rng(0)
    records = []
    for n, length in enumerate((7, 13, 4)):
        ids = rng.integers(0, config.vocab_size, length).astype(np.int32)
        records.append(Encoded(f"probe {n}", ids, np.arange(length) > 0, 0))
    model.eval()
    wanted, _ = plain([records])
    try:
        found, _ = quick([records])
    except (AttributeError, KeyError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return False
    rounding = 5e-2 if base_of(model).config.dtype in (torch.float16, torch.bfloat16) else 1e-4
    return found.shape == wanted.shape and bool((found - wanted).abs().mean() <= rounding * wanted.abs().mean())
