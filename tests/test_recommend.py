"""The recommendation against what the results table says, on grids whose numbers are made."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace

import numpy as np
import pytest

from imprint.errors import ImprintError, InvalidAudit, UsageError
from imprint.measures import auc, tpr_at_fpr
from imprint.recommend import parse_budget, recommend
from imprint.report.advice import advice_text
from imprint.report.readings import curves
from imprint.rows import load_grid, write_results
from imprint.spec import Budget, canonical_json
from imprint.store import Store, read_table, write_table
from tests.test_report import ATTACKS, COUNTS, build, spec, tuned, write_base, write_epoch, write_gates, write_lock


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """full, lora and prompt have finished; full and lora leak more with every epoch, prompt learns nothing."""
    return build(tmp_path_factory.mktemp("advice") / "grid")


def highest(cell, epoch, attacks, level):
    """The highest upper bound of any attack's AUC in one run."""
    groups = cell.groups("member"), cell.groups("nonmember")
    scores = cell.scores(epoch, attacks).values()
    return max(auc(*cell.sides(one), level, *groups).high for one in scores)


@pytest.mark.parametrize("limit", [0.6, 0.65, 0.7, 0.8, 0.9, 0.99])
@pytest.mark.parametrize("attack", ["loss", "ref", None])
def test_it_is_the_best_perplexity_within_the_budget(grid, limit, attack):
    """One seed: the same as going through the runs epoch by epoch, a third of the error for each of three."""
    loaded, frame = grid
    [advice] = recommend(loaded, Budget(auc=limit, attack=attack))
    found = curves(frame)
    kept = []
    for cell in loaded.cells:
        if cell.outcome["status"] != "done":
            continue
        for epoch in range(1, cell.epochs + 1):
            if highest(cell, epoch, [attack] if attack else loaded.attacks, 1 - 0.05 / 3) >= limit:
                break
            kept.append((found[cell.run_id].perplexity(epoch).value, cell.label, epoch))
    assert (advice.variants, advice.level) == (3, pytest.approx(1 - 0.05 / 3))
    assert "upper bound of the 98.333% interval (95% for all 3 methods and options together)" in advice_text(advice)[0]
    if not kept:
        assert advice.chosen is None
        assert advice.closest.excess >= 0
        assert "No checkpoint keeps the budget" in advice_text(advice)[1]
        return
    best = min(kept)
    assert (advice.chosen.label, advice.chosen.epoch) == best[1:]
    assert advice.chosen.perplexity == pytest.approx(best[0])
    others = [one for one in kept if one[1] != best[1]]
    assert (advice.runner_up is None) == (not others)
    if others:
        assert (advice.runner_up.label, advice.runner_up.epoch) == min(others)[1:]
        assert advice.difference.value == pytest.approx(math.log(min(others)[0] / best[0]))


def write_grid(path, runs, attacks=ATTACKS):
    """Finished runs, each a label, a spec and a (level, gap, validation) for every epoch; a base for every split."""
    rng, store = np.random.default_rng(0), Store(path)
    bases = {}
    for _, one, _ in runs:
        key = bases.setdefault(canonical_json(one.identity()["data"]), f"b{len(bases)}")
        if not store.base(key).exists():
            write_base(store, key, rng)
            write_gates(store, key)
    entries = [(label, bases[canonical_json(one.identity()["data"])], one) for label, one, _ in runs]
    write_lock(path, entries, attacks=attacks)
    for _, one, curve in runs:
        tuned(store, one, rng, curve).finish(status="done", reason=None, **COUNTS)
    return load_grid(path)


def test_an_epoch_after_one_over_the_budget_is_none_of_the_candidates(tmp_path):
    """Each epoch by itself would be another chance to be lucky: the first that fails ends a run's list."""
    loud_first = [(2.5, 1.5, 2.2), (2.5, 0.0, 2.0)]
    loaded = write_grid(tmp_path, [("lora", spec(), loud_first)])
    [advice] = recommend(loaded, Budget(auc=0.6, attack="loss"))
    assert highest(loaded.cells[0], 2, ["loss"], 0.95) < 0.6
    assert advice.chosen is None
    assert advice.closest.epoch == 1
    assert advice.closest.excess > 0


