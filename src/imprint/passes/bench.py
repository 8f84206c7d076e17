"""What the makers of evidence share: a checkpoint at work on its records, and what they leave as a table."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from imprint.errors import DataError
from imprint.passes.spec import EvidenceSpec
from imprint.store import stats_table
from imprint.types import Floats, TokenStats

if TYPE_CHECKING:
    from torch import nn

    from imprint.data.tokens import Encoded, Encoder
    from imprint.engine.forward import Forward
    from imprint.records import Audit

OUTSIDE = ("validation", "auxiliary_out")
"""Roles of the records that nobody is tuned or evaluated on."""
ASIDE = (*OUTSIDE, "auxiliary_in")
"""Roles of the records that nobody is evaluated on."""


@dataclass(frozen=True)
class Bench:
    """A checkpoint, its records, and what it takes to ask it about other texts.

    Attributes:
        model: the tuned model in evaluation mode.
        forward: the way through it, if it has been found before.
        audit: the records.
        encoder: what they were encoded by; of a chat it renders variants too.
        budget: tokens of one forward pass.
        spec: how the evidence is made.
        seed: the split's.
        context: the longest text in tokens that the model takes: its positions less its virtual tokens.
        memo: keeps what depends on the records alone; whoever asks several checkpoints about one audit gives them the
            same.
    """

    model: nn.Module
    forward: Forward | None
    audit: Audit
    encoder: Encoder
    budget: int
    spec: EvidenceSpec
    seed: int
    context: int
    memo: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def way(self) -> Forward:
        """The way through the model for any text: hidden states that were kept are those of the records alone."""
        from imprint.engine.forward import forward_of

        return forward_of(self.model) if self.forward is None or self.forward.kept else self.forward

    def stats(self, texts: Sequence[Encoded], way: Forward | None = None) -> TokenStats:
        """Score texts that need not be records of the audit."""
        from imprint.scoring.score import token_stats

        return token_stats(self.model, texts, self.budget, forward=way or self.way)


def digest(seed: int, record: str) -> bytes:
    """Thirty-two bytes for a record under a seed, whatever other records there are."""
    return hashlib.sha256(f"{seed} {record}".encode("utf-8", "surrogatepass")).digest()


def check_complete(audit: Audit, lacking: Sequence[bool] | NDArray[np.bool_], why: str) -> None:
    """
    Raises:
        DataError: an evaluated record lacks the evidence; without it no score of the attack would mean what it says.
    """
    ids = [record.id for record, role in zip(audit.scored, audit.roles, strict=True) if role not in ASIDE]
    gone = [r.id for r, role, n in zip(audit.scored, audit.roles, lacking, strict=True) if n and role not in ASIDE]
    if gone:
        raise DataError(
            f"{len(gone)} of {len(ids)} evaluated records {why} (the first is {gone[0]!r}): leave them out of the "
            "data, or this attack out of `attacks`"
        )


def blanked(stats: TokenStats, rows: Sequence[bool] | NDArray[np.bool_]) -> TokenStats:
    """The same with NaN for the records at `rows` [N]: an attack then gives them no score."""
    gone_R = np.repeat(np.asarray(rows, bool), stats.lengths)
    columns = {name: np.where(gone_R, np.float32(np.nan), getattr(stats, name)) for name in ("logp", "mean", "std")}
    return replace(stats, **columns)


def kept_table(audit: Audit, stats: TokenStats) -> pa.Table:
    """As `store.stats_table` has it; without the tokens where the audit is private."""
    return stats_table(audit.kept(stats))


def losses_table(audit: Audit, losses: Floats) -> pa.Table:
    """[N, n] mean losses."""
    values = pa.FixedSizeListArray.from_arrays(pa.array(losses.reshape(-1)), losses.shape[1])
    return pa.table({"id": _ids(audit), "losses": values})


def table_losses(table: pa.Table) -> Floats:
    """The inverse of `losses_table`."""
    column = table.column("losses").combine_chunks()
    found: Floats = column.values.to_numpy(zero_copy_only=False).reshape(len(table), column.type.list_size)
    return found


def norms_table(audit: Audit, norms: Floats) -> pa.Table:
    """[N] norms."""
    return pa.table({"id": _ids(audit), "norm": norms})


def table_norms(table: pa.Table) -> Floats:
    """The inverse of `norms_table`."""
    found: Floats = table.column("norm").to_numpy()
    return found


def _ids(audit: Audit) -> pa.Array:
    return pa.array([record.id for record in audit.scored], pa.string())
