"""How far a tuned model's inside moves from the base's, layer by layer, on members and on non-members.

Two things move: which content tokens attend to which (`Side.attention_NLH`), and the residual stream (`Side.base_NSD`,
`Side.tuned_NSD`). A record's value is the mean over its positions that predict a scored token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from imprint.data.tokens import Encoded
from imprint.mechanism.distance import energy_distance, linear_cka, shift
from imprint.mechanism.observe import (
    Attended,
    Batch,
    at_least_single,
    check_observed,
    record_batches,
    states,
    virtual_tokens,
)
from imprint.types import Floats


@dataclass(frozen=True)
class Side:
    """Members, or non-members; S = L + 1 residual streams: the embeddings, then after each layer.

    Attributes:
        attention_NLH: [N, L, H] total variation distance, 0 to 1, between the base's attention and the tuned model's
            attention among content tokens (renormalised without virtual ones), mean over the record's positions.
        shifted_NLH: [N, L, H] the same against a base whose positions start at P, as they do after virtual tokens;
            equal to `attention_NLH` where P = 0 and, but for rounding, where positions are rotary.
        base_NSD: [N, L + 1, D] mean residual stream of the base.
        tuned_NSD: [N, L + 1, D] mean residual stream of the tuned model.
        shift_S: [L + 1] how far the mean over records moved, in units of the base's spread over these records.
        cka_S: [L + 1] linear CKA of the base's and the tuned model's streams.
    """

    attention_NLH: Floats
    shifted_NLH: Floats
    base_NSD: Floats
    tuned_NSD: Floats
    shift_S: Floats
    cka_S: Floats


@dataclass(frozen=True)
class Separation:
    """Members against non-members at each residual stream, by energy distance.

    Attributes:
        value_S: [L + 1] in the unit of the stream.
        relative_S: [L + 1] 0 to 1.
        p_S: [L + 1] of the permutation test; not corrected for the number of layers.
    """

    value_S: Floats
    relative_S: Floats
    p_S: Floats


@dataclass(frozen=True)
class Drift:
    """A tuned model against its base.

    Attributes:
        virtual: P, the number of virtual tokens, 0 for methods without.
        members, nonmembers: how far each side moved.
        moved: of the displacements tuned − base: whether members move differently from non-members.
        control: of the base's own streams: whether they differed before any tuning.
    """

    virtual: int
    members: Side
    nonmembers: Side
    moved: Separation
    control: Separation


def drift(
    base: nn.Module,
    tuned: nn.Module,
    members: Sequence[Encoded],
    nonmembers: Sequence[Encoded],
    permutations: int = 999,
    seed: int = 0,
    member_groups: Iterable[object] | None = None,
    nonmember_groups: Iterable[object] | None = None,
) -> Drift:
    """Where a tuned model differs from its base, and whether more so, or in other ways, on members.

    Args:
        base: as it was loaded; left in evaluation mode.
        tuned: the same model tuned by any method; its weights are not the base's own. Left in evaluation mode.
        members, nonmembers: records of each side.
        permutations, seed: of the permutation tests (`energy_distance`).
        member_groups, nonmember_groups: clusters that the tests relabel as a whole.

    Raises:
        DataError: no record on a side, one without a token to score, groups that do not fit.
        ImprintError: the architecture's attention cannot be observed.
    """
    base.eval()
    tuned.eval()
    arrays = _measured(base, tuned, [*members, *nonmembers])
    _, _, base_NSD, tuned_NSD = arrays
    halves = np.split(np.arange(len(base_NSD)), [len(members)])
    sides = [_side(*(array[half] for array in arrays)) for half in halves]
    groups = [None if labels is None else list(labels) for labels in (member_groups, nonmember_groups)]

    def separation(array_NSD: Floats) -> Separation:
        found = [
            energy_distance(x[halves[0]], x[halves[1]], permutations, seed, *groups) for x in array_NSD.swapaxes(0, 1)
        ]
        value, relative, p = np.array([(each.value, each.relative, each.p) for each in found]).T
        return Separation(value, relative, p)

    return Drift(
        virtual=virtual_tokens(tuned),
        members=sides[0],
        nonmembers=sides[1],
        moved=separation(_displacement(base_NSD, tuned_NSD, torch.finfo(next(base.parameters()).dtype).eps)),
        control=separation(base_NSD),
    )


def _displacement(base_NSD: Floats, tuned_NSD: Floats, eps: float) -> Floats:
    """[N, S, D] tuned − base; zero at a stream where records differ by less than its precision `eps` resolves.

    Shifted positions displace the embeddings of all records of one length alike: what is left is rounding, which
    depends on the tokens and could tell sides apart.
    """
    moved: Floats = tuned_NSD - base_NSD
    spread_S = np.sqrt(((moved - moved.mean(0)) ** 2).sum(2).mean(0))
    resolved_S = spread_S > eps * np.sqrt((base_NSD**2).sum(2).mean(0))
    moved[:, ~resolved_S] = 0.0
    return moved


def _measured(base: nn.Module, tuned: nn.Module, records: Sequence[Encoded]) -> list[Floats]:
    """The first four attributes of `Side`. Both sides share batches, so that rounding cannot tell them apart."""
    groups = list(record_batches(base, records))
    for model in (base, tuned):
        check_observed(model, records)
    order = np.argsort(np.concatenate([group.places for group in groups]))
    columns = zip(*(_batch(base, tuned, group) for group in groups), strict=True)
    return [torch.cat(column).cpu().numpy()[order] for column in columns]


def _side(attention_NLH: Floats, shifted_NLH: Floats, base_NSD: Floats, tuned_NSD: Floats) -> Side:
    pairs = [(base_NSD[:, s], tuned_NSD[:, s]) for s in range(base_NSD.shape[1])]
    shift_S, cka_S = (np.array([measure(*pair) for pair in pairs]) for measure in (shift, linear_cka))
    return Side(attention_NLH, shifted_NLH, base_NSD, tuned_NSD, shift_S, cka_S)


@torch.no_grad()
def _batch(base: nn.Module, tuned: nn.Module, batch: Batch) -> tuple[torch.Tensor, ...]:
    """Attention drift [B, L, H] against the base and against the shifted base, streams [B, L + 1, D] of both models."""
    width, virtual = batch.ids.shape[1], virtual_tokens(tuned)
    own: list[torch.Tensor] = []
    moved: list[torch.Tensor] = []
    before = states(base, batch.ids, lambda call: own.append(_content(call, width)))
    if virtual:
        positions = torch.arange(virtual, virtual + width, device=batch.ids.device).expand(batch.ids.shape)
        states(base, batch.ids, lambda call: moved.append(_content(call, width)), position_ids=positions)
    references = [own, moved] if virtual else [own]
    apart: list[torch.Tensor] = []

    def compare(call: Attended) -> None:
        found, layer = _content(call, width), len(apart)
        gaps = [(found - reference[layer]).abs().sum(-1).double() / 2 for reference in references]
        apart.append(torch.stack([torch.einsum("bht,bt->bh", gap, batch.predicts) for gap in gaps]))

    after = states(tuned, batch.ids, compare)
    drifts = torch.stack(apart, 2)  # [1 or 2, B, L, H]
    return drifts[0], drifts[-1], *(_mean(streams, batch) for streams in (before, after))


def _content(call: Attended, width: int) -> torch.Tensor:
    """[B, H, T, T] attention among the content tokens, which are the last ones."""
    return call.weights(width, width, at_least_single(call.query.dtype))


def _mean(streams: tuple[torch.Tensor, ...], batch: Batch) -> torch.Tensor:
    """[B, L + 1, D] means over the predicting positions, counted from the right end."""
    width = batch.ids.shape[1]
    means = [torch.einsum("btd,bt->bd", stream[:, -width:].double(), batch.predicts) for stream in streams]
    return torch.stack(means, 1)
