"""Measures: against brute force, published values, and simulations that know the truth."""

from __future__ import annotations

import doctest
import importlib
import math
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.special import logit
from scipy.stats import beta, binom, norm
from scipy.stats import t as student

from imprint.errors import DataError, InvalidAudit, UsageError
from imprint.measures import TPR, auc, paired_auc, perplexity, tpr_at_fpr
from imprint.measures.threshold import inflation
from imprint.measures.tpr import clopper_pearson
from imprint.types import Interval, TokenStats

Z = norm.ppf(0.975)
oracle = settings(deadline=None, max_examples=100, derandomize=True)
scores = st.lists(st.integers(0, 8) | st.just(math.inf) | st.just(-math.inf), min_size=1, max_size=12)


def standard_error(interval: Interval) -> float:
    """Of the AUC, from its 95% interval on the logit scale."""
    A = interval.value
    return float((logit(interval.high) - logit(interval.low)) / (2 * Z) * A * (1 - A))


def kernel(x, y):
    """[M, N] 1 where the member is above, 1/2 where tied."""
    x, y = np.asarray(x, float)[:, None], np.asarray(y, float)[None, :]
    return (x > y) + 0.5 * (x == y)


def delong_cov(K_a, K_b):
    """Covariance of two AUCs from their kernels, O(M·N)."""
    M, N = K_a.shape
    return np.cov(K_a.mean(1), K_b.mean(1))[0, 1] / M + np.cov(K_a.mean(0), K_b.mean(0))[0, 1] / N


def obuchowski_variance(K, gx, gy):
    """The formulas of Obuchowski (1997) as printed, one cluster at a time; a None is a cluster of its own."""
    M, N = K.shape
    gx = [("x", i) if g is None else g for i, g in enumerate(gx)]
    gy = [("y", i) if g is None else g for i, g in enumerate(gy)]
    theta, I10, I01, both = K.mean(), len(set(gx)), len(set(gy)), set(gx) | set(gy)
    S10 = S01 = S11 = 0.0
    for g in both:
        at_x, at_y = [i for i in range(M) if gx[i] == g], [j for j in range(N) if gy[j] == g]
        a = sum(K[i].mean() for i in at_x) - len(at_x) * theta
        b = sum(K[:, j].mean() for j in at_y) - len(at_y) * theta
        S10, S01, S11 = S10 + a * a, S01 + b * b, S11 + a * b
    S10, S01, S11 = S10 * I10 / ((I10 - 1) * M), S01 * I01 / ((I01 - 1) * N), S11 * len(both) / (len(both) - 1)
    return S10 / M + S01 / N + 2 * S11 / (M * N)


# ---- auc


@oracle
@given(x=scores, y=scores)
def test_auc_equals_counting_pairs(x, y):
    assert auc(x, y).value == pytest.approx(kernel(x, y).mean(), abs=1e-12)


@oracle
@given(x=scores, y=scores)
def test_interval_holds_the_value_and_mirrors(x, y):
    one, other = auc(x, y), auc(y, x)
    assert 0 <= one.low <= one.value <= one.high <= 1
    assert one.low < one.high
    np.testing.assert_allclose(
        [other.value, other.low, other.high], [1 - one.value, 1 - one.high, 1 - one.low], atol=1e-9
    )


@oracle
@given(x=scores, y=scores)
def test_delong_equals_brute_force(x, y):
    assume(min(len(x), len(y)) > 1)
    K = kernel(x, y)
    variance = delong_cov(K, K)
    assume(variance > 1e-12)
    assert standard_error(auc(x, y)) == pytest.approx(math.sqrt(variance), rel=1e-6)


def test_delong_on_published_data():
    """CT ratings of Hanley and McNeil (1982). Stata's manual (roctab): .8932, s.e. .0307, 0.83295 to 0.95339."""
    normal = np.repeat([1, 2, 3, 4, 5], [33, 6, 6, 11, 2])
    abnormal = np.repeat([1, 2, 3, 4, 5], [3, 2, 2, 11, 33])
    result = auc(abnormal, normal)
    error = standard_error(result)
    assert round(result.value, 4) == 0.8932
    assert round(error, 4) == 0.0307
    assert round(result.value - Z * error, 5) == 0.83295
    assert round(result.value + Z * error, 5) == 0.95339


