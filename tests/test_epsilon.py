"""What one run proves: published values, the formula written out, and mechanisms whose ε is known."""

from __future__ import annotations

import doctest
import math

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import binom

import imprint
from imprint.errors import DataError, InvalidAudit, UsageError
from imprint.measures import epsilon as module
from imprint.measures.epsilon import SHARES, epsilon_ceiling, one_run_audit, one_run_epsilon, p_value


def naive_p(epsilon, m, r, v, delta):
    """The formula as printed, one i at a time."""
    chance = binom.pmf(range(r + 1), r, 1 / (1 + math.exp(-epsilon))).tolist()
    beta = sum(chance[v:])
    alpha = max((sum(chance[v - i : v]) / i for i in range(1, v + 1)), default=0.0)
    return min(1.0, beta + 2 * m * delta * alpha)


def coins(m, seed=0):
    return np.random.default_rng(seed).random(m) < 0.5


# ---- the bound


@pytest.mark.parametrize(
    ("counts", "delta", "value"),
    [
        ((1000, 100, 100), 0.0, 3.4930),
        ((1000, 100, 90), 0.0, 1.6308),
        ((100, 20, 20), 0.0, 1.8227),
        ((1000, 100, 100), 1e-5, 3.4654),
    ],
)
def test_known_values(counts, delta, value):
    found = imprint.one_run_epsilon(*counts, delta=delta)
    assert type(found) is float
    assert found == pytest.approx(value, abs=5e-5)


def test_all_right_by_hand():
    # q^r = significance, so 1 + e^−ε = .05^(−1/r).
    for r in (10, 100, 10**6):
        assert one_run_epsilon(r, r, r) == pytest.approx(-math.log(math.expm1(-math.log(0.05) / r)), rel=1e-9)


@pytest.mark.parametrize("delta", [0.0, 1e-5, 1e-3, 0.02])
def test_p_equals_the_formula_written_out(delta):
    for m, r, v in ((10, 10, 10), (50, 20, 13), (50, 20, 1), (50, 20, 0), (300, 101, 80)):
        for epsilon in (0.0, 0.3, 1.0, 4.0, 9.0):
            assert p_value(epsilon, m, r, v, delta) == pytest.approx(naive_p(epsilon, m, r, v, delta), rel=1e-9)


@pytest.mark.parametrize("delta", [0.0, 1e-5, 1e-3, 0.02])
@pytest.mark.parametrize("significance", [0.05, 0.3])
def test_the_bound_is_where_p_reaches_the_significance(delta, significance):
    """On a grid of ε: p lies below the significance up to the bound, and nowhere beyond it."""
    grid = np.linspace(0, 9, 46)
    for m, r, v in ((12, 12, 12), (40, 20, 17), (200, 60, 59), (200, 60, 60), (80, 80, 60), (200, 60, 20)):
        bound = one_run_epsilon(m, r, v, delta, significance)
        p = np.array([naive_p(epsilon, m, r, v, delta) for epsilon in grid])
        assert (p[grid < bound - 1e-9] < significance).all()
        assert (p[grid > bound + 1e-9] >= significance).all()


def test_what_raises_and_what_lowers_the_bound():
    bounds = [one_run_epsilon(1000, 200, v) for v in range(201)]
    assert bounds[:101] == [0.0] * 101
    assert np.all(np.diff(bounds) >= 0)
    by_delta = [one_run_epsilon(1000, 200, 190, delta) for delta in (0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.5)]
    assert np.all(np.diff(by_delta[:-1]) < 0)
    assert by_delta[-1] == 0.0
    assert one_run_epsilon(1000, 200, 190, significance=0.01) < one_run_epsilon(1000, 200, 190)


def test_tiny_delta_changes_nothing():
    assert one_run_epsilon(1000, 100, 90, 1e-300) == pytest.approx(one_run_epsilon(1000, 100, 90), rel=1e-9)


def test_ceiling():
    assert epsilon_ceiling(100) == one_run_epsilon(100, 100, 100)
    assert epsilon_ceiling(1000, 100, 1e-5) == pytest.approx(3.4654, abs=5e-5)
    assert epsilon_ceiling(1000) == pytest.approx(5.8091, abs=5e-5)  # −ln(.05^(−1/1000) − 1)
    assert epsilon_ceiling(1, significance=0.05) == 0.0  # one right guess has p = ½


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ((10, 11, 5), "there are 10 canaries, 11 guesses and 5 correct"),
        ((10, 5, 6), "there are 10 canaries, 5 guesses and 6 correct"),
        ((10, 5, -1), "there are 10 canaries, 5 guesses and -1 correct"),
        ((10, 0, 0), "guesses are 1 to as many as canaries"),
        ((10, 5, 2.5), "whole numbers, not 10, 5 and 2.5"),
        ((10, 5, 5, -0.1), "delta must lie in \\[0, 1\\), not -0.1"),
        ((10, 5, 5, 1.0), "delta must lie in"),
        ((10, 5, 5, math.nan), "delta must lie in"),
        ((10, 5, 0, 0.0, 0.0), "significance must lie strictly between 0 and 1, not 0.0"),
        ((10, 5, 5, 0.0, 1.0), "significance must lie strictly"),
    ],
)
def test_counts_that_cannot_be(given, sentence):
    with pytest.raises(UsageError, match=sentence):
        one_run_epsilon(*given)


# ---- the audit


def test_guesses_by_hand():
    """Twelve canaries, guesses for four: the two highest are called in, the two lowest out."""
    included = np.array([1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0], bool)
    scores = np.array([9.0, 8.0, 3, 3, 3, 3, 3, 3, 3, 3, 1.0, 0.0])
    found = one_run_audit(scores, included, guesses=4)
    assert (found.canaries, found.included, found.guesses, found.correct, found.tried) == (12, 6, 4, 2, 1)
    found = one_run_audit(scores, included, guesses=3)  # two highest, one lowest
    assert (found.guesses, found.correct) == (3, 2)


