"""Canaries go into data: the included ones, each as often as its manifest says, at random places of a new file."""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imprint.canaries.check import Check, Checker
from imprint.canaries.files import WRITERS
from imprint.canaries.manifest import Canary, Manifest
from imprint.canaries.telling import Telling, member_values, reading, telling_of
from imprint.data.formats import read_rows
from imprint.data.forms import content_id, examples
from imprint.data.pool import local_path, missing
from imprint.data.row import Row, missing_column
from imprint.errors import DataError, InvalidAudit, UsageError
from imprint.spec import DataSpec
from imprint.store import atomic_file

_Copy = tuple[Canary, int]
"""A canary, and the number of its copy, from 1."""


@dataclass(frozen=True)
class Inserted:
    """What has been written.

    Attributes:
        records: of the data before.
        canaries: that are in now.
        copies: of these, all together.
        telling: how they are told.
        check: whether they reach the model whole; None where that was not looked at.
    """

    records: int
    canaries: int
    copies: int
    telling: Telling
    check: Check | None


def insert(
    manifest: Manifest, data: Path, out: Path, spec: DataSpec | None = None, checker: Checker | None = None
) -> Inserted:
    """Write the data with the included canaries among them, told as the data tell their records.

    The records keep their order; the places are drawn from the seal. With a checker that knows of blocks, a copy that a
    block's end would cut waits for a place where none does.

    Args:
        spec: how the data are read (`telling.reading`; by default as their columns say).
        checker: looks whether every secret reaches the model; nothing is written if one does not.

    Raises:
        UsageError: something cannot be used as asked, or `out` exists.
        InvalidAudit: a canary would not reach the model whole.
    """
    path = _checked(data, out)
    rows = list(read_rows(path, path.name, Counter()))
    spec = spec or reading("auto")
    if spec.id is not None and spec.id not in rows[0].columns:
        raise DataError(f"{rows[0].where}: {missing_column(spec.id, rows[0].columns)}")
    telling = telling_of(spec, rows[0])
    copies = [(canary, n) for canary in manifest.included for n in range(1, canary.repetitions + 1)]
    if not copies:
        raise UsageError("no coin put a canary in: there is nothing to insert")
    told = _told(rows, telling, copies, manifest.seal)
    dice = random.Random(manifest.seal)
    places = [dice.randrange(len(rows) + 1) for _ in copies]
    block = checker.block if checker else None
    lengths = _lengths(rows, checker, telling, copies) if checker and block else None
    order = arranged(places, len(rows), lengths, block)
    check = None
    if checker is not None:
        check = checker.whole(manifest.included, telling)
        if lengths and block:
            cut = [n - len(rows) for n in cut_records(order, lengths, block) if n >= len(rows)]
            check = check.with_blocks(len(copies), [copies[n][0].id for n in cut])
        check.must_pass()
    try:
        with atomic_file(out) as temporary:
            WRITERS[path.suffix.lower()](path, temporary, rows, told, order)
    except OSError as error:
        raise UsageError(f"--out {out} cannot be written ({error.strerror or error}): give another name") from None
    return Inserted(len(rows), len(manifest.included), len(copies), telling, check)


def check_inserted(manifest: Manifest, data: Path, telling: Telling) -> None:
    """Whether a file holds what the manifest says: every included canary as often as it should be, no other at all.

    Raises:
        InvalidAudit: names the first canary of which that is not so.
        DataError: the file cannot be read.
    """
    path = local_path(str(data))
    if path is None or path.is_dir():
        raise missing(str(data))
    spec = telling.spec.model_copy(update={"group": None, "subgroup": None})
    found = Counter(
        content_id(e.prompt, e.target, e.form)
        for _, e in examples(read_rows(path, path.name, Counter()), spec, {}, Counter())
    )
    fillings = [(canary.id, canary.prompt, canary.secret) for canary in manifest.canaries]
    for canary, e in zip(manifest.canaries, telling.examples(fillings), strict=True):
        wanted, have = canary.repetitions * canary.included, found[content_id(e.prompt, e.target, e.form)]
        if have != wanted:
            raise InvalidAudit(
                f"{path.name} holds {canary.id} {have} times, and by the manifest it should {wanted} times: give the "
                "file that `imprint canaries insert` wrote and the model was tuned on"
            )


