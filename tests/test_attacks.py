"""Attacks: every formula against a loop over texts, its direction, and the sentences for wrong evidence."""

from __future__ import annotations

import doctest
import functools
import importlib
import math
import zlib as zlib_module

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imprint.attacks import ATTACKS, evidence_needed, resolve, run_attack
from imprint.attacks.single import MIN_STD, lowest_mean, min_k, min_k_plus
from imprint.attacks.worked import REFERENCE, TARGET, ZLIB_BYTES
from imprint.errors import DataError, UsageError
from imprint.types import TokenStats

# Row of per-token (logp target, logp reference, mean, std): ragged data for the oracles, N = 0 included.
finite = functools.partial(st.floats, allow_nan=False, width=32)
tokens = st.tuples(finite(-30, 0), finite(-30, 0), finite(-12, 0), finite(0, 4))
texts = st.lists(st.lists(tokens, min_size=1, max_size=12), max_size=8)
oracle = settings(deadline=None, max_examples=100, derandomize=True)


def stats(rows, logp=0, mean=2, std=3) -> TokenStats:
    """TokenStats of rows of tuples, with the columns at the places named."""
    flat = np.array([t for row in rows for t in row], np.float32).reshape(-1, 4)
    lengths = [len(row) for row in rows]
    return TokenStats(
        ids=np.array([f"x{n}" for n in range(len(rows))], np.str_),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        tokens=np.arange(len(flat), dtype=np.int32),
        logp=flat[:, logp],
        mean=flat[:, mean],
        std=flat[:, std],
        top=np.zeros(len(flat), np.bool_),
    )


def evidence(rows):
    sizes = np.array([10 + 3 * len(row) for row in rows], np.int64)
    return {"target": stats(rows), "reference": stats(rows, logp=1), "zlib_bytes": sizes}


def mean_nll(row, column=0) -> float:
    return -math.fsum(t[column] for t in row) / len(row)


def mean_of_lowest(values, k) -> float:
    n = max(1, int(k * len(values)))
    return math.fsum(sorted(values)[:n]) / n


def naive_ratio(row) -> float:
    L_t, L_r = mean_nll(row), mean_nll(row, 1)
    if L_r == 0:
        return -math.inf if L_t > 0 else -1.0
    return -L_t / L_r


NAIVE = {
    "loss": lambda row: -mean_nll(row),
    "ref": lambda row: mean_nll(row, 1) - mean_nll(row),
    "zlib": lambda row: -mean_nll(row) / (10 + 3 * len(row)),
    "min_k": lambda row: mean_of_lowest([t[0] for t in row], 0.2),
    "min_k_plus": lambda row: mean_of_lowest([(t[0] - t[2]) / max(t[3], MIN_STD) for t in row], 0.2),
    "ratio": naive_ratio,
}


FITTED = ("fitted", "shadows")  # modules whose attacks have their own tests


def test_every_attack_has_an_oracle():
    from tests.test_attacks_oracles import NAIVE as MORE

    arithmetic = {n for n, attack in ATTACKS.items() if attack.__module__.rpartition(".")[2] not in FITTED}
    assert {*NAIVE} <= arithmetic <= {*NAIVE, *MORE}


@oracle
@given(rows=texts)
def test_attacks_equal_a_loop_over_texts(rows):
    for name in NAIVE:
        scores = run_attack(name, **evidence(rows))
        assert scores.dtype == np.float64
        np.testing.assert_allclose(scores, [NAIVE[name](row) for row in rows], rtol=1e-9, atol=1e-9, err_msg=name)


@oracle
@given(rows=texts, k=st.sampled_from([0.01, 0.1, 0.29, 0.3, 0.5, 0.7, 1.0]))
def test_k_is_an_option_and_counts_like_int(rows, k):
    scores = run_attack(functools.partial(min_k, k=k), **evidence(rows))
    np.testing.assert_allclose(scores, [mean_of_lowest([t[0] for t in row], k) for row in rows], rtol=1e-9)


@oracle
@given(rows=texts.filter(len))
def test_score_does_not_depend_on_the_neighbours(rows):
    """A text scored alone gets bit for bit the score it has among others."""
    for name in NAIVE:
        together = run_attack(name, **evidence(rows))
        alone = [run_attack(name, **evidence([row]))[0] for row in rows]
        np.testing.assert_array_equal(together, alone, err_msg=name)


