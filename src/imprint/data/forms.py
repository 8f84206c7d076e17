"""Rows → examples, in every form that people fine-tune on.

A form is known by its columns. Plain texts stay texts; conversations and records in tokens are kept as they are
(`Example.form`), and the two texts beside them are a view, by which records are compared with one another.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from imprint.data.conversations import chat, from_alpaca, from_messages, from_sharegpt, read_messages
from imprint.data.row import (
    Content,
    Row,
    kind,
    missing_column,
    optional_text,
    read_key,
    read_text,
    refused,
    shown,
    value_of,
)
from imprint.errors import DataError
from imprint.spec import Columns, DataSpec, canonical_json
from imprint.types import Chat, Example, Tokenized

IGNORED = -100
"""The label of a token that is not learned, as Transformers has it."""
LARGEST_ID = 2**31 - 1
ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n{input}### Response:"
)
"""Stanford's prompt, which ends with the colon (some trainers put a line end behind it)."""


# ---- plain texts ----


def _plain(prompt: str, target: str) -> Content:
    return Content(prompt, target, empty=not target.strip())


def _text(row: Row, columns: Sequence[str], spec: DataSpec) -> Content:
    return _plain("", read_text(row, columns[0]))


def _prompt_completion(row: Row, columns: Sequence[str], spec: DataSpec) -> Content:
    """Strings, or two lists of messages of which all of the second are learned."""
    prompt, target = columns
    if not isinstance(value_of(row, prompt), list):
        return _plain(read_text(row, prompt), read_text(row, target))
    before, after = read_messages(row, prompt), read_messages(row, target)
    return chat(row, [*before, *after], range(len(before), len(before) + len(after)))


def _alpaca(row: Row, columns: Sequence[str], spec: DataSpec) -> Content:
    instruction, output = (read_text(row, column) for column in columns)
    given = optional_text(row, "input")
    paired = ", paired with an input that provides further context" if given else ""
    block = f"### Input:\n{given}\n\n" if given else ""
    return _plain(ALPACA.format(paired=paired, instruction=instruction, input=block), output)


# ---- tokens ----


def _tokens(row: Row, columns: Sequence[str], spec: DataSpec) -> Content:
    """`labels` say what is learned, or the masks there are; without either everything is."""
    packed = row.values.get("seq_lengths")
    if isinstance(packed, list) and len(packed) > 1:
        raise refused(row, "seq_lengths", "says that texts were packed into one record; give them one by one.")
    [column] = columns
    ids = _numbers(row, column, 0)
    learned = [True] * len(ids)
    if row.values.get("labels") is not None:
        labels = _numbers(row, "labels", IGNORED, len(ids))
        for n, (label, token) in enumerate(zip(labels, ids, strict=True)):
            if label not in (IGNORED, token):
                why = f"is {label}, the token there is {token}; expected that or {IGNORED}, not shifted."
                raise refused(row, f"labels[{n}]", why)
        learned = [label != IGNORED for label in labels]
    else:
        for name in ("completion_mask", "assistant_masks"):
            if row.values.get(name) is not None:
                mask = _numbers(row, name, 0, len(ids), 1)
                learned = [one and bool(other) for one, other in zip(learned, mask, strict=True)]
    keep = _unpadded(row, len(ids))
    form = Tokenized(tuple(ids[keep]), tuple(learned[keep]))
    first = form.learned.index(True) if any(form.learned) else len(form.ids)
    return Content(" ".join(map(str, form.ids[:first])), " ".join(map(str, form.ids[first:])), form)


def _unpadded(row: Row, length: int) -> slice:
    """Where `attention_mask` says that there is text: one run, with padding before or behind it."""
    if row.values.get("attention_mask") is None:
        return slice(0, length)
    mask = _numbers(row, "attention_mask", 0, length, 1)
    first = mask.index(1) if 1 in mask else length
    last = first + sum(mask)
    if first == length or not all(mask[first:last]):
        raise refused(row, "attention_mask", "is no single run of ones; expected padding before or behind the text.")
    return slice(first, last)


def _numbers(row: Row, column: str, least: int, length: int | None = None, most: int = LARGEST_ID) -> list[int]:
    value = value_of(row, column)
    if not isinstance(value, list) or not value:
        what = "is an empty list" if value == [] else f"is {kind(value)}"
        raise refused(row, column, f"{what}; expected a list of whole numbers. Fix or delete the record.")
    if length is not None and len(value) != length:
        raise refused(row, column, f"has {len(value)} entries, and `input_ids` {length}; expected as many.")
    for n, item in enumerate(value):
        if not isinstance(item, int) or (isinstance(item, bool) and most != 1) or not least <= item <= most:
            what = str(item) if isinstance(item, int) and abs(item) < 10**18 else kind(item)
            raise refused(row, f"{column}[{n}]", f"is {what}; expected a whole number from {least} to {most}.")
    return value


# ---- rows → examples ----


