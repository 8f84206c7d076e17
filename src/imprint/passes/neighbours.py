"""Texts that differ from a record in one word, and how surprised the model is of them (Mattern et al. 2023).

Without a masked language model the words are tokens: one scored token is replaced by another that is drawn as often as
it occurs among what is scored of the records that nobody is tuned or evaluated on. These draws are likelier texts than
those of an even draw, and nothing of them is taken from what is evaluated. All tokens together that do not occur there
weigh no more than one that occurs once; where there are no such records, the draw is even. Special tokens stay, and are
never put in. Draws are independent: in a short text the same swap may come twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from imprint.passes.bench import OUTSIDE, check_complete, digest, losses_table
from imprint.passes.spec import EvidenceSpec
from imprint.passes.texts import variants

if TYPE_CHECKING:
    from imprint.data.tokens import Encoded
    from imprint.passes.bench import Bench

AT_ONCE = 1 << 18
"""Tokens of neighbours that are made and scored before their statistics are thrown away."""

Make = Callable[[int], list["Encoded"]]
"""The place of a record → its neighbours; none where it has no word that could be replaced."""


def settings(spec: EvidenceSpec, seed: int) -> dict[str, Any]:
    """A masked model counts by its weights.

    Raises:
        ModelError: it cannot be found.
    """
    found: dict[str, Any] = {"neighbours": spec.neighbours, "seed": seed}
    if spec.masked_model is not None:
        from imprint.passes.masked import located

        found["masked_model"] = located(spec.masked_model).fingerprint
    return found


def measure(bench: Bench) -> pa.Table:
    """[N, n] mean negative log-likelihoods of n neighbours of each record, nats per token.

    A record depends on its id, the seed and the words there are, not on other records that are evaluated.

    Raises:
        DataError: an evaluated record has no word that could be replaced; records come in tokens, and a masked model
            is to find their words.
        ModelError: the masked model cannot be used.
    """
    count, records = bench.spec.neighbours, bench.audit.scored
    make, lacking = _swapped(bench) if bench.spec.masked_model is None else _masked(bench)
    check_complete(bench.audit, lacking, "have no word that could be replaced")
    losses = np.full((len(records), count), np.nan)
    for rows in _portions([0 if gone else len(r) * count for r, gone in zip(records, lacking, strict=True)]):
        losses[rows] = bench.stats([text for n in rows for text in make(n)]).nll.reshape(len(rows), count)
    return losses_table(bench.audit, losses)


def _portions(sizes: Sequence[int]) -> Iterator[list[int]]:
    """Places of the records that have any neighbours, a few at a time."""
    portion = np.cumsum(sizes) // AT_ONCE
    for number in np.unique(portion):
        if rows := [n for n in np.flatnonzero(portion == number).tolist() if sizes[n]]:
            yield rows


def _masked(bench: Bench) -> tuple[Make, list[bool]]:
    from imprint.passes.masked import swaps, with_swap

    found, encoder = swaps(bench), variants(bench.encoder)
    return lambda n: [encoder(with_swap(bench.audit.examples[n], swap, encoder.loss)) for swap in found[n]], [
        not some for some in found
    ]


@dataclass(frozen=True)
class Words:
    """The tokens that may be replaced and drawn.

    Attributes:
        ids: [K] their ids, rising.
        ends: [K] the weights of all up to each, added up.
    """

    ids: NDArray[np.int64]
    ends: NDArray[np.int64]

    def places(self, record: Encoded) -> NDArray[np.int64]:
        """Where a record has scored tokens that may be replaced."""
        at = np.minimum(np.searchsorted(self.ids, record.ids), len(self.ids) - 1)
        return np.flatnonzero(record.scored & (self.ids[at] == record.ids))

    def others(self, tokens: NDArray[Any], uniform: NDArray[np.float64]) -> NDArray[np.int64]:
        """For each of `tokens` another one, by draws from [0, 1): exact in integers, so that it is never the same."""
        at = np.searchsorted(self.ids, tokens)
        begins = np.concatenate([[0], self.ends])[at]
        left = self.ends[-1] - (self.ends[at] - begins)
        drawn = np.minimum((uniform * left).astype(np.int64), left - 1)
        drawn = np.where(drawn >= begins, drawn + (self.ends[at] - begins), drawn)
        return np.asarray(self.ids[np.searchsorted(self.ends, drawn, side="right")])


def words_of(tokenizer: Any, records: Sequence[Encoded]) -> Words:
    """The tokenizer's ordinary tokens, each weighed by how often it is scored in `records`."""
    special = {n for n, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = np.array(sorted(set(tokenizer.get_vocab().values()) - special - set(tokenizer.all_special_ids)), np.int64)
    tokens = np.concatenate([np.zeros(0, np.int64), *(record.ids[record.scored] for record in records)])
    counts = np.bincount(tokens.astype(np.int64), minlength=ids[-1] + 1)[ids]
    return Words(ids, np.cumsum(counts * len(ids) + 1))


def _swapped(bench: Bench) -> tuple[Make, list[bool]]:
    audit, count = bench.audit, bench.spec.neighbours
    outside = [record for record, role in zip(audit.scored, audit.roles, strict=True) if role in OUTSIDE]
    words = words_of(bench.encoder.tokenizer, outside)

    def make(n: int) -> list[Encoded]:
        record = audit.scored[n]
        places, rng = words.places(record), np.random.default_rng(list(digest(bench.seed, record.id)))
        where = places[(rng.random(count) * len(places)).astype(np.int64)]
        tokens = words.others(record.ids[where], rng.random(count))
        return [_with(record, place, token) for place, token in zip(where, tokens, strict=True)]

    return make, [not len(words.places(record)) for record in audit.scored]


def _with(record: Encoded, place: int, token: int) -> Encoded:
    ids = record.ids.copy()
    ids[place] = token
    return replace(record, ids=ids)
