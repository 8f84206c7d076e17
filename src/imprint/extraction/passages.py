"""Which part of a record is given, which part has to come out, and what stored scores already say about it.

A passage is a record cut after its suffix and scored on its suffix alone. The suffix is the first run of scored tokens
that has enough tokens before it. Everything before it is given as the model met it in training, so that a prompt is
never cut, and the probability of the suffix is that of the same tokens in the stored scores.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from imprint.data.tokens import Encoded
from imprint.measures.extraction import longest_run, normalised_edit_distance
from imprint.types import Floats, TokenStats


@dataclass(frozen=True)
class Outcomes:
    """What became of M passages.

    Attributes:
        exact: [M] whether the most probable tokens are the suffix, one after the other.
        log_p: [M] log probability that a sample is the suffix, nats.
        run: [M] tokens of the longest run that the suffix and what was written share; None where nothing was written.
        distance: [M] edit distance of the two in tokens, over their length; None likewise.
    """

    exact: NDArray[np.bool_]
    log_p: Floats
    run: NDArray[np.int64] | None = None
    distance: Floats | None = None

    def select(self, rows: NDArray[np.bool_]) -> Outcomes:
        """The passages at `rows`."""
        run, distance = self.run, self.distance
        return Outcomes(
            self.exact[rows],
            self.log_p[rows],
            None if run is None else run[rows],
            None if distance is None else distance[rows],
        )


def passage(record: Encoded, prefix: int, suffix: int) -> Encoded | None:
    """The first `suffix` neighbouring scored tokens with at least `prefix` tokens before them; None: it is too short.

    >>> record = Encoded("a", np.arange(9, dtype=np.int32), np.arange(9) >= 3, 0)
    >>> found = passage(record, prefix=2, suffix=4)
    >>> found.ids.tolist(), found.scored.tolist()
    ([0, 1, 2, 3, 4, 5, 6], [False, False, False, True, True, True, True])
    """
    before = np.concatenate([[0], np.cumsum(record.scored)])
    starts = np.arange(prefix, len(record) - suffix + 1)
    whole = starts[before[starts + suffix] - before[starts] == suffix]
    if not len(whole):
        return None
    start = int(whole[0])
    end = start + suffix
    return dataclasses.replace(record, ids=record.ids[:end], scored=np.arange(end) >= start)


def stored(stats: TokenStats, records: Sequence[Encoded], passages: Sequence[Encoded | None]) -> Outcomes:
    """What scores of whole records say of their passages, where tokens are drawn as the model says.

    Greedy writing gives the suffix if and only if each of its tokens is the most probable one after the true ones.

    Args:
        stats: of the same N records, scored in full.
        passages: of each record its own, or None; there is one outcome for each that is not.
    """
    first, suffix = [], 0
    for n, (record, cut) in enumerate(zip(records, passages, strict=True)):
        if cut is not None:
            suffix = int(cut.scored.sum())
            first.append(int(stats.offsets[n]) + int(record.scored[: len(cut) - suffix].sum()))
    rows = np.array(first, np.int64)[:, None] + np.arange(suffix)
    return Outcomes(stats.top[rows].all(1), stats.logp[rows].astype(np.float64).sum(1))


def written(passages: Sequence[Encoded], texts: Sequence[NDArray[np.int32]], log_p: Floats) -> pa.Table:
    """One row per passage: how near what was written comes to the suffix; neither texts nor tokens.

    Args:
        passages: M of them.
        texts: what the model wrote after each prefix, as long as its suffix.
        log_p: [M] log probability of the suffix under sampling.
    """
    suffixes = [cut.ids[cut.scored].tolist() for cut in passages]
    pairs = list(zip([text.tolist() for text in texts], suffixes, strict=True))
    return pa.table(
        {
            "id": [cut.id for cut in passages],
            "given": pa.array([len(cut) - len(end) for cut, end in zip(passages, suffixes, strict=True)], pa.int32()),
            "suffix": pa.array([len(end) for end in suffixes], pa.int32()),
            "exact": [text == end for text, end in pairs],
            "run": pa.array([longest_run(text, end) for text, end in pairs], pa.int32()),
            "distance": pa.array([normalised_edit_distance(text, end) for text, end in pairs], pa.float64()),
            "log_p": pa.array(log_p, pa.float64()),
        }
    )


def outcomes(table: pa.Table) -> Outcomes:
    """What `written` has written down."""
    columns = [table.column(name).to_numpy(zero_copy_only=False) for name in ("exact", "log_p", "run", "distance")]
    exact, log_p, run, distance = columns
    return Outcomes(exact.astype(bool), log_p, run.astype(np.int64), distance)