def test_known_values():
    given_all = {"target": TARGET, "reference": REFERENCE, "zlib_bytes": ZLIB_BYTES}
    expected = {
        "loss": [-3, -4],  # -(1+2+6)/3; -4/1
        "ref": [2, 0],  # (3+4+8)/3 - 3; 4 - 4
        "zlib": [-0.1, -0.2],  # -3/30; -4/20
        "min_k": [-6, -4],  # max(1, int(.2*3)) = 1: the lowest one
        "min_k_plus": [-2, -0.5],  # (-6+2)/2; (-4+2)/4
        "ratio": [-0.6, -1],  # -3/5; -4/4
    }
    for name in NAIVE:
        np.testing.assert_allclose(run_attack(name, **given_all), expected[name], err_msg=name)


@pytest.mark.parametrize(("length", "n"), [(1, 1), (4, 1), (5, 1), (9, 1), (10, 2), (14, 2), (15, 3), (100, 20)])
def test_min_k_takes_a_fifth_and_at_least_one(length, n):
    values = np.arange(length, dtype=np.float64)  # the n lowest of 0, 1, 2, ... have mean (n-1)/2
    assert lowest_mean(values[::-1].copy(), np.array([0, length]), 0.2)[0] == (n - 1) / 2


@pytest.mark.parametrize("name", NAIVE)
def test_one_token_texts_have_a_score(name):
    rows = [[(-1.0, -2.0, -3.0, 1.5)], [(0.0, 0.0, 0.0, 0.0)], [(-5.0, 0.0, 0.0, 0.0)]]
    assert not np.isnan(run_attack(name, **evidence(rows))).any()


def test_certain_model_has_a_finite_min_k_plus():
    # log p = mean = 0 and std = 0: 0/0 without the floor. A surprise there is -1/1e-4.
    scores = min_k_plus(stats([[(0.0, 0, 0.0, 0.0)], [(-1.0, 0, 0.0, 0.0)]]))
    np.testing.assert_allclose(scores, [0.0, -1 / MIN_STD])


def test_ratio_where_the_reference_is_certain():
    # columns are (target, reference): no surprise on either side; only the target's; only the reference's
    rows = [[(0.0, 0.0, 0, 0)], [(-2.0, 0.0, 0, 0)], [(0.0, -2.0, 0, 0)], [(-2.0, 1e-7, 0, 0)]]
    scores = run_attack("ratio", **evidence(rows))
    assert scores.tolist() == [-1.0, -math.inf, 0.0, -math.inf]  # the last: log p rounded above 0


@pytest.mark.parametrize("name", NAIVE)
def test_nan_is_passed_on_and_not_sorted_away(name):
    high = [(-1.0, -1.0, -2.0, 1.0)] * 9
    row = [*high, (math.nan, -1.0, -2.0, 1.0)]
    scores = run_attack(name, **evidence([row, high]))
    assert np.isnan(scores).tolist() == [True, False]


class Bigrams:
    """A toy language model over V tokens, tuned by adding weight to the transitions of its texts."""

    def __init__(self, V: int, rng: np.random.Generator):
        self.weights = rng.gamma(0.5, size=(V, V)) + 0.01

    def tuned(self, texts, weight=5.0):
        twin = object.__new__(Bigrams)
        twin.weights = self.weights.copy()
        for text in texts:
            np.add.at(twin.weights, (text[:-1], text[1:]), weight)
        return twin

    def score(self, texts) -> TokenStats:
        logp_V = np.log(self.weights / self.weights.sum(1, keepdims=True))
        p_V = np.exp(logp_V)
        mean = (p_V * logp_V).sum(1)
        std = np.sqrt((p_V * logp_V**2).sum(1) - mean**2)
        before = np.concatenate([text[:-1] for text in texts])
        after = np.concatenate([text[1:] for text in texts])
        return TokenStats(
            ids=np.array([str(n) for n in range(len(texts))]),
            offsets=np.cumsum([0] + [len(text) - 1 for text in texts]),
            tokens=after.astype(np.int32),
            logp=logp_V[before, after].astype(np.float32),
            mean=mean[before].astype(np.float32),
            std=std[before].astype(np.float32),
            top=p_V[before].argmax(1) == after,
        )


