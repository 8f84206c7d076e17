"""Sizes against the power gate, which judges the records at hand, and against drawing them over and over."""

from __future__ import annotations

import doctest
import math

import numpy as np
import pytest
from scipy.stats import beta, binom, norm

from imprint.errors import InvalidAudit, UsageError
from imprint.gates.judge import POWER, WORTH_FINDING, power
from imprint.measures import auc, sizes, tpr_at_fpr
from imprint.measures.sizes import (
    auc_error,
    design_effect,
    finds_auc,
    for_auc,
    for_auc_budget,
    for_tpr,
    for_tpr_budget,
    passes_auc,
    passes_tpr,
)
from imprint.measures.tpr import clopper_pearson


def gate(members, nonmembers, budget=None, copies=1):
    """The power gate on so many subjects a side, each with the same score `copies` times."""
    rng = np.random.default_rng(members)
    scores = tuple(np.repeat(rng.permutation(n).astype(float), copies) for n in (members, nonmembers))
    groups = [f"m{n // copies}" for n in range(len(scores[0]))], [f"n{n // copies}" for n in range(len(scores[1]))]
    return power(scores, groups, budget)


# ---- the AUC


@pytest.mark.parametrize(("members", "nonmembers", "copies"), [(50, 50, 1), (300, 40, 1), (7, 1000, 1), (60, 90, 4)])
def test_the_error_is_the_gates(members, nonmembers, copies):
    found = gate(members, nonmembers, 0.57, copies).figures
    assert auc_error(members, nonmembers) == pytest.approx(found["standard_error"])
    assert passes_auc(0.57, members, nonmembers) == pytest.approx(found["passes"])


def test_the_error_against_drawing():
    rng, exact = np.random.default_rng(0), math.sqrt((12 + 8 + 1) / (12 * 12 * 8))  # of the Mann-Whitney statistic
    drawn = [auc(rng.normal(size=12), rng.normal(size=8)).value for _ in range(3000)]
    assert np.std(drawn) == pytest.approx(exact, rel=0.04)
    assert exact < auc_error(12, 8) < exact * (1 + 1 / 8)


@pytest.mark.parametrize("budget", [0.52, 0.55, 0.6, 0.75])
@pytest.mark.parametrize("ratio", [None, 3])
def test_the_gate_agrees_with_what_passes(budget, ratio):
    members = None if ratio is None else for_auc_budget(budget) * ratio
    n = for_auc_budget(budget, members=members)
    assert (
        gate(members or n, n, budget).figures["passes"]
        >= POWER
        > gate(members or n - 1, n - 1, budget).figures["passes"]
    )
    assert for_auc_budget(budget, POWER) == for_auc_budget(budget)
    even = for_auc_budget(budget, power=0.5, members=members)  # the gate is green where passing is as likely as not
    assert gate(members or even + 1, even + 1, budget).state == "green"
    assert gate(members or even - 1, even - 1, budget).state == "red"


def test_the_gate_agrees_with_what_is_found():
    n = for_auc(WORTH_FINDING)
    assert (gate(n, n).state, gate(n - 1, n - 1).state) == ("green", "red")
    assert gate(n, n).figures["detectable"] <= WORTH_FINDING < gate(n - 1, n - 1).figures["detectable"]
    assert finds_auc(WORTH_FINDING, n, n) >= POWER > finds_auc(WORTH_FINDING, n - 1, n - 1)


@pytest.mark.parametrize("members", [None, 300])
def test_a_model_that_leaks_nothing_passes_as_often_as_said(members):
    rng, n = np.random.default_rng(1), for_auc_budget(0.6, members=members)
    passed = [auc(rng.normal(size=members or n), rng.normal(size=n)).high < 0.6 for _ in range(1200)]
    assert np.mean(passed) == pytest.approx(POWER, abs=0.04)


def test_a_leak_is_found_as_often_as_said():
    rng, n, shift = np.random.default_rng(2), for_auc(0.65), math.sqrt(2) * norm.ppf(0.65)
    found = [auc(rng.normal(shift, 1, n), rng.normal(size=n)).low > 0.5 for _ in range(1200)]
    assert POWER - 0.03 < np.mean(found) < POWER + 0.07


