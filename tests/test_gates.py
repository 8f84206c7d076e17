"""Gates: planted shifts are red, clean random splits are green, and every error rate is what it is said to be."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from scipy.special import ndtr, ndtri

from imprint.data import make_split, read_pool
from imprint.errors import InvalidAudit
from imprint.gates import (
    Gate,
    Overlap,
    base_control,
    blind,
    blind_baseline,
    blind_scores,
    missing,
    overlap,
    overlap_gate,
    positive_control,
    power,
    withheld,
)
from imprint.gates.judge import BOTH_WAYS, FAMILY
from imprint.measures import auc
from imprint.spec import DataSpec, Source
from imprint.types import Example

WORDS = "red green blue one two three cat dog fox hen sings jumps sleeps under over the a quick lazy old".split()
WEBNLG = Path(__file__).parents[2] / "shared" / "data" / "webnlg"


def records(count: int, seed: int, least: int = 8, most: int = 14) -> list[Example]:
    dice = random.Random(seed)
    texts = [" ".join(dice.choice(WORDS) for _ in range(dice.randint(least, most))) for _ in range(count)]
    return [Example(f"{seed}-{n}", "", text) for n, text in enumerate(texts)]


def ids(examples: Sequence[Example]) -> list[str]:
    return [e.group or e.id for e in examples]


def blind_gate(members: Sequence[Example], nonmembers: Sequence[Example], seed: int = 0) -> Gate:
    groups = ids(members), ids(nonmembers)
    found = blind_scores(members, nonmembers, groups, seed)
    return blind_baseline({k: (v[: len(members)], v[len(members) :]) for k, v in found.items()}, groups)


@pytest.fixture
def few_trees(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of the other classifiers, which the forest would only slow down."""
    monkeypatch.setattr(blind, "TREES", 2)


def normal(count: int, shift: float = 0.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=count) + shift, rng.normal(size=count)


def alone(count: int) -> tuple[range, range]:
    return range(count), range(count, 2 * count)


# ---- blind baseline


def test_a_clean_random_split_is_green():
    gate = blind_gate(records(150, 1), records(150, 2))
    assert (gate.state, gate.advice) == ("green", "")
    assert set(gate.figures["auc"]) == {"tf-idf", "bag of words", "length"}
    assert all(abs(found["value"] - 0.5) < 0.12 for found in gate.figures["auc"].values())


def test_a_word_that_half_the_nonmembers_have_is_found_by_both_readers():
    marked = [Example(e.id, "", f"{e.target} zebra" if n % 2 else e.target) for n, e in enumerate(records(100, 2))]
    gate = blind_gate(records(100, 1), marked)
    assert gate.state == "red"
    assert "told from non-members by tf-idf and bag of words" in gate.finding
    assert gate.advice
    # a reader that knows the word ranks half of the non-members last and the rest at random: 1/2 + 1/4
    assert all(0.65 < gate.figures["auc"][name]["value"] < 0.8 for name in ("tf-idf", "bag of words"))


@pytest.mark.usefixtures("few_trees")
def test_the_prompt_is_read_too():
    prompted = [Example(e.id, "a zebra: ", e.target) for e in records(60, 2)]
    assert blind_gate(records(60, 1), prompted).state == "red"


@pytest.mark.usefixtures("few_trees")
@pytest.mark.parametrize("shorter", ["members", "non-members", "both ends"])
def test_lengths_are_found_in_either_direction_and_as_spread(shorter: str):
    ranges = {"members": (5, 10), "non-members": (12, 20)}.get(shorter, (9, 11))
    other = {"members": (12, 20), "non-members": (5, 10)}.get(shorter, (2, 30))
    members, nonmembers = records(120, 1, *ranges), records(120, 2, *other)
    found = blind_scores(members, nonmembers, (ids(members), ids(nonmembers)))["length"]
    assert auc(found[:120], found[120:]).low > 0.7


@pytest.mark.usefixtures("few_trees")
def test_scores_are_ranks_within_folds_members_first_and_deterministic():
    members, nonmembers = records(25, 1), records(30, 2)
    groups = ids(members), ids(nonmembers)
    one, again, other = (blind_scores(members, nonmembers, groups, seed) for seed in (0, 0, 1))
    for name, scores in one.items():
        assert scores.shape == (55,)
        assert scores.dtype == np.float64
        np.testing.assert_array_equal(scores, again[name])
        assert not np.array_equal(scores, other[name])
        np.testing.assert_allclose(scores.mean(), 0.5)  # so of every fold, whatever its classifier's intercept


