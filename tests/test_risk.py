"""Counterfactual memorization, and the agreement with it: against naive computations and worlds that know the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import spearmanr, ttest_ind

from imprint.errors import DataError, InvalidAudit, UsageError
from imprint.measures.bootstrap import draw
from imprint.measures.tpr import clopper_pearson
from imprint.risk import FEWEST, agreement, counterfactual
from imprint.types import Shadows


def world(N: int, S: int, seed: int, memorized=None, noise=0.2):
    """Losses of a difficulty of their own, less what a record is remembered by where the model holds it."""
    rng = np.random.default_rng(seed)
    first = rng.permuted(np.tile(np.arange(N)[:, None] % 2 == 0, (1, S // 2)), axis=0)
    inside = np.stack([first, ~first], axis=2).reshape(N, S)
    truth = rng.gamma(1.0, 0.3, N) if memorized is None else memorized(rng, N)
    losses = rng.normal(3, 0.7, (N, 1)) - truth[:, None] * inside + rng.normal(0, noise, (N, S))
    return Shadows(losses, inside), truth


def test_known_values():
    # in: 1, 2, 6, mean 3, variance 7; out: 5, 9, mean 7, variance 8. 7 - 3 = 4; √(7/3 + 8/2) = √(19/3)
    found = counterfactual(Shadows(np.array([[1.0, 2, 6, 5, 9]]), np.array([[True, True, True, False, False]])))
    assert found.values[0] == 4
    assert found.errors[0] == pytest.approx(math.sqrt(19 / 3))


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_intervals_are_welchs(level):
    shadows, _ = world(25, 10, 0)
    shadows.inside[:5] = np.arange(10) < 3  # not always half
    found = counterfactual(shadows, level)
    for n in range(25):
        held, out = -shadows.losses[n, shadows.inside[n]], -shadows.losses[n, ~shadows.inside[n]]
        theirs = ttest_ind(held, out, equal_var=False).confidence_interval(level)
        assert found.values[n] == pytest.approx(held.mean() - out.mean())
        assert (found.low[n], found.high[n]) == pytest.approx(tuple(theirs))


@pytest.mark.parametrize("S", [8, 16])
def test_planted_memorization_is_covered(S):
    shadows, truth = world(600, S, S)
    found = counterfactual(shadows)
    covered = np.mean((found.low <= truth) & (truth <= found.high))
    assert 0.93 < covered <= 0.99
    assert (found.values - truth).mean() == pytest.approx(0, abs=0.02)
    # Each mean over S/2 models has variance .04/(S/2).
    assert (found.values - truth).std() == pytest.approx(0.2 * math.sqrt(4 / S), rel=0.1)


def test_a_record_needs_two_models_of_either_kind():
    shadows, _ = world(5, 8, 1)
    shadows.inside[1] = np.arange(8) > 0
    shadows.inside[2] = np.arange(8) < 1
    shadows.inside[3] = False
    shadows.losses[4, 0] = np.nan
    found = counterfactual(shadows)
    for column in (found.values, found.errors, found.low, found.high):
        assert np.isnan(column).tolist() == [False, True, True, True, True]


def test_models_that_do_not_differ_have_no_error():
    found = counterfactual(Shadows(np.full((30, 8), 2.0), np.tile([True, False], (30, 4))))
    assert found.values.tolist() == found.low.tolist() == found.high.tolist() == [0.0] * 30
    assert math.isnan(found.reliability)
    assert math.isnan(found.ceiling)


@pytest.mark.parametrize(("noise", "S"), [(0.1, 8), (0.3, 8), (0.3, 32), (1.0, 16)])
def test_reliability_is_the_correlation_with_other_models(noise, S):
    """Values from one half of the shadow models, twice as many, rank as a second, independent set of as many does; the
    truth correlates with them by the root."""

    def normal(rng, N):
        return np.random.default_rng(99).normal(1, 0.3, N)

    one, truth = world(1500, S, 2, normal, noise)
    other, _ = world(1500, S, 3, normal, noise)
    found, again = counterfactual(one), counterfactual(other)
    assert found.reliability == pytest.approx(spearmanr(found.values, again.values).statistic, abs=0.05)
    assert found.ceiling == pytest.approx(spearmanr(found.values, truth).statistic, abs=0.04)
    # Variances: .09 of the truth, noise²·4/S of the error; ranks correlate by 6/π·asin(ρ/2).
    rho = 0.09 / (0.09 + noise**2 * 4 / S)
    assert found.reliability == pytest.approx(6 / math.pi * math.asin(rho / 2), abs=0.05)


def test_reliability_repeats_itself_and_may_be_nothing():
    shadows, _ = world(200, 8, 4, lambda rng, N: np.zeros(N))
    assert counterfactual(shadows).reliability == counterfactual(shadows, seed=0).reliability
    assert 0 <= counterfactual(shadows).reliability < 0.3
    assert math.isnan(counterfactual(shadows.select(np.arange(FEWEST - 1))).reliability)


def naive(scores, truth):
    """Rank correlation, and the precision averaged over random orders of ties."""
    k, rng, hits = round(0.1 * len(scores)), np.random.default_rng(0), []
    for _ in range(4000):
        tops = [set(np.lexsort((rng.random(len(x)), x))[-k:].tolist()) for x in (scores, truth)]
        hits.append(len(tops[0] & tops[1]) / k)
    return spearmanr(scores, truth).statistic, np.mean(hits)


@pytest.mark.parametrize("levels", [5, 1000])
def test_agreement_equals_a_naive_one(levels):
    rng = np.random.default_rng(levels)
    truth = rng.integers(0, levels, 60).astype(float)
    scores = (truth + rng.integers(0, levels, 60)) // 2
    found = agreement(scores, truth, count=50)
    spearman, precision = naive(scores, truth)
    assert found.spearman.value == pytest.approx(spearman)
    assert found.precision.value == pytest.approx(precision, abs=0.02)
    assert (found.chance, found.records) == (0.1, 60)


def test_infinite_scores_are_ranked():
    truth = np.arange(30.0)
    scores = np.where(truth > 26, np.inf, truth)
    found = agreement(scores, truth, count=20)
    assert found.precision.value == 1
    assert found.spearman.value == pytest.approx(spearmanr(np.minimum(scores, 99), truth).statistic)


def test_the_bootstrap_draws_whole_groups():
    rng = np.random.default_rng(5)
    truth = rng.normal(size=90)
    scores, groups = truth + rng.normal(size=90), [f"g{n // 3}" for n in range(90)]
    found, drawn = agreement(scores, truth, groups, count=40, seed=6), draw(groups, (), 40, 6)
    values = []
    for times in drawn.times[0]:
        rows = np.repeat(np.arange(90), times[drawn.subjects[0]])
        values.append(spearmanr(scores[rows], truth[rows]).statistic)
    assert (found.spearman.low, found.spearman.high) == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])))
    assert found == agreement(scores, truth, groups, count=40, seed=6)
    assert found != agreement(scores, truth, groups, count=40, seed=7)


def test_precision_of_a_draw_counts_a_record_as_often_as_it_is_drawn():
    rng = np.random.default_rng(8)
    truth = rng.normal(size=200)
    scores = truth + rng.normal(size=200)
    found, drawn = agreement(scores, truth, count=60, seed=1), draw(range(200), (), 60, 1)
    values = []
    for times in drawn.times[0]:
        rows = np.repeat(np.arange(200), times)
        # Copies of a record tie: broken by the record in both rankings alike, they would agree too well.
        tops = []
        for column in (scores, truth):
            edge = np.sort(column[rows])[-20]
            above, at = (column > edge), (column == edge)
            tops.append(above + at * (20 - times[above].sum()) / times[at].sum())
        values.append((times * tops[0] * tops[1]).sum() / 20)
    low, high = np.quantile(values, [0.025, 0.975])
    exact = clopper_pearson(found.precision.value * 20, 20)
    assert found.precision.low == pytest.approx(min(low, exact[0]))
    assert found.precision.high == pytest.approx(max(high, exact[1]))


@pytest.mark.parametrize("share", [1, 4])
def test_coverage(share):
    """Records of a group share most of their deviation. Normal laws with ρ = .6: ranks correlate by 6/π·asin(.3)."""
    rng, rho, N = np.random.default_rng(9), 0.6, 100
    law, expected = [[1, rho], [rho, 1]], 6 / math.pi * math.asin(rho / 2)
    many = rng.multivariate_normal([0, 0], law, 400_000)
    precision = (many > np.quantile(many, 0.9, axis=0)).all(axis=1).mean() / 0.1
    covered, tops = [], []
    for _ in range(200):
        shared = rng.multivariate_normal([0, 0], law, N // share).repeat(share, axis=0)
        own = rng.multivariate_normal([0, 0], law, N)
        both = shared if share == 1 else math.sqrt(0.8) * shared + math.sqrt(0.2) * own
        found = agreement(both[:, 0], both[:, 1], np.arange(N) // share, count=200)
        covered.append(expected in found.spearman)
        tops.append(precision in found.precision)
    assert 0.9 <= np.mean(covered) <= 0.99
    assert np.mean(tops) >= 0.93


def test_certainty_is_never_shown():
    found = agreement(np.arange(40.0), np.arange(40.0), count=20)
    assert (found.precision.low, found.precision.high) == (clopper_pearson(4, 4)[0], 1.0)
    grouped = agreement(np.arange(40.0), np.arange(40.0), np.arange(40) // 2, count=20)
    assert grouped.precision.low == clopper_pearson(2, 2)[0]


def test_what_is_refused():
    truth = np.arange(30.0)
    with pytest.raises(InvalidAudit, match="all 30 scores are 1: there is no order"):
        agreement(np.ones(30), truth)
    with pytest.raises(InvalidAudit, match="all 30 values of memorization are 0"):
        agreement(truth, np.zeros(30))
    with pytest.raises(InvalidAudit, match="needs 20 records or groups, and 30 records form 10"):
        agreement(truth, truth, np.arange(30) // 3)
    with pytest.raises(InvalidAudit, match="19 records form 19"):
        agreement(truth[:19], truth[:19])
    with pytest.raises(DataError, match="2 of 30 scores are NaN"):
        agreement(np.where(truth < 2, np.nan, truth), truth)
    with pytest.raises(DataError, match="1 of 30 values of memorization are NaN"):
        agreement(truth, np.where(truth < 1, np.nan, truth))
    with pytest.raises(DataError, match=r"\(30,\) and \(29,\)"):
        agreement(truth, truth[1:])
    with pytest.raises(DataError, match="30 scores, 29 groups"):
        agreement(truth, truth, range(29))
    with pytest.raises(UsageError, match="confidence level"):
        agreement(truth, truth, level=2)
    with pytest.raises(UsageError, match="confidence level"):
        counterfactual(world(3, 8, 0)[0], level=0)
