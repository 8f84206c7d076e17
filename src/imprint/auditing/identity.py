"""Ids that tell nobody whose record it is but the holder of a key.

A record's id may be a customer's name, and a content hash can be guessed by whoever guesses the content. What is
written carries HMAC-SHA256 of the id under a key that lies outside of the output folder; with the key and the ids at
hand, anybody can find a record again: `hmac.new(key, id.encode(), "sha256").hexdigest()[:16]`.
"""

from __future__ import annotations

import hmac
import os
import secrets
from dataclasses import replace
from pathlib import Path

from imprint.data import Pool
from imprint.errors import UsageError
from imprint.records import Audit
from imprint.types import Example

DIGITS = 16
SMALLEST = 16
"""Bytes of a key that cannot be guessed."""


def read_key(path: Path) -> bytes:
    """The key in a file; a new one of 32 random bytes where there is no file: `keep_key` writes it.

    Raises:
        UsageError: the file cannot be read, or is too short for a key.
    """
    try:
        key = path.read_bytes().strip() if path.exists() else secrets.token_hex(32).encode()
    except (OSError, ValueError) as error:
        raise UsageError(f"--id-key {path} cannot be read ({error}): give a file, or a name for a new one") from None
    if len(key) < SMALLEST:
        raise UsageError(f"--id-key {path} holds {len(key)} bytes: a key has at least {SMALLEST}")
    return key


def keep_key(path: Path, key: bytes) -> None:
    """Write a new key, for its owner alone to read; one that is there stays as it is.

    Raises:
        UsageError: the file cannot be made, or holds another key by now.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(key)
    except FileExistsError:
        if path.read_bytes().strip() != key:
            raise UsageError(f"--id-key {path} was made by another audit meanwhile: run this one again") from None
    except OSError as error:
        raise UsageError(f"--id-key {path} cannot be made ({error}): give another file") from None


def pseudonym(key: bytes, label: str) -> str:
    """
    >>> pseudonym(b"0123456789abcdef", "customer 12")
    '3a894d516c6f9b08'
    """
    return hmac.new(key, label.encode("utf-8", "surrogatepass"), "sha256").hexdigest()[:DIGITS]


def key_beside(out: Path) -> Path:
    """Where the key of an output folder lies if nobody says otherwise."""
    folder = out.expanduser().resolve()
    return folder.parent / f"{folder.name or 'imprint'}.key"


def hidden(pool: Pool, key: bytes) -> Pool:
    """The same records under other ids and owners."""
    parts = {name: tuple(_hidden(example, key) for example in part) for name, part in pool.parts.items()}
    return replace(pool, parts=parts)


def hidden_audit(audit: Audit, key: bytes) -> Audit:
    """The same of records that have been encoded under the ids that messages may name."""
    names = {example.id: pseudonym(key, example.id) for example in audit.examples}
    scored, tuned = (
        tuple(replace(record, id=names.get(record.id, record.id)) for record in some)
        for some in (audit.scored, audit.tuned)
    )
    return replace(audit, examples=tuple(_hidden(e, key) for e in audit.examples), scored=scored, tuned=tuned)


def _hidden(example: Example, key: bytes) -> Example:
    group = None if example.group is None else pseudonym(key, example.group)
    return replace(example, id=pseudonym(key, example.id), group=group)
