"""Exposed records against counting by hand, and against audits of models that leak nothing."""

from __future__ import annotations

import doctest
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imprint import exposed as module
from imprint.errors import DataError, UsageError
from imprint.exposed import FALSE_SHARE, RATE, SIGNIFICANT, conformal_p, count_of, exposed, false_shares
from imprint.measures import tpr_at_fpr
from imprint.measures.sizes import design_effect
from imprint.rows import Cell
from tests.test_subgroups import made_cell

ones = (1.0, 1.0)


# ---- the list


def test_a_leak_by_hand(tmp_path):
    """200 and 200 records, two false positives allowed: the threshold is the third highest non-member, 197."""
    nonmembers = np.arange(200.0)
    first = np.r_[197.5, 198.5, np.full(198, 50.0)]
    second = np.r_[np.full(100, 300.0), 199.0, 197.0, np.full(98, 50.0)]
    third = np.r_[150.0, np.full(99, 300.0), 400.0, np.full(99, 50.0)]
    cell = made_cell(tmp_path, [np.r_[one, nonmembers] for one in (first, second, third)], 200)
    found = exposed(cell, most=102)
    assert [count.exposed for count in found.epochs] == [2, 101, 100]
    assert [count.expected for count in found.epochs] == pytest.approx([200 * 3 / 201] * 3)
    assert (found.rate, found.members, found.nonmembers, found.reason) == (0.01, 200, 200, "")
    top, second_row, *_ = found.rows
    assert (top.rank, top.id, top.subject, top.score, top.tokens) == (1, "r100", "record r100", 400.0, 101)
    assert (top.p, top.chance, top.first) == (pytest.approx(1 / 201), pytest.approx(200 / 201), 2)
    assert (second_row.id, second_row.first, second_row.score) == ("r1", 1, 300.0)  # ties: in the order of the data
    assert [row.first for row in found.rows[1:100]] == [1] + [2] * 98
    assert found.rows[100].id == "r0"  # exposed once, at the first epoch; not on top any more
    assert (found.rows[100].p, found.rows[100].first) == (pytest.approx(51 / 201), 1)
    assert found.rows[101].first is None
    assert top.q == pytest.approx(200 / 201 / 100)  # a hundred stand where chance puts fewer than one
    assert found.named == sum(row.q <= FALSE_SHARE for row in found.rows) == 100
    assert found.finding == (
        "100 of 200 members stand out: of these at most 5% are expected to be there by chance; "
        "100 of 200 members lie above a threshold where chance puts 3.0."
    )


def test_counts_are_those_of_the_main_table(tmp_path):
    rng = np.random.default_rng(0)
    cell = made_cell(tmp_path, rng.normal(size=(3, 500)) + np.repeat([0.8, 0], 250), 250)
    found = exposed(cell, most=5)
    for count in found.epochs:
        sides = cell.sides(cell.scores(count.epoch, ["ref"])["ref"])
        assert count.exposed == tpr_at_fpr(*sides, RATE).true_positives
    assert len(found.rows) == 5
    assert exposed(cell, most=10**6).rows[:5] == found.rows
    assert len(exposed(cell, most=10**6).rows) == 250


def test_the_top_of_a_list_without_a_leak_is_called_chance(tmp_path):
    rng = np.random.default_rng(1)
    found = exposed(made_cell(tmp_path, rng.normal(size=(1, 1000)), 500))
    assert len(found.rows) == 20
    assert found.named == 0
    assert found.finding == (
        f"None more than chance explains: {found.epochs[0].exposed} of 500 members lie above a threshold where chance "
        "puts 6.0."
    )


def test_some_are_exposed_though_none_stands_out(tmp_path):
    """Thirty members level with the fifth highest of 500 non-members: too many for chance, none beyond what it does."""
    nonmembers = np.arange(500.0)
    members = np.r_[np.full(30, 495.5), np.arange(470) / 2]
    found = exposed(made_cell(tmp_path, [np.r_[members, nonmembers]], 500))
    assert found.named == 0
    assert found.finding.startswith(
        "Some members are exposed, but none stands out from the non-members by itself: 30 of"
    )


def test_what_is_refused(tmp_path):
    few = exposed(made_cell(tmp_path / "few", [np.arange(149.0)], 50))
    assert (
        few.reason
        == few.finding
        == ("TPR at 1% FPR needs at least 100 non-members (one expected false positive): there are 99.")
    )
    assert (few.epochs, few.rows, few.named, few.nonmembers) == ((), (), 0, 99)
    assert exposed(made_cell(tmp_path / "enough", [np.arange(150.0)], 50)).reason == ""
    cell = made_cell(tmp_path / "none", [np.arange(150.0)], 50)
    with pytest.raises(UsageError, match="at least one record"):
        exposed(cell, most=0)
    with pytest.raises(UsageError, match="'loss' does not compare with the base"):
        exposed(cell, attack="loss")
    with pytest.raises(UsageError, match="did you mean 'ratio'"):
        exposed(cell, attack="ration")
    (cell.folder.epoch(1)).rename(tmp_path / "away")
    again = Cell(cell.spec, cell.label, cell.folder, cell.base)  # without what has been read before
    assert exposed(again).reason == "No epoch has finished."
    with pytest.raises(DataError, match="1 of 50 member scores"):
        exposed(made_cell(tmp_path / "nan", [[math.nan, *range(149)]], 50))


