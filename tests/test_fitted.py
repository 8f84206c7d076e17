"""Attacks fitted on known records: against scikit-learn, naive sums, and worlds whose odds are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.special import expit

from imprint.attacks import fitted
from imprint.attacks.fitted import FAR, FEWEST, FLOOR, ROUNDING, camia, ensemble, quantile, reference_features, squashed
from imprint.attacks.reference import ref
from imprint.attacks.regression import RIDGES, _folds, _held_out_loss, fit, least_squares, logistic, variance
from imprint.attacks.single import loss
from imprint.errors import InvalidAudit, UsageError
from imprint.measures import auc
from imprint.types import TokenStats


def stats(logp, lengths, mean=-2.0, std=1.0) -> TokenStats:
    """Texts of the given lengths, whose tokens' log p lie in one row."""
    size = sum(lengths)
    return TokenStats(
        ids=np.array([f"x{n}" for n in range(len(lengths))]),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        tokens=np.zeros(size, np.int32),
        logp=np.asarray(logp, np.float32),
        mean=np.full(size, mean, np.float32),
        std=np.full(size, std, np.float32),
        top=np.asarray(logp) > -1,
    )


def world(count: int, seed: int, gain: float = 0.4, lengths=None):
    """Half members; texts are hard or easy whatever side they are on, and tuning helps members by `gain` a token."""
    rng = np.random.default_rng(seed)
    members = np.arange(count) % 2 == 0
    lengths = rng.integers(5, 30, count) if lengths is None else lengths
    hard = np.repeat(rng.gamma(8, 0.4, count), lengths)
    before = -hard * rng.gamma(2, 0.5, lengths.sum())
    after = before + np.repeat(gain * members, lengths) + rng.normal(0, 1, lengths.sum())
    sizes = 10 + 4 * lengths + rng.integers(0, 5, count)
    return stats(np.minimum(after, 0), lengths), stats(before, lengths), sizes, members


def told(members, count: int):
    """Known of the first `count`, else NaN."""
    return np.where(np.arange(len(members)) < count, members.astype(np.float64), np.nan)


FITTED = {
    "camia": lambda t, r, sizes, known: camia(t, known),
    "ensemble": ensemble,
    "quantile": lambda t, r, sizes, known: quantile(t, r, known == 0),
}


