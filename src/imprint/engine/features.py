"""Hidden states computed once, for methods that leave the backbone and its inputs alone (FT head).

Fifteen epochs of training and scoring then cost the output layer's matrix products only.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from imprint.data.tokens import Encoded, batches
from imprint.engine.forward import Forward, forward_of
from imprint.engine.output import output_layer
from imprint.engine.packed import targets
from imprint.store import PART

IN_MEMORY = 2 << 30
"""Bytes of hidden states that are kept in memory; more are mapped from a file."""


class Features:
    """Hidden states [R, D] of records, by record id.

    Attributes:
        states: [R, D] of all records, in memory or in a mapped file.
        spans: record id → its rows.
    """

    def __init__(self, states: torch.Tensor, spans: dict[str, tuple[int, int]], file: object = None) -> None:
        self.states, self.spans, self._file = states, spans, file

    def __call__(self, records: Sequence[Encoded]) -> tuple[torch.Tensor, torch.Tensor]:
        found = torch.cat([self.states[slice(*self.spans[record.id])] for record in records])
        return found, targets([records])


@torch.no_grad()
def features(model: nn.Module, records: Sequence[Encoded], budget: int, folder: Path | None = None) -> Features:
    """The hidden states of records, each computed once.

    Args:
        model: whose backbone will stay as it is.
        records: every record that will be asked for; batched in an order of their own, so that the features, and with
            them a resumed run, do not depend on who asks first.
        budget: tokens per forward pass.
        folder: where a mapped file may lie (default: the system's folder for temporary files).
    """
    model.eval()
    hidden = forward_of(model).checkpoint()
    unique = sorted({record.id: record for record in records}.values(), key=lambda record: record.id)
    rows = [int(record.scored.sum()) for record in unique]
    ends = torch.tensor([0, *rows]).cumsum(0).tolist()
    spans = {record.id: (ends[n], ends[n + 1]) for n, record in enumerate(unique)}
    states, file = None, None
    for group in batches([len(record) for record in unique], budget):
        found, _ = hidden([[unique[n] for n in group]])
        if states is None:
            states, file = _room(ends[-1], found, folder)
        for n, part in zip(group, torch.split(found, [rows[n] for n in group]), strict=True):
            states[ends[n] : ends[n + 1]] = part
    assert states is not None
    return Features(states, spans, file)


def _room(count: int, like: torch.Tensor, folder: Path | None) -> tuple[torch.Tensor, object]:
    """[count, D] on the device of `like` where it is small, in a file otherwise; the file goes with the process."""
    size = count * like.shape[1]
    if size * like.element_size() <= IN_MEMORY:
        return torch.empty(count, like.shape[1], dtype=like.dtype, device=like.device), None
    file = tempfile.NamedTemporaryFile(prefix=".features.", suffix=PART, dir=folder)  # noqa: SIM115
    states = torch.from_file(file.name, shared=True, size=size, dtype=like.dtype)
    return states.view(count, like.shape[1]), file


def kept_forward(model: nn.Module, kept: Features) -> Forward:
    """A `Forward` from hidden states that are there already."""
    device = next(model.parameters()).device

    def hidden(asked: Sequence[Sequence[Encoded]]) -> tuple[torch.Tensor, torch.Tensor]:
        [records] = asked
        states, tokens = kept(records)
        return states.to(device), tokens.to(device)

    return Forward(output_layer(model), hidden, lambda: hidden, kept=True)
