"""The attacks beyond the first six: known values, the edges of their formulas, and the sentences for wrong input."""

from __future__ import annotations

import functools
import inspect
import math

import numpy as np
import pytest

from imprint.attacks import evidence_needed, run_attack, worked
from imprint.attacks.perturbed import con_recall, lowercase, neighbourhood, recall
from imprint.attacks.reference import ez_mia, wbc
from imprint.attacks.single import dc_pdd, surp
from imprint.attacks.trace import loss_trace
from imprint.errors import UsageError
from imprint.types import TokenStats
from tests.test_attacks_oracles import FUNCTIONS

WORKED = {  # the two texts of imprint.attacks.worked
    "zlib_sum": [-0.3, -0.2],  # -(1 + 2 + 6)/30; -4/20
    "surp": [-6, -4],  # entropy 2 is not below 2, so the lowest int(.4·3) = 1; the only one
    "dc_pdd": [(0.01 + 0.01 + math.exp(-6) * math.log(20)) / 3, 0.01],  # e^-1·log 10, e^-2·log 20, e^-4·log 20 > .01
    "wbc": [1, 0.5],  # gains 2, 2, 2: every window; gain 0: a tie
    "ez_mia": [math.inf, 1],  # gained 6, lost 0; nothing moved
    "ref_min_k_plus": [1, 0],  # (-6 + 2)/2 - (-8 + 2)/2; (-4 + 2)/4 twice
    "loss_trace": [1, 0],  # 5, 4, 3: 4.5 - 3.5; 4, 4, 4
    "lowercase": [2, 1],  # (4 + 5 + 9)/3 over 3; 4/4
    "neighbourhood": [1.5, -0.5],  # (5 + 4)/2 - 3; (4 + 3)/2 - 4
    "recall": [1.5, 1],  # (3 + 1.5 + 9)/3 over 3; 4/4
    "con_recall": [0.5, -0.25],  # (-4.5 + 3)/-3; (-4 + 5)/-4
    "grad_norm": [-0.5, -2],
}


def made(*texts: list[float], **columns) -> TokenStats:
    """Stats of texts of the given log p: entropy 1, standard deviation 1, each token its own, none the likeliest."""
    R = sum(map(len, texts))
    given = {"tokens": np.arange(R), "mean": np.full(R, -1.0), "std": np.ones(R), "top": np.zeros(R, bool)}
    kinds = {"tokens": np.int32, "mean": np.float32, "std": np.float32, "top": np.bool_}
    return TokenStats(
        ids=np.array([f"x{n}" for n in range(len(texts))]),
        offsets=np.cumsum([0, *map(len, texts)]),
        logp=np.array([value for text in texts for value in text], np.float32),
        **{name: np.asarray(columns.get(name, column), kinds[name]) for name, column in given.items()},
    )


@pytest.mark.parametrize("name", WORKED)
def test_known_values(name):
    pieces = {piece: getattr(worked, piece.upper()) for piece in evidence_needed(FUNCTIONS[name])}
    np.testing.assert_allclose(run_attack(FUNCTIONS[name], **pieces), WORKED[name], rtol=1e-7)


def test_the_known_values_are_of_all():
    assert {*WORKED} == {*FUNCTIONS}


def test_surp_takes_certain_tokens_among_the_lowest_and_else_all_of_these():
    # n = int(.4·5) = 2 lowest: -9 and -7. Entropies 3 and 1: only -7 is sure. Then none is; then both are.
    text = [-1, -9, -2, -7, -3]
    for entropies, score in (([0, 3, 0, 1, 0], -7), ([0, 3, 0, 2, 0], -8), ([9, 0, 9, 1.9, 9], -8)):
        assert surp(made(text, mean=np.negative(entropies))).tolist() == [score]


def test_surp_takes_the_earlier_of_equals():
    # n = int(.4·3) = 1 of three equal log p, the first: whichever it took, the score is theirs
    assert surp(made([-2, -2, -2], mean=[-1, -9, -9])).tolist() == [-2]
    # n = 2 of 5: -4 and the first -2. Only the last -2 is sure, and is not looked at: (-4 - 2)/2
    assert surp(made([-2, -4, -2, -1, -1], mean=[-9, -9, -1, -1, -1])).tolist() == [-3]