def arranged(
    places: Sequence[int], rows: int, lengths: Sequence[int] | None = None, block: int | None = None
) -> list[int]:
    """The order of the new file: rows 0, 1, … in their own order, copy n, numbered rows + n, before row places[n].

    Args:
        lengths: tokens of each row, then of each copy.
        block: tokens of the blocks that all is cut into; a copy across the end of one waits.

    >>> arranged([2, 0], 2), arranged([1], 3, [3, 3, 4, 2], 4)    # tokens 3 and 4 lie in two blocks, 6 and 7 in one
    ([3, 0, 1, 2], [0, 1, 3, 2])
    """
    due = deque(sorted(range(len(places)), key=lambda n: places[n]))
    order: list[int] = []
    waiting: list[int] = []
    at = 0
    for row in range(rows + 1):
        while due and places[due[0]] <= row:
            waiting.append(rows + due.popleft())
        for copy in list(waiting):
            size = lengths[copy] if lengths else 1
            if block is None or not _crosses(at, size, block):
                waiting.remove(copy)
                order.append(copy)
                at += size
        if row < rows:
            order.append(row)
            at += lengths[row] if lengths else 1
    return order + waiting


def cut_records(order: Sequence[int], lengths: Sequence[int], block: int) -> list[int]:
    """Which of the records of a file lie in two blocks, by their number."""
    at, found = 0, []
    for number in order:
        if _crosses(at, lengths[number], block):
            found.append(number)
        at += lengths[number]
    return found


def _crosses(at: int, size: int, block: int) -> bool:
    return at // block != (at + size - 1) // block


def _checked(data: Path, out: Path) -> Path:
    path = local_path(str(data))
    if path is None:
        raise missing(str(data))
    kind = path.suffix.lower()
    if path.is_dir() or kind not in WRITERS:
        raise UsageError(f"{data}: canaries go into one file; expected one of {', '.join(WRITERS)}")
    if out.suffix.lower() != kind:
        raise UsageError(f"--out {out}: the data are {kind}, and so is what is written; give a name that ends so")
    if out.exists():
        raise UsageError(f"--out {out} exists: give another name, or move it away")
    return path


def _told(rows: Sequence[Row], telling: Telling, copies: Sequence[_Copy], seal: str) -> list[dict[str, Any]]:
    """A record for each copy, with an id that no other has where there are ids."""
    beside = member_values(rows)
    told = [{**telling(canary.prompt, canary.secret), **beside} for canary, _ in copies]
    column = telling.spec.id or "id"
    known = [row.values.get(column) for row in rows]
    numbers = [value for value in known if isinstance(value, int)]
    first = max(numbers, default=0) + 1
    for n, (canary, copy) in enumerate(copies):
        if len(numbers) == len(rows):
            told[n][column] = first + n
        elif any(value is not None for value in known):
            told[n][column] = f"{canary.id}, copy {copy}, of {seal[:8]}"
    return told


def _lengths(rows: Sequence[Row], checker: Checker, telling: Telling, copies: Sequence[_Copy]) -> list[int]:
    """Tokens of each record, nothing cut, then of each copy."""
    plain = telling.spec.model_copy(update={"group": None, "subgroup": None})
    of_rows = {row.number: checker.length(example) for row, example in examples(rows, plain, {}, Counter())}
    of_canaries = {canary.id: checker.length(telling.example(canary)) for canary, n in copies if n == 1}
    return [of_rows.get(row.number, 0) for row in rows] + [of_canaries[canary.id] for canary, _ in copies]
