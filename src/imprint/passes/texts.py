"""The texts of a record that are scored, and the same record with other texts in their place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from imprint.errors import DataError
from imprint.types import Chat, Example, Tokenized

if TYPE_CHECKING:
    from imprint.data.tokens import Encoder


def scored_texts(example: Example, loss: str) -> list[str]:
    """The target, or the contents of the learned messages; with `loss: all` everything else as well."""
    if isinstance(example.form, Chat):
        return [example.form.messages[n]["content"] for n in _told(example.form, loss)]
    return [example.prompt, example.target] if loss == "all" else [example.target]


def with_texts(example: Example, texts: Sequence[str], loss: str) -> Example:
    """The same record with `texts` in place of those that `scored_texts` gives."""
    if isinstance(example.form, Chat):
        messages = list(example.form.messages)
        for n, text in zip(_told(example.form, loss), texts, strict=True):
            messages[n] = {**messages[n], "content": text}
        return replace(example, form=replace(example.form, messages=tuple(messages)))
    return replace(example, prompt=texts[0] if loss == "all" else example.prompt, target=texts[-1])


def variants(encoder: Encoder) -> Encoder:
    """For texts that may be a few tokens longer than their record: what would be refused is cut."""
    return replace(encoder, overlong="truncate") if encoder.overlong == "refuse" else encoder


def check_texts(examples: Sequence[Example], instead: str) -> None:
    """
    Raises:
        DataError: records come as tokens, of which no text is known.
    """
    if tokens := [example.id for example in examples if isinstance(example.form, Tokenized)]:
        raise DataError(
            f"{len(tokens)} of {len(examples)} records come in tokens (the first is {tokens[0]!r}), whose words are "
            f"not known: {instead}"
        )


def _told(chat: Chat, loss: str) -> list[int]:
    """Which messages are scored and have words; a call of a tool has none."""
    places = range(len(chat.messages)) if loss == "all" else chat.learned
    return [n for n in places if isinstance(chat.messages[n].get("content"), str)]
