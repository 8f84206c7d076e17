"""The TPR at a false-positive rate with an interval by drawing subjects anew, of members and of non-members.

Few non-members place a threshold badly, and the records of one subject agree: so whole subjects are drawn on both
sides, and the threshold with them (Davison and Hinkley 1997, §3.8). A bootstrap cannot vary what the sample does not:
its interval is joined with that of `tpr_at_fpr`, of which it is a check by other means.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from imprint.errors import DataError, UsageError
from imprint.measures.auc import Codes, codes
from imprint.measures.tpr import ROUNDING, TPR, checked_level, tpr_at_fpr, two_sides
from imprint.types import Floats

DRAWS = 2000
_CHUNK = 200
"""Draws at a time: what is made of them stays small."""


@dataclass(frozen=True)
class Draws:
    """Subjects of both sides, drawn with replacement. B draws, M members, N non-members.

    Attributes:
        subjects: [M] and [N] codes 0, 1, … of the subjects of each side.
        times: [B, subjects] how often each is drawn, for both sides.
    """

    subjects: tuple[Codes, Codes]
    times: tuple[NDArray[np.int16], NDArray[np.int16]]


def draw(
    member_groups: Iterable[object], nonmember_groups: Iterable[object], count: int = DRAWS, seed: int = 0
) -> Draws:
    """As many subjects of each side as it has, `count` times. The same groups and seed give the same draws.

    Args:
        member_groups: [M] labels of subjects; None or NaN among them marks a record on its own.
        nonmember_groups: [N] labels.

    Raises:
        UsageError: fewer than two draws.
    """
    if count < 2:
        raise UsageError(f"a bootstrap needs at least 2 draws, not {count}.")
    subjects = codes(member_groups), codes(nonmember_groups)
    rng = np.random.Generator(np.random.PCG64(seed))
    first, second = (_times(1 + int(side.max(initial=-1)), count, rng) for side in subjects)
    return Draws(subjects, (first, second))


def tpr_over_subjects(
    member_scores: ArrayLike, nonmember_scores: ArrayLike, fpr: float, draws: Draws, level: float = 0.95
) -> TPR:
    """`tpr_at_fpr` with an interval that contains its own: value, threshold and counts are the same.

    Args:
        member_scores: [M] scores, higher = more likely a member.
        nonmember_scores: [N] scores.
        fpr: between 0 and 1, for example 0.01.
        draws: of `draw`, for the same records in the same order.
        level: confidence level of the two-sided interval.

    Raises as `tpr_at_fpr`; DataError also where the draws are of other numbers of records.

    >>> x, y = np.arange(10.0, 60.0), np.arange(40.0)
    >>> f"{tpr_at_fpr(x, y, 0.1):.2f}", f"{tpr_over_subjects(x, y, 0.1, draw(range(50), range(40))):.2f}"
    ('0.48 [0.28, 0.65]', '0.48 [0.28, 0.65]')
    """
    x, y = two_sides(member_scores, nonmember_scores)
    if (len(x), len(y)) != tuple(map(len, draws.subjects)):
        raise DataError(
            f"draws and scores must be of the same records: {len(x)} and {len(y)} scores, "
            f"{len(draws.subjects[0])} and {len(draws.subjects[1])} records drawn from."
        )
    found = tpr_at_fpr(x, y, fpr, level, *draws.subjects)
    tail = (1 - checked_level(level)) / 2
    low, high = np.quantile(np.concatenate(list(_resampled(x, y, fpr, draws))), [tail, 1 - tail])
    return replace(found, low=min(float(low), found.low), high=max(float(high), found.high))


def _times(subjects: int, count: int, rng: np.random.Generator) -> NDArray[np.int16]:
    """[B, subjects] how often each is among as many drawn with replacement."""
    times = np.empty((count, subjects), np.int16)
    for start in range(0, count, _CHUNK):
        part = times[start : start + _CHUNK]
        drawn = (rng.random(part.shape) * subjects).astype(np.int64) + subjects * np.arange(len(part))[:, None]
        part[:] = np.bincount(drawn.ravel(), minlength=part.size).reshape(part.shape)
    return times


def _resampled(x: Floats, y: Floats, fpr: float, draws: Draws) -> Iterator[Floats]:
    """The TPR of each draw: a record drawn twice counts twice, for the threshold as for the share."""
    order_M, order_N = np.argsort(-x), np.argsort(-y)
    above = np.searchsorted(-x[order_M], -y[order_N], "left")  # members strictly above each non-member, highest first
    subject_M, subject_N = draws.subjects[0][order_M], draws.subjects[1][order_N]
    for start in range(0, len(draws.times[0]), _CHUNK):
        part = slice(start, start + _CHUNK)
        members = _running(draws.times[0][part], subject_M)
        nonmembers = _running(draws.times[1][part], subject_N)[:, 1:]
        total = nonmembers[:, -1]
        allowed = np.minimum((fpr * total + ROUNDING).astype(np.int64), total - 1)
        threshold = np.sum(nonmembers <= allowed[:, None], axis=1)  # the (allowed + 1)-th largest drawn
        found = members[np.arange(len(members)), above[threshold]]
        yield found / members[:, -1]


def _running(times: NDArray[np.int16], subjects: Codes) -> NDArray[np.int32]:
    """[B, 1 + records] how many of the first 0, 1, … records are drawn."""
    running = np.zeros((len(times), 1 + len(subjects)), np.int32)
    np.cumsum(times[:, subjects], axis=1, out=running[:, 1:])
    return running
