"""The bootstrap over subjects against drawing them one by one, and against simulations that know the truth."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ndtr, ndtri

from imprint.errors import DataError, InvalidAudit, UsageError
from imprint.measures import tpr_at_fpr
from imprint.measures.bootstrap import draw, tpr_over_subjects
from imprint.measures.tpr import clopper_pearson

scores = st.lists(st.integers(0, 20), min_size=1, max_size=25)


def naive(x, y, fpr, drawn, level=0.95):
    """Repeats every record as often as its subject is drawn, and measures what is there then."""
    values = []
    for b in range(len(drawn.times[0])):
        again = [np.repeat(s, drawn.times[n][b][drawn.subjects[n]]) for n, s in enumerate((x, y))]
        n = len(again[1])
        allowed = min(int(fpr * n + 1e-9), n - 1)
        values.append(np.mean(again[0] > np.sort(again[1])[n - 1 - allowed]))
    return np.quantile(values, [(1 - level) / 2, (1 + level) / 2])


@settings(deadline=None, max_examples=30, derandomize=True)
@given(
    x=scores,
    y=st.lists(st.integers(0, 20), min_size=10, max_size=30),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    fpr=st.sampled_from([0.1, 0.29, 0.5]),
)
def test_it_equals_drawing_one_by_one(x, y, sizes, fpr):
    x, y = np.array(x, float), np.array(y, float)
    subjects = np.arange(len(x)) // sizes[0], np.arange(len(y)) // sizes[1]
    drawn = draw(*subjects, count=23)
    found, plain = tpr_over_subjects(x, y, fpr, drawn), tpr_at_fpr(x, y, fpr, 0.95, *subjects)
    low, high = naive(x, y, fpr, drawn)
    assert (found.low, found.high) == pytest.approx((min(low, plain.low), max(high, plain.high)))
    assert (found.value, found.threshold, found.indicative) == (plain.value, plain.threshold, plain.indicative)
    assert found.low < found.high


def test_draws_are_of_whole_subjects_and_repeat_themselves():
    labels = ["a", "b", "a", None, None], ["c", "d", "d"]
    drawn, again = draw(*labels, count=50, seed=3), draw(*labels, count=50, seed=3)
    assert [times.shape for times in drawn.times] == [(50, 4), (50, 2)]
    assert all((times.sum(1) == times.shape[1]).all() for times in drawn.times)
    assert all(np.array_equal(a, b) for a, b in zip(drawn.times, again.times, strict=True))
    assert not np.array_equal(drawn.times[0], draw(*labels, count=50, seed=4).times[0])
    often = draw(range(9), range(5), count=4000).times[0]  # each subject once on average, with variance 1 − 1/9
    assert (often.mean(), often.var()) == pytest.approx((1, 8 / 9), rel=0.03)


@pytest.mark.parametrize("hit", [True, False])
def test_certainty_is_never_shown(hit):
    """All members above, or none: nothing varies, and subjects count, not records."""
    x, subjects = np.full(60, 1.0 if hit else -1.0), np.arange(60) // 3
    found = tpr_over_subjects(x, np.zeros(50), 0.1, draw(subjects, range(50), count=20))
    assert (found.low, found.high) == pytest.approx(clopper_pearson(20 * hit, 20), abs=0.02)
    one = tpr_over_subjects(x, np.zeros(50), 0.1, draw(["s"] * 60, range(50), count=20))
    assert (one.low, one.high) == pytest.approx(clopper_pearson(hit, 1), abs=0.01)


@pytest.mark.parametrize(("subjects", "records", "correlation"), [(300, 1, 0.0), (60, 5, 0.7)])
def test_coverage_of_the_rate_at_the_true_threshold(subjects, records, correlation):
    """10% FPR, a true TPR of 40%: near 95%, and wider than `tpr_at_fpr` by little."""
    rng, of, fpr, truth = np.random.default_rng(0), np.arange(subjects * records) // records, 0.1, 0.4
    drawn = draw(of, of, count=300)
    shift, covered, wider, rounds = ndtri(truth) - ndtri(fpr), 0, 0.0, 250
    assert 1 - ndtr(-ndtri(fpr) - shift) == pytest.approx(truth)
    for _ in range(rounds):
        shared, own = rng.normal(size=(2, subjects))[:, of], rng.normal(size=(2, len(of)))
        y, x = np.sqrt(correlation) * shared + np.sqrt(1 - correlation) * own
        found, quick = tpr_over_subjects(x + shift, y, fpr, drawn), tpr_at_fpr(x + shift, y, fpr, 0.95, of, of)
        covered += truth in found
        wider += (found.high - found.low) / (quick.high - quick.low) - 1
    assert 0.93 < covered / rounds <= 0.995
    assert 0 <= wider / rounds < 0.05


def test_what_is_refused():
    x, y = np.arange(5.0), np.arange(20.0)
    with pytest.raises(InvalidAudit, match="at least 100 non-members"):
        tpr_over_subjects(x, y, 0.01, draw(range(5), range(20), count=2))
    with pytest.raises(DataError, match="5 and 20 scores, 4 and 20 records drawn from"):
        tpr_over_subjects(x, y, 0.1, draw(range(4), range(20), count=2))
    with pytest.raises(DataError, match="1 of 5 member scores"):
        tpr_over_subjects([0, 1, 2, 3, np.nan], y, 0.1, draw(range(5), range(20), count=2))
    with pytest.raises(UsageError, match="at least 2 draws"):
        draw(range(5), range(20), count=1)
    with pytest.raises(UsageError, match="confidence level"):
        tpr_over_subjects(x, y, 0.1, draw(range(5), range(20), count=2), 1.5)
