"""Hidden states computed once, for methods that leave the backbone and its inputs alone (FT head).

Fifteen epochs of training and scoring then cost the output layer's matrix products only. The model's own code still
runs from the output layer on, with a stand-in for the backbone that returns what was kept, so scaled or capped logits
stay right. Before the features are used they must reproduce the model's logits; an architecture that does not go along
is scored the plain way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from imprint.data.tokens import Encoded, batches
from imprint.scoring.score import Logits, autocast, from_texts
from imprint.tuning.models import head_of

LIMIT = 2 << 30
"""Bytes of hidden states that are kept at most; beyond, texts go through the whole model."""


class _Outputs:
    """What a backbone returns, with nothing in it but hidden states."""

    def __init__(self, hidden_1RD: torch.Tensor) -> None:
        self.last_hidden_state = hidden_1RD

    def __getitem__(self, index: int) -> torch.Tensor | None:
        return self.last_hidden_state if index == 0 else None

    def __getattr__(self, name: str) -> None:  # caches, attentions, router logits: whatever else a model passes on
        return None


class _StandIn(nn.Module):
    """Returns given hidden states, whatever it is asked."""

    def __init__(self, hidden_1RD: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden_1RD
        self.decoder = self.forward  # OPT calls its backbone's decoder

    def forward(self, *args: Any, **kwargs: Any) -> _Outputs:
        return _Outputs(self.hidden)


@contextmanager
def _backbone(model: nn.Module, hidden_1RD: torch.Tensor) -> Iterator[None]:
    name: str = model.base_model_prefix  # type: ignore[assignment]
    original = model._modules[name]
    model._modules[name] = _StandIn(hidden_1RD)
    try:
        yield
    finally:
        model._modules[name] = original


def _from_hidden(model: nn.Module, hidden_RD: torch.Tensor) -> torch.Tensor:
    """[R, V] float32 logits of kept hidden states."""
    with _backbone(model, hidden_RD[None]), autocast(model):
        nothing = torch.zeros(1, 1, dtype=torch.long, device=hidden_RD.device)
        logits: torch.Tensor = model(input_ids=nothing, use_cache=False).logits
    return logits[0].float()


@torch.no_grad()
def _hidden(model: nn.Module, records: Sequence[Encoded]) -> tuple[torch.Tensor, torch.Tensor]:
    """([R, D] what reaches the output layer at the scored positions, [R, V] logits)."""
    kept: list[torch.Tensor] = []
    hook = head_of(model).register_forward_hook(lambda module, args, output: kept.append(args[0][0]))
    try:
        logits, _ = from_texts(model)(records)
    finally:
        hook.remove()
    return kept[0], logits


def from_features(model: nn.Module, records: Sequence[Encoded], budget: int) -> Logits:
    """Logits from hidden states that are computed here, once; from texts where that cannot be.

    Args:
        model: untuned backbone; its output layer may train afterwards.
        records: every record that will be asked for; batched in an order of their own, so that the features, and with
            them a resumed run, do not depend on who asks first.
        budget: tokens per forward pass, padding included.
    """
    weight: torch.Tensor = head_of(model).weight  # type: ignore[assignment]
    width = weight.shape[1]
    if sum(int(r.scored.sum()) for r in records) * width * 4 > LIMIT:
        return from_texts(model)
    model.eval()
    kept: dict[str, torch.Tensor] = {}
    unique = list({record.id: record for record in records}.values())
    for group in batches([len(record) for record in unique], budget):
        chosen = [unique[n] for n in group]
        hidden, logits = _hidden(model, chosen)
        if not kept and not _reproduces(model, hidden, logits):
            return from_texts(model)
        sizes = [int(record.scored.sum()) for record in chosen]
        kept |= {r.id: part.clone() for r, part in zip(chosen, torch.split(hidden, sizes), strict=True)}

    def logits_of(asked: Sequence[Encoded]) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = torch.cat([kept[record.id] for record in asked])
        targets = torch.cat([torch.from_numpy(record.ids[record.scored]) for record in asked]).long()
        return _from_hidden(model, hidden), targets.to(hidden.device)

    return logits_of


@torch.no_grad()
def _reproduces(model: nn.Module, hidden: torch.Tensor, logits: torch.Tensor) -> bool:
    try:
        found = _from_hidden(model, hidden)
    except (AttributeError, KeyError, TypeError, RuntimeError):  # an architecture that calls its backbone otherwise
        return False
    return found.shape == logits.shape and bool((found - logits).abs().max() <= 1e-4 * logits.abs().max())
