"""Texts become token ids and a mask of the positions that are trained on and scored; batches under a token budget.

The rules, the same for training and scoring:

* a text starts with whatever the tokenizer itself puts in front (a BOS for Llama, nothing for GPT-2);
* the target's tokens are scored, the prompt's are context, or with `loss: all` scored as well; the first token of a
  sequence has nothing before it and is never scored, so without a BOS the first token of a plain text is not;
* a target that follows a prompt ends with the tokenizer's EOS, because learning when to stop is part of it; plain
  text ends where it ends. `eos` says otherwise for both: where it is true, a text that ends so already gets no second;
* what is longer than `max_length` loses the start of its prompt first, then the end of its target, or with
  `overlong: keep_start` its end alone, and is counted.

A chat is its template's text, to which nothing is added, and a token is scored if one of its characters is learned. A
record in tokens stays as it is. Both are cut at their end.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imprint.data.templates import Rendered, Templates
from imprint.errors import DataError, ModelError
from imprint.types import Chat, Example, Tokenized

CHARACTERS = 64
"""Of a text whose end is cut, so many characters a token that is kept are looked at, or a book would take as long as a
shelf of letters: tokens depend on what is near them, and half of those found so are thrown away."""


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
    """Encodes examples for one tokenizer and one maximum length.

    Attributes:
        templates: renders chats; without it each has a process of its own.
    """

    tokenizer: Any
    max_length: int
    overlong: str = "truncate"
    loss: str = "target"
    eos: bool | None = None
    templates: Templates | None = None

    def __call__(self, example: Example) -> Encoded:
        """
        Raises:
            DataError: the record is longer than `max_length` and `overlong` is `refuse`; it is in tokens that are not
                this tokenizer's.
            ModelError: a chat cannot be rendered, or the tokenizer does not say where its tokens come from.
        """
        if isinstance(example.form, Chat):
            return self._whole(example, *self._told(self._rendered(example.id, example.form)))
        if isinstance(example.form, Tokenized):
            self._check_known(example.id, example.form.ids)
            return self._whole(example, list(example.form.ids), np.array(example.form.learned, bool))
        return self._text(example)

    def _text(self, example: Example) -> Encoded:
        start = self._opening
        ids_of = self._ids if example.prompt and self.overlong == "truncate" else self._first_ids
        text = ids_of(example.prompt + example.target)
        boundary = _common(ids_of(example.prompt), text) if example.prompt else 0
        prompt, target = text[:boundary], text[boundary:]
        if self._ends(example, text):
            target = [*target, self.tokenizer.eos_token_id]
        room, cut = self.max_length - len(start), ""
        if len(prompt) + len(target) > room:
            self._refuse_if_asked(example.id, len(start) + len(prompt) + len(target))
            if self.overlong == "keep_start":
                prompt, target, cut = prompt[:room], target[: max(room - len(prompt), 0)], "target"
            else:
                kept = max(room - len(target), 0)
                prompt, cut = prompt[len(prompt) - kept :], "prompt"
                if len(target) > room:
                    target, cut = target[:room], "target"
        ids = np.array([*start, *prompt, *target], dtype=np.int32)
        if self.loss == "all":
            scored = np.arange(len(ids)) >= 1
            scored_text = self.tokenizer.decode([*prompt, *target]) if cut else example.prompt + example.target
        else:
            scored = np.arange(len(ids)) >= max(len(start) + len(prompt), 1)
            scored_text = self.tokenizer.decode(target) if cut == "target" else example.target
        return Encoded(example.id, ids, scored, _zlib_bytes(scored_text), cut)

    def _ends(self, example: Example, text: list[int]) -> bool:
        """Whether an EOS is put behind a text."""
        end = self.tokenizer.eos_token_id
        wanted = bool(example.prompt) if self.eos is None else self.eos
        return wanted and end is not None and text[-1:] != [end]

    def _whole(self, example: Example, ids: list[int], learned: NDArray[np.bool_]) -> Encoded:
        """A sequence that is complete as it is, cut at its end."""
        scored = np.ones(len(ids), bool) if self.loss == "all" else learned
        cut = ""
        if len(ids) > self.max_length:
            self._refuse_if_asked(example.id, len(ids))
            cut = "target" if scored[self.max_length :].any() else "prompt"
        kept, scored = np.array(ids[: self.max_length], np.int32), scored[: self.max_length].copy()
        scored[:1] = False
        return Encoded(example.id, kept, scored, _zlib_bytes(self.tokenizer.decode(kept[scored].tolist())), cut)

    def _rendered(self, record: str, chat: Chat) -> Rendered:
        if not getattr(self.tokenizer, "is_fast", False):
            raise ModelError(
                f"the tokenizer {type(self.tokenizer).__name__} does not say which characters a token comes from, so "
                "the turns of a conversation cannot be told apart: use one with a tokenizer.json"
            )
        if self.templates is not None:
            return self.templates(record, chat)
        with Templates(self.tokenizer, self.loss) as templates:
            return templates(record, chat)

    def _told(self, rendered: Rendered) -> tuple[list[int], NDArray[np.bool_]]:
        """Ids of a rendered chat, and which of them have a learned character: one across a boundary belongs to it."""
        text = rendered.text
        for size in self._sizes(text):
            found = self.tokenizer(text[:size], add_special_tokens=False, return_offsets_mapping=True)
            if len(found["input_ids"]) >= 2 * self.max_length:
                break
        starts, ends = np.array(found["offset_mapping"], np.int64).reshape(-1, 2).T
        learned = np.zeros(len(starts), bool)
        for start, end in rendered.spans:
            learned |= (starts < end) & (ends > start)
        learned[-1:] |= any(end > size for _, end in rendered.spans)  # what was not looked at
        return list(found["input_ids"]), learned

    def _check_known(self, record: str, ids: Sequence[int]) -> None:
        if max(ids) >= self._vocabulary:
            raise DataError(
                f"record {record!r} holds the token {max(ids)}, and this tokenizer knows {self._vocabulary}: it was "
                "made with another one"
            )

    def _refuse_if_asked(self, record: str, length: int) -> None:
        if self.overlong == "refuse":
            raise DataError(
                f"record {record!r} has {length} tokens, more than max_length {self.max_length}: shorten it or say "
                "`overlong: truncate`"
            )

    def usable(self, example: Example) -> str | None:
        """Why a record cannot be scored, or None."""
        return unusable(self(example))

    @cached_property
    def _vocabulary(self) -> int:
        """One more than the largest id that stands for anything."""
        return 1 + int(max(self.tokenizer.get_vocab().values()))

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

    def _first_ids(self, text: str) -> list[int]:
        """All ids of a text, or of a long one at least twice as many as are kept."""
        for size in self._sizes(text):
            ids = self._ids(text[:size])
            if len(ids) >= 2 * self.max_length:
                break
        return ids

    def _sizes(self, text: str) -> list[int]:
        """How many characters of a text to look at: a beginning if that does, or all of it."""
        few = CHARACTERS * self.max_length
        return [few, len(text)] if len(text) > 2 * few and self.overlong != "refuse" else [len(text)]


def unusable(record: Encoded) -> str | None:
    """Why a record cannot be scored, or None."""
    if record.scored.any():
        return None
    if record.cut:
        return "nothing to predict once cut to max_length"
    return "no learned token" if len(record) > 1 else "one token and no BOS: nothing to predict"


def _zlib_bytes(text: str) -> int:
    return len(zlib.compress(text.encode("utf-8", "replace")))


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