def test_auc_by_hand():
    # 3 beats 1 and 2: V10 = (2/2, 1/2) for 3 and 1.5; V01 = (2/2, 1/2) for 1 and 2; AUC = 3/4.
    # Both variances are 1/8, so var = 1/16 + 1/16 = 1/8; logit(3/4) = ln 3; half = 1.96 sqrt(1/8) / (3/16).
    result = auc([3, 1.5], [1, 2])
    half = Z * math.sqrt(1 / 8) / (3 / 16)
    assert result.value == 0.75
    assert result.low == pytest.approx(1 / (1 + math.exp(half) / 3))
    assert result.high == pytest.approx(1 / (1 + math.exp(-half) / 3))


@pytest.mark.parametrize(("m", "half"), [(100, 0.080), (500, 0.036), (1000, 0.025), (5000, 0.011)])
def test_half_width_at_chance(m, half):
    rng = np.random.default_rng(m)
    result = auc(rng.normal(size=m), rng.normal(size=m))
    assert (result.high - result.low) / 2 == pytest.approx(half, abs=0.001)


def test_perfect_separation_is_not_certainty():
    result = auc(np.arange(10, 60), np.arange(5))  # five disjoint pairs at least
    assert (result.value, result.high) == (1.0, 1.0)
    assert result.low == pytest.approx(0.025 ** (1 / 5))  # .478
    worst = auc(np.arange(5), np.arange(10, 60))
    assert (worst.value, worst.low, worst.high) == (0.0, 0.0, pytest.approx(1 - 0.025 ** (1 / 5)))


def test_perfect_separation_counts_groups_not_records():
    groups = np.repeat(np.arange(4), 25)
    assert auc(np.ones(100), np.zeros(100), 0.95, groups, groups + 4).low == pytest.approx(0.025 ** (1 / 4))
    # the same four clusters on both sides hold only two pairs without a cluster in common
    assert auc(np.ones(100), np.zeros(100), 0.95, groups, groups).low == pytest.approx(0.025 ** (1 / 2))
    # a single cluster has no variance to estimate: one trial
    single = auc([1, 2, 3], [0, 2.5, 1.5, 0.5], 0.95, ["s"] * 3, list("abcd"))
    assert (single.low, single.high) == clopper_pearson(single.value, 1)


def test_constant_scores_are_chance_with_a_wide_interval():
    result = auc(np.zeros(50), np.zeros(60))
    assert result.value == 0.5
    assert (result.low, result.high) == clopper_pearson(25, 50)


def test_coverage_of_the_logit_interval():
    """n = 50 a side, true AUC .98: near .93, where the plain DeLong interval has .85."""
    rng = np.random.default_rng(0)
    reps, truth = 2000, 0.98
    shift = math.sqrt(2) * norm.ppf(truth)
    covered, plain = 0, 0
    for _ in range(reps):
        x, y = rng.normal(shift, 1, 50), rng.normal(size=50)
        covered += truth in auc(x, y)
        K = kernel(x, y)
        plain += abs(K.mean() - truth) <= Z * math.sqrt(delong_cov(K, K))
    assert 0.905 < covered / reps < 0.96
    assert 0.82 < plain / reps < 0.87


groups = st.lists(st.sampled_from(["a", "b", "c", "d", None]), min_size=12, max_size=12)


@oracle
@given(x=scores, y=scores, gx=groups, gy=groups)
def test_clustered_variance_equals_the_printed_formulas(x, y, gx, gy):
    """Also where clusters have records on both sides, and with records on their own."""
    gx, gy = gx[: len(x)], gy[: len(y)]
    assume(all(len(set(g) - {None}) + g.count(None) > 1 for g in (gx, gy)))
    variance = obuchowski_variance(kernel(x, y), gx, gy)
    assume(variance > 1e-12)
    assert standard_error(auc(x, y, 0.95, gx, gy)) == pytest.approx(math.sqrt(variance), rel=1e-6)


def test_singleton_groups_change_nothing():
    rng = np.random.default_rng(1)
    x, y = rng.normal(1, 1, 40), rng.normal(size=30)
    assert auc(x, y, 0.95, range(40), range(40, 70)) == auc(x, y)
    assert auc(x, y, 0.95, [None] * 40, [math.nan] * 30) == auc(x, y)


def test_copies_of_a_record_add_no_certainty():
    rng = np.random.default_rng(2)
    x, y = rng.normal(1, 1, 40), rng.normal(size=30)
    copied = auc(np.tile(x, 3), np.tile(y, 3), 0.95, np.tile(np.arange(40), 3), np.tile(np.arange(40, 70), 3))
    np.testing.assert_allclose([copied.low, copied.high], [auc(x, y).low, auc(x, y).high], rtol=1e-12)
    assert auc(np.tile(x, 3), np.tile(y, 3)).low > copied.low + 0.02


