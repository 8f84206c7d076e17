"""`Audit`: the records of one split, encoded once, and what scoring them leaves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from imprint.data import Pool, make_split
from imprint.data.templates import Templates
from imprint.data.tokens import Encoded, Encoder, unusable
from imprint.measures import perplexity
from imprint.spec import DataSpec
from imprint.types import Example, TokenStats

if TYPE_CHECKING:
    from torch import nn

    from imprint.engine.forward import Forward


@dataclass(frozen=True)
class Audit:
    """Everything about the data of a cell that does not depend on the method.

    Attributes:
        scored: encoded members, non-members and validation records, in this order.
        roles: `member`, `nonmember` or `validation` for each of them.
        tuned: what an epoch trains on: the members, `repeat` times, and the extra ones if `tune_on` asks for more.
        dropped: records left out, by reason.
        private: whether what is written must not say which tokens were scored.
    """

    examples: tuple[Example, ...]
    scored: tuple[Encoded, ...]
    roles: tuple[str, ...]
    tuned: tuple[Encoded, ...]
    dropped: dict[str, int]
    private: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of one scoring pass."""
        return sum(len(record) for record in self.scored)

    @property
    def scored_tokens(self) -> int:
        """Scored tokens of one scoring pass."""
        return sum(len(record.predictors) for record in self.scored)

    def stats(
        self,
        model: nn.Module,
        budget: int,
        progress: Callable[[int], None] | None = None,
        forward: Forward | None = None,
    ) -> TokenStats:
        """Score every record with `model`, by a way that has been found before if there is one."""
        from imprint.scoring.score import token_stats

        return token_stats(model, self.scored, budget, progress, forward)

    def kept(self, stats: TokenStats) -> TokenStats:
        """What may be written of a pass: everything, or everything but the tokens, by which the texts could be read."""
        return replace(stats, tokens=np.zeros_like(stats.tokens)) if self.private else stats

    def perplexity(self, stats: TokenStats) -> float:
        """Token-weighted perplexity of the validation records or, where there are none, of the non-members."""
        held_out = "validation" if "validation" in self.roles else "nonmember"
        return perplexity(stats.select(np.array(self.roles) == held_out)).value

    def records(self) -> pa.Table:
        """One row per scored record; no text."""
        return pa.table(
            {
                "id": [example.id for example in self.examples],
                "role": list(self.roles),
                "group": [f"group {e.group}" if e.group else f"record {e.id}" for e in self.examples],
                "subgroup": pa.array([e.subgroup for e in self.examples], pa.string()),
                "scored_tokens": pa.array([int(record.scored.sum()) for record in self.scored], pa.int32()),
                "zlib_bytes": pa.array([record.zlib_bytes for record in self.scored], pa.int64()),
                "cut": [record.cut for record in self.scored],
            }
        )

    def summary(self) -> dict[str, Any]:
        """Counts for the table and the report: who was used, what was dropped, what was cut."""
        everyone = {record.id: record for record in (*self.scored, *self.tuned)}.values()
        cut = Counter(record.cut for record in everyone)
        counts = Counter(self.roles)
        return {
            "counts": {
                "members": counts["member"],
                "nonmembers": counts["nonmember"],
                "validation": counts["validation"],
                "tuned": len(self.tuned),
            },
            "dropped": self.dropped,
            "truncated": {part: cut[part] for part in ("prompt", "target")},
            "tokens": self.tokens,
        }


class _Encoding:
    """Encodes each record once; passes over what cannot be scored or has become equal to a record drawn before.

    Duplicates have been dropped by their whole texts; two letters on one letterhead may still agree in all the tokens
    that are kept, and would then stand on both sides of the split.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.records: dict[str, Encoded] = {}
        self.owner: dict[tuple[bytes, bytes], str] = {}

    def __call__(self, example: Example) -> Encoded:
        if example.id not in self.records:
            self.records[example.id] = self.encoder(example)
        return self.records[example.id]

    def usable(self, example: Example) -> str | None:
        record = self(example)
        if reason := unusable(record):
            return reason
        first = self.owner.setdefault((record.ids.tobytes(), record.scored.tobytes()), example.id)
        return None if first == example.id else "duplicate once cut to max_length"


def prepare(pool: Pool, spec: DataSpec, tokenizer: Any) -> Audit:
    """Split the pool and encode what the split needs.

    Raises:
        DataError: fewer usable records than asked for, or a record too long where `overlong` is `refuse`.
        ModelError: a chat cannot be rendered by the tokenizer's template.
    """
    assert spec.max_length is not None  # resolved by the plan,
    assert spec.seed is not None  # and so is this
    with Templates(tokenizer, spec.loss) as templates:
        encoder = Encoder(tokenizer, spec.max_length, spec.overlong, spec.loss, spec.eos, templates)
        encoded = _Encoding(encoder)
        split = make_split(pool, spec, spec.seed, encoded.usable)
        examples = (*split.members, *split.nonmembers, *split.validation)
        roles = ["member"] * len(split.members) + ["nonmember"] * len(split.nonmembers)
        roles += ["validation"] * len(split.validation)
        scored = tuple(encoded(example) for example in examples)
        tuned = tuple(encoded(example) for example in (*split.members * spec.repeat, *split.extra))
    return Audit(examples, scored, tuple(roles), tuned, dict(split.dropped))