@pytest.mark.usefixtures("few_trees")
def test_records_of_a_group_never_help_to_find_each_other():
    """Twenty subjects a side, ten texts each, a word for each subject: only a split group would show it."""

    def subjects(start: int) -> list[Example]:
        whose = [(e, f"subject{start + n // 10}") for n, e in enumerate(records(200, start))]
        return [Example(e.id, "", f"{e.target} {subject}", subject) for e, subject in whose]

    members, nonmembers = subjects(100), subjects(200)
    assert blind_gate(members, nonmembers).state == "green"
    split = blind_scores(members, nonmembers, ([None] * 200, [None] * 200))["tf-idf"]
    assert auc(split[:200], split[200:]).value > 0.8


@pytest.mark.usefixtures("few_trees")
def test_the_null_mean_is_one_half_and_the_spread_is_what_the_gate_allows_for():
    """Ranks remove the bias below .5 of pooled cross-validation; DeLong's error is √2 too small without a shift."""
    aucs: dict[str, list[float]] = {"tf-idf": [], "length": []}
    texts = records(80, 1, 4, 8)
    for seed in range(120):
        shuffled = [texts[n] for n in np.random.default_rng(seed).permutation(80)]
        found = blind_scores(shuffled[:40], shuffled[40:], alone(40), seed)
        for name, values in aucs.items():
            values.append(auc(found[name][:40], found[name][40:]).value)
    error = np.sqrt(81 / (12 * 40 * 40))
    for values in aucs.values():
        assert abs(np.mean(values) - 0.5) < 3 * np.std(values) / np.sqrt(120)
        assert np.std(values) / error == pytest.approx(BOTH_WAYS, rel=0.2)


@pytest.mark.parametrize(("few", "groups"), [(9, None), (30, 3)])
def test_too_few_records_or_groups_are_refused(few: int, groups: int | None):
    members, nonmembers = records(30, 1), records(few, 2)
    labels = [n % groups for n in range(few)] if groups else list(range(few))
    with pytest.raises(InvalidAudit, match=f"the {few} non-members form {groups or few}: bring more data"):
        blind_scores(members, nonmembers, ([None] * 30, labels))


def test_ten_records_a_side_with_nothing_in_common_raise_no_warning():
    members = [Example(f"m{n}", "", f"word{n}") for n in range(10)]
    nonmembers = [Example(f"n{n}", "", f"other{n}") for n in range(10)]
    assert blind_gate(members, nonmembers).state in ("green", "red")


@pytest.mark.usefixtures("few_trees")
def test_one_text_everywhere_is_all_ties():
    same = [Example(str(n), "", "the same words") for n in range(12)]
    found = blind_scores(same, same, alone(12))
    assert all(auc(scores[:12], scores[12:]).value == 0.5 for scores in found.values())


@pytest.mark.slow
@pytest.mark.skipif(not WEBNLG.exists(), reason="needs ../shared")
def test_webnlgs_official_split_is_red_and_a_random_one_green():
    spec = DataSpec(source=Source(name="webnlg", path=str(WEBNLG)), members=200, nonmembers=200, validation=20)
    pool = read_pool(spec)
    states = []
    for kind in ("official", "random"):
        split = make_split(pool, spec.model_copy(update={"split": kind}), 0)
        states.append(blind_gate(split.members, split.nonmembers).state)
    assert states == ["red", "green"]


# ---- overlap

TEXT = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"


def test_overlap_counts_across_the_sides_only():
    close = TEXT + " fifteen"  # 10 five-word shingles against 11
    members = [Example("a", "", TEXT, "g"), Example("b", "", TEXT, "g"), Example("c", "", "something else", "h")]
    nonmembers = [
        Example("d", "", f"  {TEXT.upper()}", "k"),
        Example("e", "", close, "g"),
        Example("f", "", "nothing of it at all", "l"),
        Example("i", "", "nothing of it at all", "l"),
        Example("j", "", "x " + " ".join(TEXT.split()[:13]) + " but then quite other words follow to the end", None),
    ]
    assert overlap(members, nonmembers) == Overlap(exact=1, near=1, groups=1, shared_runs=3, members=3, nonmembers=5)


def test_prompt_and_target_are_one_text_and_no_group_is_no_shared_group():
    ours, theirs = Example("a", "one two", " three"), Example("b", "one", " two three")
    assert overlap([ours], [theirs]) == Overlap(1, 0, 0, 0, 1, 1)


