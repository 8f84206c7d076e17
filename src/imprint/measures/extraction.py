"""Extraction: whether a model can be made to write a record's suffix, given what stands before it.

Discoverable extraction (Carlini 2021, 2023) asks whether greedy decoding writes the suffix exactly; the probabilistic
one (Hayes et al. 2024, "Measuring memorization through probabilistic discoverable extraction") how likely sampling is
to, within n tries. Both follow from a teacher-forced pass without generating a token. What a model would have written
anyway is no memory of the record, so shares stand beside those of non-members and of the untouched base.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from imprint.errors import DataError, InvalidAudit, UsageError
from imprint.measures.auc import Codes, codes
from imprint.measures.threshold import inflation
from imprint.measures.tpr import checked_level, clopper_pearson
from imprint.types import Floats, Interval

ROUNDING = 1e-4
"""A sum of float32 log-probabilities may lie so far above 0."""
SMALL = -37.0
"""Below this log p, −log(1 − p) is p in float64."""


@dataclass(frozen=True)
class Excess(Interval):
    """A share less that of a control.

    Attributes:
        value: between −1 and 1, with `low` and `high`.
        p: exact two-sided p-value of no difference.
    """

    p: float


@dataclass(frozen=True)
class Extraction:
    """Shares of records that can be extracted, and how far they exceed what is no memory.

    Attributes:
        members: share of the members, from the tuned model.
        nonmembers: share of records it was not tuned on.
        base: share of the members, from the untouched base.
        over_nonmembers: members less non-members.
        over_base: the tuned model less the base, on the same members.
        records: members, non-members.
        extracted: members from the tuned model, non-members from it, members from the base.
    """

    members: Interval
    nonmembers: Interval
    base: Interval
    over_nonmembers: Excess
    over_base: Excess
    records: tuple[int, int]
    extracted: tuple[int, int, int]


def extraction_probability(log_p: ArrayLike, n: ArrayLike) -> Floats:
    """1 − (1 − p)^n: that n samples hold the suffix at least once.

    Computed as 1 − exp(−n · −log(1 − p)) from logarithms, so that neither a p of 1e-400 nor an n of 1e300 is lost.

    Args:
        log_p: log-probability of the suffix in one sample, nats; any shape. Up to 1e-4 above 0 counts as 0, NaN gives
            NaN.
        n: tries, at least 1; one number, or of a shape that fits.

    Raises:
        DataError: a log-probability above 0.
        UsageError: fewer than one try.

    >>> round(float(extraction_probability(math.log(1e-3), 1000)), 6)
    0.632305
    """
    tries = np.asarray(n, np.float64)
    if not np.all(tries >= 1):
        raise UsageError(f"tries: at least one is needed, not {n!r}.")
    with np.errstate(over="ignore"):
        found: Floats = -np.expm1(-np.exp(np.log(tries) + _log_hazard(log_p)))
    return found


def tries_needed(log_p: ArrayLike, probability: float) -> Floats:
    """log(1 − probability)/log(1 − p): after how many samples the suffix is there with this probability.

    A real number: whole tries are its ceiling, and at least one. Infinite beyond 1.8e308, and where p is 0.

    Args:
        log_p: as in `extraction_probability`.
        probability: strictly between 0 and 1.

    Raises:
        DataError: a log-probability above 0.
        UsageError: a probability outside (0, 1).

    >>> round(float(tries_needed(math.log(1e-3), 0.5)), 2)
    692.8
    """
    with np.errstate(over="ignore"):
        found: Floats = np.exp(_log_tries(log_p, probability))
    return found


def extractable(log_p: ArrayLike, n: float, probability: float) -> NDArray[np.bool_]:
    """[K] whether each suffix is (n, p)-discoverably extractable: n samples hold it with at least this probability.

    Raises DataError for NaN (with the number), which would pass for "no"; else as `extraction_probability`.
    """
    found = extraction_probability(log_p, n)
    _no_nan(found)
    return found >= _inside(probability)


def extraction(
    members: ArrayLike,
    nonmembers: ArrayLike,
    base: ArrayLike,
    level: float = 0.95,
    member_groups: Iterable[object] | None = None,
    nonmember_groups: Iterable[object] | None = None,
) -> Extraction:
    """Shares extracted, and their excess over both controls.

    Shares have Clopper and Pearson's interval, with groups by design effects (Korn and Graubard 1998). An excess has
    one put together from those of its two shares (Newcombe 1998), with their correlation where the records are the
    same. Its p is exact: Fisher's test against non-members, McNemar's against the base. With groups both compare
    groups, by whether any record of it was extracted and by whether more or fewer of its records were.

    Args:
        members: [M] whether each member was extracted from the tuned model: `Suffixes.greedy`, `extractable`, or what
            generated texts say.
        nonmembers: [N] the same for records it was not tuned on.
        base: [M] the same for the members, from the untouched base.
        level: confidence level of the two-sided intervals.
        member_groups: [M] labels of subjects within which records are dependent; None marks a record on its own.
        nonmember_groups: [N] labels; given if and only if `member_groups` is.

    Raises:
        InvalidAudit: no member or no non-member.
        DataError: other than true and false, or numbers that do not fit.
        UsageError: a level outside (0, 1).

    >>> found = extraction([True] * 6 + [False] * 14, [False] * 20, [True] + [False] * 19)
    >>> f"{found.members:.2f}", round(found.over_nonmembers.p, 3), round(found.over_base.p, 4)    # and 2 · 2⁻⁵
    ('0.30 [0.12, 0.54]', 0.02, 0.0625)
    """
    x, y, b = (_hits(side) for side in (members, nonmembers, base))
    if not len(x) or not len(y):
        raise InvalidAudit(f"extraction needs members and non-members: there are {len(x)} and {len(y)} suffixes.")
    if len(x) != len(b):
        raise DataError(f"the base is asked for the same members: there are {len(x)}, and {len(b)} of the base.")
    of_x, of_y = _subjects(member_groups, len(x)), _subjects(nonmember_groups, len(y))
    if (member_groups is None) != (nonmember_groups is None):
        raise DataError("groups are given for one side only: give both, with None for a record on its own.")
    in_members, in_nonmembers, in_base = _share(x, of_x, level), _share(y, of_y, level), _share(b, of_x, level)
    varies = 0 < x.mean() < 1 and 0 < b.mean() < 1
    # k subjects cannot prove that tuned model and base agree always, which would leave their difference no error.
    correlation = min(float(np.corrcoef(x, b)[0, 1]), 1 - 1 / len(np.unique(of_x))) if varies else 0.0
    return Extraction(
        in_members,
        in_nonmembers,
        in_base,
        _excess(in_members, in_nonmembers, 0.0, _fisher(x, y, of_x, of_y)),
        _excess(in_members, in_base, correlation, _mcnemar(x, b, of_x)),
        (len(x), len(y)),
        (int(x.sum()), int(y.sum()), int(b.sum())),
    )


def longest_run(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens of the longest verbatim run that both hold, wherever it stands.

    >>> longest_run([1, 2, 3, 4, 9], [7, 2, 3, 4, 5])
    3
    """
    x, y = np.asarray(a), np.asarray(b)
    runs, most = np.zeros(len(y) + 1, np.int64), 0
    for token in x:
        runs[1:] = np.where(y == token, runs[:-1] + 1, 0)  # the right side is a new array: runs[:-1] is still the old
        most = max(most, int(runs.max()))
    return most