def test_a_fixed_number_has_the_bound_of_its_counts():
    included = coins(400)
    scores = np.where(included, 1.0, -1.0) + np.random.default_rng(1).normal(size=400)
    found = one_run_audit(scores, included, guesses=80, delta=1e-5)
    order = np.argsort(scores)
    right = included[order[-40:]].sum() + (~included[order[:40]]).sum()
    assert found.correct == right > 60
    assert found.epsilon == one_run_epsilon(400, 80, int(right), 1e-5)
    assert found.ceiling == epsilon_ceiling(400, 80, 1e-5)


def test_several_numbers_are_corrected_for():
    included = coins(1000)
    scores = np.where(included, 1.0, -1.0) + np.random.default_rng(1).normal(size=1000)
    found = one_run_audit(scores, included)
    single = [one_run_audit(scores, included, int(1000 * share), significance=0.05 / 3) for share in SHARES]
    assert found.tried == len(SHARES) == 3
    assert found.epsilon == max(one.epsilon for one in single) > 1
    assert found.ceiling == max(one.ceiling for one in single)
    assert (found.guesses, found.correct) in [(one.guesses, one.correct) for one in single]
    assert found.significance == 0.05


def test_everything_known_proves_the_ceiling():
    included = coins(200, 3)
    found = one_run_audit(included.astype(float), included, guesses=100)
    assert found.correct == 100
    assert found.epsilon == found.ceiling == pytest.approx(3.4930, abs=5e-5)
    assert one_run_audit(-included.astype(float), included, guesses=100).correct == 0


@pytest.mark.parametrize("included", ["sorted", "drawn"])
def test_equal_scores_are_not_ordered_by_the_truth(included):
    """Neither where those that are in come last, nor where any seed near at hand drew the coins."""
    sides = [np.arange(400) >= 200] if included == "sorted" else [coins(400, seed) for seed in range(50)]
    right = [one_run_audit(np.zeros(400), side, guesses=400).correct for side in sides]
    assert abs(np.mean(right) - 200) < 30 / math.sqrt(len(right))  # three deviations of Bin(400, ½)
    assert all(one_run_audit(np.zeros(400), side).epsilon < 0.5 for side in sides)


def test_infinite_scores_rank():
    included = coins(40)
    scores = np.where(included, np.inf, -np.inf)
    assert one_run_audit(scores, included, guesses=20).correct == 20


@pytest.mark.parametrize(
    ("scores", "included", "options", "error", "sentence"),
    [
        ([0.0] * 9, [True, False, True] * 3, {}, InvalidAudit, "9 canaries prove nothing about ε: at least 10"),
        ([math.nan] * 2 + [0.0] * 10, [True, False] * 6, {}, DataError, "2 of 12 canaries have NaN scores"),
        ([0.0] * 12, [True] * 11, {}, DataError, r"scores are of shape \(12,\), coins \(11,\)"),
        ([0.0] * 12, [2] * 12, {}, DataError, "true or false"),
        (np.zeros(40), np.ones(40, bool), {}, InvalidAudit, "40 of 40 canaries were in, which fair coins would not"),
        (np.zeros(1000), np.arange(1000) < 400, {}, InvalidAudit, "400 of 1000 canaries were in"),
        ([0.0] * 12, [True, False] * 6, {"guesses": 13}, UsageError, "12 canaries, 13 guesses"),
        ([0.0] * 12, [True, False] * 6, {"guesses": 0}, UsageError, "guesses are 1 to"),
        ([0.0] * 12, [True, False] * 6, {"significance": 2.0}, UsageError, "significance must lie"),
        ([0.0] * 12, [True, False] * 6, {"delta": 1.0}, UsageError, "delta must lie"),
    ],
)
def test_what_is_no_audit(scores, included, options, error, sentence):
    with pytest.raises(error, match=sentence):
        one_run_audit(scores, included, **options)


def test_coins_that_may_be_fair():
    assert one_run_audit(np.arange(12.0), np.ones(12, bool)).epsilon == 0.0  # 2 · 2^−12 is above 1e-6
    assert one_run_audit(np.arange(1000.0), np.arange(1000) < 425).included == 425  # 4.7 deviations: p = 2e-6


# ---- mechanisms whose ε is known: `benchmarks/epsilon.py` has more of them, and 2,000 rounds


@pytest.mark.parametrize("guesses", [60, None])
@pytest.mark.parametrize("mechanism", ["response", "laplace"])
def test_the_bound_exceeds_the_truth_in_a_twentieth_at_most(mechanism, guesses):
    rng, epsilon, over = np.random.default_rng(0), 1.0, 0
    for _ in range(300):
        included = rng.random(300) < 0.5
        if mechanism == "response":
            scores = np.where(rng.random(300) < expit(epsilon), included, ~included)
        else:
            scores = included + rng.laplace(0, 1 / epsilon, 300)
        over += one_run_audit(scores, included, guesses).epsilon > epsilon
    assert over <= binom.ppf(0.999, 300, 0.05)


def test_a_false_claim_is_found():
    """The same simulation finds a mechanism that spends twice the ε it claims."""
    rng, over = np.random.default_rng(0), 0
    for _ in range(50):
        included = rng.random(1000) < 0.5
        over += one_run_audit(included + rng.laplace(0, 1 / 2, 1000), included, guesses=200).epsilon > 1.0
    assert over > 40


def test_doctests():
    assert doctest.testmod(module).failed == 0
