"""Goldfish loss: which tokens are left out, that copies agree, and that nothing else of a record changes."""

from __future__ import annotations

import numpy as np
import pytest

from imprint.data.tokens import Encoded
from imprint.tuning.goldfish import _hashes, goldfish

MASK = (1 << 64) - 1


def record(ids, first=1):
    ids = np.array(ids, np.int32)
    return Encoded("a", ids, np.arange(len(ids)) >= first, 7, "target")


def random(length, seed=0, first=1):
    return record(np.random.default_rng(seed).integers(0, 50_000, length), first)


def naive(ids, k, context=13):
    """The same in plain whole numbers, token by token: whether each is left out."""

    def mixed(x):
        x = (x + 0x9E3779B97F4A7C15) & MASK
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
        return x ^ (x >> 31)

    before = [[(d, int(ids[t - d])) for d in range(1, context + 1) if t >= d] for t in range(len(ids))]
    return [mixed(sum(mixed(token + (d << 32)) for d, token in found) & MASK) < (1 << 64) // k for found in before]


def test_known_values():
    """A token with nothing before it hashes to SplitMix64's well-known first number from 0. The rest must never change:
    it says what was trained on."""
    assert _hashes(np.array([5], np.int32), 13).tolist() == [0xE220A8397B1DCDAF]
    assert np.flatnonzero(~goldfish(record(range(40), first=0), 4).scored).tolist() == [
        2,
        7,
        11,
        15,
        27,
        28,
        31,
        34,
        37,
    ]


@pytest.mark.parametrize("k", [2, 3, 4, 10])
@pytest.mark.parametrize("context", [1, 2, 13, 100])
def test_agrees_with_plain_numbers(k, context):
    for seed, length in enumerate((2, 3, 14, 60)):
        one = random(length, seed)
        kept = one.scored & ~np.array(naive(one.ids, k, context))
        if kept.any():
            np.testing.assert_array_equal(goldfish(one, k, context).scored, kept)


@pytest.mark.parametrize("k", [2, 4, 25])
def test_share_left_out(k):
    """Of 100,000 random tokens: 1/k, within four standard deviations."""
    one = random(100_001)
    share = 1 - goldfish(one, k).scored.sum() / one.scored.sum()
    assert share == pytest.approx(1 / k, abs=4 * np.sqrt((1 - 1 / k) / k / 100_000))


def test_copies_of_a_passage_leave_out_the_same_tokens():
    """Whatever stands before the passage, from its fourteenth token on."""
    rng = np.random.default_rng(1)
    passage = rng.integers(0, 50_000, 200)
    masks = [goldfish(record([*rng.integers(0, 50_000, n), *passage]), 4).scored[-200:] for n in (3, 40, 111)]
    assert 0 < (~masks[0][13:]).sum() < 187
    for other in masks[1:]:
        np.testing.assert_array_equal(masks[0][13:], other[13:])
        assert not np.array_equal(masks[0][:13], other[:13])  # where what stands before is seen


def test_the_order_of_the_context_counts():
    one, other = _hashes(np.array([1, 2, 3], np.int32), 13), _hashes(np.array([2, 1, 3], np.int32), 13)
    assert one[2] != other[2]


def test_prompts_stay_unscored_and_the_record_is_left_as_it_was():
    one = random(60, first=20)
    before = one.scored.copy()
    found = goldfish(one, 2)
    assert not found.scored[:20].any()
    assert 0 < found.scored.sum() < 40
    np.testing.assert_array_equal(one.scored, before)
    assert (found.id, found.zlib_bytes, found.cut) == ("a", 7, "target")
    np.testing.assert_array_equal(found.ids, one.ids)
    np.testing.assert_array_equal(found.predictors, np.flatnonzero(found.scored) - 1)


def test_a_record_never_loses_all():
    """With one scored token that is kept; with two, both to be left out, one of them."""
    for seed in range(40):
        for length in (2, 3):
            one = random(length, seed)
            assert 1 <= goldfish(one, 2).scored.sum() <= one.scored.sum()
    both = next(one for one in (random(3, seed) for seed in range(40)) if all(naive(one.ids, 2)[1:]))
    assert goldfish(both, 2).scored.sum() == 1


def test_nothing_scored_stays_nothing():
    assert not goldfish(record([3, 4], first=2), 4).scored.any()
    assert not goldfish(record([3]), 4).scored.any()
