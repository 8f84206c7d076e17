"""What attacks may ask for, what it costs, and whether the pieces belong together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from imprint.errors import DataError, UsageError, unknown
from imprint.types import TokenStats


@dataclass(frozen=True)
class Piece:
    """A kind of evidence.

    Attributes:
        what: what an attack receives.
        passes: what it costs besides the one pass of `target`, in passes over the scored texts.
        per_record: whether it has one row per record.
    """

    what: str
    passes: str
    per_record: bool = True


EVIDENCE: dict[str, Piece] = {
    "target": Piece("the tuned model's TokenStats", "one per checkpoint"),
    "reference": Piece("the reference model's TokenStats, over the same tokens", "one, shared by all checkpoints"),
    "zlib_bytes": Piece("[N] sizes in bytes of the zlib-compressed UTF-8 scored texts", "none"),
    "trace": Piece("[N, E + 1] the record's loss at the base and at every epoch so far, nats per token", "none"),
    "token_counts": Piece("[V] how often each token occurs in a corpus nobody tuned on", "none", per_record=False),
    "known": Piece(
        "[N] 1 and 0 for records that are known to be members or not, and are not evaluated; else NaN", "none"
    ),
    "population": Piece("[N] whether a record is known to be no member, and is not evaluated", "none"),
    "lowercase": Piece("the tuned model's TokenStats of the texts in lower case", "one more per checkpoint"),
    "neighbours": Piece("[N, n] losses of n texts that differ from the record in one word", "n more per checkpoint"),
    "prefixed": Piece("TokenStats of the same tokens behind texts that nobody tuned on", "one to three"),
    "prefixed_members": Piece("TokenStats of the same tokens behind tuned texts", "one to three"),
    "gradient_norm": Piece(
        "[N] norm of the loss's gradient by what was tuned", "ten or so: backward, one text at a time"
    ),
    "shadows": Piece("Shadows: the losses under models tuned on random halves", "a training per shadow model"),
}
"""Every parameter name an attack may have without a default, and what it receives."""

LEAST_SHADOWS = 4
"""Shadow models below which nothing is said of a record: two that have seen it, and two that have not."""
ONE_PASS = ("target", "reference", "zlib_bytes")
"""What every run and every audit has."""

_STATS = ("target", "reference", "lowercase", "prefixed", "prefixed_members")
_SAME_TOKENS = ("reference", "prefixed", "prefixed_members")


def check_evidence(evidence: Mapping[str, Any]) -> int:
    """The number of records N, once every piece of evidence speaks of the same ones.

    Raises UsageError for an unknown name or pieces that do not agree, and DataError (a UsageError) for a record
    without a scored token, which has no score.
    """
    for name in evidence:
        if name not in EVIDENCE:
            raise UsageError(unknown("evidence", name, EVIDENCE))
    if "target" in evidence:
        for name in _SAME_TOKENS:
            if name in evidence:
                _check_same_texts(evidence["target"], evidence[name], name)
    for name in _STATS:
        if name in evidence:
            _check_no_empty_text(evidence[name])
    sizes = {name: len(piece) for name, piece in evidence.items() if EVIDENCE[name].per_record}
    if len(set(sizes.values())) > 1:
        counts = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise UsageError(f"all evidence must cover the same records, but the numbers of records differ: {counts}.")
    if "zlib_bytes" in evidence and not np.all(np.asarray(evidence["zlib_bytes"]) > 0):
        raise UsageError("zlib_bytes must be positive: even an empty text compresses to eight bytes.")
    return next(iter(sizes.values()), 0)


def _check_same_texts(target: TokenStats, other: TokenStats, name: str) -> None:
    if not np.array_equal(target.ids, other.ids):
        raise UsageError(
            f"target ({len(target)} records) and {name} ({len(other)} records) must hold the same ids in the "
            "same order: score both on the same split."
        )
    if not np.array_equal(target.offsets, other.offsets) or not np.array_equal(target.tokens, other.tokens):
        raise UsageError(
            f"target and {name} hold the same ids but not the same scored tokens: score both with the same "
            "tokenizer, loss mask and maximum length."
        )


def _check_no_empty_text(stats: TokenStats) -> None:
    empty = np.flatnonzero(stats.lengths < 1)
    if len(empty):
        raise DataError(
            f"{len(empty)} of {len(stats)} records have no scored token (the first is {str(stats.ids[empty[0]])!r}): "
            "leave them out before scoring."
        )