@pytest.mark.parametrize("shared", [False, True])
def test_clustered_variance_matches_a_simulation(shared):
    """40 subjects of 5 records a side (or 40 subjects with 5 on each side): the spread over repeated draws."""
    rng = np.random.default_rng(3)
    labels = np.repeat(np.arange(40), 5)
    other = labels if shared else labels + 40
    values, clustered, plain = [], [], []
    for _ in range(400):
        subject_x = rng.normal(size=40)
        subject_y = subject_x if shared else rng.normal(size=40)
        x = 0.8 + subject_x[labels] + rng.normal(size=200)
        y = subject_y[labels] + rng.normal(size=200)
        values.append(auc(x, y).value)
        plain.append(standard_error(auc(x, y)) ** 2)
        clustered.append(standard_error(auc(x, y, 0.95, labels, other)) ** 2)
    assert np.mean(clustered) / np.var(values) == pytest.approx(1, abs=0.15)
    ratio = np.mean(plain) / np.var(values)
    assert ratio > 1.3 if shared else ratio < 0.5


# ---- paired_auc


@oracle
@given(data=st.data(), M=st.integers(2, 10), N=st.integers(2, 10))
def test_paired_delong_equals_brute_force(data, M, N):
    def draw(size):
        return data.draw(st.lists(st.integers(0, 9), min_size=size, max_size=size))

    x_a, y_a, x_b, y_b = draw(M), draw(N), draw(M), draw(N)
    K_a, K_b = kernel(x_a, y_a), kernel(x_b, y_b)
    variance = delong_cov(K_a, K_a) + delong_cov(K_b, K_b) - 2 * delong_cov(K_a, K_b)
    assume(variance > 1e-12)
    result = paired_auc(x_a, y_a, x_b, y_b)
    difference, half = K_a.mean() - K_b.mean(), Z * math.sqrt(variance)
    expected = [difference, max(-1, difference - half), min(1, difference + half)]
    np.testing.assert_allclose([result.value, result.low, result.high], expected, atol=1e-9)
    assert result.p == pytest.approx(2 * norm.sf(abs(difference) / math.sqrt(variance)), rel=1e-6, abs=1e-12)
    assert (result.a, result.b) == (auc(x_a, y_a), auc(x_b, y_b))


def test_paired_groups_are_obuchowski_on_the_differences():
    rng = np.random.default_rng(4)
    x_a, y_a, x_b, y_b = (rng.normal(size=24) for _ in range(4))
    gx, gy = np.repeat(np.arange(8), 3), np.repeat(np.arange(4, 12), 3)
    result = paired_auc(x_a, y_a, x_b, y_b, 0.95, gx, gy)
    variance = obuchowski_variance(kernel(x_a, y_a) - kernel(x_b, y_b), gx, gy)
    assert (result.high - result.low) / 2 == pytest.approx(Z * math.sqrt(variance))
    assert result.a == auc(x_a, y_a, 0.95, gx, gy)


def test_same_ranking_differs_by_nothing():
    rng = np.random.default_rng(5)
    x, y = rng.normal(1, 1, 30), rng.normal(size=30)
    result = paired_auc(x, y, np.exp(x), np.exp(y))
    assert (result.value, result.low, result.high, result.p) == (0, 0, 0, 1)


def test_constant_difference_is_not_certainty():
    # a separates all 50 pairs, b none: no variance, but 50 independent pairs and Hoeffding's inequality.
    result = paired_auc(np.ones(50), np.zeros(50), np.zeros(50), np.ones(50))
    assert (result.value, result.high) == (1.0, 1.0)
    assert result.low == pytest.approx(1 - math.sqrt(2 * math.log(2 / 0.05) / 50))  # 1 - .384
    assert result.p == pytest.approx(2 * math.exp(-25))
    few = paired_auc([1], [0], [0], [1])
    assert (few.low, few.high, few.p) == (-1, 1, 1)  # one record a side: nothing is known


