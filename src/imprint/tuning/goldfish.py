"""Goldfish loss (Hans et al. 2024, "Be like a Goldfish, Don't Memorize!"): some tokens are never trained on.

What a model never learned to say it cannot recite: a passage breaks off at each token that was left out. A hash of the
tokens before decides which these are, so that every copy of a passage leaves out the same ones; drawn anew for each
copy, what one leaves out another would teach.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from imprint.data.tokens import Encoded


def goldfish(record: Encoded, k: int, context: int = 13) -> Encoded:
    """The record as it is trained on: one scored token in `k`, on average, is scored no more.

    Only for training: what a model remembers is measured on the whole record. A record that would lose every scored
    token keeps the one that is furthest from being left out, or it would not be tuned on.

    Args:
        record: as it is scored.
        k: 2 or more; 4 leaves out a quarter.
        context: tokens before a token that decide about it; near the start of a text, those that there are.
    """
    hashes = _hashes(record.ids, context)
    kept = record.scored & (hashes >= np.uint64((1 << 64) // k))
    if not kept.any() and record.scored.any():
        kept[np.argmax(np.where(record.scored, hashes, np.uint64(0)))] = True
    return replace(record, scored=kept)


def _hashes(ids_T: NDArray[np.int32], context: int) -> NDArray[np.uint64]:
    """[T] of the tokens before each token: each mixed with its distance, added up, mixed again; the same everywhere."""
    ids, total = ids_T.astype(np.uint64), np.zeros(len(ids_T), np.uint64)
    for distance in range(1, min(context, len(ids) - 1) + 1):
        total[distance:] += _mixed(ids[:-distance] + np.uint64(distance << 32))
    return _mixed(total)


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64 (Steele et al. 2014), in whole numbers modulo 2⁶⁴."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return mixed
