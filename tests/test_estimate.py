"""Influences against DeLong, the paired test, known values and simulation; the frontier against hand arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest

from imprint.errors import DataError
from imprint.measures import auc, paired_auc, perplexity
from imprint.measures.estimate import (
    Estimate,
    Stratum,
    auc_estimate,
    auc_over_seeds,
    holm,
    log_perplexity_estimate,
    mean,
    over_seeds,
)
from imprint.measures.frontier import Checkpoint, at_perplexity, best, pareto
from tests.test_measures import stats as stats_of


def scores(seed, shift=0.5, M=60, N=50):
    rng = np.random.default_rng(seed)
    return rng.normal(shift, 1, M), rng.normal(0, 1, N)


def groups(n, size=3):
    return [f"g{k // size}" for k in range(n)]


def test_one_auc_has_delongs_interval():
    x, y = scores(0)
    for labels in ((None, None), (groups(60), [f"n{g}" for g in groups(50)])):
        wanted = auc(x, y, member_groups=labels[0], nonmember_groups=labels[1])
        found = auc_over_seeds([auc_estimate(x, y, *labels)])
        assert (found.value, found.low, found.high) == pytest.approx((wanted.value, wanted.low, wanted.high))
        assert math.isnan(found.spread)


def test_a_difference_is_the_paired_test():
    (x_a, y_a), (x_b, y_b) = scores(1, 0.9), scores(2, 0.1)
    x_b, y_b = x_a + 0.3 * x_b, y_a + 0.3 * y_b
    wanted = paired_auc(x_a, y_a, x_b, y_b)
    found = over_seeds([auc_estimate(x_a, y_a) - auc_estimate(x_b, y_b)])
    assert (found.value, found.low, found.high, found.p) == pytest.approx(
        (wanted.value, wanted.low, wanted.high, wanted.p)
    )


def test_other_records_are_independent():
    a, b = auc_estimate(*scores(1)), auc_estimate(*scores(2), names=("others", "strangers"))
    assert (a - b).variance == pytest.approx(a.variance + b.variance)
    assert (a - a).variance == 0
    with pytest.raises(DataError, match="60 and 59"):
        a + auc_estimate(scores(2)[0][1:], scores(2)[1])


def test_log_perplexity_has_the_interval_of_perplexity():
    stats = stats_of([[-1.0, -2.0], [-3.0], [-0.5, -0.25, -4.0], [-2.0]])
    wanted = perplexity(stats)
    one = log_perplexity_estimate(stats)
    assert math.exp(one.value) == pytest.approx(wanted.value)
    from scipy.special import stdtrit

    half = -stdtrit(3, 0.025) * math.sqrt(one.variance)
    assert math.exp(one.value + half) == pytest.approx(wanted.high)


def on_the_same_records(values, error):
    """A run per value, on records that give their mean this standard error."""
    strata = {"r": Stratum(np.array([error, -error]) / 2, np.array([0, 1]))}
    assert Estimate(0.0, strata).variance == pytest.approx(error**2)
    return [Estimate(value, strata) for value in values]


def test_seeds_on_the_same_records_add_their_own_variance():
    """Known value: z² V_records + t² s²/S with S − 1 degrees of freedom."""
    found = over_seeds(on_the_same_records((0.1, 0.2, 0.3), 0.02))
    assert found.value == pytest.approx(0.2)
    assert (found.error, found.spread) == pytest.approx((0.02, 0.1))
    z, t = 1.959963984540054, 4.302652729749464  # tables: 97.5%, normal and Student's with 2 degrees of freedom
    assert found.high - found.value == pytest.approx(math.sqrt(z**2 * 0.02**2 + t**2 * 0.1**2 / 3))


@pytest.mark.parametrize("average", [over_seeds, auc_over_seeds])
@pytest.mark.parametrize(("error", "shift"), [(0.02, 0.0), (0.02, 1e-9), (0.02, 0.03), (1e-6, 0.03), (0.0, 0.03)])
def test_p_is_the_level_at_which_the_interval_ends_at_no_effect(average, error, shift):
    null = 0.5 if average is auc_over_seeds else 0.0
    for distance in (0.001, 0.03, 0.08):
        runs = on_the_same_records([null + distance + step * shift for step in (-1, 0, 1)], error)
        p = average(runs).p
        assert average(runs, 1 - p).low == pytest.approx(null, abs=1e-8) or p < 1e-15
    assert average(on_the_same_records([null - shift, null, null + shift], error)).p == 1


def test_p_where_one_part_is_all_there_is():
    """Tables: the normal's and Student's two-sided 1%."""
    same, exact = on_the_same_records((0.2575829, 0.2575829), 0.1), on_the_same_records((0.1, 0.3), 0.0)
    assert over_seeds(same).p == pytest.approx(0.01, rel=1e-5)
    assert over_seeds(exact).p == pytest.approx(2 * (0.5 - math.atan(2) / math.pi))  # Cauchy, at .2 / .1
    assert over_seeds(on_the_same_records((1e5, 1e5), 0.1)).p == 0
    assert math.isnan(over_seeds([Estimate(0.1, {"r": Stratum(np.zeros(2), np.zeros(2, int))})] * 2).p)


@pytest.mark.parametrize("average", [over_seeds, auc_over_seeds])
@pytest.mark.parametrize("seeds", [2, 3])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0, 3.0])
def test_few_seeds_reject_no_more_often_than_they_say(average, seeds, ratio):
    """True null: at most the nominal rate, whatever the variance of the seeds' mean is beside that of the records."""
    rng, rounds, error = np.random.default_rng(seeds), 2500, 0.01
    null = 0.5 if average is auc_over_seeds else 0.0
    p = []
    for _ in range(rounds):
        values = null + rng.normal(0, error) + rng.normal(0, error * math.sqrt(ratio * seeds), seeds)
        p.append(average(on_the_same_records(values, error)).p)
    for level in (0.05, 0.01, 0.0028):
        assert np.mean(np.array(p) < level) <= level + 3 * math.sqrt(level / rounds)