@pytest.mark.parametrize("k", [0, 1.01, math.nan])
def test_surp_refuses_other_shares(k):
    with pytest.raises(UsageError, match="0 < k <= 1"):
        surp(worked.TARGET, k=k)


def test_dc_pdd_counts_a_token_once_per_text():
    # tokens 1 1 0 and 1: f = (3+1)/(4+2) for 1 and (1+1)/6 for 0; p = 1: log 1.5 and log 3; the second 1 is left out
    stats = made([0, -5, 0], [0], tokens=[1, 1, 0, 1])
    expected = [(math.log(1.5) + math.log(3)) / 2, math.log(1.5)]
    np.testing.assert_allclose(dc_pdd(stats, np.array([1, 3]), cap=9), expected)


def test_dc_pdd_says_what_it_lacks():
    blank = made([-1, -2], [-3], tokens=[0, 0, 0])
    with pytest.raises(UsageError, match="private audit does not keep: give --show-text"):
        dc_pdd(blank, np.ones(5))
    assert dc_pdd(blank.select(np.array([1])), np.ones(5)).shape == (1,)  # one text may be the token 0
    with pytest.raises(UsageError, match="covers 14 tokens and a text holds token 14"):
        dc_pdd(worked.TARGET, worked.TOKEN_COUNTS[:14])


def test_wbc_counts_windows_that_fit():
    # gains 3, -1, -1, -1. Windows of 2: +, -, -; of 3: +, -; of 4: 3 - 3, a tie. (1/3 + 1/2 + 1/2)/3
    target, reference = made([-1, -3, -3, -3]), made([-4, -2, -2, -2])
    np.testing.assert_allclose(wbc(target, reference), [(1 / 3 + 1 / 2 + 1 / 2) / 3])
    np.testing.assert_allclose(wbc(target, reference, windows=(1, 4)), [(1 / 4 + 1 / 2) / 2])
    assert wbc(target, reference, windows=(5, 9)).tolist() == [0.5]  # shorter than all: the text is one window
    assert wbc(made([-1], [-2]), made([-2], [-1])).tolist() == [1, 0]


def test_wbc_sees_exact_ties():
    # windows of 2 and of 4 sum to 0 to the bit, though .3 has no exact float32
    assert wbc(made([-1, -1.3, -1, -1.3]), made([-1.3, -1, -1.3, -1]), windows=(2, 4)).tolist() == [0.5]


@pytest.mark.parametrize("windows", [(), (0, 2), (-1,)])
def test_wbc_refuses_other_windows(windows):
    with pytest.raises(UsageError, match="windows are sizes in tokens"):
        wbc(worked.TARGET, worked.REFERENCE, windows=windows)


EZ = {  # log p of the target, of the reference, whether each errs at the token; the score
    "errors alone count": ([-1, -2, -3], [-3, -1, -9], [1, 1, 0], [1, 1, 1], 2.0),  # +2 and -1; the +6 is no error
    "all gained": ([-1, -2], [-3, -4], [1, 1], [1, 1], math.inf),
    "all lost": ([-3, -4], [-1, -2], [1, 1], [1, 1], 0.0),
    "nothing moved": ([-3, -4], [-3, -4], [1, 1], [1, 1], 1.0),
    "moved elsewhere": ([-3, -1], [-3, -4], [1, 0], [1, 1], 1.0),
    "errors mended": ([-0.1, -0.1], [-3, -0.1], [0, 0], [1, 0], math.inf),
    "none ever": ([-0.1, -0.2], [-0.5, -0.1], [0, 0], [0, 0], 1.0),
}


@pytest.mark.parametrize("case", EZ)
def test_ez_mia_where_one_side_is_empty(case):
    t, r, errs_t, errs_r, score = EZ[case]
    target, reference = made(t, top=np.logical_not(errs_t)), made(r, top=np.logical_not(errs_r))
    np.testing.assert_allclose(ez_mia(target, reference), [score])


