"""Every error a user can meet is one sentence: what was expected where, and what to do.

The command line prints the sentence and ends with the exit code of the class; no traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ImprintError(Exception):
    """The job could not finish. Exit code 3."""

    exit_code = 3


class UsageError(ImprintError):
    """The request itself is wrong: an unknown name, a bad value, a missing file. Exit code 64."""

    exit_code = 64


class DataError(UsageError):
    """The data cannot be used as asked: broken JSON, a missing column, too few records. Exit code 64."""


class ModelError(UsageError):
    """The model cannot be loaded safely or at all. Exit code 64."""


class InvalidAudit(ImprintError):
    """The numbers would not mean what they say: too few records for the claim. Exit code 2."""

    exit_code = 2


def first_line(error: BaseException) -> str:
    """What another library's exception says, in a line; its name where it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """The sentence for an unknown name, with the nearest right one first.

    >>> unknown("method", "lorra", ["lora", "prefix"])
    "unknown method 'lorra': did you mean 'lora'? Known: lora, prefix."
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f" did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {name!r}:{hint} Known: {', '.join(names)}."
