"""Subgroups against the main table, against naive oracles, and against simulations that know the truth."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from imprint.errors import DataError, UsageError
from imprint.measures import auc
from imprint.measures.bootstrap import draw, tpr_over_subjects
from imprint.measures.contrast import auc_difference
from imprint.measures.estimate import holm
from imprint.rows import Cell, Grid, write_results
from imprint.spec import DataSpec, MethodSpec, ModelSpec, RunSpec, TrainSpec
from imprint.store import Store, atomic_folder, write_json, write_stats, write_table
from imprint.subgroups import SMALLEST, Rate, subgroups
from imprint.types import TokenStats

SPEC = RunSpec(
    model=ModelSpec(name="gpt2"),
    data=DataSpec(source="world/customers"),
    method=MethodSpec(name="lora"),
    train=TrainSpec(epochs=3),
    seed=0,
)
EVIL = "<script>alert(1)</script>\x1b[31m\u202e|"


def evidence(scores):
    """One token a record, whose log-probability is the score less 20."""
    N = len(scores)
    logp = (np.asarray(scores) - 20).astype(np.float32)
    return TokenStats(
        ids=np.array([f"r{n}" for n in range(N)]),
        offsets=np.arange(N + 1),
        tokens=np.ones(N, np.int32),
        logp=logp,
        mean=logp,
        std=np.ones(N, np.float32),
        top=np.ones(N, bool),
    )


def made_cell(path, epochs, members, groups=None, labels=None):
    """A cell whose base gives every token a log-probability of −20, so that `ref` gives the scores of each epoch.

    Args:
        epochs: [E, N] scores, members first.
        members: how many records are members; two more are for validation.
        groups: [N] subjects (default: each record its own).
        labels: [N] subgroups (default: no such column).
    """
    store, N = Store(path), len(epochs[0])
    groups = [f"record r{n}" for n in range(N)] if groups is None else [f"group {g}" for g in groups]
    columns = {
        "id": [f"r{n}" for n in range(N + 2)],
        "role": ["member"] * members + ["nonmember"] * (N - members) + ["validation"] * 2,
        "group": [*groups, "record v0", "record v1"],
        "scored_tokens": np.arange(1, N + 3, dtype=np.int32),
        "zlib_bytes": np.full(N + 2, 50),
        "cut": [None] * (N + 2),
    }
    if labels is not None:
        columns["subgroup"] = pa.array([*labels, None, None], pa.string())
    with atomic_folder(store.base("b0")) as folder:
        write_stats(folder / "stats.parquet", evidence(np.zeros(N + 2)))
        write_table(folder / "records.parquet", pa.table(columns))
        write_json(folder / "meta.json", {})
    for epoch, scores in enumerate(epochs, 1):
        with atomic_folder(store.cell(SPEC.run_id).epoch(epoch)) as folder:
            write_stats(folder / "stats.parquet", evidence([*scores, 0.0, 0.0]))
    return Cell(SPEC, "lora", store.cell(SPEC.run_id), store.base("b0"))


def drawn_cell(path, labels, subjects=None, shift=0.7, seed=0):
    """Half members of each label; `labels` says which the records of one side have."""
    rng, M = np.random.default_rng(seed), len(labels)
    scores = np.r_[rng.normal(shift, 1, M), rng.normal(0, 1, M)]
    groups = None if subjects is None else [f"m{s}" for s in subjects] + [f"n{s}" for s in subjects]
    return made_cell(path, [scores], M, groups, [*labels, *labels])


# ---- the rows


@pytest.mark.parametrize("size", [1, 4])
def test_one_subgroup_of_everybody_is_the_main_table(tmp_path, size):
    cell = drawn_cell(tmp_path, ["de"] * 400, np.arange(400) // size)
    frame = write_results(Grid(tmp_path, {}, ("loss",), None, (cell,))).set_index(["epoch", "attack", "metric"])
    [row] = subgroups(cell, 1, ["loss"])
    main = frame.loc[(1, "loss", "auc")]
    assert (row.auc.value, row.auc.low, row.auc.high) == (main["value"], main["low"], main["high"])
    assert (row.members, row.nonmembers, row.subjects) == (400, 400, (400 // size, 400 // size))
    for metric, rate in row.tpr.items():
        main = frame.loc[(1, "loss", metric)]
        assert rate.interval.value == main["value"]
        assert rate.interval.low <= main["low"] < main["high"] <= rate.interval.high
    assert (row.difference, row.p, row.status) == (None, None, "ok")
    assert row.reason == (
        "No difference: among all other records are 0 members of 0 subjects and 0 non-members of 0; "
        f"it needs {SMALLEST} subjects a side."
    )


def test_every_number_is_that_of_the_records_it_names(tmp_path):
    """Records without a label are no subgroup, and belong to the others."""
    labels = ["de"] * 120 + ["fr"] * 60 + [None] * 40
    cell = drawn_cell(tmp_path, labels)
    rows = subgroups(cell, 1, ["ref", "loss"])
    assert [(row.attack, row.label) for row in rows] == [("ref", "de"), ("ref", "fr"), ("loss", "de"), ("loss", "fr")]
    x, y = cell.sides(cell.scores(1, ["ref"])["ref"])
    raw = []
    for row, inside in zip(rows, (np.r_[:120], np.r_[120:180]), strict=False):
        others = np.setdiff1d(np.arange(220), inside)
        assert row.auc == auc(x[inside], y[inside])
        assert row.auc.value == pytest.approx(np.mean(x[inside][:, None] > y[inside]))
        ten = tpr_over_subjects(x[inside], y[inside], 0.1, draw(inside, inside))
        wanted = Rate(row.tpr["tpr_at_10pct_fpr"].interval, "ok" if len(inside) >= 100 else "indicative")
        assert row.tpr["tpr_at_10pct_fpr"] == wanted
        assert (wanted.interval.value, wanted.interval.low, wanted.interval.high) == (ten.value, ten.low, ten.high)
        assert row.difference.value == pytest.approx(row.auc.value - np.mean(x[others][:, None] > y[others]))
        mask = np.isin(np.arange(220), inside)
        raw.append(auc_difference((x, y), (mask, mask), (np.arange(220), np.arange(220)))[1])
    assert [row.p for row in rows[:2]] == pytest.approx(holm(raw))
    assert rows[0].tpr["tpr_at_1pct_fpr"].status == "indicative"
    assert rows[1].tpr["tpr_at_1pct_fpr"] == Rate(None, "too_few")
    assert rows == subgroups(cell, 1, ["ref", "loss"])


def test_small_subgroups_are_listed_with_their_counts(tmp_path):
    labels = ["de"] * 60 + [EVIL] * 57 + ["fr"] * SMALLEST
    subjects = np.r_[:60, 60 + np.arange(57) // 3, 100 : 100 + SMALLEST]
    rows = {row.label: row for row in subgroups(drawn_cell(tmp_path, labels, subjects), 1, ["ref"])}
    assert list(rows) == ["de", EVIL, "fr"]
    small = rows[EVIL]
    assert (
        small.reason
        == f"57 members of 19 subjects and 57 non-members of 19; an interval needs {SMALLEST} subjects a side."
    )
    assert (small.status, small.auc, small.tpr, small.difference, small.p) == ("too_few", None, {}, None, None)
    assert (rows["fr"].status, rows["fr"].reason) == ("ok", "")
    assert rows["fr"].difference is not None


def test_subjects_are_what_a_rate_is_known_by(tmp_path):
    """1,000 records of 100 subjects a side: at 1% they are worth 100, no more; of 25 subjects nothing can be said."""
    rates = [
        subgroups(drawn_cell(tmp_path / str(size), ["x"] * 1000, np.arange(1000) // size), 1, ["ref"])[0].tpr
        for size in (1, 10, 40)
    ]
    assert [rate["tpr_at_1pct_fpr"].status for rate in rates] == ["ok", "indicative", "too_few"]
    assert [rate["tpr_at_10pct_fpr"].status for rate in rates] == ["ok", "ok", "indicative"]


def test_without_labels_there_are_no_subgroups(tmp_path):
    assert subgroups(drawn_cell(tmp_path / "a", [None] * 50), 1, ["ref"]) == []
    assert subgroups(made_cell(tmp_path / "b", [np.arange(60.0)], 30), 1, ["ref"]) == []  # an older base


def test_nothing_that_varies_has_no_narrow_interval(tmp_path):
    """Before tuning `ref` is 0 throughout; a model that gives all members away separates both sides."""
    cell = made_cell(tmp_path, [np.repeat([5.0, 0.0], 100)], 100, labels=(["a"] * 50 + ["b"] * 50) * 2)
    for epoch, value in ((0, 0.5), (1, 1.0)):
        for row in subgroups(cell, epoch, ["ref"]):
            assert row.auc == auc(np.full(50, float(epoch)), np.zeros(50))
            assert row.auc.value == value
            assert (row.difference.value, row.p) == (0, 1)
            assert row.difference.high - row.difference.low > 0.05
            assert all(rate.interval.high - rate.interval.low > 0.05 for rate in row.tpr.values() if rate.interval)


def test_scores_that_are_not_numbers_stop_it(tmp_path):
    cell = made_cell(tmp_path, [[math.nan, *range(79)]], 40, labels=["a"] * 80)
    with pytest.raises(DataError, match="1 of 40 member scores"):
        subgroups(cell, 1, ["ref"])


# ---- the difference

several = st.lists(st.integers(0, 9), min_size=12, max_size=12)


def split(values):
    """Twelve records a side, six inside."""
    x, y = np.array(values[0], float), np.array(values[1], float)
    inside = np.arange(12) < 6
    return (x, y), (inside, inside), (np.arange(12), np.arange(12))


@settings(deadline=None, max_examples=60, derandomize=True)
@given(values=st.tuples(several, several), level=st.sampled_from([0.5, 0.9, 0.95, 0.999]))
def test_it_is_put_together_from_two_intervals(values, level):
    """Other subjects inside than outside: Newcombe's, from the intervals that are shown."""
    sides, inside, subjects = split(values)
    a, b = (auc(*(s[here] for s in sides), level) for here in (inside[0], ~inside[0]))
    found, p = auc_difference(sides, inside, subjects, level)
    assert found.value == pytest.approx(a.value - b.value)
    assert found.low == pytest.approx(max(-1, found.value - math.hypot(a.value - a.low, b.high - b.value)))
    assert found.high == pytest.approx(min(1, found.value + math.hypot(a.high - a.value, b.value - b.low)))
    assert found.low < found.high
    assert 0 < p <= 1
    other, same = auc_difference(sides, (~inside[0], ~inside[1]), subjects, level)
    assert (-other.value, -other.high, -other.low) == pytest.approx((found.value, found.low, found.high))
    assert same == pytest.approx(p)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(values=st.tuples(several, several))
