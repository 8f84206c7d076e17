"""The prefix identity of Petrov, Torr and Bibi (2024, "When Do Prompting and Prefix-Tuning Work?", eq. 5 to 7).

One head of one layer, queries i, content keys j, prefix keys in front: t_i = Σ_j A_ij v_j with the softmax over the
content alone, t^pt_i with prefix and content. For the same inputs to the layer

    t^pt_i = Σ_prefix A^pt_ij v_j + (1 − A_i0) t_i,    A_i0 = Σ_prefix A^pt_ij,

because leaving keys out of a softmax rescales the rest. What the prefix does deeper, `drift` measures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import normalize

from imprint.data.tokens import Encoded
from imprint.errors import UsageError
from imprint.mechanism.observe import Attended, Batch, at_least_single, check_observed, record_batches, states
from imprint.types import Floats


@dataclass(frozen=True)
class PrefixIdentity:
    """What a learned prefix does inside each layer, for the layer's own inputs.

    Attributes:
        residual_L: [L] largest |left − right side| of the identity over all records, heads, tokens and components, in
            the model's precision (float32 at least), in the unit of the values.
        residual64_L: [L] the same in float64, from the same queries, keys and values.
        mass_NLH: [N, L, H] mean of A_i0, the share of attention that goes to the prefix, over the record's positions
            that predict a scored token; records in the order given.
        tokens_N: [N] how many positions these are.
        bias_LH: [L, H] how far the prefix adds one fixed direction: the mean cosine between Σ_prefix A^pt_ij v_j / A_i0
            and its own mean over those positions of all records. 1: a bias, only the size of which depends on the text
            (always so for one virtual token); NaN where no position sees the prefix.
    """

    residual_L: Floats
    residual64_L: Floats
    mass_NLH: Floats
    tokens_N: NDArray[np.int64]
    bias_LH: Floats

    @property
    def mass_LH(self) -> Floats:
        """[L, H] mean of A_i0 over the positions of all records."""
        mean: Floats = np.einsum("n,nlh->lh", self.tokens_N / self.tokens_N.sum(), self.mass_NLH)
        return mean

    @property
    def mass_NL(self) -> Floats:
        """[N, L] mean of A_i0 over positions and heads: to compare members with non-members of similar length."""
        mean: Floats = self.mass_NLH.mean(2)
        return mean


@torch.no_grad()
def prefix_identity(tuned: nn.Module, records: Sequence[Encoded]) -> PrefixIdentity:
    """Both sides of the identity, and where the attention goes, in the model's own forward pass.

    Args:
        tuned: a prefix-tuned model; left in evaluation mode.
        records: any texts.

    Raises:
        UsageError: the model is not prefix-tuned.
        DataError: no record, or one without a token to score.
        ImprintError: the architecture's attention cannot be observed.
    """
    _check_prefix(tuned)
    tuned.eval()
    groups = list(record_batches(tuned, records))
    check_observed(tuned, records)
    columns = zip(*(_batch(tuned, group) for group in groups), strict=True)
    residuals, masses, totals, units, counts = (list(column) for column in columns)
    worst_L = torch.stack(residuals).amax(0).cpu().numpy()
    order = np.argsort(np.concatenate([group.places for group in groups]))
    direction = normalize(torch.stack(totals).sum(0), dim=-1)
    cosine = (torch.stack(units).sum(0) * direction).sum(-1) / torch.stack(counts).sum(0)
    return PrefixIdentity(
        residual_L=worst_L[:, 0],
        residual64_L=worst_L[:, 1],
        mass_NLH=torch.cat(masses).cpu().numpy()[order],
        tokens_N=np.array([record.scored.sum() for record in records]),
        bias_LH=cosine.cpu().numpy(),
    )


def _check_prefix(tuned: nn.Module) -> None:
    from peft import PeftModel, PeftType

    if not isinstance(tuned, PeftModel) or tuned.active_peft_config.peft_type != PeftType.PREFIX_TUNING:
        raise UsageError("the prefix identity is about prefix tuning: the model has no prefix")


def _batch(tuned: nn.Module, batch: Batch) -> tuple[torch.Tensor, ...]:
    """`_layer` for all layers: residual [L, 2], mass [B, L, H], total and units [L, H, D], count [L, H]."""
    rows: list[tuple[torch.Tensor, ...]] = []
    states(tuned, batch.ids, lambda call: rows.append(_layer(call, batch)))
    residual, mass, total, units, count = (torch.stack(row) for row in zip(*rows, strict=True))
    return residual, mass.transpose(0, 1), total, units, count


def _layer(call: Attended, batch: Batch) -> tuple[torch.Tensor, ...]:
    """Largest residuals [2] of two precisions; mean mass on the prefix [B, H]; of what the prefix adds per unit of mass
    the sum [H, D], the sum of unit vectors [H, D] and how many [H]: from these follows the mean cosine to the mean."""
    own, exact = both_sides(call, at_least_single(call.query.dtype)), both_sides(call, torch.float64)
    residual = torch.stack([(sides.left - sides.right).abs().double() for sides in (own, exact)])  # [2, B, H, T, D]
    used = (batch.predicts > 0)[:, None] & (exact.mass > 0)  # beyond a sliding window there is no prefix
    added = (exact.added / exact.mass[..., None]).masked_fill(~used[..., None], 0.0)
    return (
        residual.amax((1, 2, 3, 4)),  # the identity holds for padding too
        torch.einsum("bht,bt->bh", exact.mass, batch.predicts),
        added.sum((0, 2)),
        normalize(added, dim=-1).sum((0, 2)),
        used.sum((0, 2)),
    )


@dataclass(frozen=True)
class Sides:
    """Both sides of the identity in one layer.

    Attributes:
        left: [B, H, T, D] t^pt, what the heads give.
        right: [B, H, T, D] Σ_prefix A^pt_ij v_j + (1 − A_i0) t_i.
        added: [B, H, T, D] the first term of it.
        mass: [B, H, T] A_i0.
    """

    left: torch.Tensor
    right: torch.Tensor
    added: torch.Tensor
    mass: torch.Tensor


def both_sides(call: Attended, dtype: torch.dtype) -> Sides:
    """The identity's two sides, from the same queries, keys and values, in `dtype`.

    The softmax over the content is computed from the scores, not from the one over prefix and content.
    """
    content, keys = call.query.shape[2], call.key.shape[2]
    value, prefix = call.value.to(dtype), keys - content
    attention = call.weights(content, keys, dtype)
    mass = attention[..., :prefix].sum(-1)
    added = attention[..., :prefix] @ value[:, :, :prefix]
    plain = call.weights(content, content, dtype) @ value[:, :, prefix:]
    return Sides(attention @ value, added + (1 - mass)[..., None] * plain, added, mass)