def test_paired_test_size_and_power():
    """Scores of correlation .95: rejects 5% under no difference, and finds a difference the unpaired test cannot."""
    rng = np.random.default_rng(6)
    rho, n, reps = 0.95, 150, 300
    false_alarms, found, unpaired = 0, 0, 0
    for _ in range(reps):
        common, e_a, e_b = rng.normal(size=(3, 2 * n))
        a = math.sqrt(rho) * common + math.sqrt(1 - rho) * e_a
        b = math.sqrt(rho) * common + math.sqrt(1 - rho) * e_b
        same = paired_auc(a[:n] + 0.7, a[n:], b[:n] + 0.7, b[n:])
        better = paired_auc(a[:n] + 0.85, a[n:], b[:n] + 0.7, b[n:])
        false_alarms += same.p < 0.05
        found += better.p < 0.05
        error = math.hypot(standard_error(better.a), standard_error(better.b))
        unpaired += 2 * norm.sf(abs(better.value) / error) < 0.05
    assert 0.02 < false_alarms / reps < 0.08
    assert found / reps > 0.9
    assert unpaired / reps < 0.1


# ---- tpr_at_fpr


def naive_tpr(members, nonmembers, fpr: str):
    """The best TPR over all thresholds whose FPR is allowed, in exact fractions."""
    best = 0
    for t in {-math.inf, *members, *nonmembers}:
        if Fraction(sum(y > t for y in nonmembers), len(nonmembers)) <= Fraction(fpr):
            best = max(best, sum(x > t for x in members))
    return best


@oracle
@given(
    x=st.lists(st.integers(0, 30), min_size=1, max_size=30),
    y=st.lists(st.integers(0, 30), min_size=10, max_size=40),
    fpr=st.sampled_from(["0.1", "0.2", "0.29", "0.3", "0.35", "0.7", "0.95"]),
)
def test_tpr_equals_trying_every_threshold(x, y, fpr):
    result = tpr_at_fpr(x, y, float(fpr))
    assert result.true_positives == naive_tpr(x, y, fpr)
    assert result.value == result.true_positives / len(x)
    assert result.false_positives == sum(s > result.threshold for s in y)
    assert result.true_positives == sum(s > result.threshold for s in x)
    assert Fraction(result.false_positives, len(y)) <= Fraction(fpr)


def test_tpr_by_hand():
    # ten non-members 0..9, one false positive allowed: threshold 8, above it 9 of them and members 8.5, 9.5, 12.
    result = tpr_at_fpr([8, 8.5, 9.5, 12], np.arange(10), 0.1)
    assert result == TPR(0.75, result.low, result.high, 8.0, 3, 1, 4, 10, indicative=True)
    # none of ten non-members lies above the true threshold with probability .9¹⁰ = .35: maybe no member does either
    assert (result.low, result.high) == (0, pytest.approx(naive_interval([8, 8.5, 9.5, 12], range(10), 0.1)[1]))


def naive_interval(x, y, fpr, level=0.95, effects=(1, 1)):
    """For every number of non-members above the true threshold Clopper-Pearson's Beta distributions, mixed."""
    x, y, trials, n = np.array(x, float), sorted(y, reverse=True), len(x) / effects[0], len(y)
    below = [beta.sf(fpr, k / effects[1] + 1, (n - k) / effects[1]) if k < n else 1 for k in range(n + 1)]
    weights = np.diff([0, *below])
    least = np.array([0, *(np.sum(x > t) for t in y)]) / effects[0]
    most = np.array([*(np.sum(x > t) for t in y), len(x)]) / effects[0]

    def low(t):
        each = [beta.cdf(t, c, trials - c + 1) if c else 1 for c in least]
        return weights @ each - (1 - level) / 2

    def high(t):
        each = [beta.sf(t, c + 1, trials - c) if c < trials else 1 for c in most]
        return weights @ each - (1 - level) / 2

    return brentq(low, 0, 1) if low(0) < 0 else 0, brentq(high, 0, 1) if high(1) < 0 else 1


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    x=st.lists(st.integers(0, 9) | st.just(-math.inf) | st.just(math.inf), min_size=1, max_size=30),
    y=st.lists(st.integers(0, 9) | st.just(-math.inf) | st.just(math.inf), min_size=10, max_size=30),
    fpr=st.sampled_from([0.1, 0.29, 0.5, 0.95]),
    level=st.sampled_from([0.5, 0.95, 0.999]),
)
def test_the_interval_equals_going_through_every_rank(x, y, fpr, level):
    found = tpr_at_fpr(x, y, fpr, level)
    low, high = naive_interval(x, y, fpr, level)
    assert (found.low, found.high) == pytest.approx((min(low, found.value), max(high, found.value)), abs=2e-3)
    assert 0 <= found.low < found.high <= 1
    assert found.value in found


