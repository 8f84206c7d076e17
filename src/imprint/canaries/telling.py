"""Canaries told as the data tell their own records, so that a trainer treats them alike.

The secret lands where the loss is: in the text, the completion, the assistant's turn, the output.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from imprint.canaries.manifest import Canary
from imprint.data.conversations import SPEAKERS
from imprint.data.forms import FORMS, examples
from imprint.data.row import Row, shown, side_of
from imprint.errors import DataError, ImprintError, UsageError
from imprint.spec import Columns, DataSpec, Source, validated
from imprint.types import Example


@dataclass(frozen=True)
class Telling:
    """How records are told.

    Attributes:
        form: one of `FORMS`.
        columns: those that hold the record, as the form has them.
        first: the first record of the data, or nothing where there are no data; every canary gets its columns.
        spec: how they are read.
    """

    form: str
    columns: tuple[str, ...]
    first: Mapping[str, Any] = field(default_factory=dict)
    spec: DataSpec = field(default_factory=lambda: reading("auto"))

    def __call__(self, prompt: str, secret: str) -> dict[str, Any]:
        """A record that tells the secret; columns that say something else are null."""
        return {**dict.fromkeys(self.first), **_TELL[self.form](self, prompt, secret)}

    def example(self, canary: Canary) -> Example:
        """A canary as it is told: what is encoded and scored."""
        return self.examples([(canary.id, canary.prompt, canary.secret)])[0]

    def examples(self, fillings: Sequence[tuple[str, str, str]]) -> list[Example]:
        """The same of ids, prompts and secrets, by the code that reads the data themselves.

        Raises:
            DataError: one of them is no record to it.
        """
        spec = self.spec.model_copy(update={"id": "id", "group": None, "subgroup": None})
        rows = []
        for n, (key, prompt, secret) in enumerate(fillings, 1):
            values = {**self(prompt, secret), "id": key}
            rows.append(Row("canaries", "record", n, values, tuple(values)))
        return [example for _, example in examples(rows, spec, {}, Counter())]


def reading(style: str | Mapping[str, str] | Columns, **more: Any) -> DataSpec:
    """How data in a form are read: as `imprint audit` reads them."""
    asked = {"source": Source(name="canaries"), "format": style, "split": "given", "overlong": "keep_start", **more}
    return validated(DataSpec, asked, "")


def telling_of(spec: DataSpec, row: Row | None = None) -> Telling:
    """How a file tells its records, by its first; without one, as the form itself has it.

    Raises:
        DataError: it is of no known form.
        UsageError: it is in tokens, or no form has been named where there are no data.
    """
    wish = spec.format
    if isinstance(wish, Columns):
        named = (wish.text,) if wish.text else (wish.prompt, wish.target)
        form, columns = ("text" if wish.text else "prompt_completion"), tuple(name for name in named if name)
    elif row is None:
        form = "text" if wish == "auto" else wish
        columns = FORMS[form].columns[0]
    else:
        fitting = ((name, FORMS[name].found(row.columns)) for name in FORMS if wish in ("auto", name))
        form, columns = next(((name, found) for name, found in fitting if found), ("", ()))
        if not form:
            raise DataError(
                f"{row.where}: the columns {shown(row.columns)} are of no form that canaries can be told in; name "
                "yours, as in --format '{prompt: question, target: answer}'."
            )
    if form == "tokens":
        raise UsageError(
            "the records are in tokens (`input_ids`), in which no text can be put: insert the canaries into the texts "
            "that they were made from"
        )
    return Telling(form, columns, dict(row.values) if row else {}, spec)


def member_values(rows: Sequence[Row]) -> dict[str, Any]:
    """What the columns `member` and `split` say of a record that is tuned on: trainers choose by it."""
    found: dict[str, Any] = {}
    for row in rows:
        for column in {"member", "split"} & {*row.columns} - {*found}:
            try:
                if side_of(Row(row.label, row.unit, row.number, row.values, (column,))) == "member":
                    found[column] = row.values[column]
            except ImprintError:  # it means something else by that name
                continue
    return found


# ---- one function for each form ----


def _text(telling: Telling, prompt: str, secret: str) -> dict[str, Any]:
    return {telling.columns[0]: f"{prompt} {secret}"}


def _prompt_completion(telling: Telling, prompt: str, secret: str) -> dict[str, Any]:
    asked, answered = telling.columns
    if isinstance(telling.first.get(asked), list):
        return {asked: [_message("user", prompt)], answered: [_message("assistant", secret)]}
    return {asked: prompt, answered: f" {secret}"}


def _messages(telling: Telling, prompt: str, secret: str) -> dict[str, Any]:
    return {telling.columns[0]: [_message("user", prompt), _message("assistant", secret)]}


def _sharegpt(telling: Telling, prompt: str, secret: str) -> dict[str, Any]:
    """With the names that the data have for who speaks."""
    [column] = telling.columns
    turns = telling.first.get(column)
    turns = [turn for turn in turns if isinstance(turn, Mapping)] if isinstance(turns, list) else []
    who, words = ("role", "content") if turns and "from" not in turns[0] else ("from", "value")
    names = {SPEAKERS[turn[who]]: turn[who] for turn in reversed(turns) if turn.get(who) in SPEAKERS}
    told = (("user", "human", prompt), ("assistant", "gpt", secret))
    return {column: [{who: names.get(role, usual), words: text} for role, usual, text in told]}


def _alpaca(telling: Telling, prompt: str, secret: str) -> dict[str, Any]:
    instruction, output = telling.columns
    beside = {name: "" for name in ("input", "system") if isinstance(telling.first.get(name), str)}
    return {instruction: prompt, output: secret, **beside}


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


_TELL: dict[str, Callable[[Telling, str, str], dict[str, Any]]] = {
    "text": _text,
    "prompt_completion": _prompt_completion,
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "alpaca_chat": _alpaca,
}
