"""Exact and near duplicates.

Near means: the sets of five-word shingles of two texts have a Jaccard similarity of at least 0.8. Candidates come
from an exact filter and not from a sketch such as MinHash, so no pair is missed and nothing depends on a seed:

* Order every record's shingles by how rare they are. If J(x, y) ≥ t, the two share at least ⌈t·|x|⌉ shingles, so
  they share one among the |x| - ⌈t·|x|⌉ + 1 rarest of x, and likewise of y (*prefix*). Most shingles of natural
  text occur once; a record without a prefix shingle seen elsewhere needs no comparison at all.
* If the first shared one is the p-th of x and the q-th of y, at most min(|x| - p, |y| - q) are shared (*position*).
  That is what keeps form letters apart, whose prefixes begin with the few words that differ.

What passes both is verified by counting. Words are hashed by their order of appearance, shingles to 64 bits.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from imprint.types import Example

SHINGLE = 5
SIMILAR = (4, 5)
"""The Jaccard similarity of near duplicates, as a fraction: whole-number arithmetic has no rounding."""

_MIX = np.array([int(hashlib.sha256(bytes([k])).hexdigest()[:16], 16) | 1 for k in range(SHINGLE + 1)], np.uint64)
_VERIFY = 4096  # candidates compared at once


def word_ids(records: Iterable[Example]) -> list[NDArray[np.int32]]:
    """Each record's prompt and target as numbers, one per word, case and white space ignored.

    >>> [ids.tolist() for ids in word_ids([Example("1", "", "To be or not to be"), Example("2", "Be", " there")])]
    [[0, 1, 2, 3, 0, 1], [1, 4]]
    """
    known: dict[str, int] = {}
    texts = (f"{e.prompt} {e.target}".casefold().split() for e in records)
    return [np.array([known.setdefault(word, len(known)) for word in words], np.int32) for words in texts]


def first_of_each(words: Sequence[NDArray[np.int32]]) -> NDArray[np.bool_]:
    """[N] whether no earlier record has the very same words."""
    seen: set[bytes] = set()
    keep = np.zeros(len(words), bool)
    for n, ids in enumerate(words):
        key = hashlib.blake2b(ids.tobytes(), digest_size=16).digest()
        keep[n] = key not in seen
        seen.add(key)
    return keep


def shingles(ids: NDArray[np.int32]) -> NDArray[np.uint64]:
    """The sorted, distinct hashes of all runs of five words; of a shorter text, of the whole."""
    words = ids.astype(np.uint64)
    width = min(len(words), SHINGLE)
    if width == 0:
        return words
    runs = len(words) - width + 1
    mixed = np.full(runs, np.uint64(width)) * _MIX[SHINGLE]
    for k in range(width):
        mixed += words[k : k + runs] * _MIX[k]
    mixed ^= mixed >> np.uint64(31)  # the index below takes the top bits: let all bits reach them
    return np.unique(mixed * _MIX[0])


def far_from_earlier(words: Sequence[NDArray[np.int32]], groups: Sequence[int]) -> NDArray[np.bool_]:
    """[N] whether a record is no near duplicate of an earlier kept record of another group.

    Records of one group never get separated, so they may be alike.

    Args:
        words: as `word_ids` gives them.
        groups: [N] a number for each record's group.
    """
    sets = [shingles(ids) for ids in words]
    finder = _Finder(sets, np.asarray(groups, np.int64))
    keep = np.ones(len(sets), bool)
    for n in range(len(sets)):
        prefix = finder.prefix(n)
        keep[n] = not finder.similar(n, prefix)
        if keep[n]:
            finder.add(n, prefix)
    return keep


class _Finder:
    """The kept records so far, by the shingles of their prefixes."""

    def __init__(self, sets: list[NDArray[np.uint64]], groups: NDArray[np.int64]) -> None:
        self.sets, self.groups = sets, groups
        self.sizes = np.array([len(one) for one in sets], np.int64)
        self.holders: dict[int, array[int]] = {}  # shingle → record << 32 | position in its prefix
        bits = min(26, max(10, int(self.sizes.sum() * 4).bit_length()))
        self.shift = np.uint64(64 - bits)
        self.counts = np.zeros(1 << bits, np.uint32)  # how many records hold a shingle, or more where slots collide
        for one in sets:
            np.add.at(self.counts, one >> self.shift, 1)

    def prefix(self, n: int) -> list[tuple[int, int]]:
        """(position, shingle) of the prefix, rarest first, without shingles that no other record holds."""
        one = self.sets[n]
        near, whole = SIMILAR
        counts = self.counts[one >> self.shift]
        length = len(one) - -(-near * len(one) // whole) + 1
        rarest = np.argsort(counts, kind="stable")[:length]  # stable: ties stay in the order of the hashes
        shared = np.flatnonzero(counts[rarest] > 1)
        return list(zip(shared.tolist(), one[rarest[shared]].tolist(), strict=True))

    def add(self, n: int, prefix: list[tuple[int, int]]) -> None:
        for position, shingle in prefix:
            self.holders.setdefault(shingle, array("q")).append(n << 32 | position)

    def similar(self, n: int, prefix: list[tuple[int, int]]) -> bool:
        """Whether a kept record of another group is a near duplicate of record n."""
        found = [self._candidates(n, *entry) for entry in prefix if entry[1] in self.holders]
        others = np.unique(np.concatenate(found)) if found else np.zeros(0, np.int64)
        return any(self._verified(n, others[at : at + _VERIFY]) for at in range(0, len(others), _VERIFY))

    def _candidates(self, n: int, position: int, shingle: int) -> NDArray[np.int64]:
        entries = np.frombuffer(self.holders[shingle], np.int64)
        others = entries >> 32
        shared = np.minimum(self.sizes[n] - position, self.sizes[others] - (entries & 0xFFFFFFFF))
        return np.asarray(others[self._enough(n, others, shared) & (self.groups[others] != self.groups[n])])

    def _verified(self, n: int, others: NDArray[np.int64]) -> bool:
        mine = self.sets[n]
        theirs = np.concatenate([self.sets[other] for other in others])
        hit = mine[np.minimum(np.searchsorted(mine, theirs), len(mine) - 1)] == theirs
        starts = np.cumsum(self.sizes[others]) - self.sizes[others]
        return bool(self._enough(n, others, np.add.reduceat(hit.astype(np.int64), starts)).any())

    def _enough(self, n: int, others: NDArray[np.int64], shared: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether `shared` shingles make J ≥ near/whole: whole · s ≥ near · (|x| + |y| - s)."""
        near, whole = SIMILAR
        return np.asarray((whole + near) * shared >= near * (self.sizes[n] + self.sizes[others]))