def test_ratios_of_texts_known_by_heart():
    # L(x) = 0, once with log p rounded above 0; what it is compared with costs something, or nothing
    plain, changed = made([0, 0], [0], [1e-7], [-2]), made([0, -2], [0], [1e-7], [0])
    for attack in (lowercase, recall):
        assert attack(plain, changed).tolist() == [math.inf, 1, 1, 0]
    assert con_recall(plain, changed, plain).tolist() == [math.inf, 0, 0, -1]  # (0 - 2)/2 is the last
    assert con_recall(plain, plain, changed, gamma=0.5).tolist()[:3] == [-math.inf, 0.5, 0.5]


def test_nothing_changes_behind_a_prefix_that_does_not_matter():
    stats = made([-1, -3], [-2])
    assert recall(stats, stats).tolist() == [1, 1]
    assert con_recall(stats, stats, stats, gamma=0.25).tolist() == [0.75, 0.75]


def test_members_lose_more_behind_strange_texts():
    # Xie et al.: P moves a member from LL -1 to -2, another record from -3 to -3.3
    member, other = recall(made([-1], [-3]), made([-2], [-3.3]))
    assert member > other
    # Wang et al.: behind tuned texts the member stays at -1, the other falls to -3.1: 1/1 against .2/3
    member, other = con_recall(made([-1], [-3]), made([-2], [-3.3]), made([-1], [-3.1]))
    assert member > other > 0


def test_loss_trace_is_zero_at_the_base_and_linear_between_epochs():
    assert loss_trace(np.array([[3.0], [7.0]])).tolist() == [0, 0]
    # two losses: the quartiles lie a quarter from each end, 4·.5; falling or rising
    assert loss_trace(np.array([[5.0, 1.0], [1.0, 5.0]])).tolist() == [2, 2]
    assert loss_trace(np.array([[5.0, 1.0]]), low=0, high=1).tolist() == [4]
    assert np.isnan(loss_trace(np.array([[5.0, math.inf], [5.0, math.nan]]))).all()  # a run that diverged


WRONG = {
    "quantiles": (lambda: loss_trace(worked.TRACE, low=0.75, high=0.25), "0 <= low < high <= 1, not 0.75 and 0.25"),
    "nan": (lambda: loss_trace(worked.TRACE, low=math.nan), "0 <= low < high <= 1"),
    "one loss": (lambda: loss_trace(np.array([1.0, 2.0])), r"\[N, E \+ 1\] losses.*not of shape \(2,\)"),
    "no epoch": (lambda: loss_trace(np.zeros((2, 0))), r"not of shape \(2, 0\)"),
    "no neighbour": (lambda: neighbourhood(worked.TARGET, np.zeros((2, 0))), r"n >= 1 neighbours.*\(2, 0\)"),
    "one neighbour": (lambda: neighbourhood(worked.TARGET, np.zeros(2)), r"\[N, n\] losses.*\(2,\)"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_named(case):
    call, sentence = WRONG[case]
    with pytest.raises(UsageError, match=sentence):
        call()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_missing_evidence_is_named(name):
    for piece in evidence_needed(FUNCTIONS[name]):
        rest = {p: getattr(worked, p.upper()) for p in evidence_needed(FUNCTIONS[name]) if p != piece}
        with pytest.raises(UsageError, match=f"attack '{name}' needs {piece} "):
            run_attack(FUNCTIONS[name], **rest)


def test_options_have_the_published_defaults():
    options = {
        name: {p.name: p.default for p in inspect.signature(attack).parameters.values() if p.default is not p.empty}
        for name, attack in FUNCTIONS.items()
    }
    assert {name: given for name, given in options.items() if given} == {
        "surp": {"k": 0.4, "max_entropy": 2.0},
        "dc_pdd": {"cap": 0.01},
        "wbc": {"windows": (2, 3, 4, 6, 9, 13, 18, 25, 32, 40)},
        "ref_min_k_plus": {"k": 0.2},
        "loss_trace": {"low": 0.25, "high": 0.75},
        "con_recall": {"gamma": 1.0},
    }
    scores = run_attack(functools.partial(wbc, windows=(1,)), target=worked.TARGET, reference=worked.REFERENCE)
    assert scores.tolist() == [1, 0.5]