class Form(NamedTuple):
    """How records of one form are known and read: sets of columns, one of which is there; others that may be."""

    columns: tuple[tuple[str, ...], ...]
    also: tuple[str, ...]
    read: Callable[[Row, Sequence[str], DataSpec], Content]

    def found(self, columns: Sequence[str]) -> tuple[str, ...] | None:
        """The first of its sets of columns that is there."""
        return next((needed for needed in self.columns if {*needed} <= {*columns}), None)


_CHAT = ("tools", "chat_template_kwargs")
_MASKS = ("labels", "completion_mask", "assistant_masks", "attention_mask", "seq_lengths")
FORMS: dict[str, Form] = {  # `auto` takes the first that fits
    "text": Form((("text",),), (), _text),
    "prompt_completion": Form((("prompt", "completion"), ("prompt", "target")), _CHAT, _prompt_completion),
    "messages": Form((("messages",),), _CHAT, from_messages),
    "sharegpt": Form((("conversations",),), ("system", *_CHAT), from_sharegpt),
    "tokens": Form((("input_ids",),), _MASKS, _tokens),
    "alpaca": Form((("instruction", "output"),), ("input",), _alpaca),
    "alpaca_chat": Form((("instruction", "output"),), ("input", "system", "history", *_CHAT), from_alpaca),
}


def wanted_columns(spec: DataSpec) -> set[str]:
    """Every column the recipe may need of a row."""
    named = [spec.id, spec.group, spec.subgroup]
    if isinstance(spec.format, Columns):
        named += [spec.format.text, spec.format.prompt, spec.format.target, *_CHAT]
    else:
        forms = FORMS.values() if spec.format == "auto" else [FORMS[spec.format]]
        named += [name for form in forms for names in (*form.columns, form.also) for name in names]
    return {"id", "member", "split", *(name for name in named if name)}


def examples(
    rows: Iterable[Row], spec: DataSpec, seen: dict[str, str], dropped: Counter[str]
) -> Iterator[tuple[Row, Example]]:
    """Rows, each with its example by the recipe's columns; records without text are dropped and counted.

    Args:
        seen: id → where it was read; shared by all parts, since an id names one record of the whole source.

    Raises:
        DataError: a column is missing or not as its form has it, or an id is missing or used twice.
    """
    read: Callable[[Row, Sequence[str], DataSpec], Content] | None = None
    columns: tuple[str, ...] = ()
    for row in rows:
        if read is None:
            read, columns = _form_of(spec, row)
            for column in (*columns, spec.id, spec.group, spec.subgroup):
                if column is not None and column not in row.columns:
                    raise DataError(f"{row.where}: {missing_column(column, row.columns)}")
            id_column = spec.id or ("id" if "id" in row.columns else None)
        content = read(row, columns, spec)
        if content.empty:
            dropped["empty text"] += 1
            continue
        group, subgroup = (
            read_key(row, column, optional=True) if column else None for column in (spec.group, spec.subgroup)
        )
        key = _identity(row, id_column, content, seen)
        yield row, Example(key, content.prompt, content.target, group, subgroup, content.form)


def _form_of(spec: DataSpec, row: Row) -> tuple[Callable[[Row, Sequence[str], DataSpec], Content], tuple[str, ...]]:
    """How the rows are read, and from which columns."""
    wish = spec.format
    if isinstance(wish, Columns):
        if wish.text and not (wish.prompt or wish.target):
            return _text, (wish.text,)
        if wish.prompt and wish.target and not wish.text:
            return _prompt_completion, (wish.prompt, wish.target)
        raise DataError("`format` must name either `text` alone, or `prompt` and `target`.")
    forms = [form for name, form in FORMS.items() if wish in ("auto", name)]
    for form in forms:
        if columns := form.found(row.columns):
            return form.read, columns
    expected = dict.fromkeys(" and ".join(f"`{name}`" for name in form.columns[0]) for form in forms)
    say = "name yours with `format: {text: COLUMN}` or `format: {prompt: COLUMN, target: COLUMN}`"
    raise DataError(
        f"{row.where}: expected the columns {' or '.join(expected)}; columns found: {shown(row.columns)}; {say}."
    )


def content_id(prompt: str, target: str, form: Chat | Tokenized | None = None) -> str:
    """Sixteen hexadecimal digits of the SHA-256 of the content: the id of a record that brings none."""
    told = f"{prompt}\0{target}" if form is None else f"{prompt}\0{target}\0{canonical_json(form_document(form))}"
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def form_document(form: Chat | Tokenized) -> list[Any]:
    """A form as plain data, for fingerprints."""
    if isinstance(form, Chat):
        return ["chat", list(form.messages), list(form.learned), list(form.tools)]
    return ["tokens", list(form.ids), list(form.learned)]


def _identity(row: Row, column: str | None, content: Content, seen: dict[str, str]) -> str:
    key = read_key(row, column) if column else None
    if key is None:
        return content_id(content.prompt, content.target, content.form)
    if key in seen:
        raise DataError(f"{row.where}: id {key[:80]!r} was used before, in {seen[key]}; make the ids unique.")
    seen[key] = row.where
    return key
