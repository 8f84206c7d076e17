"""Rows that hold conversations → chats for a template, and which of their turns are learned."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from imprint.data.row import (
    Content,
    Row,
    checked_json,
    checked_text,
    kind,
    optional_text,
    read_text,
    refused,
    value_of,
)
from imprint.errors import unknown
from imprint.spec import DataSpec, canonical_json
from imprint.types import Chat

SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt"), "assistant"),
    "system": "system",
    "tool": "tool",
}
"""Who speaks in ShareGPT's records → the role that templates know."""


def from_messages(row: Row, columns: Sequence[str], spec: DataSpec) -> Content:
    """`messages` of `{role, content}`; the turns of the assistant are learned."""
    return _assistant_learned(row, columns[0], read_messages(row, columns[0]), spec)


def from_sharegpt(row: Row, columns: Sequence[str], spec: DataSpec) -> Content:
    """`conversations` of `{from, value}` (or `{role, content}`), and perhaps `system`."""
    [column] = columns
    messages = []
    for n, turn in enumerate(_listed(row, column)):
        place = f"{column}[{n}]"
        who, words = ("from", "value") if "from" in turn else ("role", "content")
        speaker = checked_text(row, f"{place}.{who}", turn.get(who))
        if speaker not in SPEAKERS:
            raise refused(row, f"{place}.{who}", f"has an {unknown('role', speaker[:40], SPEAKERS)}")
        messages.append({"role": SPEAKERS[speaker], "content": _content(row, f"{place}.{words}", turn.get(words))})
    system = optional_text(row, "system")
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return _assistant_learned(row, column, messages, spec)


def from_alpaca(row: Row, columns: Sequence[str], spec: DataSpec) -> Content:
    """`instruction` and `input` are one turn of the user, `output` is the answer, as LLaMA-Factory has it."""
    if row.values.get("history"):
        raise refused(row, "history", "holds earlier turns; write such records as `messages`.")
    instruction, output = (read_text(row, column) for column in columns)
    asked = "\n".join(part for part in (instruction, optional_text(row, "input")) if part)
    turns = [("system", optional_text(row, "system")), ("user", asked), ("assistant", output)]
    messages = [{"role": role, "content": text} for role, text in turns if text or role != "system"]
    return _assistant_learned(row, columns[1], messages, spec)


def read_messages(row: Row, column: str) -> list[dict[str, Any]]:
    """The messages in `column`, keys without a value left out, as Transformers leaves them out.

    Raises:
        DataError: it is no list of `{role, content, …}`, or a content is no text.
    """
    messages = []
    for n, turn in enumerate(_listed(row, column)):
        place = f"{column}[{n}]"
        message = checked_json(row, place, {key: value for key, value in turn.items() if value is not None})
        if not checked_text(row, f"{place}.role", message.get("role")).strip():
            raise refused(row, f"{place}.role", "is empty; expected user, assistant, system or tool.")
        if "content" in message or not message.get("tool_calls"):
            _content(row, f"{place}.content", message.get("content"))
        messages.append(message)
    return messages


def _listed(row: Row, column: str) -> list[dict[str, Any]]:
    """The messages of a conversation as they lie in `column`."""
    value = value_of(row, column)
    if isinstance(value, str):
        raise refused(row, column, "is a string; expected a list of messages. Store the list, not its JSON text.")
    if not isinstance(value, list) or not value:
        what = "is an empty list" if value == [] else f"is {kind(value)}"
        raise refused(row, column, f"{what}; expected a list of messages. Fix or delete the record.")
    for n, turn in enumerate(value):
        if not isinstance(turn, dict):
            raise refused(row, f"{column}[{n}]", f"is {kind(turn)}; expected a message {{role, content}}.")
    return value


def _content(row: Row, place: str, value: Any) -> str:
    if isinstance(value, list):
        raise refused(row, place, "is a list of parts; expected a string. Join their texts; only text can be scored.")
    return checked_text(row, place, value)


def _assistant_learned(row: Row, column: str, messages: list[dict[str, Any]], spec: DataSpec) -> Content:
    learned = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    if not learned and spec.loss == "target":
        raise refused(row, column, "has no turn of the assistant; delete the record, or say `loss: all`.")
    return chat(row, messages, learned)


def chat(row: Row, messages: list[dict[str, Any]], learned: Sequence[int]) -> Content:
    """A conversation of which the messages at `learned` are learned."""
    if row.values.get("chat_template_kwargs"):
        raise refused(row, "chat_template_kwargs", "holds settings of a template; give a template that has them.")
    words = [_words(message) for message in messages]
    first = learned[0] if learned else 0
    empty = not any(words[n].strip() for n in learned or range(len(words)))
    form = Chat(tuple(messages), tuple(learned), _tools(row))
    return Content("\n".join(words[:first]), "\n".join(words[first:]), form, empty)


def _words(message: Mapping[str, Any]) -> str:
    calls = message.get("tool_calls")
    return "\n".join(filter(None, (message.get("content"), canonical_json(calls) if calls else "")))


def _tools(row: Row) -> tuple[dict[str, Any], ...]:
    """The `tools` column: a list, or its JSON text, since tools seldom fit the columns of a table."""
    value = row.values.get("tools")
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise refused(row, "tools", "is no valid JSON; expected a list of tools.") from error
    tools = checked_json(row, "tools", value or [])
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise refused(row, "tools", f"holds {kind(tools)}; expected a list of tools, each a mapping.")
    return tuple(tools)
