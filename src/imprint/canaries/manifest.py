"""The manifest of a set of canaries: what each says, how often it is told, and which way its coin fell.

The file is sealed: `seal` is the SHA-256 of everything else in canonical JSON. Published before the training, it
shows afterwards that nobody chose the coins, or the canaries, by what the model turned out to know.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from imprint.errors import DataError, UsageError
from imprint.spec import canonical_json
from imprint.store import write_text
from imprint.types import Example

VERSION = 1
LARGEST_FILE = 64 * 2**20
"""Bytes."""
MOST_CANDIDATES = 1_000_000
"""Texts that are scored one by one, of all templates together."""
_STRICT = ConfigDict(extra="forbid", strict=True)
_ONE_LINE = r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]+$"
_Text = Annotated[str, Field(min_length=1, max_length=10_000, pattern=_ONE_LINE)]
_Piece = Annotated[str, Field(min_length=1, max_length=50, pattern=_ONE_LINE)]
_Name = Annotated[str, Field(min_length=1, max_length=100, pattern=_ONE_LINE)]


@dataclass(frozen=True)
class Canary:
    """One canary. `prompt` says what kind of thing the secret is; the secret is what was drawn at random.

    Args:
        id: its name in messages.
        family: what kind of secret it is: `digits`, `names`, `rare`, `sample`.
        prompt: what comes before the secret; canaries of one family with the same prompt are of one template.
        secret: what the model may have learned by heart.
        repetitions: copies of it in the data, if it is in there.
        included: whether its coin put it there.
    """

    __pydantic_config__ = _STRICT

    id: _Name
    family: _Name
    prompt: _Text
    secret: _Text
    repetitions: Annotated[int, Field(ge=1, le=100_000)]
    included: bool

    @property
    def text(self) -> str:
        """Prompt and secret as one text."""
        return f"{self.prompt} {self.secret}"

    @property
    def template(self) -> tuple[str, str]:
        """What it has in common with others: family and prompt."""
        return self.family, self.prompt

    def example(self) -> Example:
        """It as a record of plain text."""
        return Example(self.id, "", self.text)


@dataclass(frozen=True)
class Space:
    """All the secrets that could have been drawn: one of each of `parts`, joined by `joint`.

    >>> Space((("a", "b"), ("1", "2")), "-").secrets()
    ['a-1', 'a-2', 'b-1', 'b-2']
    """

    __pydantic_config__ = _STRICT

    parts: Annotated[tuple[Annotated[tuple[_Piece, ...], Field(min_length=1)], ...], Field(min_length=1, max_length=8)]
    joint: Annotated[str, Field(max_length=10)] = ""

    @property
    def size(self) -> int:
        return math.prod(len(part) for part in self.parts)

    def secrets(self) -> list[str]:
        return [self.joint.join(chosen) for chosen in product(*self.parts)]


@dataclass(frozen=True)
class Manifest:
    """A set of canaries, made before the training.

    Args:
        canaries: in the order of their making.
        spaces: family → the secrets that could have been drawn, where they can be counted out.
        model: whose tokenizer and samples they were made with, for people to read.
        seed: what the coins were drawn from; None: the operating system's randomness.
    """

    __pydantic_config__ = _STRICT

    canaries: Annotated[tuple[Canary, ...], Field(min_length=1, max_length=100_000)]
    spaces: dict[_Name, Space]
    model: Annotated[str, Field(max_length=1000)] = ""
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    version: Annotated[int, Field(ge=VERSION, le=VERSION)] = VERSION

    @cached_property
    def seal(self) -> str:
        """SHA-256 of everything else, in hexadecimal digits."""
        return hashlib.sha256(canonical_json(asdict(self)).encode()).hexdigest()

    @property
    def included(self) -> tuple[Canary, ...]:
        """Those that are in the data."""
        return tuple(canary for canary in self.canaries if canary.included)


@dataclass(frozen=True)
class _Sealed:
    """What lies in the file."""

    __pydantic_config__ = _STRICT

    manifest: Manifest
    seal: Annotated[str, Field(min_length=64, max_length=64)]


def candidates(manifest: Manifest, canary: Canary) -> list[str]:
    """Full texts of everything that the canary could have been, in the order of its space.

    Raises:
        UsageError: that cannot be counted out.
    """
    if canary.family not in manifest.spaces:
        raise UsageError(f"{canary.id}: the secrets of the family {canary.family} cannot be counted out")
    return [f"{canary.prompt} {secret}" for secret in manifest.spaces[canary.family].secrets()]


def check_new(path: Path) -> None:
    """
    Raises:
        UsageError: there is a file already, which other models may have been tuned by.
    """
    if path.exists():
        raise UsageError(f"{path} exists, and a model may have been tuned by it: give another name, or move it away")


def write_manifest(path: str | Path, manifest: Manifest) -> None:
    """
    Raises:
        UsageError: there is a file already, which other models may have been tuned by; or it cannot be written.
    """
    path = Path(path)
    check_new(path)
    document = {"seal": manifest.seal, "manifest": asdict(manifest)}
    try:
        write_text(path, canonical_json(document) + "\n")
    except OSError as error:
        raise UsageError(f"{path} cannot be written ({error.strerror}): give another name") from None


def read_manifest(path: str | Path) -> Manifest:
    """The canaries in a file, which is checked and whose seal is whole.

    Raises:
        DataError: it cannot be read, is none, or is not what was sealed.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            raw = file.read(LARGEST_FILE + 1)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); give the file of `imprint canaries make`.") from None
    if len(raw) > LARGEST_FILE:
        raise DataError(f"{path} has more than {LARGEST_FILE >> 20} MiB; expected canaries of `imprint canaries make`.")
    try:
        found = TypeAdapter(_Sealed).validate_json(raw)
    except ValidationError as error:
        raise DataError(f"{path}: {_first(error)}; expected a file of `imprint canaries make`.") from None
    if found.seal != found.manifest.seal:
        raise DataError(
            f"{path} is not what was sealed: its seal is {found.seal[:16]}…, and that of its content "
            f"{found.manifest.seal[:16]}…; take the file that the data were made with."
        )
    for why in _faults(found.manifest):
        raise DataError(f"{path}: {why}; make the canaries anew.")
    return found.manifest


def _first(error: ValidationError) -> str:
    """Where the first fault is and what it is; nothing of what stands there, which may be anything."""
    [first, *_] = error.errors(include_url=False, include_input=False, include_context=False)
    where = ".".join(str(part) for part in first["loc"])[:100]
    shown = where if where.isprintable() else ascii(where)
    return f"{shown}: {first['msg'][:200]}" if shown else str(first["msg"][:200])


def _faults(manifest: Manifest) -> Iterator[str]:
    """What types alone do not say."""
    for what in ("id", "text"):
        [(value, most)] = Counter(getattr(canary, what) for canary in manifest.canaries).most_common(1)
        if most > 1:
            yield f"{most} canaries have the {what} {value[:80]!r}, and each must have one of its own"
    templates = {canary.template for canary in manifest.canaries}
    used = {family for family, _ in templates}
    total = sum(manifest.spaces[family].size for family, _ in templates if family in manifest.spaces)
    if total > MOST_CANDIDATES:
        yield f"its templates have {total:,} candidates, and at most {MOST_CANDIDATES:,} can be scored"
        return
    known = {family: set(space.secrets()) for family, space in manifest.spaces.items() if family in used}
    for canary in manifest.canaries:
        if canary.family in known and canary.secret not in known[canary.family]:
            yield f"{canary.id}: its secret is none of the candidates of its family"
