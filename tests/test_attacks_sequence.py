"""Features of the log p sequence against loops over texts, and on sequences whose value is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from imprint.attacks import worked
from imprint.attacks.sequence import (
    BLOCK,
    FEATURES,
    FIRST,
    approximate_entropy,
    lempel_ziv,
    sequence_features,
    share_above,
    slope,
)
from imprint.errors import UsageError
from tests.test_attacks import renamed
from tests.test_attacks_edges import made
from tests.test_attacks_oracles import ragged


def naive_slope(values):
    if len(values) == 1:
        return 0.0
    middle, mean = (len(values) - 1) / 2, math.fsum(values) / len(values)
    top = math.fsum((t - middle) * (value - mean) for t, value in enumerate(values))
    return top / math.fsum((t - middle) ** 2 for t in range(len(values)))


def naive_lempel_ziv(values, bins):
    values = values[:FIRST]
    low, spread = min(values), max(values) - min(values) or 1.0
    symbols = [min(bins - 1, int(bins * (value - low) / spread)) for value in values]
    phrases, begin = set(), 0
    for end in range(1, len(symbols) + 1):
        if tuple(symbols[begin:end]) not in phrases:
            phrases.add(tuple(symbols[begin:end]))
            begin = end
    return len(phrases) * math.log(len(values), bins) / len(values)


def naive_approximate_entropy(values, m, r):
    values = np.array(values[:FIRST])
    if len(values) <= m + 1:
        return 0.0
    within = r * values.std()

    def phi(m):
        stretches = np.array([values[i : i + m] for i in range(len(values) - m + 1)])
        return np.mean([np.log(np.mean(np.abs(stretches - one).max(axis=1) <= within)) for one in stretches])

    return abs(phi(m) - phi(m + 1))


def rows_of(stats):
    return [stats.logp[a:b].astype(float).tolist() for a, b in zip(stats.offsets[:-1], stats.offsets[1:], strict=True)]


def stats(seed):
    rng = np.random.default_rng(seed)
    lengths = [1, 2, 3, 9, 10, 11, FIRST, FIRST + 1, FIRST + 40, *rng.integers(1, 90, 12)]
    return ragged(seed, np.array(lengths), ties=seed % 2 == 1)


@pytest.mark.parametrize("seed", range(4))
def test_features_equal_a_loop_over_texts(seed):
    target = stats(seed)
    rows = rows_of(target)

    def agree(found, naive):
        np.testing.assert_allclose(found, [naive(row) for row in rows], rtol=1e-9, atol=1e-9)

    agree(slope(target), naive_slope)
    agree(share_above(target, threshold=-2.0), lambda row: sum(value > -2 for value in row) / len(row))
    for bins in (2, 3, 4, 5):
        agree(lempel_ziv(target, bins=bins), lambda row, bins=bins: naive_lempel_ziv(row, bins))
    for m, r in ((1, 0.2), (2, 0.2), (3, 0.5), (5, 0.8), (8, 0.8)):
        agree(approximate_entropy(target, m=m, r=r), lambda row, m=m, r=r: naive_approximate_entropy(row, m, r))


def test_the_columns_are_the_features_in_order():
    target = stats(2)
    assert list(FEATURES) == [
        "slope",
        "share_above_-1",
        "share_above_-2",
        "share_above_-3",
        "lempel_ziv",
        "approximate_entropy",
    ]
    found = sequence_features(target)
    assert found.shape == (len(target), len(FEATURES))
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found[:, 2], share_above(target, threshold=-2.0))
    np.testing.assert_array_equal(found[:, 4], lempel_ziv(target))


def test_features_do_not_depend_on_the_neighbours():
    """Texts are padded and worked through in blocks of similar length: to the bit the same alone, and in any order."""
    target = stats(0)
    together = sequence_features(target)
    alone = np.vstack([sequence_features(target.select(np.array([n]))) for n in range(len(target))])
    np.testing.assert_array_equal(together, alone)
    order = np.random.default_rng(1).permutation(len(target))
    np.testing.assert_array_equal(sequence_features(target.select(order)), together[order])


def test_more_texts_than_a_block_holds():
    target = ragged(6, np.full(2 * BLOCK // 40 + 3, 40), ties=False)
    found = sequence_features(target)
    for n in (0, BLOCK // 40 - 1, BLOCK // 40, len(target) - 1):
        np.testing.assert_array_equal(found[n], sequence_features(target.select(np.array([n])))[0])


def test_known_values():
    # log p rises by 2 a token, falls by 1; one token. -1 and 0 are above -1.5
    assert slope(made([-4, -2, 0], [-1, -2, -3, -4], [-7])).tolist() == [2, -1, 0]
    assert share_above(made([-1, -1.5, 0, -9]), threshold=-1.5).tolist() == [0.5]
    # 0 1 1 0 0 1 1 0 in two symbols: phrases 0, 1, 10, 01; then 10 again: 4·log_2(8)/8
    assert lempel_ziv(made([-1, 0, 0, -1, -1, 0, 0, -1]), bins=2).tolist() == [1.5]
    # one value says what comes next, and so do two in turn, but for the ends
    assert approximate_entropy(made([-3.0] * 30)).tolist() == [0]
    assert approximate_entropy(made([-1, -9] * 15), m=1)[0] < 0.01
    # -1 -2 -6, m = 1, r·σ = .8·2.16: counts 2, 2, 1 of 3; pairs (-1 -2), (-2 -6) are unlike: 1, 1 of 2
    phi_1, phi_2 = (2 * math.log(2 / 3) + math.log(1 / 3)) / 3, math.log(1 / 2)
    np.testing.assert_allclose(approximate_entropy(worked.TARGET, m=1)[0], abs(phi_1 - phi_2))


def test_a_random_sequence_is_less_regular_than_a_repeated_one():
    rng = np.random.default_rng(3)
    random, repeated = -rng.gamma(2, 1, 120), np.tile(-rng.gamma(2, 1, 6), 20)
    target = made(random, repeated)
    assert lempel_ziv(target)[0] > 1.5 * lempel_ziv(target)[1]
    assert approximate_entropy(target, m=2, r=0.5)[0] > approximate_entropy(target, m=2, r=0.5)[1] + 0.2


def test_the_length_moves_the_complexity_little():
    """c/T alone falls by nearly half from 40 tokens to 160."""
    rng = np.random.default_rng(4)
    short, long = (made(*(-rng.gamma(1, 2, T) for _ in range(50))) for T in (40, 160))
    assert abs(lempel_ziv(long).mean() / lempel_ziv(short).mean() - 1) < 0.15
    shares = [lempel_ziv(stats).mean() / math.log(T) for stats, T in ((short, 40), (long, 160))]
    assert shares[1] / shares[0] < 0.85


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_text_without_a_finite_log_p_has_no_features(value):
    target = stats(1)
    logp_R = target.logp.copy()
    logp_R[target.offsets[6] + 5] = value
    found, clean = sequence_features(renamed(target, logp=logp_R)), sequence_features(target)
    assert np.isnan(found[6]).all()
    np.testing.assert_array_equal(np.delete(found, 6, axis=0), np.delete(clean, 6, axis=0))


def test_no_texts_have_no_features():
    assert sequence_features(worked.TARGET.select(np.array([], np.intp))).shape == (0, len(FEATURES))


def test_wrong_options_are_named():
    with pytest.raises(UsageError, match="at least 2, not 1"):
        lempel_ziv(worked.TARGET, bins=1)
    for m, r in ((0, 0.8), (2, -0.1), (2, math.nan)):
        with pytest.raises(UsageError, match="stretches of m >= 1 tokens within r >= 0"):
            approximate_entropy(worked.TARGET, m=m, r=r)
