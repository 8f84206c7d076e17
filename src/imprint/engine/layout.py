"""Texts in one row, without padding: how the row is laid out.

A packed row is [1, N]: run after run; within a run its virtual tokens if they are to be computed, then its texts,
longest first. Attention takes neighbouring texts of like length as one padded group, so what is wasted there stays
below what one more call would cost. A few tokens that nobody asks for fill the row to a round number. Keys and values
that a run shares between its texts (a prefix, or a prompt that was computed before) stand in front of each text's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

PER_CALL = {"cpu": 2e7, "cuda": 1e10}
"""FLOPs that fit into the fixed cost of one attention call, forward and backward: about 100 µs on two cores."""

Shared = dict[int, tuple[torch.Tensor, torch.Tensor]]
"""layer → keys and values [1, H, P, D] that stand in front of every text of a run."""


@dataclass(frozen=True)
class Group:
    """Texts that attention takes together: tokens [begin, end) of the row, `count` texts padded to `width`.

    Attributes:
        places: where each token stands in the padded [count · width]; None where all are `width` long.
        run: whose shared keys stand in front; None: nobody's (the group is a run's virtual tokens themselves).
    """

    begin: int
    end: int
    count: int
    width: int
    places: torch.Tensor | None
    run: int | None


@dataclass
class Layout:
    """How a packed row is laid out.

    Attributes:
        position_ids: [N].
        groups: in the order of the row; they cover it, the filling at its end included.
        prompts: [begin, end) of each run's virtual tokens within the row, empty where they are not in it.
        shared: each run's keys and values from outside the row; None where there are none.
        spans: [begin, end) of each run's tokens, virtual ones included; the last one's include the filling.
        has_texts: whether each run has any.
        kept: where to put the keys and values of the whole row, layer by layer (to share them later).
    """

    position_ids: torch.Tensor
    groups: list[Group]
    prompts: list[tuple[int, int]]
    shared: list[Shared | None]
    spans: list[tuple[int, int]]
    has_texts: list[bool]
    kept: Shared | None = None
    masks: dict[tuple[int, int, int | None], torch.Tensor | None] = field(default_factory=dict)

    def mask(self, width: int, front: int, window: int | None) -> torch.Tensor | None:
        """Made once for all layers: see `_mask`."""
        key = (width, front, window)
        if key not in self.masks:
            self.masks[key] = _mask(width, front, window, self.position_ids.device)
        return self.masks[key]


def layout(runs: Sequence[tuple[Sequence[int], int, Shared | None]], width: int, device: torch.device) -> Layout:
    """
    Args:
        runs: per run the lengths of its texts in the order of the row (longest first), the number of virtual tokens
            that stand in the row before them, and the keys and values they share from elsewhere.
        width: the model's hidden size.
    """
    spare = PER_CALL.get(device.type, PER_CALL["cpu"]) / (12 * width)
    positions: list[torch.Tensor] = []
    groups: list[Group] = []
    prompts, spans, begin = [], [], 0
    for number, (lengths, virtual, shared) in enumerate(runs):
        start = begin
        if virtual:
            groups.append(Group(begin, begin + virtual, 1, virtual, None, None))
            positions.append(torch.arange(virtual))
            begin += virtual
        prompts.append((start, begin))
        front = virtual or (next(iter(shared.values()))[0].shape[2] if shared else 0)
        positions += [torch.arange(front, front + length) for length in lengths]
        for texts in _alike(lengths, spare):
            end = begin + sum(texts)
            groups.append(Group(begin, end, len(texts), texts[0], _places(texts, device), number))
            begin = end
        spans.append((start, begin))
    if (filled := rounded(begin)) > begin:
        groups.append(Group(begin, filled, 1, filled - begin, None, None))
        positions.append(torch.arange(filled - begin))
        spans[-1] = (spans[-1][0], filled)  # their gradients are zero
    row = torch.cat(positions).to(device)
    has_texts = [bool(lengths) for lengths, _, _ in runs]
    return Layout(row, groups, prompts, [shared for _, _, shared in runs], spans, has_texts)


def rounded(count: int) -> int:
    """`count` or a few per cent more, so that few sizes occur: oneDNN makes and keeps a kernel for every size it meets.

    >>> rounded(925), rounded(928), rounded(3)
    (928, 928, 8)
    """
    step = max(8, 1 << max(0, count.bit_length() - 5))
    return -(-count // step) * step


def _alike(lengths: Sequence[int], spare: float) -> Iterator[Sequence[int]]:
    """Neighbours whose padding costs attention less than a call of its own would.

    >>> list(_alike([9, 9, 8, 3, 2], spare=20))
    [[9, 9, 8], [3, 2]]
    """
    first, waste = 0, 0
    for n, length in enumerate(lengths):
        waste += lengths[first] ** 2 - length**2
        if waste > spare:
            yield lengths[first:n]
            first, waste = n, 0
    if lengths:
        yield lengths[first:]


def _places(lengths: Sequence[int], device: torch.device) -> torch.Tensor | None:
    if lengths[0] == lengths[-1]:
        return None
    return torch.cat([torch.arange(length) + n * lengths[0] for n, length in enumerate(lengths)]).to(device)


def _mask(width: int, front: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """[width, front + width] True where a query may look; None for plain causal attention."""
    if not front and (window is None or window >= width):
        return None
    query = torch.arange(front, front + width, device=device)[:, None]
    key = torch.arange(front + width, device=device)[None]
    seen = key <= query
    return seen if window is None else seen & (key > query - window)
