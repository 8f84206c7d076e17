"""Extraction: known values, exact fractions, suffixes by hand, and tests written out."""

from __future__ import annotations

import doctest
import math
import sys
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, hypergeom

import imprint.measures.extraction  # noqa: F401
from imprint import extraction_probability
from imprint.errors import DataError, InvalidAudit, UsageError
from imprint.measures import (
    edit_distance,
    extractable,
    extraction,
    longest_run,
    normalised_edit_distance,
    tries_needed,
)
from imprint.measures.tpr import clopper_pearson
from imprint.types import TokenStats

module = sys.modules["imprint.measures.extraction"]  # the package has a function of this name
oracle = settings(deadline=None, max_examples=100, derandomize=True)
words = st.lists(st.integers(0, 3), max_size=7)


def stats_of(lengths, seed=0):
    rng, R = np.random.default_rng(seed), sum(lengths)
    return TokenStats(
        np.array([f"r{n}" for n in range(len(lengths))]),
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        rng.integers(0, 9, R).astype(np.int32),
        -rng.exponential(2, R).astype(np.float32),
        np.zeros(R, np.float32),
        np.ones(R, np.float32),
        rng.random(R) < 0.7,
    )


# ---- (n, p)


def test_known_values():
    assert float(extraction_probability(math.log(1e-3), 1000)) == pytest.approx(0.632305, abs=5e-7)
    assert float(tries_needed(math.log(1e-3), 0.5)) == pytest.approx(692.80, abs=5e-3)


@pytest.mark.parametrize(
    "p", [Fraction(1, 10**12), Fraction(1, 1000), Fraction(1, 2), Fraction(9, 10), Fraction(999, 1000)]
)
@pytest.mark.parametrize("n", [1, 2, 50])
def test_it_equals_exact_fractions(p, n):
    expected = float(1 - (1 - p) ** n)
    assert float(extraction_probability(math.log(p), n)) == pytest.approx(expected, rel=1e-12)


def test_one_try_is_p_itself():
    log_p = np.array([-1e-9, -0.1, -0.6, -0.8, -5, -36.9, -37.1, -100, -700])
    np.testing.assert_allclose(extraction_probability(log_p, 1), np.exp(log_p), rtol=1e-12)


def test_small_p_times_many_tries():
    # np is small: 1 − (1 − p)^n = np.
    assert float(extraction_probability(-1000.0, 1e300)) == pytest.approx(
        math.exp(-1000 + 300 * math.log(10)), rel=1e-9
    )
    assert float(extraction_probability(-40.0, math.exp(40.0))) == pytest.approx(1 - math.exp(-1))


def test_ends_of_p():
    found = extraction_probability([0.0, 1e-6, -np.inf, np.nan], 7)
    np.testing.assert_array_equal(found, [1.0, 1.0, 0.0, np.nan])
    np.testing.assert_array_equal(tries_needed([0.0, -np.inf, np.nan], 0.5), [0.0, np.inf, np.nan])


def test_shapes_fit_as_in_numpy():
    found = extraction_probability(np.log([0.1, 0.2]), np.array([[1], [2], [3]]))
    np.testing.assert_allclose(found, [[0.1, 0.2], [0.19, 0.36], [0.271, 0.488]])
    assert extraction_probability([], 5).shape == (0,)


def test_tries_invert_the_probability():
    log_p = np.array([-0.01, -1.0, -10.0, -300.0])
    for probability in (0.001, 0.5, 0.999):
        tries = tries_needed(log_p, probability)
        enough = tries >= 1
        np.testing.assert_allclose(extraction_probability(log_p[enough], tries[enough]), probability, rtol=1e-9)