def test_coverage_over_records_and_seeds():
    """Interval of a mean over three seeds whose AUCs scatter about the truth: near 95% in simulation."""
    rng, hits, rounds = np.random.default_rng(5), 0, 600
    truth = 0.63816  # P(N(.5, 1) > N(0, 1)) = Phi(.5 / sqrt 2)
    for _ in range(rounds):
        x, y = rng.normal(0.5, 1, 100), rng.normal(0, 1, 100)
        shifts = rng.normal(0, 0.1, 3)
        runs = [auc_estimate(x + shift, y) for shift in shifts]
        found = over_seeds(runs)
        hits += truth in found
    assert 0.92 < hits / rounds <= 0.995


def test_splits_drawn_by_the_seeds_count_their_sampling_once():
    """Three seeds with records of their own and no effect of the seed: the interval is that of all records together."""
    rng, hits, rounds, widths = np.random.default_rng(6), 0, 400, []
    for _ in range(rounds):
        runs = [auc_estimate(rng.normal(0, 1, 80), rng.normal(0, 1, 80), names=(f"m{k}", f"n{k}")) for k in range(3)]
        found = over_seeds(runs)
        hits += 0.5 in found
        widths.append(found.error)
    assert 0.93 < hits / rounds <= 1
    assert np.mean(widths) == pytest.approx(math.sqrt(161 / (12 * 80 * 80) / 3), rel=0.05)


def test_nothing_that_varies():
    perfect = auc_estimate(np.array([3.0, 4.0]), np.array([1.0, 2.0]))
    reverse = auc_estimate(np.array([1.0, 2.0]), np.array([3.0, 4.0]))
    assert over_seeds([perfect - perfect]).p == 1
    assert over_seeds([perfect - reverse]).low < 1 == over_seeds([perfect - reverse]).value
    assert auc_over_seeds([perfect]).low == pytest.approx(0.025 ** (1 / 2))
    with pytest.raises(DataError, match="at least one"):
        over_seeds([])