def test_a_rate_has_to_hold_for_every_attack(tmp_path):
    """Three in five members lack a surprise that all others have: LOSS finds more on the whole, Min-K% more surely."""
    loaded = write_grid(tmp_path, [("lora", spec(), [(2.5, 0.0, 2.2)])], attacks=("loss", "min_k"))
    [cell] = loaded.cells
    rng, told = np.random.default_rng(1), np.arange(400) < 240
    L = np.r_[rng.normal(2.4, 0.5, 400), rng.normal(2.8, 0.5, 95), np.full(30, 2.2)].clip(0.5)
    worst = np.r_[np.where(told, 1.0, 4.0), np.full(125, 3.0)]
    rest = (6 - worst) / 5
    logp = -(L[:, None] * np.c_[worst, np.tile(rest[:, None], 5)]).astype(np.float32).ravel()
    file = cell.folder.epoch(1)
    shutil.rmtree(file)
    write_epoch(Store(tmp_path), cell.run_id, 1, replace(cell.reference, logp=logp, mean=logp - 0.5))
    owners = cell.groups("member"), cell.groups("nonmember")
    rates = {
        a: tpr_at_fpr(*cell.sides(s), 0.1, 0.95, *owners).high for a, s in cell.scores(1, ("loss", "min_k")).items()
    }
    aucs = {a: auc(*cell.sides(s)).value for a, s in cell.scores(1, ("loss", "min_k")).items()}
    assert aucs["loss"] > aucs["min_k"]
    limit = (rates["loss"] + rates["min_k"]) / 2
    assert rates["loss"] < limit < rates["min_k"]
    [strict] = recommend(loaded, Budget(tpr_at_10pct_fpr=limit))
    assert strict.chosen is None
    assert strict.closest.attack == "min_k"
    assert strict.closest.excess == pytest.approx(rates["min_k"] - limit)
    [named] = recommend(loaded, Budget(tpr_at_10pct_fpr=limit, attack="loss"))
    assert named.chosen is not None


@pytest.mark.parametrize("change", [{"max_length": 32}, {"repeat": 2}, {"tune_on": 500}, {"members": 300}])
def test_other_records_are_another_place(tmp_path, change):
    """Perplexities of different records are not ranked, and each place says what it is."""
    one = spec()
    other = one.model_copy(update={"data": one.data.model_copy(update=change)})
    seeds = [one, one.model_copy(update={"seed": 1, "data": one.data.model_copy(update={"seed": 1})})]
    curve = [(2.5, 0.0, 2.2)]
    loaded = write_grid(tmp_path, [("lora", s, curve) for s in (*seeds, other)])
    found = recommend(loaded, Budget(auc=0.7, attack="loss"))
    [(key, value)] = change.items()
    before = getattr(one.data, key)
    assert [advice.place for advice in found] == [
        f"gpt2 on world/customers (data.{key}={before})",
        f"gpt2 on world/customers (data.{key}={value})",
    ]
    assert [advice.unlimited.auc.seeds for advice in found] == [2, 1]
    assert found[0].place in advice_text(found[0])[0]


def test_other_precision_is_another_place(tmp_path):
    one = spec()
    other = one.model_copy(update={"model": one.model.model_copy(update={"dtype": "float16"})})
    loaded = write_grid(tmp_path, [("lora", s, [(2.5, 0.0, 2.2)]) for s in (one, other)])
    found = recommend(loaded, Budget(auc=0.7, attack="loss"))
    assert [advice.place for advice in found] == [
        f"gpt2 on world/customers (model.dtype={dtype})" for dtype in ("float32", "float16")
    ]


@pytest.mark.parametrize(
    ("of_lora", "of_prompt", "paired"),
    [
        ([(0, 0), (1, 0)], [(0, 0), (1, 0)], True),
        ([(0, 0), (1, 0)], [(0, 0), (2, 0)], False),  # other training seeds
        ([(0, 0), (1, 0)], [(0, 0)], False),
        ([(0, 0)], [(0, 1)], False),  # the same seed, on another split
    ],
)
def test_a_runner_up_is_compared_only_where_seeds_and_records_are_the_same(tmp_path, of_lora, of_prompt, paired):
    def runs(method, seeds, curve):
        return [(method, spec(method, seed=seed, split=split), curve) for seed, split in seeds]

    quiet = runs("lora", of_lora, [(2.5, 0.0, 2.0)]) + runs("prompt", of_prompt, [(2.5, 0.0, 2.2)])
    loaded = write_grid(tmp_path, quiet)
    rename_records(loaded)
    [advice] = recommend(loaded, Budget(auc=0.999, attack="loss"))
    assert {advice.chosen.label, advice.runner_up.label} == {"lora", "prompt"}
    assert (advice.difference is not None) == paired
    assert any("on the same records" in line for line in advice_text(advice)) == paired