def edit_distance(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens to insert, delete or replace to make one of the other. Levenshtein 1966.

    >>> edit_distance([1, 2, 3, 4], [2, 3, 5, 4])    # without the 1, with the 5
    2
    """
    y = np.asarray(b)
    steps = np.arange(len(y) + 1)
    row = steps
    for n, token in enumerate(np.asarray(a), 1):
        best = np.concatenate([[n], np.minimum(row[1:] + 1, row[:-1] + (y != token))])
        row = np.minimum.accumulate(best - steps) + steps  # insertions, from wherever they are cheapest
    return int(row[-1])


def normalised_edit_distance(a: Sequence[int], b: Sequence[int]) -> float:
    """`edit_distance` over the longer length: 0 for equal sequences (two empty ones too), 1 for nothing in common.

    >>> normalised_edit_distance([1, 2, 3, 4], [2, 3, 5, 4])
    0.5
    """
    return edit_distance(a, b) / max(1, len(a), len(b))


def _log_hazard(log_p: ArrayLike) -> Floats:
    """log(−log(1 − p)): the n-th try needs no power, log(−log(1 − P)) = log n + this."""
    given = np.asarray(log_p, np.float64)
    if np.any(given > ROUNDING):
        raise DataError(f"a log-probability is at most 0: the largest is {np.nanmax(given):g}.")
    x = np.minimum(given, 0.0)
    with np.errstate(divide="ignore"):  # p = 1 is found at once: log(−log 0) = ∞
        near, far = np.log(-np.expm1(x)), np.log1p(-np.exp(x))
        hazard = np.log(-np.where(x > -math.log(2), near, far))
    return np.where(x < SMALL, x, hazard)


def _log_tries(log_p: ArrayLike, probability: float) -> Floats:
    return math.log(-math.log1p(-_inside(probability))) - _log_hazard(log_p)


def _inside(probability: float) -> float:
    if not 0 < probability < 1:
        raise UsageError(f"a probability must lie strictly between 0 and 1, not {probability}.")
    return probability


def _no_nan(log_p: Floats) -> None:
    bad = int(np.isnan(log_p).sum())
    if bad:
        raise DataError(
            f"{bad} of {log_p.size} suffixes have a log-probability of NaN: find out why, rather than dropping them."
        )


def _hits(side: ArrayLike) -> NDArray[np.bool_]:
    hits = np.asarray(side)
    if hits.ndim != 1 or not np.isin(hits, (0, 1)).all():
        raise DataError("whether a record was extracted is true or false, one for each.")
    return hits.astype(bool)


def _subjects(groups: Iterable[object] | None, records: int) -> Codes:
    found = np.arange(records) if groups is None else codes(groups)
    if len(found) != records:
        raise DataError(f"every record needs a group: {records} records, {len(found)} groups.")
    return found


def _share(hits: NDArray[np.bool_], subjects: Codes, level: float) -> Interval:
    effect = inflation(hits, subjects, checked_level(level))
    found, trials = hits.sum() / effect, len(hits) / effect  # of Korn and Graubard's effective records, not whole ones
    return Interval(float(hits.mean()), *clopper_pearson(found, trials, level))


def _excess(one: Interval, other: Interval, correlation: float, p: float) -> Excess:
    def joined(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a + b * b - 2 * correlation * a * b))

    value = one.value - other.value
    down = joined(one.value - one.low, other.high - other.value)
    up = joined(one.high - one.value, other.value - other.low)
    return Excess(value, max(-1.0, value - down), min(1.0, value + up), p)


def _fisher(x: NDArray[np.bool_], y: NDArray[np.bool_], of_x: Codes, of_y: Codes) -> float:
    """Fisher's exact test of groups any record of which was extracted, against groups of the other side."""
    from scipy.stats import fisher_exact  # half a second, needed here alone

    sides = np.bincount(of_x, x) > 0, np.bincount(of_y, y) > 0
    return float(fisher_exact([[int(found.sum()), int((~found).sum())] for found in sides]).pvalue)


def _mcnemar(x: NDArray[np.bool_], b: NDArray[np.bool_], subjects: Codes) -> float:
    """McNemar's exact test: of the groups with more or fewer records extracted, half are expected to have more."""
    from scipy.stats import binomtest

    change = np.bincount(subjects, x) - np.bincount(subjects, b)
    more, fewer = int(np.sum(change > 0)), int(np.sum(change < 0))
    return float(binomtest(more, more + fewer).pvalue) if more + fewer else 1.0