def test_shared_runs_agree_with_comparing_all_pairs():
    dice = random.Random(3)
    sentences = [" ".join(dice.choice(WORDS) for _ in range(7)) for _ in range(12)]
    texts = [" ".join(dice.choice(sentences) for _ in range(dice.randint(1, 4))) for _ in range(60)]
    members, nonmembers = ([Example(str(n), "", t) for n, t in enumerate(half)] for half in (texts[:30], texts[30:]))

    def runs(text: str) -> set[str]:
        words = text.split()
        return {" ".join(words[at : at + 13]) for at in range(len(words) - 12)}

    expected = sum(any(runs(e.target) & runs(f.target) for f in members) for e in nonmembers)
    assert 0 < expected < 30
    assert overlap(members, nonmembers).shared_runs == expected


@pytest.mark.parametrize(
    ("counts", "state"), [((0, 0, 0, 9), "green"), ((1, 0, 0, 9), "red"), ((0, 1, 0, 9), "red"), ((0, 0, 1, 9), "red")]
)
def test_overlap_gate(counts: tuple[int, int, int, int], state: str):
    gate = overlap_gate(Overlap(*counts, 10, 20))
    assert gate.state == state
    assert bool(gate.advice) == (state == "red")
    assert "45.0% of the non-members share a run of 13 words" in gate.finding


# ---- base control


def test_base_control_is_two_sided_and_names_the_attack():
    clean, above, below = normal(200), normal(200, 1.0, 1), normal(200, -1.0, 2)
    assert base_control({"loss": clean, "zlib": normal(200, seed=3)}, alone(200)).state == "green"
    for shifted in (above, below):
        gate = base_control({"loss": clean, "zlib": shifted}, alone(200))
        assert gate.state == "red"
        assert "differs from .5 for zlib:" in gate.finding
    assert gate.figures["auc"]["zlib"]["high"] < 0.5


def test_base_control_shares_its_error_among_the_attacks():
    """A z of 2.7 is beyond the interval of one attack at 99% (2.58) and within that of one of four (3.02)."""
    one = next(sides for sides in (normal(300, seed=n) for n in range(3000)) if 2.62 < _z(sides) < 2.98)
    alone_red = base_control({"loss": one}, alone(300))
    among_four = base_control({"loss": one, "a": normal(300, seed=1), "b": normal(300), "c": normal(300)}, alone(300))
    assert (alone_red.state, among_four.state) == ("red", "green")
    assert among_four.figures["level"] == 1 - FAMILY / 4


def _z(sides: tuple[np.ndarray, np.ndarray]) -> float:
    """The normal quantile at which the interval touches .5."""
    interval = auc(*sides)
    value = np.log(interval.value / (1 - interval.value))
    high = np.log(interval.high / (1 - interval.high))
    return float(abs(value) / (high - value) * 1.959964)


def test_base_control_of_clean_audits_is_red_in_one_of_a_hundred():
    """Four independent attacks, the case in which splitting the error rate is tight."""
    red = 0
    for seed in range(1500):
        scores = {str(attack): normal(60, seed=4 * seed + attack) for attack in range(4)}
        red += base_control(scores, alone(60)).state == "red"
    assert 0.004 < red / 1500 < 0.019


def test_groups_widen_the_interval():
    """Twenty subjects a side of ten like records each: an AUC near .6 is chance, of 200 records it is not."""
    subjects = ndtri((np.arange(20) + 0.5) / 20)
    noise = 0.05 * np.random.default_rng(0).normal(size=(2, 200))
    sides = np.repeat(subjects, 10) + 0.4 + noise[0], np.repeat(subjects, 10) + noise[1]
    labels = np.repeat(np.arange(40), 10).tolist()
    assert base_control({"loss": sides}, (labels[:200], labels[200:])).state == "green"
    assert base_control({"loss": sides}, alone(200)).state == "red"


# ---- blind baseline, judged


def test_blind_baseline_is_one_sided_and_wider_than_delong():
    assert blind_baseline({"tf-idf": normal(200, -2.0)}, alone(200)).state == "green"
    gate = blind_baseline({"tf-idf": normal(200, 2.0), "length": normal(200)}, alone(200))
    assert gate.state == "red"
    assert gate.finding.startswith("By their texts alone members are told from non-members by tf-idf: ")
    assert gate.figures["level"] == pytest.approx(1 - 2 * FAMILY / 2)
    z = BOTH_WAYS * -ndtri(FAMILY / 2)
    expected = auc(*normal(200), 2 * ndtr(z) - 1)
    assert gate.figures["auc"]["length"] == pytest.approx(asdict(expected))


# ---- power


@pytest.mark.parametrize(("each", "half"), [(100, 0.080), (500, 0.036), (1000, 0.025), (5000, 0.011)])
def test_half_widths_at_chance(each: int, half: float):
    assert power(normal(each), alone(each)).figures["half_width"] == pytest.approx(half, abs=5e-4)


