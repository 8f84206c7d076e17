"""The recommendation against what the results table says, on grids whose numbers are made."""

from __future__ import annotations

import math

import numpy as np
import pytest

from imprint.errors import ImprintError, InvalidAudit, UsageError
from imprint.recommend import parse_budget, recommend
from imprint.report.advice import advice_text
from imprint.report.readings import curves
from imprint.rows import load_grid, write_results
from imprint.spec import Budget
from imprint.store import Store
from tests.test_report import COUNTS, build, spec, tuned, write_base, write_gates, write_lock


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """full, lora and prompt have finished; full and lora leak more with every epoch, prompt learns nothing."""
    return build(tmp_path_factory.mktemp("advice") / "grid")


@pytest.mark.parametrize("limit", [0.6, 0.65, 0.7, 0.8, 0.9, 0.99])
@pytest.mark.parametrize("attack", ["loss", "ref", None])
def test_it_is_the_best_perplexity_within_the_budget(grid, limit, attack):
    """One seed: the same as looking through results.parquet by hand."""
    loaded, frame = grid
    [advice] = recommend(loaded, Budget(auc=limit, attack=attack))
    found = curves(frame)
    kept = []
    for cell in loaded.cells:
        if cell.outcome["status"] != "done":
            continue
        for epoch in range(1, cell.epochs + 1):
            curve = found[cell.run_id]
            highs = [curve.get(epoch, a).interval.high for a in ([attack] if attack else loaded.attacks)]
            if max(highs) < limit:
                kept.append((curve.perplexity(epoch).value, cell.label, epoch))
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
