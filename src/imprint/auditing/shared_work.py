"""The processes of a training, each with a copy of the model: they share the scoring, and one of them writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch.distributed as dist

from imprint.data.tokens import Encoded
from imprint.errors import ImprintError, first_line
from imprint.types import TokenStats

T = TypeVar("T")
PATIENCE = timedelta(days=2)
"""How long a process waits for another, which may be training the positive control."""


@dataclass(frozen=True)
class Ranks:
    """The processes of a training; `group` joins them, on the CPU, where there are several.

    What fails in one of them fails in all, with the same sentence: none is left waiting for another.
    """

    rank: int = 0
    count: int = 1
    group: Any = None

    @classmethod
    def join(cls) -> Ranks:
        """All that train together; to be called by each of them."""
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo", timeout=PATIENCE))

    def first(self, work: Callable[[], T]) -> T:
        """What the first process finds, told to all."""
        if self.count == 1:
            return work()
        told = [_outcome(work) if self.rank == 0 else None]
        dist.broadcast_object_list(told, src=0, group=self.group)
        return _result(told[0])  # type: ignore[no-any-return]

    def each(self, work: Callable[[], T]) -> list[T]:
        """What every process finds, in their order, told to all."""
        if self.count == 1:
            return [work()]
        told: list[Any] = [None] * self.count
        dist.all_gather_object(told, _outcome(work), group=self.group)
        return [_result(one) for one in told]

    def leave(self) -> None:
        """The processes have nothing more to tell one another."""
        if self.count > 1:
            dist.destroy_process_group(self.group)


def _outcome(work: Callable[[], T]) -> tuple[T | None, type[ImprintError] | None, str]:
    """What came of it: a result, or the kind and the sentence of what went wrong."""
    try:
        return work(), None, ""
    except ImprintError as error:
        return None, type(error), str(error)
    except Exception as error:  # out of memory, for one
        return None, ImprintError, f"{type(error).__name__}: {first_line(error)}"


def _result(told: Any) -> Any:
    found, kind, sentence = told
    if kind is not None:
        raise kind(sentence)
    return found


def share(records: Sequence[Encoded], rank: int, count: int) -> list[int]:
    """Positions of what one process scores: every `count`-th of the records by length, so that all have as much to do.

    >>> [share([Encoded("", np.zeros(n), np.ones(n), 0) for n in (3, 9, 4, 8, 5)], rank, 2) for rank in (0, 1)]
    [[1, 4, 0], [3, 2]]
    """
    return sorted(range(len(records)), key=lambda n: (-len(records[n]), n))[rank::count]


def joined(parts: Sequence[TokenStats | None], records: Sequence[Encoded]) -> TokenStats:
    """The scores of all processes, in the order of the records."""
    order = np.concatenate([share(records, rank, len(parts)) for rank in range(len(parts))]).astype(np.int64)
    found = [part for part in parts if part is not None]
    lengths = np.concatenate([part.lengths for part in found])
    columns = ("tokens", "logp", "mean", "std", "top")
    everything = TokenStats(
        np.concatenate([part.ids for part in found]),
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        *(np.concatenate([getattr(part, name) for part in found]) for name in columns),
    )
    return everything.select(np.argsort(order))