def test_p_is_the_level_at_which_the_interval_ends_at_0(values):
    sides, inside, subjects = split(values)
    p = auc_difference(sides, inside, subjects)[1]
    if 1e-9 < p < 0.99:
        found = auc_difference(sides, inside, subjects, 1 - p)[0]
        assert min(abs(found.low), abs(found.high)) == pytest.approx(0, abs=1e-6)
    elif p >= 0.99:
        assert 0 in auc_difference(sides, inside, subjects, 0.05)[0]


def test_subjects_on_both_hands_are_compared_with_themselves():
    """Subjects whose records agree, half of them inside: the interval is narrower than if they were strangers."""
    rng, of = np.random.default_rng(0), np.repeat(np.arange(60), 4)
    shared, own = rng.normal(size=(2, 60))[:, of], rng.normal(size=(2, 240))
    sides = (shared[0] + 0.3 * own[0] + 1, shared[1] + 0.3 * own[1])
    half = np.arange(240) % 2 == 0
    known = auc_difference(sides, (half, half), (of, of))[0]
    strangers = of + 60 * half
    unknown = auc_difference(sides, (half, half), (strangers, strangers))[0]
    assert known.value == unknown.value
    assert known.high - known.low < 0.6 * (unknown.high - unknown.low)


def test_the_same_scores_on_both_hands_leave_an_error():
    rng, of = np.random.default_rng(1), np.repeat(np.arange(30), 2)
    sides, half = (rng.normal(1, 1, 30)[of], rng.normal(size=30)[of]), np.arange(60) % 2 == 0
    found, p = auc_difference(sides, (half, half), (of, of))
    assert (found.value, p) == (0, 1)
    assert found.high - found.low > 0.02