@pytest.mark.parametrize("ridge", RIDGES)
@pytest.mark.parametrize("members", [15, 60])
def test_logistic_equals_sklearns(ridge, members):
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(members)
    labels = np.arange(120) < members
    X = rng.normal(size=(120, 4)) * [1, 50, 1e-3, 1] + labels[:, None] * [0.5, 20, 0, 0]
    model = logistic(X, labels, ridge)
    Z = (X - X.mean(0)) / X.std(0)
    theirs = LogisticRegression(C=1 / ridge, class_weight="balanced", tol=1e-10, max_iter=10_000).fit(Z, labels)
    np.testing.assert_allclose(model.weights, theirs.coef_[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(model(X), theirs.decision_function(Z), rtol=1e-4, atol=1e-5)


def test_logistic_of_one_binary_feature():
    """No penalty worth the name: the log-odds are those of the table, 30:10 and 10:30, so ±log 3."""
    X = np.repeat([[1.0], [0.0], [1.0], [0.0]], [30, 10, 10, 30], axis=0)
    model = logistic(X, np.arange(80) < 40, ridge=1e-9)
    np.testing.assert_allclose(model(np.array([[1.0], [0.0]])), [math.log(3), -math.log(3)], rtol=1e-6)
    # Three times as many non-members of the same kind: at even prior odds nothing changes.
    many = np.concatenate([X[:40], np.repeat(X[40:], 3, axis=0)])
    again = logistic(many, np.arange(160) < 40, ridge=1e-9)
    np.testing.assert_allclose(again(np.array([[1.0], [0.0]])), [math.log(3), -math.log(3)], rtol=1e-6)


def test_separable_classes_and_constant_features_have_finite_weights():
    X = np.column_stack([np.arange(40) < 20, np.full(40, 0.1), np.zeros(40)]).astype(float)
    model = logistic(X, np.arange(40) < 20)
    assert np.isfinite(model.weights).all()
    assert model.weights[0] > 0
    np.testing.assert_allclose(model.weights[1:], 0, atol=1e-12)
    assert model.spread[1:].tolist() == [1, 1]


def test_the_penalty_is_chosen_by_held_out_records():
    rng, labels = np.random.default_rng(1), np.arange(60) % 2 == 0
    folds = list(_folds(labels))
    assert sum(folds).tolist() == [1] * 60  # each once, six of each class in a fold
    assert {int(fold[labels].sum()) for fold in folds} == {int(fold[~labels].sum()) for fold in folds} == {6}
    noise = rng.normal(size=(60, 8))
    signal = noise + 3.0 * labels[:, None]
    for X, expected in ((noise, max(RIDGES)), (signal, min(RIDGES))):
        losses = {ridge: _held_out_loss(X, labels, ridge) for ridge in RIDGES}
        best = min(losses, key=losses.get)
        np.testing.assert_array_equal(logistic(X, labels).weights, logistic(X, labels, best).weights)
        assert best == expected


def test_least_squares_leaves_each_record_out():
    rng = np.random.default_rng(1)
    X, y = rng.normal(size=(30, 3)), rng.normal(size=30)
    line, left_out = least_squares(X, y, 2.0)
    Z = (X - X.mean(0)) / X.std(0)
    A, penalty = np.column_stack([np.ones(30), Z]), np.diag([0, 2.0, 2.0, 2.0])
    np.testing.assert_allclose(line(X), A @ np.linalg.solve(A.T @ A + penalty, A.T @ y))
    for n in range(30):  # by fitting thirty times, on features standardised once
        B, others = np.delete(A, n, 0), np.delete(y, n)
        assert left_out[n] == pytest.approx(y[n] - A[n] @ np.linalg.solve(B.T @ B + penalty, B.T @ others))


def test_variance_finds_the_spread_it_was_drawn_with():
    rng = np.random.default_rng(2)
    X = rng.normal(size=(20_000, 2))
    truth = 0.5 + 1.2 * X[:, 0]  # log σ²
    found = variance(X, (np.exp(truth / 2) * rng.normal(size=20_000)) ** 2, 1.0)
    np.testing.assert_allclose(found(X), truth, atol=0.12)
    # Without features: the mean of the squares, (1 + 4 + 16)/3.
    assert variance(np.zeros((3, 1)), np.array([1.0, 4.0, 16.0]), 1.0).intercept == pytest.approx(math.log(7))


def test_newton_reaches_the_minimum_from_far_away():
    squares = np.array([1e-12, 1.0, 1e12])
    line = variance(np.array([[0.0], [1.0], [2.0]]), squares, 1e-3)
    away = fit(
        np.array([[0.0], [1.0], [2.0]]),
        lambda eta: ((eta + squares * np.exp(-eta)) / 2, (1 - squares * np.exp(-eta)) / 2, squares * np.exp(-eta) / 2),
        1e-3,
        start=-20.0,
    )
    np.testing.assert_allclose(away.weights, line.weights, rtol=1e-5)
    np.testing.assert_allclose(line(np.array([[0.0], [1.0], [2.0]])), np.log(squares), atol=0.2)


def test_squashing_keeps_the_order_and_saturates():
    known = np.array([0.0, 1.0, 0.0, 1.0, np.nan, np.nan, np.nan, np.nan])
    column = np.array([0.0, 1.0, 2.0, 5.0, np.inf, -np.inf, 1e9, np.nan])
    # known: median 1.5, mean deviation (1.5 + .5 + .5 + 3.5)/4 = 1.5
    found = squashed(column[:, None], known)[:, 0]
    np.testing.assert_allclose(found[:4], np.arcsinh([-1, -1 / 3, 1 / 3, 3.5 / 1.5]))
    assert found[4] == found[6] == -found[5] == np.arcsinh(FAR)
    assert np.isnan(found[7])
    # What is infinite among the known says nothing of the middle, and a constant has no deviation.
    np.testing.assert_allclose(squashed(np.full((8, 1), np.inf), known)[:, 0], np.arcsinh(FAR))
    assert squashed(np.full((8, 1), 0.1), known).any() == False  # noqa: E712


def test_reference_features_are_those_of_a_loop_over_texts():
    lengths = np.array([1, 4, 7])
    row = np.random.default_rng(3).normal(-2, 1, 12).astype(np.float32)
    found = reference_features(stats(row, lengths, mean=-1.5, std=0.7))
    for features, text in zip(found, np.split(row.astype(np.float64), [1, 5]), strict=True):
        naive = [text.mean(), text.std(), 1.5, 0.7, np.mean(text > -1), math.log(len(text))]
        np.testing.assert_allclose(features, naive, rtol=1e-5, atol=1e-6)


def test_the_ensemble_says_what_the_odds_are():
    """Fitted on 400 known records, on 4,000 fresh ones the mean probability is the share of members, in all and in
    every bin of it; and no single attack ranks better."""
    target, reference, sizes, members = world(4400, seed=4)
    scores = ensemble(target, reference, sizes, told(members, 400))[400:]
    members, p = members[400:], expit(scores)
    assert p.mean() == pytest.approx(members.mean(), abs=0.03)
    for low, high in ((0, 0.2), (0.2, 0.4), (0.4, 0.6), (0.6, 0.8), (0.8, 1.0)):
        chosen = (p >= low) & (p < high)
        assert chosen.sum() > 200
        assert p[chosen].mean() == pytest.approx(members[chosen].mean(), abs=0.07)
    singles = [attack[400:] for attack in (loss(target), ref(target, reference))]
    found = auc(scores[members], scores[~members]).value
    assert found > max(auc(s[members], s[~members]).value for s in singles) - 0.01


def test_of_a_model_that_leaks_nothing_the_ensemble_says_nothing():
    target, reference, sizes, members = world(2200, seed=5, gain=0.0)
    scores = ensemble(target, reference, sizes, told(members, 200))[200:]
    found = auc(scores[members[200:]], scores[~members[200:]])
    assert 0.5 in found
    assert np.abs(expit(scores) - 0.5).mean() < 0.1


@pytest.mark.parametrize("name", FITTED)
def test_higher_means_member(name):
    target, reference, sizes, members = world(400, seed=6, gain=1.0)
    scores = FITTED[name](target, reference, sizes, told(members, 160))[160:]
    assert np.isfinite(scores).all()
    found = auc(scores[members[160:]], scores[~members[160:]]).value
    assert found > (0.6 if name == "camia" else 0.9)


@pytest.mark.parametrize("name", FITTED)
def test_nothing_is_fitted_on_evaluated_records(name):
    """Their order changes no score; their absence, or anything in their place, none of the others'."""
    target, reference, sizes, members = world(300, seed=7)
    known, attack = told(members, 140), FITTED[name]
    scores = attack(target, reference, sizes, known)
    order = np.concatenate([np.arange(140), 140 + np.random.default_rng(0).permutation(160)])
    shuffled = attack(target.select(order), reference.select(order), sizes[order], known[order])
    np.testing.assert_array_equal(shuffled, scores[order])
    few = np.arange(150)
    alone = attack(target.select(few), reference.select(few), sizes[few], known[few])
    np.testing.assert_array_equal(alone, scores[few])
    other, its_reference, its_sizes, _ = world(300, seed=8, gain=5.0)
    rows = np.concatenate([target.select(few[:140]).logp, other.select(np.arange(140, 300)).logp])
    before = np.concatenate([reference.select(few[:140]).logp, its_reference.select(np.arange(140, 300)).logp])
    lengths = np.concatenate([target.lengths[:140], other.lengths[140:]])
    replaced = attack(
        stats(rows, lengths), stats(before, lengths), np.concatenate([sizes[:140], its_sizes[140:]]), known
    )
    np.testing.assert_array_equal(replaced[:140], scores[:140])


def test_coefficients_come_from_known_records_alone():
    target, reference, _, members = world(200, seed=9)
    features, known = np.column_stack([loss(target), ref(target, reference)]), told(members, 80)
    model = fitted.fitted_on(features, known, "ensemble")
    features[80:] = np.random.default_rng(1).normal(size=(120, 2)) * 100
    again = fitted.fitted_on(features, known, "ensemble")
    assert (model.intercept, model.weights.tolist()) == (again.intercept, again.weights.tolist())
    assert model.centre.tolist() == again.centre.tolist() == features[:80].mean(axis=0).tolist()


def test_camia_learns_which_way_a_feature_points(monkeypatch):
    """A feature that is lower for members counts for membership where it is low, and the other way round."""
    target, _, _, members = world(200, seed=10, gain=0.0)
    for sign in (1, -1):
        feature = sign * members + np.random.default_rng(0).normal(0, 0.1, 200)
        monkeypatch.setattr(fitted, "sequence_features", lambda stats, column=feature: column[:, None])
        scores = camia(target, told(members, 100))[100:]
        assert scores[members[100:]].min() > scores[~members[100:]].max()


@pytest.mark.parametrize("name", FITTED)
def test_nan_is_passed_on_and_never_fitted_on(name):
    target, reference, sizes, members = world(300, seed=11)
    known = told(members, 160)
    clean = FITTED[name](target, reference, sizes, known)
    broken = target.logp.copy()
    for n in (3, 200):  # a known non-member, an evaluated record
        broken[target.offsets[n]] = np.nan
    scores = FITTED[name](stats(broken, target.lengths), reference, sizes, known)
    assert np.flatnonzero(np.isnan(scores)).tolist() == [3, 200]
    without = known.copy()
    without[3] = np.nan
    expected = FITTED[name](target, reference, sizes, without)
    there = ~np.isnan(scores)
    np.testing.assert_allclose(scores[there], expected[there])
    assert not np.array_equal(clean[there], scores[there])


def test_infinite_scores_saturate_the_ensemble():
    """Where the reference is certain the ratio is -inf (`ratio`): a finite score, and a finite fit."""
    target, reference, sizes, members = world(200, seed=12)
    certain = reference.logp.copy()
    for n in (2, 150):
        certain[reference.offsets[n] : reference.offsets[n + 1]] = 0.0
    scores = ensemble(target, stats(certain, reference.lengths), sizes, told(members, 100))
    assert np.isfinite(scores).all()
    others = np.delete(np.arange(200), [2, 150])
    clean = ensemble(target, reference, sizes, told(members, 100))
    assert np.corrcoef(scores[others], clean[others])[0, 1] > 0.9


def test_quantile_scores_non_members_by_standard_deviations():
    """Fresh non-members have mean 0 and variance 1 by their own regression, and in each half of texts by length; the
    gain of short texts varies more, so a threshold on the gain itself would let mostly short ones through."""
    target, reference, _, _ = world(6000, seed=13, gain=0.0)
    scores = quantile(target, reference, np.arange(6000) < 300)[300:]
    long = target.lengths[300:] > 16
    for side in (long, ~long):
        assert scores[side].mean() == pytest.approx(0, abs=0.12)
        assert scores[side].std() == pytest.approx(1, abs=0.12)
    gain = ref(target, reference)[300:]
    assert gain[~long].std() > 1.3 * gain[long].std()


def test_quantile_of_one_kind_of_text():
    """All texts alike to the reference: μ and σ are the mean and the root of the mean squared left-out residual."""
    rng = np.random.default_rng(14)
    gains = rng.normal(0.3, 0.2, 60)
    before = np.full(60, -3.0)
    target, reference = stats(before + gains, [1] * 60), stats(before, [1] * 60)
    gains = ref(target, reference)
    known = np.arange(60) < 50
    mean = gains[:50].mean()
    left_out = (gains[:50] - mean) / (1 - 1 / 50)  # the mean of the other 49
    np.testing.assert_allclose(
        quantile(target, reference, known), (gains - mean) / np.sqrt(np.mean(left_out**2)), rtol=1e-9
    )


def test_quantiles_spread_has_a_floor():
    # Two kinds of text, of 1 and 8 tokens; the gain of long ones never varies, that of short ones is ±1.
    lengths = np.array([1, 8] * 40)
    gain = np.where(lengths == 1, np.tile([1.0, 0, -1.0, 0], 20), 0.0)
    reference = stats(np.full(lengths.sum(), -3.0), lengths)
    target = stats(-3.0 + np.repeat(gain, lengths), lengths)
    gain_of_last = np.repeat(gain, lengths)
    gain_of_last[-8:] = 1.0  # the last long text, evaluated, gains 1
    target = stats(-3.0 + gain_of_last, lengths)
    scores = quantile(target, reference, np.arange(80) < 78)
    assert 1.4 < scores[-1] < 1 / (FLOOR * 0.7)  # above the pooled 1/√½, below what a spread at the floor gives
    # And where tuning changed nothing at all there is nothing to divide by.
    assert quantile(reference, reference, np.arange(80) < 60).tolist() == [0.0] * 80
    barely = quantile(stats(np.full(lengths.sum(), -3.0) + 2e-7, lengths), reference, np.arange(80) < 60)
    assert np.abs(barely).max() < 2e-6 / ROUNDING


REFUSED = {
    "camia": (19, 20, "'camia'.*at least 20 known members and 20 known non-members, and there are 19 and 20"),
    "ensemble": (20, 3, "'ensemble'.*there are 20 and 3: set `data.auxiliary` in the recipe"),
    "quantile": (0, 49, "'quantile'.*at least 50 .*there are 49: raise `data.validation` or set `data.auxiliary`"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_too_few_known_records_are_refused(name):
    members_known, nonmembers_known, sentence = REFUSED[name]
    target, reference, sizes, members = world(200, seed=15)
    known = np.full(200, np.nan)
    known[np.flatnonzero(members)[:members_known]] = 1
    known[np.flatnonzero(~members)[:nonmembers_known]] = 0
    with pytest.raises(InvalidAudit, match=sentence):
        FITTED[name](target, reference, sizes, known)
    known[np.flatnonzero(members)[:FEWEST]] = 1
    known[np.flatnonzero(~members)[:50]] = 0
    assert np.isfinite(FITTED[name](target, reference, sizes, known)).all()


def test_known_is_one_zero_or_nan():
    target, reference, sizes, members = world(100, seed=16)
    known = told(members, 80)
    known[7] = 0.5
    with pytest.raises(UsageError, match=r"record 7 has 0\.5"):
        ensemble(target, reference, sizes, known)


@pytest.mark.parametrize("name", FITTED)
def test_texts_of_one_token_have_scores(name):
    target, reference, sizes, members = world(200, seed=17, lengths=np.ones(200, np.int64))
    assert np.isfinite(FITTED[name](target, reference, sizes, told(members, 120))).all()


@pytest.mark.parametrize("name", FITTED)
def test_identical_texts_have_one_score(name):
    lengths = [4] * 120
    same, sizes = stats(np.full(480, -2.0), lengths), np.full(120, 30)
    known = told(np.arange(120) % 2 == 0, 110)
    assert np.ptp(FITTED[name](same, same, sizes, known)) == 0