def test_mean_is_linear():
    a, b = auc_estimate(*scores(1)), auc_estimate(*scores(2))
    assert mean([a, b]).value == pytest.approx((a.value + b.value) / 2)
    assert (2 * a).variance == pytest.approx(4 * a.variance)


def test_holm_by_hand():
    assert holm([]) == []
    assert holm([0.5]) == [0.5]
    assert holm([0.2, 0.01, 0.5]) == pytest.approx([0.4, 0.03, 0.5])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([math.nan, 0.02, math.nan, 0.01]) == pytest.approx([math.nan, 0.02, math.nan, 0.02], nan_ok=True)


# ---- the frontier ----


def path(*points):
    """(log perplexity, AUC) from the base on, without sampling error."""
    return [Checkpoint(n, Estimate(H), {"loss": Estimate(A)}) for n, (H, A) in enumerate(points)]


def test_interpolation_by_hand():
    run = path((2.0, 0.5), (1.6, 0.6), (1.2, 0.9), (1.4, 0.99))
    stop = at_perplexity(run, Estimate(1.5), "loss")
    assert (stop.epoch, stop.share, stop.auc.value) == pytest.approx((2, 0.25, 0.675))
    assert at_perplexity(run, Estimate(1.2), "loss").auc.value == pytest.approx(0.9)
    assert at_perplexity(run, Estimate(1.1), "loss") is None  # never that good
    assert at_perplexity(run, Estimate(2.0), "loss") is None  # the base is there already
    assert best(run).epoch == 2


def test_the_first_crossing_counts():
    run = path((2.0, 0.5), (1.0, 0.6), (3.0, 0.7), (0.5, 1.0))
    assert at_perplexity(run, Estimate(1.5), "loss").auc.value == pytest.approx(0.55)


def test_the_interval_covers_the_perplexity_too():
    """The whole derivative, against moving the perplexities of the validation records by hand."""

    def estimate(value, seed, name):
        influence = np.random.default_rng(seed).normal(0, 0.01, 20)
        return Estimate(value, {name: Stratum(influence - influence.mean(), np.arange(20))})

    H0, H1, t = (estimate(v, s, "validation") for v, s in ((2.0, 1), (1.0, 2), (1.3, 3)))
    a, b = (estimate(v, s, "members") for v, s in ((0.5, 4), (0.8, 5)))

    def value(e):
        h = [one.value + e * one.strata["validation"].influence[7] for one in (H0, H1, t)]
        w = (h[0] - h[2]) / (h[0] - h[1])
        return (1 - w) * a.value + w * b.value

    stop = at_perplexity([Checkpoint(0, H0, {"x": a}), Checkpoint(1, H1, {"x": b})], t, "x")
    slope = (value(1e-6) - value(-1e-6)) / 2e-6
    assert stop.auc.strata["validation"].influence[7] == pytest.approx(slope, rel=1e-5)
    want = 0.3 * a.strata["members"].influence + 0.7 * b.strata["members"].influence
    np.testing.assert_allclose(stop.auc.strata["members"].influence, want)


def test_its_own_best_epoch_is_where_it_reaches_its_best():
    H = Estimate(1.0, {"validation": Stratum(np.array([0.1, -0.1]), np.arange(2))})
    run = [
        Checkpoint(0, Estimate(2.0, H.strata), {"loss": Estimate(0.5)}),
        Checkpoint(1, H, {"loss": Estimate(0.7)}),
    ]
    stop = at_perplexity(run, H, "loss")
    assert stop.share == 1
    assert stop.auc.value == pytest.approx(0.7)
    assert stop.auc.variance == pytest.approx(0)


def test_pareto_keeps_what_nothing_beats():
    rng = np.random.default_rng(1)
    points = [tuple(p) for p in rng.random((60, 2)).round(1)]
    front = {points[n] for n in pareto(points)}
    naive = {p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)}
    assert front == naive
    assert pareto([]) == []