def test_power_does_not_depend_on_a_base_that_is_not_at_chance():
    assert power(normal(300), alone(300)).figures == power(normal(300, 3.0), alone(300)).figures


def test_power_knows_how_alike_the_records_of_a_group_are():
    """The spread of the AUC over simulated audits with 40 subjects a side of one to eight records each."""
    rng = np.random.default_rng(0)
    found, told = [], []
    for _ in range(400):
        sides, labels = [], []
        for side in range(2):
            subjects = np.repeat(np.arange(40), rng.integers(1, 9, 40))
            sides.append(np.sqrt(0.6) * rng.normal(size=40)[subjects] + np.sqrt(0.4) * rng.normal(size=len(subjects)))
            labels.append((40 * side + subjects).tolist())
        found.append(auc(*sides).value)
        told.append(power((sides[0], sides[1]), (labels[0], labels[1])).figures["standard_error"])
    assert np.mean(told) == pytest.approx(np.std(found), rel=0.1)


def test_the_smallest_detectable_auc_is_detected_in_four_cases_of_five():
    detectable = power(normal(150), alone(150)).figures["detectable"]
    shift = float(ndtri(detectable)) * np.sqrt(2)
    hits = [0.5 not in auc(*normal(150, shift, seed)) for seed in range(1000)]
    assert 0.76 < np.mean(hits) < 0.85


def test_a_model_without_a_leak_meets_the_budget_as_often_as_told():
    told = power(normal(400), alone(400), 0.56).figures["passes"]
    passed = [auc(*normal(400, 0.0, seed)).high < 0.56 for seed in range(1000)]
    assert told == pytest.approx(np.mean(passed), abs=0.05)


@pytest.mark.parametrize(
    ("each", "budget", "state"),
    [(120, None, "red"), (140, None, "green"), (400, 0.54, "red"), (450, 0.54, "green"), (400, 0.5, "red")],
)
def test_power_gate(each: int, budget: float | None, state: str):
    gate = power(normal(each), alone(each), budget)
    assert gate.state == state
    assert f"tell an AUC of {gate.figures['detectable']:.3f} or more from .5 with 80% power" in gate.finding


def test_one_group_a_side_is_red_and_no_crash():
    gate = power(normal(20), ([1] * 20, list(range(2, 22))))
    assert gate.state == "red"
    assert "Groups of members: 1, of non-members: 20;" in gate.finding


# ---- positive control and the whole


def test_positive_control_names_the_blind_attacks():
    assert positive_control({"loss": normal(100, 2.0), "zlib": normal(100, 1.0)}).state == "green"
    gate = positive_control({"loss": normal(100, 2.0), "zlib": normal(100), "min_k": normal(100, -2.0)})
    assert gate.state == "red"
    assert "overfitted on purpose: zlib and min_k:" in gate.finding


def unknown() -> list[Gate]:
    nan = np.full(20, np.nan), np.zeros(20)
    return [
        base_control({}, alone(20)),
        base_control({"loss": nan}, alone(20)),
        blind_baseline({}, alone(20)),
        power(nan, alone(20)),
        power((np.zeros(20), np.zeros(20)), alone(20)),
        power(normal(20), alone(19)),
        positive_control({}),
        positive_control({"loss": nan}),
        missing("overlap", "the texts are gone."),
    ]


@pytest.mark.parametrize("gate", unknown())
def test_what_cannot_be_computed_is_missing_and_not_green(gate: Gate):
    assert gate.state == "missing"
    assert gate.finding
    assert gate.advice == ""  # the finding says what it takes; nothing was found that could be mended
    assert withheld([gate]).startswith(f"Not green: {gate.name} (missing);")


def test_withheld_is_empty_only_if_all_are_green():
    green, red = overlap_gate(Overlap(0, 0, 0, 0, 9, 9)), overlap_gate(Overlap(1, 0, 0, 0, 9, 9))
    assert withheld([green, green]) == ""
    said = withheld([green, red, missing("power", "no scores.")])
    assert said.startswith("Not green: overlap (red) and power (missing);")
    assert said.endswith("are no evidence of memorization.")


def test_figures_are_ready_for_json():
    scores = {"loss": normal(150)}
    gates = [
        base_control(scores, alone(150)),
        blind_baseline(scores, alone(150)),
        overlap_gate(overlap(records(5, 1), records(5, 2))),
        power(normal(150), alone(150), 0.6),
        positive_control(scores),
    ]
    for gate in gates:
        assert json.loads(json.dumps(asdict(gate), allow_nan=False)) == asdict(gate)


def test_judging_imports_neither_torch_nor_sklearn():
    code = "import sys, imprint.gates; print(sorted({'torch', 'sklearn'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