@pytest.mark.parametrize(
    ("here", "there", "size", "correlation", "mixed", "a", "b"),
    [
        (20, 100, 1, 0.0, False, 0.95, 0.95),
        (20, 100, 1, 0.0, False, 0.7, 0.5),
        (40, 40, 5, 0.8, True, 0.7, 0.7),
    ],
)
def test_coverage_of_the_difference(here, there, size, correlation, mixed, a, b):
    rng, of, rounds = np.random.default_rng(2), np.repeat(np.arange(here + there), size), 500
    inside = rng.random(len(of)) < 0.5 if mixed else of < here
    shift, covered = math.sqrt(2) * np.where(inside, norm.ppf(a), norm.ppf(b)), 0
    for _ in range(rounds):
        shared, own = rng.normal(size=(2, here + there))[:, of], rng.normal(size=(2, len(of)))
        x, y = math.sqrt(correlation) * shared + math.sqrt(1 - correlation) * own
        covered += a - b in auc_difference((x + shift, y), (inside, inside), (of, of))[0]
    assert 0.92 < covered / rounds < 0.98


def test_a_single_subject_shows_nothing():
    x, y, inside = np.arange(10.0), np.arange(10.0) - 5, np.arange(10) < 5
    one = np.where(inside, 0, np.arange(10))
    found, p = auc_difference((x, y), (inside, inside), (one, one))
    assert found.high - found.low > 1
    assert p > 0.5
    with pytest.raises(DataError, match="there are 0 and 10 scores"):
        auc_difference((x, y), (np.zeros(10, bool), np.ones(10, bool)), (one, one))
    with pytest.raises(UsageError, match="confidence level"):
        auc_difference((x, y), (inside, inside), (one, one), 1.0)
