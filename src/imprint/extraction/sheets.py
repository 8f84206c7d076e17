"""Extraction as tables: every epoch from the stored scores, and what the kept weights write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from imprint.extraction.spec import ExtractionSpec
from imprint.extraction.summary import Extracted
from imprint.report import words
from imprint.report.sheet import Entry, Sheet
from imprint.types import Interval


def curve_sheet(rows: Sequence[Extracted], asked: ExtractionSpec) -> Sheet:
    """How it grew: the epochs of each cell that say something new, from stored scores alone."""
    header = ("cell", "epoch", "members", "non-members", "members, sampled", "non-members, sampled")
    body: list[tuple[Entry | str, ...]] = [
        (
            words.clean(row.label),
            str(row.epoch) if row.epoch else "0 (base)",
            *(Entry(words.share(x)) for x in _shown(row)),
        )
        for row, before in zip(rows, [None, *rows[:-1]], strict=True)
        if before is None or before.run_id != row.run_id or _shown(before) != _shown(row)
    ]
    plain = ExtractionSpec(tries=asked.tries, probability=asked.probability)
    notes = (
        f"Share of records whose suffix comes out: greedily, and {_sampled(plain)}.",
        "From stored scores; an epoch with the shares of that before is left out. extraction.json has the intervals.",
    )
    return Sheet(f"Extraction by epoch, {_lengths(asked)}", header, tuple(body), notes, group=2)


def _shown(row: Extracted) -> list[float]:
    return [x.value for way in (row.greedy, row.sampled) for x in (way.members, way.nonmembers)]


def written_sheet(rows: Sequence[Extracted], asked: ExtractionSpec, short: Mapping[str, int], flips: int) -> Sheet:
    """What the kept weights write, beside both controls.

    Args:
        short: who → how many of them were too short.
        flips: records for which rounding decided otherwise than in the stored scores.
    """
    header = (
        "cell",
        "epoch",
        "whose",
        "records",
        "greedy",
        "sampled",
        "longest run",
        "edit distance",
        "p",
        "p, sampled",
    )
    notes = [
        f"Greedy: the suffix is written exactly. Sampled: it comes out {_sampled(asked)}.",
        "Longest run: tokens in a row that also stand in the suffix, mean. Edit distance: over its length, median.",
        "p: of members in excess of both non-members and the base by chance, corrected for the number of rows (Holm).",
        *(f"{words.plural(count, 'record')} too short: {words.clean(who)}." for who, count in short.items() if count),
        *map(_finding, rows),
    ]
    if flips:
        notes.append(f"In {words.plural(flips, 'record')} rounding decided otherwise than in the stored scores.")
    body = tuple(line for row in rows for line in _lines(row))
    return Sheet(f"What the kept weights write, {_lengths(asked)}", header, body, tuple(notes), group=3)


def _lines(row: Extracted) -> list[tuple[Entry | str, ...]]:
    members, nonmembers = row.greedy.records
    sides = zip(
        ("members", "non-members", "members, base"),
        (members, nonmembers, members),
        _shares(row),
        row.near,
        ([Entry(words.probability(p)) for p in row.p], [Entry(""), Entry("")], [Entry(""), Entry("")]),
        strict=True,
    )
    return [
        (
            words.clean(row.label),
            str(row.epoch),
            whose,
            Entry(f"{records:,}"),
            *shares,
            Entry(f"{near.run:.1f}"),
            Entry(words.share(near.distance)),
            *p,
        )
        for whose, records, shares, near, p in sides
    ]


def _shares(row: Extracted) -> list[tuple[Entry, Entry]]:
    """Greedy and sampled of members, of non-members, and of members by the base."""
    ways = row.greedy, row.sampled
    greedy, sampled = ([_share(x) for x in (way.members, way.nonmembers, way.base)] for way in ways)
    return list(zip(greedy, sampled, strict=True))


def _share(x: Interval) -> Entry:
    return Entry(words.share(x.value), words.share(x.low), words.share(x.high))


def _finding(row: Extracted) -> str:
    way = words.listed(row.claims)
    said = f"members come out {way}, beyond both controls" if row.claims else "no excess over both controls is shown"
    return f"{words.clean(row.label)}, epoch {row.epoch}: {said}."


def _lengths(asked: ExtractionSpec) -> str:
    return f"{words.plural(asked.prefix, 'token')} given, {asked.suffix:,} to come"


def _sampled(asked: ExtractionSpec) -> str:
    """
    >>> _sampled(ExtractionSpec(tries=100, temperature=0.7, top_k=40))
    'within 100 samples (temperature 0.7, top-k 40) with probability 0.5 or more'
    """
    parts = [f"temperature {asked.temperature:g}"]
    parts += [f"top-k {asked.top_k:,}"] if asked.top_k else []
    parts += [f"top-p {asked.top_p:g}"] if asked.top_p else []
    tries = words.plural(asked.tries, "sample")
    return f"within {tries} ({', '.join(parts)}) with probability {asked.probability:g} or more"
