"""What attacks may ask for, and whether the pieces belong together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from imprint.errors import DataError, UsageError, unknown
from imprint.types import TokenStats

EVIDENCE: dict[str, str] = {
    "target": "the tuned model's TokenStats",
    "reference": "the reference model's TokenStats, over the same tokens",
    "zlib_bytes": "[N] sizes in bytes of the zlib-compressed UTF-8 scored texts",
}
"""Every parameter name an attack may have without a default, and what it receives."""


def check_evidence(evidence: Mapping[str, Any]) -> int:
    """The number of records N, once every piece of evidence speaks of the same ones.

    Raises UsageError for an unknown name or pieces that do not agree, and DataError (a UsageError) for a record
    without a scored token, which has no score.
    """
    for name in evidence:
        if name not in EVIDENCE:
            raise UsageError(unknown("evidence", name, EVIDENCE))
    stats = [evidence[name] for name in ("target", "reference") if name in evidence]
    if len(stats) == 2:
        _check_same_texts(*stats)
    for one in stats:
        _check_no_empty_text(one)
    sizes = [len(piece) for piece in evidence.values()]
    if len(set(sizes)) > 1:
        counts = ", ".join(f"{name} {len(piece)}" for name, piece in evidence.items())
        raise UsageError(f"all evidence must cover the same records, but the numbers of records differ: {counts}.")
    if "zlib_bytes" in evidence and not np.all(np.asarray(evidence["zlib_bytes"]) > 0):
        raise UsageError("zlib_bytes must be positive: even an empty text compresses to eight bytes.")
    return sizes[0] if sizes else 0


def _check_same_texts(target: TokenStats, reference: TokenStats) -> None:
    if not np.array_equal(target.ids, reference.ids):
        raise UsageError(
            f"target ({len(target)} records) and reference ({len(reference)} records) must hold the same ids in the "
            "same order: score both on the same split."
        )
    if not np.array_equal(target.offsets, reference.offsets) or not np.array_equal(target.tokens, reference.tokens):
        raise UsageError(
            "target and reference hold the same ids but not the same scored tokens: score both with the same "
            "tokenizer, loss mask and maximum length."
        )


def _check_no_empty_text(stats: TokenStats) -> None:
    empty = np.flatnonzero(stats.lengths < 1)
    if len(empty):
        raise DataError(
            f"{len(empty)} of {len(stats)} records have no scored token (the first is {str(stats.ids[empty[0]])!r}): "
            "leave them out before scoring."
        )