@pytest.mark.parametrize("name", NAIVE)
def test_higher_means_member(name):
    rng = np.random.default_rng(7)
    texts = [rng.integers(0, 120, size=rng.integers(8, 40)) for _ in range(80)]
    members = np.arange(80) < 40
    base = Bigrams(120, rng)
    sizes = np.array([len(zlib_module.compress(text.astype(np.uint8).tobytes())) for text in texts])

    def scores(model):
        return run_attack(name, target=model.score(texts), reference=base.score(texts), zlib_bytes=sizes)

    before, after = scores(base), scores(base.tuned(texts[:40]))
    assert np.all(after[members] > before[members])  # each tuned text rises
    beats = after[members][:, None] > after[~members]
    assert beats.mean() > 0.75
    control = before[members][:, None] > before[~members]
    assert control.mean() < 0.65


def test_evidence_is_read_from_the_parameters():
    assert {name: evidence_needed(name) for name in NAIVE} == {
        "loss": ("target",),
        "ref": ("target", "reference"),
        "zlib": ("target", "zlib_bytes"),
        "min_k": ("target",),
        "min_k_plus": ("target",),
        "ratio": ("target", "reference"),
    }
    assert evidence_needed(lambda reference, window=3: reference.nll) == ("reference",)


def test_a_function_is_an_attack():
    def worst_token(target):
        return np.minimum.reduceat(target.logp, target.offsets[:-1])

    scores = run_attack(worst_token, target=TARGET)
    assert scores.tolist() == [-6, -4]
    assert scores.dtype == np.float64
    assert resolve(worst_token) is worst_token


def renamed(stats: TokenStats, **changes) -> TokenStats:
    return TokenStats(**{**{f: getattr(stats, f) for f in TokenStats.__dataclass_fields__}, **changes})


WRONG_EVIDENCE = {
    "missing": ({"target": TARGET}, "needs reference"),
    "none": ({"target": TARGET, "reference": None}, "needs reference"),
    "misspelt": ({"target": TARGET, "refrence": TARGET}, "did you mean 'reference'"),
    "other ids": ({"target": TARGET, "reference": renamed(TARGET, ids=np.array(["b", "a"]))}, "same ids"),
    "fewer": ({"target": TARGET, "reference": TARGET.select(np.array([0]))}, r"target \(2 .* reference \(1 "),
    "offsets": ({"target": TARGET, "reference": renamed(TARGET, offsets=np.array([0, 2, 4]))}, "scored tokens"),
    "tokens": ({"target": TARGET, "reference": renamed(TARGET, tokens=TARGET.tokens + 1)}, "scored tokens"),
    "zlib size": ({"target": TARGET, "reference": TARGET, "zlib_bytes": np.array([9])}, "target 2.*zlib_bytes 1"),
    "zlib zero": ({"target": TARGET, "reference": TARGET, "zlib_bytes": np.array([9, 0])}, "positive"),
}


@pytest.mark.parametrize("case", WRONG_EVIDENCE)
def test_wrong_evidence_is_named(case):
    wrong, sentence = WRONG_EVIDENCE[case]
    with pytest.raises(UsageError, match=sentence):
        run_attack("ref", **wrong)


@pytest.mark.parametrize("offsets", [[0, 0, 4], [0, 4, 4]])  # reduceat would give one a number and fail on the other
def test_text_without_scored_tokens_is_refused(offsets):
    with pytest.raises(DataError, match="1 of 2 records have no scored token"):
        run_attack("loss", target=renamed(TARGET, offsets=np.array(offsets)))


def test_wrong_attacks_are_named():
    with pytest.raises(UsageError, match="did you mean 'min_k'"):
        resolve("mink")
    with pytest.raises(UsageError, match=r"asks for unknown evidence 'paraphrases'.*default"):
        evidence_needed(lambda target, paraphrases: None)
    with pytest.raises(UsageError, match="unknown evidence 'everything'"):
        evidence_needed(lambda **everything: None)
    with pytest.raises(UsageError, match="wrap it in a function"):
        evidence_needed(min)
    with pytest.raises(UsageError, match=r"shape \(2,\), not \(\)"):
        run_attack(lambda target: 1.0, target=TARGET)


@pytest.mark.parametrize("k", [0, -0.1, 1.01, math.nan])
def test_k_outside_the_text_is_refused(k):
    with pytest.raises(UsageError, match="0 < k <= 1"):
        min_k(TARGET, k=k)


@pytest.mark.parametrize(
    "module", ["", ".single", ".reference", ".sequence", ".trace", ".perturbed", ".evidence", ".worked"]
)
def test_doctests(module):
    assert doctest.testmod(importlib.import_module(f"imprint.attacks{module}")).failed == 0
