"""Which tokens was the loss on? What tuning did to the opening that all records share tells.

A trainer may put the loss on the answers alone or on every token, and an adapter does not say which. Every record of a
template opens with the same tokens. A model that was trained on them has them by heart after an epoch; to one that was
trained on the answers alone they are as surprising as they were, however much it learned of the language around them,
which is why the gain on questions in general does not tell the two apart. Where the records share no opening, or the
base knows it already, the answers alone are scored: they were trained on in either case.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from imprint.data import Pool
from imprint.data.tokens import Encoded
from imprint.records import prepare
from imprint.scoring.score import token_stats
from imprint.spec import DataSpec

if TYPE_CHECKING:
    from torch import nn

    from imprint.tuning.base import Base

PROBES = 64
"""Members that are looked at."""
LEARNED, AS_BEFORE = 0.5, 0.8
"""The opening's loss after tuning over its loss before: down to here it was trained on; from here on it was not.

Measured on two models, each tuned by TRL both ways, at one to five epochs (docs/audit.md): .01 to .18, and .94 to 1.08.
"""
SURPRISING = 1.0
"""Nats per token of the base: an opening that it knows already tells nothing."""


@dataclass(frozen=True)
class Span:
    """What was found.

    Attributes:
        loss: `target` or `all`.
        clear: whether the opening says so; else it is the safe choice.
        tokens: how many tokens all records open with, those of no loss in either case left out.
        before: their mean loss on the base, nats per token; NaN where there are none.
        after: on the tuned model.
    """

    loss: Literal["target", "all"]
    clear: bool
    tokens: int
    before: float
    after: float

    def __str__(self) -> str:
        chosen = "every token" if self.loss == "all" else "the answers"
        told = "the records share no opening that would tell"
        if self.tokens:
            told = (
                f"tuning took the loss of the {self.tokens} tokens that every record opens with from "
                f"{self.before:.2f} to {self.after:.2f} nats per token"
            )
        return (
            f"{chosen}: {told}" if self.clear else f"{chosen}, the safe choice: {told} (--loss target or all decides)"
        )


def trained_span(pool: Pool, data: DataSpec, tokenizer: Any, base: Base, tuned: Callable[[], nn.Module]) -> Span | None:
    """Compare the opening's loss before and after; None where every token is an answer.

    Args:
        pool, data: as for the audit; `loss` is left open.
        tuned: loads the tuned model.
    """
    if all(not example.prompt and example.form is None for example in pool.parts["member"]):
        return None
    few = data.model_copy(update={"members": min(PROBES, data.members or PROBES), "nonmembers": 1})
    answers, whole = (prepare(pool, few.model_copy(update={"loss": loss}), tokenizer) for loss in ("target", "all"))
    learned = {record.id: record.scored for record in answers.scored}
    probes = [record for record in whole.scored if record.id in learned]
    if all(np.array_equal(record.scored, learned[record.id]) for record in probes):
        return None
    context = [record.scored & ~learned[record.id] for record in probes]
    shared = opening(probes, context)
    if not shared.any():
        return Span("target", False, 0, float("nan"), float("nan"))
    first = [Encoded(probes[0].id, probes[0].ids[: len(shared)], shared, 0)]  # the same of all: one tells
    before = float(token_stats(base.model, first, base.budget).nll[0])
    after = float(token_stats(tuned(), first, base.budget).nll[0])
    return judged(int(shared.sum()), before, after)


def opening(records: Sequence[Encoded], context: Sequence[NDArray[np.bool_]]) -> NDArray[np.bool_]:
    """Which tokens of the common beginning of all records are context in each of them."""
    width = min(len(record) for record in records)
    same = np.ones(width, bool)
    mask = np.ones(width, bool)
    for record, own in zip(records, context, strict=True):
        same &= record.ids[:width] == records[0].ids[:width]
        mask &= own[:width]
    end = width if same.all() else int(np.argmin(same))
    return mask[:end] if len(records) > 1 else mask[:0]


def judged(tokens: int, before: float, after: float) -> Span:
    """What the two losses say.

    >>> str(judged(7, 11.14, 2.04))
    'every token: tuning took the loss of the 7 tokens that every record opens with from 11.14 to 2.04 nats per token'
    """
    share = after / before if before >= SURPRISING else (LEARNED + AS_BEFORE) / 2
    return Span("all" if share <= LEARNED else "target", share <= LEARNED or share >= AS_BEFORE, tokens, before, after)