def rename_records(loaded):
    """Validation ids say of which base they are, those of the first apart."""
    for base in {cell.base for cell in loaded.cells if cell.base.name != "b0"}:
        table = read_table(base / "records.parquet")
        roles = table.column("role").to_pylist()
        ids = [f"{base.name} {n}" if role == "validation" else f"r{n}" for n, role in enumerate(roles)]
        write_table(base / "records.parquet", table.set_column(0, "id", [ids]))


def test_what_the_budget_costs(grid):
    loaded, _ = grid
    [tight] = recommend(loaded, Budget(auc=0.7, attack="loss"))
    [wide] = recommend(loaded, Budget(auc=0.999, attack="loss"))
    assert wide.chosen == wide.unlimited
    assert (tight.unlimited.label, tight.unlimited.epoch) == (wide.chosen.label, wide.chosen.epoch)
    assert tight.chosen.perplexity > wide.chosen.perplexity
    assert any("costs nothing" in line for line in advice_text(wide))
    ratio = tight.chosen.perplexity / wide.chosen.perplexity
    assert any(f"{100 * (ratio - 1):.2g}% of perplexity" in line for line in advice_text(tight))


def test_seeds_are_judged_together(tmp_path):
    """One seed within the budget and one far above it: the mean and its interval decide."""
    rng, store = np.random.default_rng(0), Store(tmp_path)
    write_base(store, "b0", rng)
    write_gates(store, "b0")
    quiet, loud = spec("lora", seed=0), spec("lora", seed=1)
    write_lock(tmp_path, [("lora", "b0", quiet), ("lora", "b0", loud)])
    for one, gap in ((quiet, 0.0), (loud, 1.5)):
        tuned(store, one, rng, [(2.5, gap, 2.2)]).finish(status="done", reason=None, **COUNTS)
    write_results(load_grid(tmp_path))
    [advice] = recommend(load_grid(tmp_path), Budget(auc=0.6, attack="loss"))
    assert advice.chosen is None
    assert advice.closest.auc.seeds == 2
    assert advice.closest.auc.low < 0.5 < advice.closest.auc.value < 0.9 < advice.closest.auc.high


def test_a_rate_that_cannot_be_known_cannot_be_promised(grid):
    """95 non-members: a true-positive rate at 1% false positives is refused, so no budget on it is kept."""
    [advice] = recommend(grid[0], Budget(tpr_at_1pct_fpr=0.9))
    assert advice.chosen is None
    [advice] = recommend(grid[0], Budget(tpr_at_10pct_fpr=0.999, attack="loss"))
    assert advice.chosen is not None


def test_nothing_is_recommended_on_invalid_numbers(tmp_path):
    loaded, _ = build(tmp_path / "shifted", base_gap=1.5)
    with pytest.raises(InvalidAudit, match="base control"):
        recommend(loaded, Budget(auc=0.9))


def test_a_grid_without_a_finished_cell(tmp_path):
    rng, store = np.random.default_rng(0), Store(tmp_path)
    write_base(store, "b0", rng)
    write_lock(tmp_path, [("lora", "b0", spec())])
    with pytest.raises(ImprintError, match="has finished"):
        recommend(load_grid(tmp_path), Budget(auc=0.6))


def test_budgets_from_the_command_line(grid):
    assert parse_budget((), ("loss",)) is None
    given = parse_budget(("auc=0.6", "attack=loss"), ("loss",))
    assert (given.auc, given.attack) == (0.6, "loss")
    for wrong, said in (
        (("auc",), "expected LIMIT=NUMBER"),
        (("auc=x",), "budget.auc"),
        (("auk=0.6",), "did you mean 'auc'"),
        (("auc=0.6", "attack=los"), "did you mean 'loss'"),
        (("attack=loss",), "sets no limit"),
    ):
        with pytest.raises(UsageError, match=said):
            parse_budget(wrong, ("loss",))
    with pytest.raises(UsageError, match="needs a budget"):
        recommend(grid[0])
