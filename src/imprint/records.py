"""`Audit`: the records of one split, encoded once, and what scoring them leaves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from imprint.canaries.manifest import Canary, read_manifest
from imprint.data import Pool, make_split
from imprint.data.templates import Templates
from imprint.data.tokens import Encoded, Encoder, unusable
from imprint.errors import DataError
from imprint.halves import inside
from imprint.measures import perplexity
from imprint.spec import DataSpec, RunSpec
from imprint.tuning.goldfish import goldfish
from imprint.types import Example, TokenStats

if TYPE_CHECKING:
    from torch import nn

    from imprint.engine.forward import Forward


@dataclass(frozen=True)
class Audit:
    """Everything about the data of a cell that does not depend on the method.

    Attributes:
        scored: encoded members, non-members and validation records, in this order, then auxiliary ones and canaries.
        roles: `member`, `nonmember`, `validation`, `auxiliary_in`, `auxiliary_out`, `canary_in` or `canary_out` for
            each of them.
        tuned: what an epoch trains on: the members, `repeat` times, canaries whose coin says so, auxiliary records, and
            the extra ones if `tune_on` asks for more.
        dropped: records left out, by reason.
        private: whether what is written must not say which tokens were scored.
        beside: those of `tuned` that are neither members nor canaries, and that shadow models are tuned on as well.
        canaries: id → canary, of the records that are one.
    """

    examples: tuple[Example, ...]
    scored: tuple[Encoded, ...]
    roles: tuple[str, ...]
    tuned: tuple[Encoded, ...]
    dropped: dict[str, int]
    private: bool = False
    beside: tuple[Encoded, ...] = ()
    canaries: Mapping[str, Canary] = field(default_factory=dict)

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
                "group": _groups(self),
                "subgroup": pa.array([e.subgroup for e in self.examples], pa.string()),
                "scored_tokens": pa.array([int(record.scored.sum()) for record in self.scored], pa.int32()),
                "zlib_bytes": pa.array([record.zlib_bytes for record in self.scored], pa.int64()),
                "cut": [record.cut for record in self.scored],
                "family": pa.array([c.family if c else None for c in self._planted], pa.string()),
                "repetitions": pa.array([c.repetitions if c else None for c in self._planted], pa.int32()),
            }
        )

    @property
    def _planted(self) -> list[Canary | None]:
        return [self.canaries.get(record.id) for record in self.scored]

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
                "auxiliary": counts["auxiliary_in"],
                "canaries": counts["canary_in"] + counts["canary_out"],
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
    planted = read_manifest(spec.canaries).canaries if spec.canaries else ()
    taken = {e.id for part in pool.parts.values() for e in part} & {c.id for c in planted}
    if taken:
        raise DataError(f"{pool.name}: record {min(taken)!r} has the id of a canary: give the records other ids")
    with Templates(tokenizer, spec.loss) as templates:
        encoder = Encoder(tokenizer, spec.max_length, spec.overlong, spec.loss, spec.eos, templates)
        encoded = _Encoding(encoder)
        split = make_split(pool, spec, spec.seed, encoded.usable)
        sides = {
            "member": split.members,
            "nonmember": split.nonmembers,
            "validation": split.validation,
            "auxiliary_in": split.auxiliary_in,
            "auxiliary_out": split.auxiliary_out,
            "canary_in": tuple(c.example() for c in planted if c.included),
            "canary_out": tuple(c.example() for c in planted if not c.included),
        }
        roles = tuple(role for role, side in sides.items() for _ in side)
        examples = tuple(example for side in sides.values() for example in side)
        scored = tuple(encoded(example) for example in examples)
        beside = tuple(encoded(example) for example in (*split.auxiliary_in, *split.extra))
        copies = tuple(c.example() for c in planted if c.included for _ in range(c.repetitions))
        tuned = tuple(encoded(example) for example in (*split.members * spec.repeat, *copies))
    _check_whole([record for record, role in zip(scored, roles, strict=True) if role.startswith("canary")], spec)
    canaries = {c.example().id: c for c in planted}
    return Audit(examples, scored, roles, (*tuned, *beside), dict(split.dropped), beside=beside, canaries=canaries)


def _check_whole(canaries: Sequence[Encoded], spec: DataSpec) -> None:
    """
    Raises:
        DataError: of a canary that was cut nobody could say what the model was told.
    """
    if cut := [record.id for record in canaries if record.cut]:
        raise DataError(
            f"{len(cut)} of {len(canaries)} canaries are longer than data.max_length {spec.max_length} (the first is "
            f"{cut[0]!r}): raise it, or make shorter ones"
        )


def tuned_for(audit: Audit, spec: RunSpec) -> Audit:
    """The same records with what a cell is tuned on: by a shadow model half of them, less what its loss leaves out."""
    tuned = audit.tuned
    if spec.shadow is not None:
        half = np.flatnonzero(inside(audit.roles, _groups(audit), spec.data.seed or 0, spec.shadow))
        tuned = (*[audit.scored[n] for n in half] * spec.data.repeat, *audit.beside)
    if spec.train.goldfish:
        tuned = without_some(tuned, spec.train.goldfish)
    return audit if tuned is audit.tuned else replace(audit, tuned=tuned)


def without_some(records: Iterable[Encoded], k: int) -> tuple[Encoded, ...]:
    """As goldfish loss sees them, under ids of their own: hidden states are kept by id, of the scored tokens."""
    return tuple(replace(goldfish(record, k), id=f"{record.id} (goldfish)") for record in records)


def _groups(audit: Audit) -> list[str]:
    """Who owns each record, as `records.parquet` says it."""
    return [f"group {e.group}" if e.group else f"record {e.id}" for e in audit.examples]
