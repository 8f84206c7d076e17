"""Attacks over shadow models: against naive loops, and in worlds where the best attack is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.special import ndtr
from scipy.stats import norm, spearmanr

from imprint.attacks.shadows import CERTAIN, POOLED_BELOW, fitted_a, lira, lira_offline, logits, rmia
from imprint.attacks.single import loss
from imprint.errors import InvalidAudit, UsageError
from imprint.measures import auc
from imprint.types import Shadows, TokenStats


def stats(losses) -> TokenStats:
    """One text of one token per loss."""
    N = len(losses)
    column = np.zeros(N, np.float32)
    return TokenStats(
        ids=np.array([f"x{n}" for n in range(N)]),
        offsets=np.arange(N + 1),
        tokens=np.zeros(N, np.int32),
        logp=-np.asarray(losses, np.float64),  # not rounded to float32: tests compare to the bit
        mean=column,
        std=column + 1,
        top=column > 0,
    )


def softplus(phi):
    """The loss whose logit is φ: p = 1/(1 + e^−φ)."""
    return np.logaddexp(0, -np.asarray(phi))


def halves(N: int, S: int, rng: np.random.Generator):
    """[N, S] each record inside half of the models, pairs of models complementary."""
    first = rng.permuted(np.tile(np.arange(N)[:, None] % 2 == 0, (1, S // 2)), axis=0)
    return np.stack([first, ~first], axis=2).reshape(N, S)


def gaussian_world(N=4000, S=16, difficulty=1.5, gain=1.0, spread=1.0, seed=0, lift=None):
    """φ = difficulty of the record + what holding it adds + noise, normal; half of the records are members."""
    rng = np.random.default_rng(seed)
    hard = rng.normal(0, difficulty, N)
    lift = np.full(N, gain) if lift is None else lift(rng, N)
    inside, members = halves(N, S, rng), rng.permutation(N) < N // 2

    def phi(held):
        return (hard + lift * held.T + rng.normal(0, spread, held.T.shape)).T

    shadows = Shadows(softplus(phi(inside)), inside)
    return stats(softplus(phi(members))), shadows, members


def area(scores, members):
    return auc(scores[members], scores[~members]).value


ATTACKS = {
    "lira": lambda target, shadows: lira(target, shadows),
    "lira_offline": lambda target, shadows: lira_offline(target, shadows),
    "rmia": lambda target, shadows: rmia(target, shadows, np.arange(len(target)) % 3 == 0),
}


@pytest.mark.parametrize("phi", [-800.0, -30.0, -1.0, 0.0, 2.0, 13.0])
def test_logits_are_stable(phi):
    assert logits(softplus(np.array([phi])))[0] == pytest.approx(phi, rel=1e-6)


def test_a_loss_of_nothing_has_a_logit():
    # log(1/(e^CERTAIN − 1)), also for a loss that rounding made negative
    expected = -math.log(math.expm1(CERTAIN))
    assert logits(np.array([0.0, -1e-9])) == pytest.approx([expected] * 2)


@pytest.mark.parametrize("S", [6, POOLED_BELOW])
def test_lira_equals_a_loop_over_records(S):
    rng = np.random.default_rng(S)
    N = 30
    inside = halves(N, S, rng)
    inside[:3] = False  # records that no half holds
    losses = rng.gamma(2, 1.0, (N, S))
    target = stats(rng.gamma(2, 1.0, N))
    logit = lambda L: math.log(math.exp(-L) / (1 - math.exp(-L)))  # noqa: E731
    sides = [
        {True: [logit(losses[n, s]) for s in range(S) if inside[n, s]]}
        | {False: [logit(losses[n, s]) for s in range(S) if not inside[n, s]]}
        for n in range(N)
    ]

    def sigma(n, side):
        if S >= POOLED_BELOW:
            return np.std(sides[n][side], ddof=1)
        each = [of[side] for of in sides if of[side]]
        return math.sqrt(sum(sum((x - np.mean(of)) ** 2 for x in of) for of in each) / sum(len(of) - 1 for of in each))

    online, offline = lira(target, Shadows(losses, inside)), lira_offline(target, Shadows(losses, inside))
    for n in range(N):
        phi = logit(target.nll[n])
        out = norm(np.mean(sides[n][False]), sigma(n, False))
        assert norm.cdf(offline[n]) == pytest.approx(out.cdf(phi), abs=1e-9)
        if n < 3:
            assert math.isnan(online[n])
            continue
        held = norm(np.mean(sides[n][True]), sigma(n, True))
        assert online[n] == pytest.approx(held.logpdf(phi) - out.logpdf(phi), rel=1e-6, abs=1e-9)


def test_offline_does_not_saturate():
    """Twelve and thirteen standard deviations out the distribution function is 1 for both."""
    shadows = Shadows(softplus([[-0.5, 0.5, -0.5, 0.5]] * 2), np.zeros((2, 4), bool))
    spread = math.sqrt(1 / 3)  # four squared deviations of a quarter, three degrees of freedom
    scores = lira_offline(stats(softplus([12 * spread, 13 * spread])), shadows)
    np.testing.assert_allclose(scores, [12, 13], rtol=1e-5)
    assert ndtr(scores).tolist() == [1, 1]


@pytest.mark.parametrize("S", [8, 128])
def test_lira_reaches_the_area_of_the_best_test(S):
    """Two normal laws a distance d·σ apart: no test of one φ has more than Φ(d/√2). μ estimated from S/2 models has
    the error σ/√(S/2): the difference of the two densities loses about that much."""
    gain = 1.5
    target, shadows, members = gaussian_world(S=S, gain=gain, seed=1)
    best = ndtr(gain / math.sqrt(2))
    found = area(lira(target, shadows), members)
    assert found < best + 0.015
    assert found > best - (0.015 if S == 128 else 0.04)


def test_more_is_found_with_more_to_ask():
    """What a record gains varies: models with it know how much, models without it how hard it is, LOSS neither."""
    target, shadows, members = gaussian_world(S=32, seed=2, lift=lambda rng, N: rng.exponential(1.5, N))
    online, offline = lira(target, shadows), lira_offline(target, shadows)
    areas = [area(scores, members) for scores in (online, offline, loss(target))]
    assert areas[0] > areas[1] + 0.02
    assert areas[1] > areas[2] + 0.05
    # LOSS: φ differs by the difficulty as well, sd √(1 + 1.5²); the mean over gains of Φ(gain/√(2·3.25)).
    gains = np.random.default_rng(0).exponential(1.5, 100_000)
    assert areas[2] == pytest.approx(ndtr(gains / math.sqrt(2 * 3.25)).mean(), abs=0.02)
    assert area(rmia(target, shadows, ~members), members) > areas[2] + 0.03


def test_with_few_models_a_shared_variance_is_better():
    """Variances of four models each rank worse than one of all: that is why they are pooled."""
    target, shadows, members = gaussian_world(S=8, seed=3)
    phi = logits(shadows.losses)
    held, out = (np.where(side, phi, np.nan) for side in (shadows.inside, ~shadows.inside))
    own = norm.logpdf(logits(target.nll), np.nanmean(held, 1), np.nanstd(held, 1, ddof=1)) - norm.logpdf(
        logits(target.nll), np.nanmean(out, 1), np.nanstd(out, 1, ddof=1)
    )
    assert area(lira(target, shadows), members) > area(own, members) + 0.02


@pytest.mark.parametrize("name", ATTACKS)
def test_higher_means_member_and_of_no_gain_nothing(name):
    target, shadows, members = gaussian_world(gain=1.5, seed=4)
    assert area(ATTACKS[name](target, shadows), members) > 0.75
    target, shadows, members = gaussian_world(gain=0.0, seed=5)
    scores = ATTACKS[name](target, shadows)
    assert 0.5 in auc(scores[members], scores[~members])


@pytest.mark.parametrize("gamma", [0.8, 1.0, 1.5])
@pytest.mark.parametrize("a", [0.3, 1.0])
def test_rmia_equals_a_loop_over_pairs(gamma, a):
    rng = np.random.default_rng(6)
    N, S = 40, 6
    inside = halves(N, S, rng)
    inside[:12] = False
    losses, target = rng.gamma(2, 1.0, (N, S)), stats(rng.gamma(2, 1.0, N))
    population = np.arange(N) < 12

    def r(n):
        p_out = np.mean([math.exp(-losses[n, s]) for s in range(S) if not inside[n, s]])
        return math.exp(-target.nll[n]) / (((1 + a) * p_out + (1 - a)) / 2)

    naive = [np.mean([r(n) / r(z) > gamma for z in range(12)]) for n in range(N)]
    found = rmia(target, Shadows(losses, inside), population, gamma=gamma, a=a)
    np.testing.assert_allclose(found[12:], naive[12:], rtol=1e-12)
    if gamma != 1:  # at γ = 1 a z is compared with itself, where rounding decides
        np.testing.assert_allclose(found, naive, rtol=1e-12)


def test_gamma_moves_the_steps_and_not_the_order():
    target, shadows, _ = gaussian_world(N=300, S=8, seed=7)
    population = np.arange(300) < 100
    fine, coarse = (rmia(target, shadows, population, gamma=gamma) for gamma in (1.0, 2.0))
    order = np.argsort(fine, kind="stable")
    assert (np.diff(coarse[order])[np.diff(fine[order]) > 0] >= 0).all()
    assert len(np.unique(fine)) <= 101
    # Of texts at 3 nats a token that gain .2: a γ of 2 asks for log 2 = .69 and leaves hardly any step.
    rng = np.random.default_rng(8)
    hard = rng.normal(3, 0.5, 300)
    target = stats(hard - 0.2 * (np.arange(300) >= 200) + rng.normal(0, 0.05, 300))
    shadows = Shadows(hard[:, None] + rng.normal(0, 0.05, (300, 8)), np.zeros((300, 8), bool))
    steps = [len(np.unique(rmia(target, shadows, population, gamma=gamma, a=1.0)[200:])) for gamma in (1.0, 2.0)]
    assert steps[1] == 1


def test_a_classifiers_a_makes_it_loss():
    """Texts of 2 to 4 nats a token: p is about .05, so with a = .3 the constant .35 is nearly all of p̄."""
    rng = np.random.default_rng(9)
    N, S = 600, 8
    hard, inside, members = rng.normal(3, 0.5, N), halves(N, S, rng), rng.permutation(N) < N // 2
    target = stats(hard - 0.2 * members + rng.normal(0, 0.1, N))
    shadows = Shadows(hard[:, None] - 0.2 * inside + rng.normal(0, 0.1, (N, S)), inside)
    population = ~members & (rng.random(N) < 0.5)
    scores = {a: rmia(target, shadows, population, a=a) for a in (0.3, None, 1.0)}
    evaluated = ~population
    areas = {a: area(s[evaluated], members[evaluated]) for a, s in scores.items()}
    assert spearmanr(scores[0.3], loss(target)).statistic > 0.99
    assert areas[0.3] == pytest.approx(area(loss(target)[evaluated], members[evaluated]), abs=0.02)
    assert areas[None] > 0.85 > 0.7 > areas[0.3]
    # p_in = e^.2 p_out, so a is near (1 − e^.2·.056)/(1 − .056) = .987
    assert fitted_a(shadows) == pytest.approx(0.987, abs=0.004)


def test_likelihoods_that_underflow_are_compared_all_the_same():
    # e⁻⁹⁰⁰ is 0 in floating point; the text still gained a nat more than the other.
    shadows = Shadows(np.array([[900.0] * 4, [900.0] * 4]), np.zeros((2, 4), bool))
    found = rmia(stats([898.0, 899.0]), shadows, np.array([False, True]), a=1.0)
    assert found.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("name", ATTACKS)
def test_nan_is_passed_on_to_its_record_alone(name):
    target, shadows, _ = gaussian_world(N=200, S=8, seed=10)
    losses, own = shadows.losses.copy(), target.nll.copy()
    losses[4, ~shadows.inside[4]] = np.nan
    own[7] = np.nan
    scores = ATTACKS[name](stats(own), Shadows(losses, shadows.inside))
    assert np.flatnonzero(np.isnan(scores)).tolist() == [4, 7]


@pytest.mark.parametrize("name", ATTACKS)
def test_a_record_needs_two_models_of_a_kind(name):
    target, shadows, _ = gaussian_world(N=200, S=8, seed=11)
    inside = shadows.inside.copy()
    inside[1] = np.arange(8) > 0  # one without
    inside[4] = np.arange(8) < 1  # one with
    inside[5] = False  # none with, as a validation record
    missing = {"lira": [1, 4, 5], "lira_offline": [1], "rmia": [1]}
    scores = ATTACKS[name](target, Shadows(shadows.losses, inside))
    assert np.flatnonzero(np.isnan(scores)).tolist() == missing[name]


@pytest.mark.parametrize("name", ATTACKS)
def test_models_that_do_not_differ_say_nothing(name):
    inside = halves(60, 8, np.random.default_rng(0))
    scores = ATTACKS[name](stats(np.full(60, 2.0)), Shadows(np.full((60, 8), 2.0), inside))
    assert np.ptp(scores) == 0


@pytest.mark.parametrize("name", ATTACKS)
def test_too_few_models_are_refused(name):
    target, shadows, _ = gaussian_world(N=12, S=8, seed=12)
    with pytest.raises(InvalidAudit, match="at least 4 of them, and there are 2: set `shadows` in the recipe"):
        ATTACKS[name](target, Shadows(shadows.losses[:, :2], shadows.inside[:, :2]))
    everywhere = Shadows(shadows.losses, np.ones((12, 8), bool))
    with pytest.raises(InvalidAudit, match="no record lies outside 2 shadow models: set more `shadows`"):
        ATTACKS[name](target, everywhere)
    with pytest.raises(UsageError, match=r"not \(12, 8\) and \(12, 7\)"):
        ATTACKS[name](target, Shadows(shadows.losses, shadows.inside[:, :7]))


def test_what_else_is_refused():
    target, shadows, _ = gaussian_world(N=12, S=8, seed=13)
    nowhere = Shadows(shadows.losses, np.zeros((12, 8), bool))
    with pytest.raises(InvalidAudit, match="no record lies inside 2 shadow models"):
        lira(target, nowhere)
    assert np.isfinite(lira_offline(target, nowhere)).all()
    with pytest.raises(InvalidAudit, match=r"there are none: set `data\.validation` or `data\.auxiliary`"):
        rmia(target, shadows, np.zeros(12, bool))
    for options in ({"gamma": 0.0}, {"gamma": math.nan}, {"a": 1.1}, {"a": -0.1}):
        with pytest.raises(UsageError, match="gamma > 0 and a from 0 to 1"):
            rmia(target, shadows, np.ones(12, bool), **options)
    one_side_each = np.repeat([[True] * 8, [False] * 8], 6, axis=0)
    with pytest.raises(UsageError, match="give a"):
        rmia(target, Shadows(shadows.losses, one_side_each), np.ones(12, bool))