def test_tries_beyond_floats():
    assert float(tries_needed(-600.0, 0.5)) == pytest.approx(math.log(2) * math.exp(600.0), rel=1e-9)
    assert math.isinf(float(tries_needed(-1000.0, 0.5)))


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: extraction_probability([-1.0, 0.01], 5), DataError, "at most 0: the largest is 0.01"),
        (lambda: extraction_probability(-1.0, 0), UsageError, "tries: at least one is needed, not 0"),
        (lambda: extraction_probability(-1.0, math.nan), UsageError, "at least one is needed"),
        (lambda: tries_needed(-1.0, 1.0), UsageError, "strictly between 0 and 1, not 1.0"),
        (lambda: tries_needed(-1.0, 0.0), UsageError, "strictly between 0 and 1"),
        (lambda: extractable([-1.0], 5, 2.0), UsageError, "strictly between 0 and 1, not 2.0"),
        (lambda: extractable([-1.0, math.nan], 5, 0.5), DataError, "1 of 2 suffixes have a log-probability of NaN"),
    ],
)
def test_what_is_no_probability(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call()


def test_extractable_at_its_threshold():
    log_p = np.log([1e-3, 1e-3, 1e-5])
    assert extractable(log_p, 1000, 0.63).tolist() == [True, True, False]
    assert extractable(log_p, 1000, 0.64).tolist() == [False, False, False]


# ---- shares


def fisher(a, M, b, N):
    """Two-sided: all tables of these margins that are no more probable."""
    chance = hypergeom(M + N, a + b, M)
    return sum(chance.pmf(k) for k in range(a + b + 1) if chance.pmf(k) <= chance.pmf(a) * (1 + 1e-9))


def test_shares_and_both_controls_by_hand():
    x, y = np.arange(50) < 20, np.arange(80) < 8
    b = (np.arange(50) < 3) | (np.arange(50) == 49)  # three that both extract, one the base alone: 17 more, 1 fewer
    found = extraction(x, y, b)
    assert (found.records, found.extracted) == ((50, 80), (20, 8, 4))
    assert (found.members.value, found.nonmembers.value, found.base.value) == (0.4, 0.1, 0.08)
    assert (found.members.low, found.members.high) == clopper_pearson(20, 50)
    assert (found.nonmembers.low, found.nonmembers.high) == clopper_pearson(8, 80)
    assert found.over_nonmembers.value == pytest.approx(0.3)
    assert found.over_nonmembers.p == pytest.approx(fisher(20, 50, 8, 80))
    assert found.over_base.value == pytest.approx(0.32)
    assert found.over_base.p == pytest.approx(2 * binom.cdf(1, 18, 0.5))
    # Newcombe: the bounds' distances in the directions that add up.
    low = 0.3 - math.hypot(0.4 - found.members.low, found.nonmembers.high - 0.1)
    assert found.over_nonmembers.low == pytest.approx(low)
    assert 0 < found.over_base.low < 0.32 < found.over_base.high


def test_nothing_extracted_proves_little():
    found = extraction(np.zeros(30), np.zeros(30), np.zeros(30))
    assert (found.members.value, found.members.low) == (0.0, 0.0)
    assert found.members.high == pytest.approx(1 - 0.025 ** (1 / 30))
    assert (found.over_nonmembers.value, found.over_nonmembers.p, found.over_base.p) == (0.0, 1.0, 1.0)
    assert found.over_base.low < 0 < found.over_base.high


def test_all_extracted():
    found = extraction(np.ones(30), np.zeros(30), np.ones(30))
    assert found.over_nonmembers.value == 1.0
    assert found.over_nonmembers.high == 1.0
    assert found.over_nonmembers.low > 0.7
    assert found.over_base.value == 0.0
    assert found.over_base.low < 0  # and not [0, 0]: other records might differ


def test_the_same_answers_leave_an_error():
    x = np.arange(40) < 20
    found = extraction(x, np.zeros(40), x).over_base
    assert (found.value, found.p) == (0.0, 1.0)
    assert found.low < 0 < found.high


def test_subjects_count_once_where_their_records_agree():
    x, y, b = (np.repeat(np.arange(20) < k, 10) for k in (8, 1, 2))
    of = np.repeat(np.arange(20), 10)
    found, records = extraction(x, y, b, 0.95, of, of), extraction(x, y, b)
    single = extraction(x[::10], y[::10], b[::10])
    assert found.members.value == 0.4
    assert found.members.high - found.members.low > 2 * (records.members.high - records.members.low)
    assert found.over_nonmembers.p == pytest.approx(single.over_nonmembers.p) == pytest.approx(fisher(8, 20, 1, 20))
    assert found.over_base.p == pytest.approx(single.over_base.p) == pytest.approx(2 * 0.5**6)
    assert found.over_nonmembers.p > records.over_nonmembers.p


def test_records_on_their_own_are_no_groups():
    rng = np.random.default_rng(0)
    x, y, b = (rng.random(60) < p for p in (0.4, 0.1, 0.2))
    assert extraction(x, y, b, 0.95, [None] * 60, list(range(60))) == extraction(x, y, b)


def test_p_values_hold_their_level():
    rng, under, of = np.random.default_rng(0), np.zeros(2), np.arange(90) // 3
    for _ in range(200):
        subject = np.repeat(rng.random(60) < 0.2, 3)
        x, y, b = (
            np.where(rng.random(90) < 0.5, part, rng.random(90) < 0.2)
            for part in (subject[:90], subject[90:], subject[:90])
        )
        found = extraction(x, y, b, 0.95, of, of)
        under += found.over_nonmembers.p < 0.05, found.over_base.p < 0.05
    assert (under <= binom.ppf(0.999, 200, 0.05)).all()


@pytest.mark.parametrize(
    ("given", "error", "sentence"),
    [
        (([], [1], []), InvalidAudit, "needs members and non-members: there are 0 and 1"),
        (([1], [], [1]), InvalidAudit, "there are 1 and 0"),
        (([1, 0], [1], [1]), DataError, "there are 2, and 1 of the base"),
        (([0.5], [1], [1]), DataError, "true or false"),
        (([math.nan], [1], [1]), DataError, "true or false"),
        (([1], [1], [1], 1.0), UsageError, "confidence level"),
        (([1, 0], [1, 0], [1, 0], 0.95, ["a", "b"]), DataError, "groups are given for one side only"),
        (([1, 0], [1, 0], [1, 0], 0.95, ["a"], ["a", "b"]), DataError, "every record needs a group: 2 records, 1"),
    ],
)
def test_shares_that_cannot_be(given, error, sentence):
    with pytest.raises(error, match=sentence):
        extraction(*given)


# ---- texts


def naive_run(a, b):
    runs = {tuple(a[i:j]) for i, j in combinations(range(len(a) + 1), 2)}
    return max((j - i for i, j in combinations(range(len(b) + 1), 2) if tuple(b[i:j]) in runs), default=0)


def naive_distance(a, b):
    if not a or not b:
        return len(a) + len(b)
    return min(
        naive_distance(a[1:], b) + 1, naive_distance(a, b[1:]) + 1, naive_distance(a[1:], b[1:]) + (a[0] != b[0])
    )


@oracle
@given(a=words, b=words)
def test_runs_equal_all_runs(a, b):
    assert longest_run(a, b) == naive_run(a, b) == longest_run(b, a)


@oracle
@given(a=words.filter(lambda one: len(one) < 6), b=words.filter(lambda one: len(one) < 6))
def test_distances_equal_the_recursion(a, b):
    assert edit_distance(a, b) == naive_distance(a, b) == edit_distance(b, a)
    assert normalised_edit_distance(a, b) == naive_distance(a, b) / max(len(a), len(b), 1)


def test_texts_by_hand():
    kitten, sitting = [ord(c) for c in "kitten"], [ord(c) for c in "sitting"]
    assert edit_distance(kitten, sitting) == 3
    assert normalised_edit_distance(kitten, sitting) == 3 / 7
    assert longest_run(kitten, sitting) == 3  # itt
    assert (longest_run([], [1]), edit_distance([], []), normalised_edit_distance([], [])) == (0, 0, 0.0)
    assert normalised_edit_distance([1, 2], [3, 4]) == 1.0
    assert longest_run(np.arange(1000), np.arange(500, 2000)) == 500
    assert edit_distance(np.arange(1000), np.arange(500, 1500)) == 1000


def test_doctests():
    assert doctest.testmod(module).failed == 0
