"""One record as it was read, and what may be taken from it: every refusal names the file, the line and the column."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

from imprint.errors import DataError
from imprint.types import Chat, Tokenized

DEEPEST = 32
"""Levels of nesting in a cell; more is no conversation."""


class Row(NamedTuple):
    """One record as it was read. `columns` are all the columns there are; `values` may hold only those asked for."""

    label: str
    unit: str
    number: int
    values: dict[str, Any]
    columns: tuple[str, ...]

    @property
    def where(self) -> str:
        return f"{self.label}, {self.unit} {self.number}"


class Content(NamedTuple):
    """What a row says: the two texts of an `Example`, and what is encoded in their place."""

    prompt: str
    target: str
    form: Chat | Tokenized | None = None
    empty: bool = False


def value_of(row: Row, column: str) -> Any:
    """Whatever `column` holds.

    Raises:
        DataError: there is no such column.
    """
    if column not in row.values:
        raise DataError(f"{row.where}: {missing_column(column, row.columns)}")
    return row.values[column]


def missing_column(column: str, columns: Collection[str]) -> str:
    """The sentence for a column that is not there, with the nearest that is."""
    near = difflib.get_close_matches(column, columns, n=1, cutoff=0.5)
    hint = f" did you mean {near[0]!r}?" if near else ""
    return f"no column {column!r}:{hint} Columns found: {shown(columns)}."


def read_text(row: Row, column: str) -> str:
    """The text in `column`.

    Raises:
        DataError: there is no such column, or what it holds is not Unicode text.
    """
    return checked_text(row, column, value_of(row, column))


def optional_text(row: Row, column: str) -> str:
    """The text in `column`, or nothing where there is no such column or it holds null."""
    return read_text(row, column) if row.values.get(column) is not None else ""


def checked_text(row: Row, column: str, value: Any) -> str:
    """The string itself; JSON can spell halves of surrogate pairs, which no file and no tokenizer takes.

    Raises:
        DataError: it is none, or holds such a half.
    """
    if not isinstance(value, str):
        raise refused(row, column, f"is {kind(value)}; expected a string. Fix or delete the record.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        place = f"{row.where}: character {error.start + 1} of column {column!r}"
        raise DataError(f"{place} is half a surrogate pair, not Unicode text; remove it.") from error
    return value


def checked_json(row: Row, column: str, value: Any, depth: int = 0) -> Any:
    """The value itself, where JSON can say it: what a template is given, and what fingerprints are made of.

    Raises:
        DataError: it holds something else (a date, bytes, NaN), a key that is no string, or is nested too deeply.
    """
    if depth > DEEPEST:
        raise refused(row, column, f"is nested more than {DEEPEST} levels deep; fix or delete the record.")
    if isinstance(value, str):
        return checked_text(row, column, value)
    if isinstance(value, list):
        return [checked_json(row, column, item, depth + 1) for item in value]
    if isinstance(value, dict):
        items = value.items()
        return {checked_text(row, column, key): checked_json(row, column, item, depth + 1) for key, item in items}
    if value is None or isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise refused(row, column, f"holds {kind(value)}; expected what JSON can say. Fix or delete the record.")


def refused(row: Row, column: str, why: str) -> DataError:
    """The sentence for a cell that cannot be used."""
    return DataError(f"{row.where}: column {column!r} {why}")


def kind(value: Any) -> str:
    """What a value is, for a message: `null`, `a list`.

    >>> kind(None), kind([])
    ('null', 'a list')
    """
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return "null" if value is None else f"a {type(value).__name__}"


def shown(columns: Iterable[str], most: int = 20) -> str:
    """Column names for a message: printable, and no longer than a reader wants, whatever the file holds."""
    names = [name if name.isprintable() else ascii(name) for name in columns]
    short = [name if len(name) <= 40 else f"{name[:40]}…" for name in names[:most]]
    return ", ".join(short + ["…"] * (len(names) > most)) or "none"


def read_key(row: Row, column: str, *, optional: bool = False) -> str | None:
    """An id or group: a string or a whole number; None where it is null or empty and may be.

    Raises:
        DataError: there is no such column, or it holds something else.
    """
    value = value_of(row, column)
    if value is None or value == "":
        if optional:
            return None
        raise refused(row, column, "is empty; every record needs an id. Give it one.")
    if isinstance(value, str) and "\0" not in value:
        return read_text(row, column)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    what = "holds a NUL character" if isinstance(value, str) else f"is {kind(value)}"
    raise refused(row, column, f"{what}; expected a string or a whole number.")


_YES, _NO = ("true", "1", "yes", "member", "members"), ("false", "0", "no", "nonmember", "nonmembers")
_SAID: dict[str, dict[str, str]] = {
    "member": {**dict.fromkeys(_YES, "member"), **dict.fromkeys(_NO, "nonmember")},
    "split": {
        **dict.fromkeys(("train", "training", "member", "members"), "member"),
        **dict.fromkeys(("test", "testing", "nonmember", "nonmembers", "heldout", "holdout"), "nonmember"),
        **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    },
}
"""Column that says who was tuned on → what stands in it, letters and digits alone → the part."""


def side_of(row: Row) -> str:
    """`member`, `nonmember` or `validation`, as the record's column `member` or else `split` says.

    Raises:
        DataError: there is neither, or it says something else.
    """
    column = next((name for name in _SAID if name in row.columns), None)
    if column is None:
        found = f"columns found: {shown(row.columns)}"
        raise DataError(f"{row.where}: expected a column `member` or `split` that says who was tuned on; {found}.")
    value = value_of(row, column)
    if isinstance(value, bool | int):
        value = str(int(value))
    said = "".join(letter for letter in value.casefold() if letter.isalnum()) if isinstance(value, str) else ""
    if said not in _SAID[column]:
        what = repr(value[:40]) if isinstance(value, str) else kind(value)
        known = "true or false" if column == "member" else "train, test or validation"
        raise refused(row, column, f"is {what}; expected {known}.")
    return _SAID[column][said]
