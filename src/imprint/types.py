"""The nouns of Imprint. Values are frozen; work is done by functions.

Shape legend, used as suffixes everywhere: N examples, T tokens, V vocabulary, L layers, H heads,
P virtual (prefix or prompt) tokens, E epochs, R ragged rows (the scored tokens of all N examples in a row).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Chat:
    """A conversation, to be told by a tokenizer's own template.

    Attributes:
        messages: as the template takes them: mappings with `role` and `content`.
        learned: which of them are trained on and scored, by their place.
        tools: what the template is told of tools.
    """

    messages: tuple[dict[str, Any], ...]
    learned: tuple[int, ...]
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Tokenized:
    """A record in tokens already: [T] ids, and [T] whether a token is trained on and scored."""

    ids: tuple[int, ...]
    learned: tuple[bool, ...]


@dataclass(frozen=True)
class Example:
    """One record. `prompt` is context; `target` is what is learned and scored; plain text has an empty prompt.

    Of a conversation or of tokens the two are a plain view, by which texts are compared with one another.

    Args:
        id: the source's own id, or a content hash.
        prompt: context only: neither trained on nor scored.
        target: the text that is trained on and scored.
        group: records that share a group (a subject, a document, a set of triples) stay on one side of a split.
        subgroup: a property of the record (its language, say), for each value of which leakage is reported apart.
        form: what is encoded in place of the two texts.
    """

    id: str
    prompt: str
    target: str
    group: str | None = None
    subgroup: str | None = None
    form: Chat | Tokenized | None = None


@dataclass(frozen=True)
class Split:
    """Who is tuned on and who is scored.

    `members` are tuned on and scored; `extra` are tuned on and not scored (`tune_on` larger than `members`).
    `auxiliary_in` are tuned on, `auxiliary_out` are not; attacks may learn from them, and none is evaluated on them.
    `dropped` counts what was left out, by reason, for the report.
    """

    members: tuple[Example, ...]
    nonmembers: tuple[Example, ...]
    validation: tuple[Example, ...]
    extra: tuple[Example, ...] = ()
    auxiliary_in: tuple[Example, ...] = ()
    auxiliary_out: tuple[Example, ...] = ()
    dropped: dict[str, int] = field(default_factory=dict)

    @property
    def tuned(self) -> tuple[Example, ...]:
        """Everything the model is tuned on."""
        return self.members + self.auxiliary_in + self.extra


@dataclass(frozen=True)
class TokenStats:
    """What one scoring pass leaves: per scored token, ragged; example n owns rows offsets[n]:offsets[n+1].

    Attributes:
        ids: [N] record ids.
        offsets: [N + 1] row boundaries.
        tokens: [R] token ids.
        logp: [R] log p(x_t | x_<t), nats.
        mean: [R] Σ_v p_v log p_v, the negative entropy, nats.
        std: [R] standard deviation of log p under p.
        top: [R] whether x_t is the argmax.
    """

    ids: NDArray[np.str_]
    offsets: NDArray[np.int64]
    tokens: NDArray[np.int32]
    logp: NDArray[np.float32]
    mean: NDArray[np.float32]
    std: NDArray[np.float32]
    top: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """[N] scored tokens of each example."""
        return np.diff(self.offsets)

    @cached_property
    def nll(self) -> Floats:
        """[N] mean negative log-likelihood of each example in nats, L(x)."""
        return -np.add.reduceat(self.logp.astype(np.float64), self.offsets[:-1]) / self.lengths

    def select(self, rows: NDArray[Any]) -> TokenStats:
        """The examples at `rows` (indices or a boolean mask over N), in that order."""
        index = np.arange(len(self))[rows]
        spans = [np.arange(self.offsets[n], self.offsets[n + 1]) for n in index]
        flat = np.concatenate(spans) if spans else np.zeros(0, np.int64)
        offsets = np.concatenate([[0], np.cumsum(self.lengths[index])]).astype(np.int64)
        return TokenStats(
            self.ids[index],
            offsets,
            self.tokens[flat],
            self.logp[flat],
            self.mean[flat],
            self.std[flat],
            self.top[flat],
        )


@dataclass(frozen=True)
class Shadows:
    """What models tuned on random halves of the records say of each record.

    Attributes:
        losses: [N, S] mean negative log-likelihood under each of S shadow models, nats per token.
        inside: [N, S] whether the shadow model was tuned on the record; nowhere true for records that no half holds.
    """

    losses: Floats
    inside: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.losses)

    def select(self, rows: NDArray[Any]) -> Shadows:
        """The records at `rows` (indices or a boolean mask over N), in that order."""
        return Shadows(self.losses[rows], self.inside[rows])


@dataclass(frozen=True)
class Interval:
    """A number with its confidence interval."""

    value: float
    low: float
    high: float

    def __contains__(self, x: float) -> bool:
        return self.low <= x <= self.high

    def __format__(self, spec: str) -> str:
        spec = spec or ".3f"
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


@dataclass(frozen=True)
class Measurement:
    """One row of `results.parquet`.

    Attributes:
        options: the method's options as canonical JSON.
        epoch: 0 is the untouched base.
        attack: empty for perplexity.
        metric: one of `auc, tpr_at_10pct_fpr, tpr_at_1pct_fpr, tpr_at_0.1pct_fpr, perplexity`.
        value, low, high: None where the measurement was refused.
        status: `ok`; `indicative` (fewer than ten expected false positives); `too_few` (refused: fewer than one);
            `diverged` (the run's loss stopped being finite; rows up to the last finite epoch keep their values).
    """

    run_id: str
    model: str
    data: str
    method: str
    options: str
    seed: int
    epoch: int
    attack: str
    metric: str
    value: float | None
    low: float | None
    high: float | None
    members: int
    nonmembers: int
    status: str