def test_many_ranks_are_stood_for_by_few():
    rng = np.random.default_rng(0)
    x, y = rng.normal(0.7, 1, 500), rng.normal(size=400)
    found = tpr_at_fpr(x, y, 0.3)
    low, high = naive_interval(x, y, 0.3)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.01 * (high - low))


def test_countless_nonmembers_leave_the_members_alone():
    """Clopper-Pearson where the threshold is known, order statistics where the members are."""
    few, many = (np.arange(50) + 0.5) / 50, (np.arange(200_000) + 0.5) / 200_000
    found = tpr_at_fpr(few, many, 0.3)
    assert (found.low, found.high) == pytest.approx(clopper_pearson(found.true_positives, 50), abs=2e-3)
    found = tpr_at_fpr(many, few, 0.3)
    least, most = binom.ppf([0.025, 0.975], 50, 0.3).astype(int)  # of non-members above the true threshold
    assert (found.low, found.high) == pytest.approx((1 - few[50 - least], 1 - few[50 - most - 1]), abs=4e-3)


@pytest.mark.parametrize(("members", "nonmembers", "fpr"), [(300, 300, 0.1), (2000, 100, 0.1), (400, 1000, 0.01)])
@pytest.mark.parametrize("auc_", [0.5, 0.9])
def test_the_interval_holds_the_rate_at_the_true_threshold(members, nonmembers, fpr, auc_):
    """`benchmarks/tpr.py` has more cases. Clopper-Pearson's interval takes the threshold as given."""
    rng, shift, rounds = np.random.default_rng(1), math.sqrt(2) * norm.ppf(auc_), 250
    truth = norm.sf(norm.isf(fpr) - shift)
    drawn = [tpr_at_fpr(rng.normal(shift, 1, members), rng.normal(size=nonmembers), fpr) for _ in range(rounds)]
    assert np.mean([truth in found for found in drawn]) > 0.93
    assert np.mean([truth < found.low for found in drawn]) < 0.045
    assert np.mean([truth > found.high for found in drawn]) < 0.045
    assert np.mean([truth in Interval(0, *clopper_pearson(found.true_positives, members)) for found in drawn]) < 0.92


@pytest.mark.parametrize(("subjects", "records", "correlation"), [(80, 5, 0.5), (40, 10, 0.9)])
def test_the_interval_is_for_other_subjects(subjects, records, correlation):
    rng, of, truth, rounds = np.random.default_rng(2), np.arange(subjects * records) // records, 0.4, 250
    shift, held, alone = norm.isf(0.1) - norm.isf(truth), 0, 0
    for _ in range(rounds):
        shared, own = rng.normal(size=(2, subjects))[:, of], rng.normal(size=(2, len(of)))
        y, x = np.sqrt(correlation) * shared + np.sqrt(1 - correlation) * own
        held += truth in tpr_at_fpr(x + shift, y, 0.1, 0.95, of, of)
        alone += truth in tpr_at_fpr(x + shift, y, 0.1)
    assert held / rounds > 0.93
    assert alone / rounds < 0.9


def test_groups_of_one_record_change_nothing():
    rng = np.random.default_rng(3)
    x, y = rng.normal(1, 1, 60), rng.normal(size=80)
    alone = tpr_at_fpr(x, y, 0.1)
    assert tpr_at_fpr(x, y, 0.1, 0.95, [None] * 60, range(80)) == alone
    assert tpr_at_fpr(x, y, 0.1, 0.95, np.arange(60), [f"s{n}" for n in range(80)]) == alone


def test_labels_are_only_labels():
    rng, of = np.random.default_rng(4), np.arange(90) // 3
    x, y = rng.normal(1, 1, 90), rng.normal(size=90)
    found, mixed = tpr_at_fpr(x, y, 0.1, 0.95, of, of), rng.permutation(90)
    labels = [f"s{100 - n}" for n in of]
    assert tpr_at_fpr(x, y, 0.1, 0.95, labels, labels) == found
    assert tpr_at_fpr(x[mixed], y, 0.1, 0.95, of[mixed] * 2, of * 1000) == found


def test_copies_of_a_record_add_no_certainty_about_the_tpr():
    rng = np.random.default_rng(5)
    x, y = rng.normal(1, 1, 150), rng.normal(size=150)
    one = tpr_at_fpr(x, y, 0.1)
    of = np.repeat(np.arange(150), 4)
    four = tpr_at_fpr(np.repeat(x, 4), np.repeat(y, 4), 0.1, 0.95, of, of)
    assert (four.low, four.high) == pytest.approx((one.low, one.high), abs=0.01)
    assert tpr_at_fpr(np.repeat(x, 4), np.repeat(y, 4), 0.1).high < one.high - 0.03