def test_subjects_of_several_records_need_as_many_times_more():
    """Four records of one score each: the worst of subjects."""
    rng, n = np.random.default_rng(3), for_auc_budget(0.65, effect=4.0)
    assert n == 4 * for_auc_budget(0.65)
    subjects = np.arange(n) // 4
    passed = []
    for _ in range(800):
        x, y = rng.normal(size=n // 4)[subjects], rng.normal(size=n // 4)[subjects]
        passed.append(auc(x, y, 0.95, subjects, subjects + n).high < 0.65)
    assert np.mean(passed) == pytest.approx(POWER, abs=0.05)


def test_more_members_never_ask_for_more_nonmembers():
    asked = [for_auc_budget(0.55, members=m) for m in (300, 400, 525, 1000, 10**6)]
    assert asked == sorted(asked, reverse=True)
    assert asked[2] <= for_auc_budget(0.55) == 525


# ---- the TPR


@pytest.mark.parametrize(
    ("budget", "fpr", "members", "nonmembers"),
    [(0.05, 0.01, 300, 200), (0.03, 0.01, 150, 1000), (0.2, 0.1, 60, 90), (0.3, 0.1, 20, 15)],
)
def test_passing_a_tpr_budget_against_drawing(budget, fpr, members, nonmembers):
    rng = np.random.default_rng(4)
    drawn = (tpr_at_fpr(rng.random(members), rng.random(nonmembers), fpr) for _ in range(1500))
    passed = np.mean([tpr.high < budget for tpr in drawn])
    assert -0.07 < passed - passes_tpr(budget, fpr, members, nonmembers) < 0.02


def test_passing_with_a_known_threshold_is_binomial():
    """Countless non-members leave Clopper-Pearson's bound of a binomial count: within half a step of it."""
    m, fpr, budget = 400, 0.1, 0.14
    most = max(c for c in range(m) if clopper_pearson(c, m)[1] < budget)
    assert binom.cdf(most - 1, m, fpr) < passes_tpr(budget, fpr, m, 5_000_000) < binom.cdf(most + 1, m, fpr)


def test_passing_with_countless_members_is_that_of_order_statistics():
    """The bound is then the true rate at a rank that is too low in one case of forty."""
    n, fpr, budget = 1000, 0.1, 0.125
    rank = 1 + binom.ppf(0.975, n, fpr)
    below, above = (beta.cdf(budget, r, n + 1 - r) for r in (rank + 1, rank - 1))
    assert below < passes_tpr(budget, fpr, 5_000_000, n) < above < below + 0.1


def test_passing_grows_with_the_numbers_and_the_budget():
    chances = [passes_tpr(0.05, 0.01, n, n) for n in range(100, 900, 20)]
    assert chances == sorted(chances)
    assert (passes_tpr(0.05, 0.01, 100, 99), passes_tpr(1, 0.01, 100, 100)) == (0, 1)
    wider = [passes_tpr(budget, 0.01, 300, 300) for budget in (0.02, 0.04, 0.05, 0.06, 0.2)]
    assert wider == sorted(wider)
    assert wider[-1] > 0.999


@pytest.mark.parametrize(("budget", "fpr"), [(0.05, 0.01), (0.02, 0.01), (0.2, 0.1), (0.01, 0.001)])
def test_the_number_asked_for_is_enough_and_one_less_is_not(budget, fpr):
    n = for_tpr_budget(budget, fpr)
    assert passes_tpr(budget, fpr, n, n) >= POWER > passes_tpr(budget, fpr, n - 1, n - 1)
    assert for_tpr_budget(budget, fpr, effect=2.5) == math.ceil(2.5 * n)


def test_subjects_of_several_records_pass_as_often_with_as_many_times_more():
    """Four records of one score each: the worst of subjects."""
    rng, n = np.random.default_rng(5), for_tpr_budget(0.2, 0.1, effect=4.0)
    subjects, passed = np.arange(n) // 4, []
    for _ in range(600):
        x, y = rng.random(1 + n // 4)[subjects], rng.random(1 + n // 4)[subjects]
        passed.append(tpr_at_fpr(x, y, 0.1, 0.95, subjects, subjects).high < 0.2)
    assert np.mean(passed) == pytest.approx(POWER, abs=0.06)


@pytest.mark.parametrize("fpr", [0.1, 0.01, 0.001, 0.07, 1 / 3, 0.29])
def test_measurable_and_firm_are_what_the_tpr_says(fpr):
    least, firm = for_tpr(fpr), for_tpr(fpr, expected=10)
    assert tpr_at_fpr([0], np.arange(least), fpr).nonmembers == least
    with pytest.raises(InvalidAudit):
        tpr_at_fpr([0], np.arange(least - 1), fpr)
    assert tpr_at_fpr([0], np.arange(firm - 1), fpr).indicative
    assert not tpr_at_fpr([0], np.arange(firm), fpr).indicative


# ---- what is refused


@pytest.mark.parametrize(
    ("ask", "sentence"),
    [
        (lambda: for_auc_budget(0.5), r"must lie above \.5, which a model that leaks nothing has.*not 0\.5\."),
        (lambda: for_auc_budget(1.2), "at most 1"),
        (lambda: for_auc_budget(math.nan), "not nan"),
        (lambda: for_auc(0.4), r"told from \.5 must lie above it"),
        (lambda: for_auc_budget(0.5001), "needs more than 10,000,000 records a side"),
        (lambda: for_tpr_budget(0.01, 0.01), "must lie above the false positive rate 0.01"),
        (lambda: for_tpr_budget(0.5, 0), "fpr must lie strictly between"),
        (lambda: for_tpr(1), "fpr must lie strictly between"),
        (lambda: for_auc(0.6, power=1), "power must lie strictly between"),
        (lambda: for_auc(0.6, members=0), "at least 1"),
        (lambda: for_auc(0.6, effect=0.5), "at least 1, not 0.5"),
        (lambda: for_auc(0.6, level=95), "confidence level"),
        (lambda: design_effect(["a"], 1.5), r"must lie in \[0, 1\]"),
        (lambda: design_effect([]), "at least one record"),
    ],
)
def test_what_no_number_answers_is_refused(ask, sentence):
    with pytest.raises(UsageError, match=sentence):
        ask()


def test_too_few_members_are_told_how_many_it_takes():
    with pytest.raises(UsageError, match=r"out of reach of 100 members, whatever.*at least 263 are needed"):
        for_auc_budget(0.55, members=100)
    assert for_auc_budget(0.55, members=263) > 10**5
    with pytest.raises(UsageError, match="at least 526 are needed"):
        for_auc_budget(0.55, members=262, effect=2.0)
    with pytest.raises(UsageError, match=r"TPR budget of 0\.02 at 1\.0% FPR"):
        for_tpr_budget(0.02, 0.01, members=100)


def test_design_effect_by_hand():
    assert design_effect(range(7)) == design_effect([None] * 7) == 1
    assert design_effect(["a"] * 3 + ["b"]) == 10 / 4
    assert design_effect(["a"] * 3 + ["b"], 0.5) == 1 + 0.5 * 1.5


def test_doctests():
    result = doctest.testmod(sizes)
    assert result.attempted > 0
    assert result.failed == 0
