"""How far apart two samples are: of losses (one number per record) and of hidden states (one vector per record)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.distance import cdist
from scipy.stats import ks_2samp, wasserstein_distance

from imprint.errors import DataError, UsageError
from imprint.measures.auc import codes
from imprint.measures.tpr import two_sides
from imprint.types import Floats

ROUNDING = 1e-10
"""Two permutations that differ by less than this share of the mean distance are the same number, rounded twice."""


@dataclass(frozen=True)
class KS:
    """The two-sample test of Kolmogorov and Smirnov.

    Attributes:
        statistic: the largest gap between the two empirical distribution functions, 0 to 1. As an attack with one
            threshold it is the largest |TPR − FPR|.
        p: two-sided; supposes independent records.
    """

    statistic: float
    p: float


@dataclass(frozen=True)
class Energy:
    """The energy distance of two samples.

    Attributes:
        value: 2 E|X − Y| − E|X − X'| − E|Y − Y'| ≥ 0, in the unit of the vectors.
        relative: value / (2 E|X − Y|), 0 to 1, comparable between layers of different scale; 0 if nothing differs.
        p: of the permutation test that both samples have one distribution.
    """

    value: float
    relative: float
    p: float


@dataclass(frozen=True)
class Gap:
    """Members against non-members.

    Attributes:
        ks: of their losses.
        wasserstein: of their losses, nats.
    """

    ks: KS
    wasserstein: float


@dataclass(frozen=True)
class Moved:
    """The same records before and after tuning.

    Attributes:
        fall: mean loss before − mean loss after, nats; positive where tuning helped.
        wasserstein: between the two distributions of losses, nats; equals |fall| where the whole distribution slid.
    """

    fall: float
    wasserstein: float


@dataclass(frozen=True)
class LossShift:
    """What tuning did to the losses of both sides.

    Attributes:
        before, after: members against non-members, under the base and under the tuned model.
        members, nonmembers: each side against itself, base to tuned.
    """

    before: Gap
    after: Gap
    members: Moved
    nonmembers: Moved


def loss_shift(
    members_base: ArrayLike, nonmembers_base: ArrayLike, members_tuned: ArrayLike, nonmembers_tuned: ArrayLike
) -> LossShift:
    """How the losses of members and of non-members moved apart.

    Args:
        members_base, nonmembers_base: [M] and [N] mean negative log-likelihoods per token under the base, nats.
        members_tuned, nonmembers_tuned: the same records in the same order under the tuned model.

    Raises DataError for an empty side, NaN, or sides that differ in size before and after.

    >>> found = loss_shift([3, 4, 5, 6], [3, 4, 5, 6], [1, 2, 3, 4], [3, 4, 5, 5])
    >>> found.before.ks.statistic, found.after.ks.statistic, found.after.wasserstein
    (0.0, 0.5, 1.75)
    >>> found.members, found.nonmembers.fall
    (Moved(fall=2.0, wasserstein=2.0), 0.25)
    """
    before = two_sides(members_base, nonmembers_base)
    after = two_sides(members_tuned, nonmembers_tuned)
    for x, y in zip(before, after, strict=True):
        if len(x) != len(y):
            raise DataError(
                f"a shift needs the same records twice: there are {len(x)} losses before and {len(y)} after tuning."
            )
    (members, tuned_members), (nonmembers, tuned_nonmembers) = zip(before, after, strict=True)
    return LossShift(
        before=_gap(members, nonmembers),
        after=_gap(tuned_members, tuned_nonmembers),
        members=_moved(members, tuned_members),
        nonmembers=_moved(nonmembers, tuned_nonmembers),
    )


def _gap(members: Floats, nonmembers: Floats) -> Gap:
    return Gap(kolmogorov_smirnov(members, nonmembers), wasserstein(members, nonmembers))


def _moved(before: Floats, after: Floats) -> Moved:
    return Moved(float(before.mean() - after.mean()), wasserstein(before, after))


def kolmogorov_smirnov(a: ArrayLike, b: ArrayLike) -> KS:
    """The test of Kolmogorov and Smirnov for [N] and [M] numbers; DataError for an empty side or NaN.

    >>> found = kolmogorov_smirnov([1, 2, 3], [4, 5, 6])    # 2 of the 20 ways to label six numbers are as extreme
    >>> found.statistic, round(found.p, 6)
    (1.0, 0.1)
    """
    found = ks_2samp(*two_sides(a, b))
    return KS(float(found.statistic), float(found.pvalue))


def wasserstein(a: ArrayLike, b: ArrayLike) -> float:
    """The earth mover's distance (Wasserstein-1) of [N] and [M] numbers, in their unit: nats for losses.

    DataError for an empty side or NaN.

    >>> wasserstein([0, 1], [2, 4])
    2.5
    """
    return float(wasserstein_distance(*two_sides(a, b)))


def energy_distance(
    x_ND: ArrayLike,
    y_MD: ArrayLike,
    permutations: int = 999,
    seed: int = 0,
    x_groups: Iterable[object] | None = None,
    y_groups: Iterable[object] | None = None,
) -> Energy:
    """The energy distance of two samples of vectors with its permutation test (Székely and Rizzo 2004, 2013).

    It was chosen over the maximum mean discrepancy because it has no bandwidth to choose, is zero for equal
    distributions only, and scales with the vectors, so `relative` compares layers. The test statistic is
    N·M/(N + M) times the distance, p = (1 + #{permuted ≥ observed}) / (1 + permutations): valid at any sample size,
    and never 0. O((N + M)² · permutations) in one matrix product.

    Args:
        x_ND: [N, D].
        y_MD: [M, D].
        permutations: random relabellings.
        seed: of the generator that draws them.
        x_groups: [N] labels of clusters within which records are dependent; a cluster is relabelled as a whole. None
            or NaN among them marks a record on its own.
        y_groups: [M] labels; given if and only if `x_groups` is.

    Raises:
        DataError: shapes that do not fit, an empty side, values that are not finite, a cluster on both sides.
        UsageError: no permutation.

    >>> energy_distance([[0.0], [1.0]], [[0.0], [1.0]], permutations=9).value
    0.0
    """
    x, y = _vectors(x_ND, y_MD)
    if permutations < 1:
        raise UsageError(f"a permutation test needs at least 1 permutation, not {permutations}.")
    sides = _relabelled(*_clusters(len(x), len(y), x_groups, y_groups), permutations, seed)
    both = np.concatenate([x, y])
    distances = cdist(both, both)
    within_x, between, within_y = _sums(distances, sides)
    n = sides.sum(0)
    m = len(both) - n
    energy = 2 * between / (n * m) - within_x / n**2 - within_y / m**2
    test = n * m / (n + m) * energy
    slack = ROUNDING * len(both) * float(distances.mean())
    p = (1 + np.count_nonzero(test[1:] >= test[0] - slack)) / (1 + permutations)
    value, spread = max(0.0, float(energy[0])), float(2 * between[0] / (n[0] * m[0]))
    return Energy(value, value / spread if spread else 0.0, float(p))


def _sums(distances: Floats, sides: Floats) -> tuple[Floats, Floats, Floats]:
    """[R] each: distances summed within the x side (ordered pairs), between the sides (once), within the y side."""
    within_x = np.einsum("nr,nr->r", sides, distances @ sides)
    between = distances.sum(0) @ sides - within_x
    return within_x, between, distances.sum() - within_x - 2 * between


def _relabelled(groups: NDArray[np.int64], is_x: NDArray[np.bool_], permutations: int, seed: int) -> Floats:
    """[N + M, 1 + permutations] 1 where a record counts as x: as it is in column 0, then clusters relabelled."""
    labels = np.tile(is_x, (1 + permutations, 1))
    labels[1:] = np.random.default_rng(seed).permuted(labels[1:], axis=1)
    sides: Floats = labels[:, groups].T.astype(np.float64)
    return sides


def _clusters(
    N: int, M: int, x_groups: Iterable[object] | None, y_groups: Iterable[object] | None
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """[N + M] the cluster of each record and, per cluster, whether it belongs to x."""
    if (x_groups is None) != (y_groups is None):
        raise DataError("groups are given for one side only: give both, with None for a record on its own.")
    of_x = [None] * N if x_groups is None else list(x_groups)
    of_y = [None] * M if y_groups is None else list(y_groups)
    if (len(of_x), len(of_y)) != (N, M):
        raise DataError(f"every vector needs a group: {N} and {M} vectors, {len(of_x)} and {len(of_y)} groups.")
    groups = codes([*of_x, *of_y])
    if shared := len(np.intersect1d(groups[:N], groups[N:])):
        raise DataError(f"{shared} groups have records on both sides: they cannot be relabelled as a whole.")
    return groups, np.isin(np.arange(groups.max() + 1), groups[:N])


def linear_cka(x_ND: ArrayLike, y_ND: ArrayLike) -> float:
    """Linear centred kernel alignment of two representations of the same N records (Kornblith et al. 2019, eq. 3 to 5).

    ‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖) in Frobenius norms with centred columns: 1 if they agree up to rotation and scale, 0 if
    orthogonal; NaN if either is the same for all records. Biased upwards where N is not much larger than D: compare
    only values of equal N.

    Args:
        x_ND: [N, D].
        y_ND: [N, D'].

    Raises DataError where the shapes do not fit or values are not finite.
    """
    x, y = (_matrix(side) for side in (x_ND, y_ND))
    if len(x) != len(y):
        raise DataError(f"two representations of the same records are needed: there are {len(x)} and {len(y)} rows.")
    x, y = x - x.mean(0), y - y.mean(0)
    if len(x) ** 2 < x.shape[1] * y.shape[1]:
        a, b = x @ x.T, y @ y.T
        cross, scale = float((a * b).sum()), float(np.linalg.norm(a) * np.linalg.norm(b))
    else:
        cross = float(np.linalg.norm(y.T @ x) ** 2)
        scale = float(np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))
    return cross / scale if scale else math.nan


def shift(base_ND: ArrayLike, tuned_ND: ArrayLike) -> float:
    """How far the mean of a cloud of vectors moved, in units of the base's spread.

    ‖mean(tuned) − mean(base)‖ / √(mean ‖base − mean(base)‖²). 0 if the mean did not move, infinite if it moved and
    the base has no spread.

    Args:
        base_ND: [N, D] before.
        tuned_ND: [N, D] after.

    Raises DataError where the shapes do not fit or values are not finite.

    >>> shift([[0.0, 0.0], [2.0, 0.0]], [[0.0, 3.0], [2.0, 3.0]])
    3.0
    """
    base, tuned = _vectors(base_ND, tuned_ND)
    moved = float(np.linalg.norm(tuned.mean(0) - base.mean(0)))
    spread = math.sqrt(float(((base - base.mean(0)) ** 2).sum(1).mean()))
    return moved / spread if spread else (math.inf if moved else 0.0)


def _vectors(x_ND: ArrayLike, y_MD: ArrayLike) -> tuple[Floats, Floats]:
    x, y = _matrix(x_ND), _matrix(y_MD)
    if x.shape[1] != y.shape[1]:
        raise DataError(f"both sides need vectors of one length, not of {x.shape[1]} and {y.shape[1]}.")
    return x, y


def _matrix(rows: ArrayLike) -> Floats:
    matrix = np.asarray(rows, np.float64)
    if matrix.ndim != 2 or not matrix.size:
        raise DataError(f"one vector per record is needed, at least one record: the shape is {matrix.shape}.")
    if not np.isfinite(matrix).all():
        raise DataError(f"{np.count_nonzero(~np.isfinite(matrix))} of {matrix.size} values are not finite.")
    return matrix
