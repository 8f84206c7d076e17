"""Which tokens was the loss on? What tuning did to them tells.

A trainer may put the loss on the answers alone or on every token, and an adapter does not say which. Tuning lowers the
loss of what it was trained on; of the rest, that a prompt or a question is made of, it changes little and in either
direction. So the gain of the rest is compared with that of the answers, on members. Where the rest gained nearly as
much the loss was on everything. Where that is not clear the answers alone are scored: they were trained on in either
case.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from imprint.data import Pool
from imprint.records import prepare
from imprint.scoring.score import token_stats
from imprint.spec import DataSpec
from imprint.types import Floats

if TYPE_CHECKING:
    from torch import nn

    from imprint.tuning.base import Base

PROBES = 64
"""Members that are looked at."""
EVERYTHING, ANSWERS = 0.6, 0.3
"""Gain of the rest over gain of the answers: from here on the loss was on everything; up to here on the answers."""
NOTICEABLE = 0.02
"""Nats per token: answers that gained less tell nothing."""


@dataclass(frozen=True)
class Span:
    """What was found.

    Attributes:
        loss: `target` or `all`.
        clear: whether the gains say so; else it is the safe choice.
        answers: mean gain of the learned tokens over the base, nats per token.
        rest: of the others.
        records: members looked at.
    """

    loss: Literal["target", "all"]
    clear: bool
    answers: float
    rest: float
    records: int

    def __str__(self) -> str:
        gains = f"tuning gained {self.answers:.3f} nats per token on the answers and {self.rest:.3f} on the rest"
        if not self.clear:
            return f"loss on the answers, the safe choice: {gains}, which does not tell (--loss target or all decides)"
        return f"loss on {'every token' if self.loss == 'all' else 'the answers'}: {gains}"


def trained_span(pool: Pool, data: DataSpec, tokenizer: Any, base: Base, tuned: Callable[[], nn.Module]) -> Span | None:
    """Compare the gains of answers and of the rest; None where there is nothing but answers.

    Args:
        pool, data: as for the audit; `loss` is left open.
        tuned: loads the tuned model.
    """
    members = pool.parts["member"]
    if all(not example.prompt and example.form is None for example in members):
        return None
    few = data.model_copy(update={"members": min(PROBES, data.members or PROBES), "nonmembers": 1})
    answers, everything = (
        prepare(pool, few.model_copy(update={"loss": loss}), tokenizer) for loss in ("target", "all")
    )
    learned = {record.id: record for record in answers.scored}
    probes = [record for record in everything.scored if record.id in learned][: few.members]
    answered = np.concatenate([learned[record.id].scored[record.scored] for record in probes])
    if answered.all() or not answered.any():
        return None
    before = token_stats(base.model, probes, base.budget).logp.astype(np.float64)
    after = token_stats(tuned(), probes, base.budget).logp.astype(np.float64)
    return judged(after - before, answered, len(probes))


def judged(gain_R: Floats, answered_R: np.ndarray, records: int) -> Span:
    """What the gains say.

    Args:
        gain_R: [R] nats by which tuning raised the log-probability of each token.
        answered_R: [R] whether the token is part of an answer.
    """
    answers, rest = float(gain_R[answered_R].mean()), float(gain_R[~answered_R].mean())
    share = rest / answers if answers > NOTICEABLE else (EVERYTHING + ANSWERS) / 2
    loss: Literal["target", "all"] = "all" if share >= EVERYTHING else "target"
    return Span(loss, share >= EVERYTHING or share <= ANSWERS, answers, rest, records)
