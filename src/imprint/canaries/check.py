"""Does a canary reach the model? Told, templated, masked and cut as in the training, all of its secret must be scored.

A secret that is cut off, or that the loss leaves out, is in the data and cannot be learned: such a canary would pass
for one that the model has forgotten.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from imprint.canaries.manifest import Canary
from imprint.canaries.telling import Telling
from imprint.data.templates import Templates
from imprint.data.tokens import Encoded, Encoder
from imprint.errors import InvalidAudit
from imprint.types import Example

UNCUT = 10**9
"""More tokens than any text has."""


@dataclass(frozen=True)
class Check:
    """What was found.

    Attributes:
        canaries: how many were looked at.
        lost: id and reason of each whose secret is not scored whole.
        copies: how many copies of them are packed into blocks; 0 where nothing is known of that.
        cut: ids of the copies that lie in two blocks.
    """

    canaries: int
    lost: tuple[tuple[str, str], ...]
    copies: int = 0
    cut: tuple[str, ...] = ()

    def with_blocks(self, copies: int, cut: Sequence[str]) -> Check:
        return replace(self, copies=copies, cut=tuple(cut))

    def must_pass(self) -> None:
        """
        Raises:
            InvalidAudit: a canary does not reach the model whole.
        """
        if self.lost:
            name, why = self.lost[0]
            raise InvalidAudit(
                f"{len(self.lost)} of {self.canaries} inserted canaries do not reach the model whole; the first is "
                f"{name}: {why}"
            )
        if self.cut:
            raise InvalidAudit(
                f"{len(self.cut)} of {self.copies} copies of canaries lie in two blocks; the first is of "
                f"{self.cut[0]}: give larger blocks with --packing, or pack without cutting records"
            )

    def __str__(self) -> str:
        blocks = f"; none of {self.copies:,} copies is cut by a block" if self.copies else ""
        return f"All tokens of the secret are scored of each of {self.canaries:,} inserted canaries{blocks}"


@dataclass(frozen=True)
class Checker:
    """How the training makes tokens of records.

    Attributes:
        tokenizer: its own, with the chat template that is used.
        max_length: tokens kept of a record.
        eos: whether the end token follows a text (None: a completion).
        block: tokens of the blocks that records are packed into, in the order of the file; None: they are not.
        templates: renders chats.
    """

    tokenizer: Any
    max_length: int
    eos: bool | None = None
    block: int | None = None
    templates: Templates | None = None

    @cached_property
    def encoder(self) -> Encoder:
        return Encoder(self.tokenizer, self.max_length, "keep_start", "target", self.eos, self.templates)

    @cached_property
    def _uncut(self) -> Encoder:
        return replace(self.encoder, max_length=UNCUT)

    def length(self, example: Example) -> int:
        """Tokens of a record, nothing cut."""
        return len(self._uncut(example))

    def whole(self, canaries: Sequence[Canary], telling: Telling) -> Check:
        """Look at every one of them.

        Raises:
            DataError, ModelError: one cannot be told or encoded at all.
        """
        told = telling.examples([(canary.id, canary.prompt, canary.secret) for canary in canaries])
        found = ((c.id, self._why(c, self.encoder(e))) for c, e in zip(canaries, told, strict=True))
        return Check(len(canaries), tuple((name, why) for name, why in found if why))

    def _why(self, canary: Canary, record: Encoded) -> str:
        """Why not all of the secret is scored, or ""."""
        scored = self._plain(record.ids[record.scored].tolist())
        if self._plain(self.tokenizer(canary.secret, add_special_tokens=False).input_ids) in scored:
            return ""
        if record.cut:
            return f"it has more than {self.max_length:,} tokens, and its end is cut off (--max-length)"
        return "its secret is not where the loss is: look at the chat template and the format"

    def _plain(self, ids: Sequence[int]) -> str:
        """What tokens say, white space aside, which a tokenizer may treat in its own way."""
        return "".join(self.tokenizer.decode(ids, skip_special_tokens=True).split())
