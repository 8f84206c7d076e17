"""Texts become token ids and a mask of the positions that are trained on and scored; batches under a token budget.

The rules, the same for training and scoring:

* a text starts with whatever the tokenizer itself puts in front (a BOS for Llama, nothing for GPT-2);
* the target's tokens are scored, the prompt's are context; the first token of a sequence has nothing before it and is
  never scored, so without a BOS the first token of a plain text is not;
* a target that follows a prompt ends with the tokenizer's EOS, because learning when to stop is part of it; plain
  text ends where it ends;
* what is longer than `max_length` loses the start of its prompt first, then the end of its target, and is counted.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imprint.errors import DataError
from imprint.types import Example


@dataclass(frozen=True)
class Encoded:
    """One record in tokens.

    Attributes:
        ids: [T] token ids.
        scored: [T] whether the token is trained on and scored; never true at 0.
        zlib_bytes: size of the scored text, UTF-8 and zlib-compressed.
        cut: "" or which part lost tokens: "prompt", "target".
    """

    id: str
    ids: NDArray[np.int32]
    scored: NDArray[np.bool_]
    zlib_bytes: int
    cut: str = ""

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def predictors(self) -> NDArray[np.int64]:
        """[R] the positions whose hidden states predict the scored tokens."""
        return np.flatnonzero(self.scored) - 1


@dataclass(frozen=True)
class Encoder:
    """Encodes examples for one tokenizer and one maximum length."""

    tokenizer: Any
    max_length: int
    overlong: str = "truncate"

    def __call__(self, example: Example) -> Encoded:
        """
        Raises:
            DataError: the record is longer than `max_length` and `overlong` is `refuse`.
        """
        start = self._opening
        text = self._ids(example.prompt + example.target)
        boundary = _common(self._ids(example.prompt), text) if example.prompt else 0
        prompt, target = text[:boundary], text[boundary:]
        if example.prompt and self.tokenizer.eos_token_id is not None:
            target = [*target, self.tokenizer.eos_token_id]
        room, cut = self.max_length - len(start), ""
        if len(prompt) + len(target) > room:
            if self.overlong == "refuse":
                raise DataError(
                    f"record {example.id!r} has {len(start) + len(prompt) + len(target)} tokens, more than "
                    f"max_length {self.max_length}: shorten it or say `overlong: truncate`"
                )
            kept = max(room - len(target), 0)
            prompt, cut = prompt[len(prompt) - kept :], "prompt"
            if len(target) > room:
                target, cut = target[:room], "target"
        ids = np.array([*start, *prompt, *target], dtype=np.int32)
        scored = np.arange(len(ids)) >= max(len(start) + len(prompt), 1)
        scored_text = self.tokenizer.decode(target) if cut == "target" else example.target
        return Encoded(example.id, ids, scored, len(zlib.compress(scored_text.encode("utf-8", "replace"))), cut)

    def usable(self, example: Example) -> str | None:
        """Why a record cannot be scored, or None."""
        return unusable(self(example))

    @cached_property
    def _opening(self) -> list[int]:
        """What the tokenizer puts in front of every text."""
        plain = self._ids("a")
        full = list(self.tokenizer("a", add_special_tokens=True).input_ids)
        for n in range(len(full) - len(plain) + 1):
            if full[n : n + len(plain)] == plain:
                return full[:n]
        return []

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)


def unusable(record: Encoded) -> str | None:
    """Why a record cannot be scored, or None."""
    return None if record.scored.any() else "one token and no BOS: nothing to predict"


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning: a token that straddles prompt and target belongs to the target."""
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


def batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Positions grouped so that the padded size of a group stays within `budget` tokens; longest first.

    A text longer than the budget is a group of its own. Every position occurs once.

    >>> batches([3, 9, 4, 8], budget=20)
    [[1, 3], [2, 0]]
    """
    groups: list[list[int]] = []
    order = sorted(range(len(lengths)), key=lambda n: (-lengths[n], n))
    for n in order:
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= budget:
            groups[-1].append(n)
        else:
            groups.append([n])
    return groups


def pad(records: Sequence[Encoded]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Ids and scored mask, right-padded, [B, T]. Causal attention never looks right, so padding changes no score."""
    width = max(len(record) for record in records)
    ids = np.zeros((len(records), width), np.int64)
    scored = np.zeros((len(records), width), bool)
    for n, record in enumerate(records):
        ids[n, : len(record)] = record.ids
        scored[n, : len(record)] = record.scored
    return ids, scored