# ---- p and q

values = st.lists(st.integers(0, 12), min_size=1, max_size=20)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(x=values, y=values, size=st.integers(1, 4))
def test_p_equals_counting(x, y, size):
    subjects = np.arange(len(y)) // size
    p, K = conformal_p(np.array(x, float), np.array(y, float), subjects), subjects[-1] + 1
    for one, found in zip(x, p, strict=True):
        shares = [np.mean([score >= one for score, s in zip(y, subjects, strict=True) if s == k]) for k in range(K)]
        assert found == pytest.approx((1 + sum(shares)) / (K + 1))
        if size == 1:
            assert found == pytest.approx((1 + sum(score >= one for score in y)) / (len(y) + 1))
    assert (p > 0).all()
    assert (p <= 1).all()


@settings(deadline=None, max_examples=100, derandomize=True)
@given(p=st.lists(st.integers(1, 20), min_size=1, max_size=20))
def test_q_names_what_the_step_up_procedure_rejects(p):
    p = np.array(p) / 20
    q = false_shares(p)
    for level in (0.05, 0.1, 0.3, 1.0):
        ranks = [k for k in range(1, len(p) + 1) if np.sort(p)[k - 1] <= level * k / len(p) + 1e-12]
        rejected = p <= (np.sort(p)[max(ranks) - 1] if ranks else -1)
        assert np.array_equal(q <= level + 1e-12, rejected)


def test_p_of_a_count_against_drawing():
    """As many or more than c by chance: from the definition, by drawing both sides over and over."""
    rng, rounds = np.random.default_rng(2), 4000
    found = [count_of(1, tpr_at_fpr(rng.random(60), rng.random(200), RATE), ones) for _ in range(rounds)]
    counts = np.array([count.exposed for count in found])
    assert counts.mean() == pytest.approx(found[0].expected, abs=0.06)
    assert found[0].expected == 60 * 3 / 201
    for c in (0, 1, 2, 4):
        told = next(count.p for count in found if count.exposed == c)
        assert told == pytest.approx(np.mean(counts >= c), abs=0.02)


@pytest.mark.parametrize(
    ("members", "nonmembers", "k_m", "k_n", "correlation"),
    [(300, 300, 1, 1, 0.0), (60, 60, 5, 5, 0.9), (30, 300, 10, 1, 0.9), (300, 30, 1, 10, 0.9)],
)
def test_a_model_that_leaks_nothing_exposes_nobody(members, nonmembers, k_m, k_n, correlation):
    """At most one audit in twenty names a record, or counts more than chance, however alike a subject's records are."""
    rng, named, more, rounds = np.random.default_rng(3), 0, 0, 400
    of_x, of_y = np.repeat(np.arange(members), k_m), np.repeat(np.arange(nonmembers), k_n)
    effects = design_effect(of_x), design_effect(of_y)
    for _ in range(rounds):
        shared = rng.normal(size=members)[of_x], rng.normal(size=nonmembers)[of_y]
        x, y = (math.sqrt(correlation) * s + math.sqrt(1 - correlation) * rng.normal(size=len(s)) for s in shared)
        named += bool((false_shares(conformal_p(x, y, of_y)) <= FALSE_SHARE).any())
        more += count_of(1, tpr_at_fpr(x, y, RATE), effects).p < SIGNIFICANT
    slack = 3 * math.sqrt(0.05 / rounds)
    assert named / rounds <= FALSE_SHARE + slack
    assert more / rounds <= SIGNIFICANT + slack


def test_taking_records_of_a_subject_as_independent_would_name_too_many():
    rng, of = np.random.default_rng(4), np.repeat(np.arange(20), 50)
    named = np.zeros(2)
    for _ in range(150):
        x, y = rng.normal(size=(2, 20))[:, of] + 0.3 * rng.normal(size=(2, 1000))
        for n, subjects in enumerate((of, np.arange(1000))):
            named[n] += (false_shares(conformal_p(x, y, subjects)) <= FALSE_SHARE).any()
    assert named[0] == 0
    assert named[1] / 150 > 0.1


def test_those_named_are_seldom_false():
    rng, false = np.random.default_rng(5), []
    for _ in range(200):
        x, y = rng.normal(size=500), rng.normal(size=500)
        x[:50] += 4
        names = false_shares(conformal_p(x, y, np.arange(500))) <= FALSE_SHARE
        false.append(names[50:].sum() / max(1, names.sum()))
        assert names[:50].sum() > 10 or not names.any()
    assert np.mean(false) <= FALSE_SHARE + 0.01


def test_doctests():
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