def test_few_hits_promise_no_more_than_none():
    """Twenty subjects of five records. One record above the threshold shows no variance between subjects."""
    of, y = np.arange(100) // 5, np.arange(100.0)
    highs = [tpr_at_fpr(np.where(np.arange(100) < c, 200.0, -1.0), y, 0.1, 0.95, of, of).high for c in range(6)]
    assert highs[0] == pytest.approx(clopper_pearson(0, 20)[1], abs=1e-6)
    assert highs == sorted(highs)
    lows = [tpr_at_fpr(np.where(np.arange(100) < c, -1.0, 200.0), y, 0.1, 0.95, of, of).low for c in range(6)]
    assert lows == sorted(lows, reverse=True)
    assert lows[0] <= clopper_pearson(20, 20)[0] + 1e-6


def test_a_single_subject_knows_next_to_nothing():
    x, y = np.arange(50.0), np.arange(50.0)
    one = tpr_at_fpr(x, y, 0.1, 0.95, ["s"] * 50, range(50))
    assert one.low < 0.01
    assert one.high > 0.95


@pytest.mark.parametrize(
    ("hits", "subjects", "effect"),
    [
        ([1, 0, 1, 0], [0, 1, 2, 3], 1),  # each on its own
        ([1, 0] * 2000, np.arange(4000) // 2, 1),  # subjects that disagree are worth their records
        ([1] * 8, np.arange(8) // 2, 2),  # no variance to see
        ([0] * 6, [0, 0, 0, 0, 1, 1], 20 / 6),  # (16 + 4) / 6
        ([1, 0, 0], [0, 0, 0], 3),  # a single subject
    ],
)
def test_design_effect_of_hits(hits, subjects, effect):
    assert inflation(np.array(hits, bool), np.array(subjects)) == pytest.approx(effect, rel=1e-3)


def test_design_effect_of_copies():
    hits, of = np.repeat(np.arange(200) % 5 == 0, 3), np.repeat(np.arange(200), 3)
    assert inflation(hits, of) == pytest.approx(3, abs=0.03)
    # ten subjects, all copies, 3 · (10/9) / (30/29): Student's t adds nothing, as it is more than 3 already
    assert inflation(hits[:30], of[:30]) == pytest.approx(3 * (10 / 9) / (30 / 29))
    # ten subjects of two records, which agree in eight
    few = np.array([1, 1, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0], bool)
    pairs = np.arange(20) // 2
    share = 6 / 20
    between = sum((few[pairs == n].sum() - 2 * share) ** 2 for n in range(10)) * 10 / 9
    ratio = between / (share * (1 - share) * 400 / 19)
    expected = ratio * (student.ppf(0.025, 9) / student.ppf(0.025, 19)) ** 2
    assert 1 < expected < 2
    assert inflation(few, pairs) == pytest.approx(expected)


def test_the_point_above_the_fpr_is_never_taken():
    # 15% of ten is 1.5: one false positive (threshold 8) finds nobody, two (threshold 7) would find everybody.
    assert tpr_at_fpr(np.full(20, 7.5), np.arange(10), 0.15).value == 0


def test_ties_count_for_neither_side():
    nonmembers = [5, 5, 1, 1, 1, 1, 1, 1, 1, 1]
    result = tpr_at_fpr([5, 5, 5, 6], nonmembers, 0.1)  # calling the fives members would cost two false positives
    assert (result.value, result.threshold, result.false_positives) == (0.25, 5.0, 0)
    constant = tpr_at_fpr(np.zeros(100), np.zeros(100), 0.1)
    assert (constant.value, constant.low, constant.false_positives) == (0, 0, 0)
    assert constant.high == pytest.approx(clopper_pearson(0, 100)[1], abs=1e-3)


def test_a_hundred_a_side_says_nothing_at_a_thousandth():
    """With a true 1.8% here, code that reads the curve off anyway reports 8.4% on average."""
    rng = np.random.default_rng(8)
    with pytest.raises(InvalidAudit, match=r"0\.1% FPR needs at least 1000 non-members.*there are 100\."):
        tpr_at_fpr(rng.normal(size=100), rng.normal(size=100), 0.001)


@pytest.mark.parametrize(("fpr", "needed"), [(0.1, 10), (0.01, 100), (0.001, 1000), (0.3, 4), (0.7, 2), (1 / 3, 3)])
def test_one_expected_false_positive_is_the_least(fpr, needed):
    x = np.arange(5)
    assert tpr_at_fpr(x, np.arange(needed), fpr).nonmembers == needed
    with pytest.raises(InvalidAudit, match=f"at least {needed} non-members"):
        tpr_at_fpr(x, np.arange(needed - 1) if needed > 2 else [0], fpr)


def test_rounding_never_costs_a_false_positive():
    assert 0.29 * 100 < 29  # as a float
    assert tpr_at_fpr([0], np.arange(100), 0.29).false_positives == 29


@pytest.mark.parametrize(("n", "indicative"), [(99, True), (100, False), (101, False)])
def test_indicative_below_ten_false_positives(n, indicative):
    assert tpr_at_fpr([0], np.arange(n), 0.1).indicative is indicative


def test_infinite_scores_rank():
    nonmembers = [math.inf, math.inf, *range(18)]
    assert tpr_at_fpr([math.inf, 20], nonmembers, 0.05).value == 0  # nothing lies above the tied infinities
    assert tpr_at_fpr([math.inf, 20, -math.inf], nonmembers, 0.1).value == 2 / 3
    assert auc([math.inf, 0], [-math.inf, math.inf]).value == 0.625  # 1, 1/2; 1, 0


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [  # published tables of the exact binomial 95% interval
        (0, 10, 0.0, 0.3085),
        (1, 10, 0.0025, 0.4450),
        (5, 10, 0.1871, 0.8129),
        (10, 10, 0.6915, 1.0),
        (1, 20, 0.0013, 0.2487),
    ],
)
def test_clopper_pearson_known_values(k, n, low, high):
    assert clopper_pearson(k, n) == pytest.approx((low, high), abs=5e-5)


# ---- perplexity


def stats(logp_rows) -> TokenStats:
    flat = np.concatenate([np.zeros(0), *logp_rows]).astype(np.float32)
    R = len(flat)
    return TokenStats(
        ids=np.array([str(n) for n in range(len(logp_rows))], np.str_),
        offsets=np.cumsum([0] + [len(row) for row in logp_rows]),
        tokens=np.zeros(R, np.int32),
        logp=flat,
        mean=flat,
        std=flat,
        top=np.zeros(R, np.bool_),
    )


def draw_texts(rng, n):
    """Texts of 1 to 60 tokens whose tokens share the text's difficulty; a token's mean nll is 3 for every length."""
    return stats([-rng.gamma(4, 0.75) * rng.exponential(size=rng.integers(1, 61)) for _ in range(n)])


def test_perplexity_by_hand():
    # nll (2, 3) on (2, 1) tokens: H = 5/3, residuals 2 - 10/3 = -4/3 and 3 - 5/3 = 4/3,
    # se = sqrt(2/1 * 2 * 16/9) / 3 = 8/9; Student's t of one degree of freedom at .975 is 12.7062.
    result = perplexity(stats([[-1, -1], [-3]]))
    assert result.value == pytest.approx(math.exp(5 / 3))
    assert math.log(result.high) == pytest.approx(5 / 3 + 12.7062 * 8 / 9, rel=1e-5)
    assert math.log(result.low) == pytest.approx(5 / 3 - 12.7062 * 8 / 9, rel=1e-5)


def test_perplexity_weighs_tokens_not_texts():
    # a mean of the texts' own perplexities would be (e + e^3)/2 = 11.4
    assert perplexity(stats([[-1] * 99, [-3]])).value == pytest.approx(math.exp(1.02), rel=1e-6)


def test_uniform_model_has_the_vocabulary_as_perplexity():
    result = perplexity(stats([[-math.log(50)] * 3, [-math.log(50)] * 7]))
    np.testing.assert_allclose([result.value, result.low, result.high], 50, rtol=1e-5)


def test_perplexity_interval_equals_a_bootstrap_over_texts():
    rng = np.random.default_rng(9)
    drawn = draw_texts(rng, 300)
    nll, T = drawn.nll * drawn.lengths, drawn.lengths
    times = rng.multinomial(300, np.full(300, 1 / 300), size=4000)
    spread = np.std(np.log(np.exp((times @ nll) / (times @ T))))
    result = perplexity(drawn)
    assert math.log(result.high / result.low) / (2 * Z) == pytest.approx(spread, rel=0.06)


def test_perplexity_coverage():
    rng = np.random.default_rng(10)
    covered = sum(math.exp(3) in perplexity(draw_texts(rng, 40)) for _ in range(500))
    assert 0.90 < covered / 500 < 0.98


def test_copies_of_a_text_add_no_certainty_to_perplexity():
    rng = np.random.default_rng(11)
    drawn = draw_texts(rng, 30)
    twice = drawn.select(np.repeat(np.arange(30), 2))
    grouped, once = perplexity(twice, groups=np.repeat(np.arange(30), 2)), perplexity(drawn)
    np.testing.assert_allclose([grouped.low, grouped.high], [once.low, once.high], rtol=1e-9)
    assert perplexity(twice).low > once.low


def test_one_text_has_no_interval():
    alone, one_group = perplexity(stats([[-1, -2]])), perplexity(stats([[-1], [-2]]), groups=["s", "s"])
    for result in (alone, one_group):
        assert result.value == pytest.approx(math.exp(1.5))
        assert math.isnan(result.low)
        assert math.isnan(result.high)


def test_perplexity_beyond_the_floats_is_infinite():
    assert perplexity(stats([[-800], [-900]])).value == math.inf


# ---- what is refused


@pytest.mark.parametrize("measure", [auc, lambda x, y: tpr_at_fpr(x, y, 0.5), lambda x, y: paired_auc(x, y, x, y)])
@pytest.mark.parametrize(
    ("x", "y", "sentence"),
    [
        ([], [1, 2], "there are 0 and 2 scores"),
        ([1, 2], [], "there are 2 and 0 scores"),
        ([1, math.nan, math.nan], [1, 2], "2 of 3 member scores and 0 of 2 non-member scores are NaN"),
        ([1, 2], [1, math.nan], "0 of 2 member scores and 1 of 2 non-member"),
        ([[1, 2]], [1, 2], r"vectors.*\(1, 2\)"),
    ],
)
def test_unusable_scores_are_refused(measure, x, y, sentence):
    with pytest.raises(DataError, match=sentence):
        measure(x, y)


def test_groups_and_pairs_must_fit():
    with pytest.raises(DataError, match="one side only"):
        auc([1, 2], [0, 1], member_groups=["a", "b"])
    with pytest.raises(DataError, match="2 and 2 scores, 2 and 1 groups"):
        auc([1, 2], [0, 1], 0.95, ["a", "b"], ["c"])
    with pytest.raises(DataError, match="one side only"):
        tpr_at_fpr([1, 2], [0, 1], 0.5, nonmember_groups=["a", "b"])
    with pytest.raises(DataError, match="2 and 2 scores, 2 and 0 groups"):
        tpr_at_fpr([1, 2], [0, 1], 0.5, 0.95, ["a", "b"], np.zeros(0, np.int64))
    with pytest.raises(DataError, match="a has 2 members and 2 non-members, b has 2 and 3"):
        paired_auc([1, 2], [0, 1], [1, 2], [0, 1, 2])
    with pytest.raises(DataError, match="2 texts, 1 groups"):
        perplexity(stats([[-1], [-2]]), groups=["a"])


def test_unusable_texts_are_refused():
    with pytest.raises(DataError, match="at least one text"):
        perplexity(stats([]))
    with pytest.raises(DataError, match="1 of 2 texts have no scored token"):
        perplexity(stats([[-1.0], []]))
    with pytest.raises(DataError, match="2 of 3 token"):
        perplexity(stats([[-1.0, math.nan], [-math.inf]]))


@pytest.mark.parametrize("level", [0, 1, 95, math.nan])
def test_level_is_a_probability(level):
    for measure in (
        lambda: auc([1, 2], [0, 1.5], level),
        lambda: paired_auc([1, 2], [0, 1.5], [1, 2], [0, 1], level),
        lambda: tpr_at_fpr([1], [0, 1], 0.5, level),
        lambda: perplexity(stats([[-1], [-2]]), level),
    ):
        with pytest.raises(UsageError, match="confidence level"):
            measure()


@pytest.mark.parametrize("fpr", [0, 1, 5, -0.1, math.nan])
def test_fpr_is_a_probability(fpr):
    with pytest.raises(UsageError, match="fpr"):
        tpr_at_fpr([1], [0, 1], fpr)


@pytest.mark.parametrize("module", ["auc", "tpr", "threshold", "perplexity"])
def test_doctests(module):
    result = doctest.testmod(importlib.import_module(f"imprint.measures.{module}"))
    assert result.attempted > 0
    assert result.failed == 0


def test_analysis_imports_neither_torch_nor_pandas():
    code = "import sys, imprint.attacks, imprint.measures; print({'torch', 'pandas'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
