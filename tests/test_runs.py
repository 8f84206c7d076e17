"""Whole runs on a tiny model: what they write, what they leave alone, and that no interruption changes a number."""

from __future__ import annotations

import json
import os
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

import imprint
from imprint import controls
from imprint.attacks import DEFAULT_ATTACKS
from imprint.errors import ImprintError, UsageError
from imprint.rows import load_grid
from imprint.spec import Runtime
from imprint.store import Store
from imprint.tuning.methods import METHODS

RESULTS = "run_id model data method options seed epoch attack metric value low high members nonmembers status".split()
SCORES = "run_id epoch record_id member attack score".split()
TPRS = ["tpr_at_10pct_fpr", "tpr_at_1pct_fpr", "tpr_at_0.1pct_fpr"]
PYTHON = {**os.environ, "OMP_NUM_THREADS": "1"}


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter, where nothing has been imported yet."""
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=PYTHON)


def tables(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in ("results.parquet", "scores.parquet")]


def evidence(folder: Path) -> dict[str, int]:
    """Every file and folder below `cells/` and `base/` with the time it was last changed."""
    return {str(p): p.stat().st_mtime_ns for part in ("cells", "base") for p in (folder / part).rglob("*")}


def outcomes(folder: Path) -> dict[str, dict[str, Any]]:
    return {cell.spec.method.name: cell.outcome for cell in load_grid(folder).cells}


@pytest.fixture(scope="module")
def finished(gpt2: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A finished grid of two methods, to look at only."""
    recipe = {
        "model": str(gpt2),
        "data": {"source": str(data), "members": 12, "nonmembers": 10, "validation": 4},
        "method": ["head", {"lora": {"rank": 2}}],
        "train": {"epochs": 2, "batch_size": 4},
    }
    folder = tmp_path_factory.mktemp("runs") / "finished"
    frame = imprint.run(recipe, folder)
    return SimpleNamespace(recipe=recipe, folder=folder, frame=frame, scores=pd.read_parquet(folder / "scores.parquet"))


# ---- what is written ----


def test_results_have_the_documented_columns_and_metrics(finished):
    frame = finished.frame
    assert list(frame.columns) == RESULTS
    cells = [
        (m, e, a, metric)
        for m in ("head", "lora")
        for e in (0, 1, 2)
        for a, metric in [("", "perplexity"), *((a, metric) for a in DEFAULT_ATTACKS for metric in ("auc", *TPRS))]
    ]
    assert list(frame[["method", "epoch", "attack", "metric"]].itertuples(index=False, name=None)) == cells
    assert set(frame.members) == {12}
    assert set(frame.nonmembers) == {10}
    assert set(frame.model) == {finished.recipe["model"]}
    assert set(frame.data) == {finished.recipe["data"]["source"]}
    options = {method: json.loads(found) for method, found in frame[["method", "options"]].values}
    assert options["lora"]["rank"] == 2
    assert options["head"] == {"learning_rate": METHODS["head"].default_rate(32)}


def test_statuses_say_what_ten_nonmembers_can_tell(finished):
    """At 10% FPR ten non-members allow one false positive: indicative; at 1% none: refused, without a value."""
    by_metric = finished.frame.groupby("metric").status.unique().map(list).to_dict()
    assert by_metric == {
        "auc": ["ok"],
        "perplexity": ["ok"],
        "tpr_at_10pct_fpr": ["indicative"],
        "tpr_at_1pct_fpr": ["too_few"],
        "tpr_at_0.1pct_fpr": ["too_few"],
    }
    refused = finished.frame.status == "too_few"
    assert finished.frame[refused][["value", "low", "high"]].isna().all(axis=None)
    assert finished.frame[~refused][["value", "low", "high"]].notna().all(axis=None)


def test_scores_have_the_documented_columns_and_the_records_own_ids(finished, data):
    scores = finished.scores
    assert list(scores.columns) == SCORES
    assert len(scores) == 2 * 3 * len(DEFAULT_ATTACKS) * (12 + 10)
    assert not scores.duplicated(["run_id", "epoch", "record_id", "attack"]).any()
    assert set(scores.record_id) <= {json.loads(line)["id"] for line in data.read_text().splitlines()}
    sides = scores.groupby("record_id").member.nunique()
    assert (sides == 1).all()  # a record is a member everywhere or nowhere
    assert scores.groupby("member").record_id.nunique().to_dict() == {True: 12, False: 10}


def test_every_auc_is_that_of_the_scores(finished):
    rows = finished.frame[finished.frame.metric == "auc"]
    by_cell = dict(list(finished.scores.groupby(["run_id", "epoch", "attack"])))
    assert len(rows) == len(by_cell)
    for row in rows.itertuples():
        of_cell = by_cell[row.run_id, row.epoch, row.attack]
        wanted = imprint.auc(of_cell[of_cell.member].score, of_cell[~of_cell.member].score)
        assert (row.value, row.low, row.high) == (wanted.value, wanted.low, wanted.high)


def test_epoch_zero_is_the_untouched_base_for_every_method(finished):
    base = finished.frame[finished.frame.epoch == 0]
    head, lora = (base[base.method == name].value.tolist() for name in ("head", "lora"))
    np.testing.assert_array_equal(head, lora)
    assert set(base[(base.attack == "ref") & (base.metric == "auc")].value) == {0.5}  # compared with itself
    tuned = finished.frame[(finished.frame.epoch == 2) & (finished.frame.metric == "perplexity")]
    assert tuned.value.nunique() == 2
    assert not set(tuned.value) & set(base.value)


def test_the_base_is_scored_before_a_tuner_stands_in_front_of_it(recipe, gpt2, data, tmp_path):
    """A prompt changes what the model says from the moment it is attached. Here is what the file itself says."""
    import torch
    import transformers

    imprint.run(recipe(method="prompt"), tmp_path / "out")
    [cell] = load_grid(tmp_path / "out").cells
    texts = {row["id"]: row["text"] for row in map(json.loads, data.read_text().splitlines())}
    model = transformers.AutoModelForCausalLM.from_pretrained(gpt2).eval()
    words = transformers.AutoTokenizer.from_pretrained(gpt2)
    stats = cell.reference
    for n, key in enumerate(stats.ids):
        ids = torch.tensor(words(texts[key]).input_ids)
        with torch.no_grad():
            logp = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        wanted = logp[:-1].gather(-1, ids[1:, None])[:, 0]
        np.testing.assert_allclose(stats.logp[stats.offsets[n] : stats.offsets[n + 1]], wanted, atol=1e-5)


def test_perplexity_is_of_the_validation_records(finished):
    """Recomputed from the evidence: exp(Σ nll / Σ tokens)."""
    for cell in load_grid(finished.folder).cells:
        for epoch in (0, 1, 2):
            stats = cell.stats(epoch).select(cell.rows("validation"))
            row = finished.frame.query("run_id == @cell.run_id and epoch == @epoch and metric == 'perplexity'")
            assert row.value.item() == pytest.approx(np.exp(-stats.logp.astype(float).sum() / len(stats.logp)))


def test_results_reads_what_run_returned(finished, tmp_path):
    pd.testing.assert_frame_equal(imprint.results(finished.folder), finished.frame)
    with pytest.raises(ImprintError, match="does not exist"):
        imprint.results(tmp_path)


def test_what_was_trained_is_kept_in_safetensors_only(finished):
    files = {path.name for path in finished.folder.rglob("*") if path.is_file()}
    assert {Path(name).suffix for name in files} <= {".json", ".parquet", ".safetensors", ".yaml", ".md", ".lock"}
    last = [cell.folder.epoch(2) / "adapter" for cell in load_grid(finished.folder).cells]
    assert all(list(folder.glob("*.safetensors")) for folder in last)
    assert not list(finished.folder.rglob("state.safetensors"))
    assert not list(finished.folder.rglob("*.part"))


# ---- who is tuned on ----


def test_only_members_and_extra_records_are_trained_on(recipe, tmp_path, monkeypatch):
    from imprint.tuning import train

    seen: dict[int, set[str]] = {}

    class Spy(train.Trainer):
        def __init__(self, model, records, spec, rate, seed, *rest):
            seen[seed] = {record.id for record in records}
            super().__init__(model, records, spec, rate, seed, *rest)

    monkeypatch.setattr("imprint.cells.Trainer", Spy)
    imprint.run(recipe(seed=[0, 1], data__tune_on=14), tmp_path / "out")
    for cell in load_grid(tmp_path / "out").cells:
        ids = {role: set(cell.records.id[cell.rows(role)]) for role in ("member", "nonmember", "validation")}
        tuned = seen[cell.spec.seed]
        assert {role: len(found) for role, found in ids.items()} == {"member": 8, "nonmember": 8, "validation": 4}
        assert len(tuned) == 14
        assert ids["member"] <= tuned
        assert not tuned & (ids["nonmember"] | ids["validation"])
    assert seen[0] != seen[1]


def test_a_group_stays_on_one_side(recipe, data, tmp_path):
    imprint.run(recipe(data__group="owner"), tmp_path / "out")
    [cell] = load_grid(tmp_path / "out").cells
    owner = {row["id"]: row["owner"] for row in map(json.loads, data.read_text().splitlines())}
    assert cell.records.group.tolist() == [f"group {owner[key]}" for key in cell.records.id]
    assert (cell.records.groupby("group").role.nunique() == 1).all()
    assert cell.records.groupby("group").size().max() == 2


# ---- what is not done again ----


def test_a_finished_recipe_is_a_no_op(finished):
    before, bytes_before = evidence(finished.folder), tables(finished.folder)
    frame = imprint.run(finished.recipe, finished.folder)
    pd.testing.assert_frame_equal(frame, finished.frame)
    assert evidence(finished.folder) == before
    assert tables(finished.folder) == bytes_before


def test_the_base_is_scored_once_for_all_methods(recipe, tmp_path, monkeypatch):
    from imprint.scoring import score

    passes = []
    original = score.token_stats

    def counted(model, *rest, **options):
        passes.append(type(model).__name__)
        return original(model, *rest, **options)

    monkeypatch.setattr(score, "token_stats", counted)
    imprint.run(recipe(method=["full", "lora", "prompt"]), tmp_path / "out")
    held_out = controls.EPOCHS  # what the positive control compares its training loss with
    assert len(passes) == 1 + held_out + 1 + 3  # the base, the control, an epoch of each method
    assert len(list((tmp_path / "out" / "base").iterdir())) == 1


def test_another_method_continues_in_the_same_folder(recipe, tmp_path):
    folder = tmp_path / "out"
    first = imprint.run(recipe(), folder)
    before = evidence(folder)
    both = imprint.run(recipe(method=["head", "prompt"]), folder)
    assert {path: evidence(folder)[path] for path in before if not path.endswith("cells")} == {
        path: time for path, time in before.items() if not path.endswith("cells")
    }
    pd.testing.assert_frame_equal(both[both.method == "head"], first)
    assert set(both.method) == {"head", "prompt"}


def test_attacks_are_added_without_training(recipe, tmp_path):
    folder = tmp_path / "out"
    imprint.run(recipe(attacks=["loss"]), folder)
    before = evidence(folder)
    frame = imprint.run(recipe(attacks=["loss", "zlib"]), folder)
    assert evidence(folder) == before
    assert set(frame.attack) == {"", "loss", "zlib"}


def test_a_cell_does_not_depend_on_its_grid(recipe, tmp_path):
    """Nor on what ran before: no random state leaks from cell to cell, or from the caller."""
    import torch

    torch.manual_seed(1)
    alone = imprint.run(recipe(method="lora"), tmp_path / "alone")
    torch.manual_seed(2)
    grid = imprint.run(recipe(method=["full", "prompt", "lora"]), tmp_path / "grid")
    of_grid = grid[grid.method == "lora"].reset_index(drop=True)
    pd.testing.assert_frame_equal(of_grid, alone, check_exact=True)


@pytest.mark.parametrize("method", ["full", "prefix"])
def test_memory_is_no_part_of_a_run(recipe, llama, tmp_path, method):
    """The same run under another token budget: the same id, and the same numbers within rounding."""
    of_budget = [
        imprint.run(recipe(model=str(llama), method=method), tmp_path / str(n), runtime=Runtime(token_budget=n))
        for n in (4096, 40)
    ]
    assert of_budget[0].run_id.equals(of_budget[1].run_id)
    values = [frame[frame.metric == "perplexity"].value.to_numpy() for frame in of_budget]
    np.testing.assert_allclose(values[0], values[1], rtol=1e-4)


# ---- a folder belongs to a recipe ----


def test_another_recipe_is_refused_and_told_what_differs(recipe, tmp_path):
    folder = tmp_path / "out"
    imprint.run(recipe(), folder)
    before = evidence(folder), tables(folder), (folder / "recipe.lock.json").read_bytes()
    with pytest.raises(UsageError, match=r"another recipe or audit.*train\.epochs.*another folder"):
        imprint.run(recipe(train={"epochs": 2, "batch_size": 4}), folder)
    with pytest.raises(UsageError, match=r"another recipe or audit.*differs in seed;"):
        imprint.run(recipe(seed=5), folder)
    assert (evidence(folder), tables(folder), (folder / "recipe.lock.json").read_bytes()) == before


def test_a_recipe_that_failed_before_anything_was_measured_may_be_corrected(recipe, tmp_path):
    """Else one mistyped name costs the folder and the base in it."""
    folder = tmp_path / "out"
    with pytest.raises(UsageError, match="q_projj"):
        imprint.run(recipe(method={"lora": {"placement": "q_projj"}}), folder)
    frame = imprint.run(recipe(method={"lora": {"placement": "c_attn"}}), folder)
    assert set(frame.epoch) == {0, 1}


def test_a_method_that_failed_may_be_left_out(recipe, tmp_path, monkeypatch):
    """Nothing of it was measured, so nothing is lost."""

    def broken(model, options):
        raise ValueError("no cache")

    whole = METHODS["prompt"]
    monkeypatch.setitem(METHODS, "prompt", type(whole)(whole.options, broken, whole.rate, whole.scaled))
    imprint.run(recipe(method=["prompt", "head"]), tmp_path / "out")
    frame = imprint.run(recipe(method=["head"]), tmp_path / "out")
    assert set(frame.method) == {"head"}


def test_a_foreign_folder_is_left_alone(recipe, tmp_path):
    (tmp_path / "sub").mkdir()
    precious = [tmp_path / "notes.txt", tmp_path / ".film.mkv.part", tmp_path / "sub" / ".letter.part"]
    for file in precious:
        file.write_text("mine")
    with pytest.raises(UsageError, match="not Imprint's"):
        imprint.run(recipe(), tmp_path)
    assert all(file.exists() for file in precious)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".film.mkv.part", "notes.txt", "sub"]


def test_half_written_files_of_a_killed_run_are_removed(recipe, tmp_path):
    folder = tmp_path / "out"
    imprint.run(recipe(), folder)
    half = folder / "cells" / ".something.abc.part"
    half.mkdir()
    (half / "stats.parquet").write_bytes(b"PAR1")
    imprint.run(recipe(), folder)
    assert not half.exists()


# ---- cells that do not end well ----


def test_a_failed_cell_keeps_its_reason_while_the_others_finish(recipe, tmp_path, monkeypatch):
    def broken(model, options):
        raise ValueError("this architecture takes no cache\nand more about it")

    whole = METHODS["prompt"]
    monkeypatch.setitem(METHODS, "prompt", type(whole)(whole.options, broken, whole.rate, whole.scaled))
    folder = tmp_path / "out"
    frame = imprint.run(recipe(method=["prompt", "head"]), folder)
    assert set(frame[frame.epoch > 0].method) == {"head"}
    found = outcomes(folder)
    assert found["head"]["status"] == "done"
    assert found["prompt"]["status"] == "failed"
    assert found["prompt"]["reason"] == "prompt does not work with GPT2LMHeadModel: this architecture takes no cache"
    monkeypatch.setitem(METHODS, "prompt", whole)  # say, after an upgrade
    again = imprint.run(recipe(method=["prompt", "head"]), folder)
    assert set(again[again.epoch > 0].method) == {"prompt", "head"}
    assert outcomes(folder)["prompt"]["status"] == "done"


def test_an_unforeseen_error_in_one_cell_does_not_stop_the_others(recipe, tmp_path, monkeypatch):
    """Out of memory, for one: torch raises RuntimeErrors."""
    from imprint.tuning import train

    original = train.Trainer.batches

    def failing(self, number):
        if "lm_head.weight" in self.parameters:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
        return original(self, number)

    monkeypatch.setattr(train.Trainer, "batches", failing)
    frame = imprint.run(recipe(method=["head", "lora"]), tmp_path / "out")
    assert set(frame[frame.epoch > 0].method) == {"lora"}
    assert "out of memory" in outcomes(tmp_path / "out")["head"]["reason"]


def test_a_diverged_cell_is_kept_and_not_tried_again(recipe, tmp_path):
    folder = tmp_path / "out"
    document = recipe(method=[{"full": {"learning_rate": 1e30}}, "head"], train={"epochs": 3, "batch_size": 4})
    frame = imprint.run(document, folder)
    full = frame[frame.method == "full"]
    gone = full[full.status == "diverged"]
    assert len(gone) == 1 + len(DEFAULT_ATTACKS)
    assert gone[["value", "low", "high"]].isna().all(axis=None)
    assert set(gone.epoch) == {full.epoch.max()}
    assert full[full.epoch == 0].status.eq("ok").any()
    assert "stopped being finite" in outcomes(folder)["full"]["reason"]
    assert set(frame[frame.method == "head"].epoch) == {0, 1, 2, 3}
    before = evidence(folder)
    imprint.run(document, folder)
    assert evidence(folder) == before


def test_a_perplexity_beyond_the_floats_is_a_result(recipe, tmp_path):
    """A loss of more than 709 nats is finite, its exponential is not: the cell is bad, not broken."""
    document = recipe(method={"head": {"learning_rate": 3e3}}, train={"epochs": 2, "batch_size": 4})
    frame = imprint.run(document, tmp_path / "out")
    last = frame[(frame.epoch == frame.epoch.max()) & (frame.metric == "perplexity")]
    assert last.value.item() == np.inf or last.status.item() == "diverged"


def test_a_base_that_is_not_a_number_fails_every_cell(recipe, damaged, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = load_file(damaged / "model.safetensors")
    weights["transformer.ln_f.bias"][0] = float("nan")
    save_file(weights, damaged / "model.safetensors", {"format": "pt"})
    with pytest.raises(ImprintError, match="base model itself"):
        imprint.run(recipe(model=str(damaged)), tmp_path / "out")


def test_missing_weights_are_not_made_up(recipe, damaged, tmp_path):
    """Transformers draws what a file lacks at random, and says so only in a warning."""
    from safetensors.torch import load_file, save_file

    weights = load_file(damaged / "model.safetensors")
    del weights["transformer.h.0.mlp.c_fc.weight"]
    save_file(weights, damaged / "model.safetensors", {"format": "pt"})
    with pytest.raises(ImprintError, match=r"c_fc\.weight"):
        imprint.run(recipe(model=str(damaged)), tmp_path / "out")


def test_a_model_that_sees_the_future_is_refused(recipe, damaged, tmp_path):
    """BERT loads as a `causal` model; it attends both ways, so that log p(x_t | x_<t) would be nonsense."""
    import transformers

    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=300
    )
    transformers.AutoModelForMaskedLM.from_config(config).save_pretrained(damaged)
    with pytest.raises(ImprintError, match=r"causal|later tokens|future"):
        imprint.run(recipe(model=str(damaged)), tmp_path / "out")


def test_damaged_evidence_is_not_taken_for_results(recipe, tmp_path):
    """`done.json` holds checksums; evidence that does not match them must not be reported."""
    folder = tmp_path / "out"
    imprint.run(recipe(method=["head", "full"]), folder)
    cells = {cell.spec.method.name: cell.folder for cell in load_grid(folder).cells}
    shutil.copy(cells["full"].epoch(1) / "stats.parquet", cells["head"].epoch(1) / "stats.parquet")
    with pytest.raises(ImprintError, match=str(cells["head"].path)):
        imprint.run(recipe(method=["head", "full"]), folder)


# ---- crews ----

CREW = [
    {"lora": {"rank": [2, 3], "learning_rate": [1e-3, 1e-2]}},
    {"prompt": {"tokens": 4}},
    "head",
    {"prefix": {"tokens": 4}},
]


def spied_crews(monkeypatch):
    """The methods of each call of `run_crew`."""
    from imprint import cells

    crews, original = [], cells.run_crew

    def spy(crew, base, progress):
        crews.append([work.cell.spec.method.name for work in crew])
        return original(crew, base, progress)

    monkeypatch.setattr(cells, "run_crew", spy)
    return crews


def test_small_cells_share_their_passes_and_end_as_alone(recipe, tmp_path, monkeypatch):
    """Of a grid of seven, two seeds: the head goes alone; the numbers are those of cells that went alone."""
    from imprint import cells

    crews = spied_crews(monkeypatch)
    document = recipe(method=CREW, seed=[0, 1], train={"epochs": 2, "batch_size": 2})
    together = imprint.run(document, tmp_path / "together")
    assert sorted(map(len, crews)) == [1, 1, 1, 5, 6]  # the last of one seed goes with the first of the next
    monkeypatch.setitem(cells.CREW_ROOM, "cpu", 0)
    crews.clear()
    alone = imprint.run(document, tmp_path / "alone")
    assert [len(crew) for crew in crews] == [1] * 14
    same = ["run_id", "epoch", "attack", "metric", "status"]
    pd.testing.assert_frame_equal(together[same], alone[same])
    np.testing.assert_allclose(
        together[together.metric == "perplexity"].value, alone[alone.metric == "perplexity"].value, rtol=1e-5
    )
    for cell in load_grid(tmp_path / "together").cells:
        for epoch in (1, 2):
            wanted = Store(tmp_path / "alone").cell(cell.run_id).stats(epoch)
            np.testing.assert_allclose(cell.stats(epoch).logp, wanted.logp, atol=1e-4)


def test_a_crew_goes_on_where_its_cells_were_left(recipe, tmp_path, monkeypatch):
    """Killed after the first cell of the second epoch: those left behind go on together, the other by itself."""
    from imprint import cells

    document = recipe(method=[{"prompt": {"tokens": [2, 3, 4]}}], train={"epochs": 3, "batch_size": 2})
    wanted = imprint.run(document, tmp_path / "whole")
    written, original = [], cells.write_epoch

    def mortal(folder, report, *rest):
        original(folder, report, *rest)
        written.append(report.epoch)
        if len(written) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(cells, "write_epoch", mortal)
    with pytest.raises(KeyboardInterrupt):
        imprint.run(document, tmp_path / "cut")
    assert written == [1, 1, 1, 2]
    crews = spied_crews(monkeypatch)
    found = imprint.run(document, tmp_path / "cut")
    assert sorted(map(len, crews)) == [1, 2]
    np.testing.assert_allclose(found.value, wanted.value, rtol=1e-3)


def test_a_crew_in_which_one_cell_cannot_start_runs_the_others(recipe, tmp_path, monkeypatch):
    from dataclasses import replace

    def broken(model, options):
        raise ValueError("no cache")

    monkeypatch.setitem(METHODS, "prompt", replace(METHODS["prompt"], attach=broken))
    crews = spied_crews(monkeypatch)
    imprint.run(
        recipe(method=[{"lora": {"rank": [2, 3]}}, "prompt"], train={"epochs": 1, "batch_size": 2}), tmp_path / "out"
    )
    states = {cell.label: cell.outcome["status"] for cell in load_grid(tmp_path / "out").cells}
    assert states == {"lora rank=2": "done", "lora rank=3": "done", "prompt": "failed"}
    assert crews == [["lora"], ["lora"]]


def test_every_epoch_says_what_it_cost(finished):
    for cell in load_grid(finished.folder).cells:
        assert len(cell.costs) == 2
        for cost in cell.costs:
            parts = {"data", "forward", "output", "optimizer", "scoring"}
            parts |= {"backward"} if cell.label == "lora" else set()
            assert set(cost["seconds"]) == parts
            assert cost["flops"] > 0
            assert cost["peak_flops"] > 1e8
            assert cost["peak_memory"] > 1 << 20
    head, lora = (cell.costs[0]["flops"] for cell in load_grid(finished.folder).cells)
    assert lora > head


# ---- interruptions ----

METHODS_RESUMED = ["full", {"lora": {"rank": 2, "dropout": 0.2}}, {"prefix": {"tokens": 4}}]
CRASHES = """
import json, os, pathlib, signal, sys, time
document, folder = json.loads(sys.argv[1]), pathlib.Path(sys.argv[2])
import accelerate, peft, torch, transformers
import imprint.runs
torch.set_num_threads(1)

def life(name, dies_at=None, first=False):
    "Run in a process of its own, which ends by itself just before or after the `dies_at`-th change of a name."
    pid = os.fork()
    if pid:
        return pid
    count = 0
    def mortal(original):
        def changed(self, *rest, **options):
            nonlocal count
            count += 1
            if count == dies_at and first:
                os._exit(9)
            result = original(self, *rest, **options)
            if count == dies_at:
                os._exit(9)
            return result
        return changed
    for operation in ("replace", "rename", "unlink"):
        setattr(pathlib.Path, operation, mortal(getattr(pathlib.Path, operation)))
    try:
        imprint.runs.run(document, folder / name)
    except BaseException:
        import traceback
        traceback.print_exc()
        os._exit(1)
    os._exit(0)

def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

started = time.perf_counter()
codes = {"straight": [ended(life("straight"))], "steps": [], "killed": []}
whole = time.perf_counter() - started
for n in range(80):  # each life gets a little further
    codes["steps"].append(ended(life("steps", dies_at=4 + 5 * n % 25, first=n % 2 == 0)))
    if codes["steps"][-1] != 9:
        break
for share in (0.15, 0.3, 0.45, 0.6, 0.4):
    pid = life("killed")
    time.sleep(share * whole)
    os.kill(pid, signal.SIGKILL)
    codes["killed"].append(ended(pid))
codes["killed"].append(ended(life("killed")))
print(json.dumps(codes))
"""


@pytest.fixture(scope="module")
def crashed(gpt2: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The same recipe run straight through, dying at dozens of chosen places, and killed at random moments.

    One interpreter imports torch and forks every life, so that each costs a fraction of a second.
    """
    document = {
        "model": str(gpt2),
        "data": {"source": str(data), "members": 8, "nonmembers": 8, "validation": 4},
        "method": METHODS_RESUMED,
        "train": {"epochs": 3, "batch_size": 4},
    }
    folder = tmp_path_factory.mktemp("crashes")
    found = python(CRASHES, json.dumps(document), str(folder))
    assert found.returncode == 0, found.stderr
    return SimpleNamespace(folder=folder, codes=json.loads(found.stdout.splitlines()[-1]), stderr=found.stderr)


def test_the_crashes_happened(crashed):
    """Else the comparisons below would show nothing."""
    assert crashed.codes["straight"] == [0], crashed.stderr
    assert crashed.codes["steps"][-1] == 0, crashed.stderr
    assert crashed.codes["steps"].count(9) >= 10
    assert crashed.codes["killed"][-1] == 0, crashed.stderr
    assert crashed.codes["killed"].count(-9) >= 2


@pytest.mark.parametrize("how", ["steps", "killed"])
def test_an_interrupted_run_ends_with_the_same_bytes(crashed, how):
    straight, other = crashed.folder / "straight", crashed.folder / how
    assert tables(other) == tables(straight)
    kept = [p.relative_to(straight) for p in straight.rglob("*.safetensors")]
    kept += [p.relative_to(straight) for p in straight.rglob("stats.parquet")]
    assert len(kept) >= 1 + 3 * (3 + 1)
    assert [str(p) for p in kept if (other / p).read_bytes() != (straight / p).read_bytes()] == []


@pytest.mark.parametrize("how", ["steps", "killed"])
def test_an_interrupted_run_leaves_nothing_behind(crashed, how):
    """Resume states and superseded weights are many times the size of everything else."""
    straight, other = (
        {str(p.relative_to(f)) for p in f.rglob("*")} for f in (crashed.folder / "straight", crashed.folder / how)
    )
    assert other - straight == set()
    assert straight - other == set()


# ---- the package ----


def test_the_public_names_are_these():
    names = [
        "ATTACKS",
        "METHODS",
        "ImprintError",
        "LeakageCallback",
        "auc",
        "audit",
        "extraction_probability",
        "one_run_epsilon",
        "paired_auc",
        "results",
        "run",
        "tpr_at_fpr",
    ]
    assert imprint.__all__ == names
    assert set(names) <= set(dir(imprint))
    assert not {module.name for module in pkgutil.iter_modules(imprint.__path__)} & set(names)  # it would hide the name
    assert all(callable(getattr(imprint, name)) or isinstance(getattr(imprint, name), dict) for name in names)
    with pytest.raises(AttributeError, match="no attribute 'runn'"):
        _ = imprint.runn


def test_reports_need_no_torch_and_give_the_same_numbers(finished, tmp_path):
    folder = Path(shutil.copytree(finished.folder, tmp_path / "copy"))
    for name in ("results.parquet", "scores.parquet"):
        (folder / name).unlink()
    code = """
import sys
import imprint
assert not {"torch", "transformers", "pandas"} & set(sys.modules), "import imprint"
for name in ("torch", "transformers", "peft", "accelerate", "datasets"):
    sys.modules[name] = None  # importing it fails
sys.argv = ["imprint", "report", sys.argv[1]]
from imprint.cli import main
main()
"""
    found = python(code, str(folder))
    assert (found.returncode, found.stderr) == (0, "")
    assert tables(folder) == tables(finished.folder)
    assert (folder / "report.html").stat().st_size > 10_000


def test_store_keeps_what_it_is_given(tmp_path):
    """The folder layout other tools rely on."""
    store = Store(tmp_path)
    assert store.cell("abc").epoch(3) == tmp_path / "cells" / "abc" / "epochs" / "03"
    assert store.base("key") == tmp_path / "base" / "key"


# ---- trained weights ----


@pytest.mark.parametrize("method", ["full", "head", "lora", "prefix", "prompt", "p_tuning"])
def test_stored_weights_give_the_stored_scores(recipe, tmp_path, method):
    """Loaded into a model to which the same method has been attached anew, from another seed."""
    from imprint.checkpoint import load_trained
    from imprint.recipe import plan, read_recipe
    from imprint.runs import prepare_audits
    from imprint.spec import Runtime
    from imprint.tuning.base import Base

    document = recipe(method=method, train={"epochs": 2, "batch_size": 4, "learning_rate": 0.1})
    imprint.run(document, tmp_path / "out")
    [cell] = plan(read_recipe(document), lambda name: "float32").cells
    [audit] = prepare_audits(plan(read_recipe(document), lambda name: "float32"), Store(tmp_path / "none")).values()
    folder = Store(tmp_path / "out").cell(cell.spec.run_id)
    model = Base.of(cell.located, cell.spec.model, Runtime()).tuned(cell.spec.method, seed=99)
    assert not np.allclose(audit.stats(model, 512).logp, folder.stats(2).logp, atol=1e-3)
    load_trained(folder.epoch(2) / "adapter", model)
    np.testing.assert_allclose(audit.stats(model, 512).logp, folder.stats(2).logp, atol=1e-5)
    with pytest.raises(ImprintError, match="is missing"):
        load_trained(tmp_path, model)


def test_members_may_be_repeated(recipe, tmp_path):
    """Each member so many times per epoch, what `tune_on` adds once."""
    imprint.run(recipe(data__repeat=3, data__tune_on=12, method=["head", "lora"]), tmp_path / "out")
    cells = load_grid(tmp_path / "out").cells
    assert {cell.base_meta["counts"]["tuned"] for cell in cells} == {3 * 8 + 4}
    imprint.run(recipe(data__tune_on=12, method="lora"), tmp_path / "once")
    [plain] = load_grid(tmp_path / "once").cells
    members = plain.records[plain.records["role"] == "member"]["id"].tolist()
    assert members == cells[0].records[cells[0].records["role"] == "member"]["id"].tolist()
    assert cells[1].folder.meta(1)["tokens_trained"] > 2 * plain.folder.meta(1)["tokens_trained"]


def test_a_run_killed_before_its_mark_gets_it(recipe, tmp_path, monkeypatch):
    """All epochs are there and only `done.json` is missing: nothing is trained again, and the state goes."""
    from imprint import cells

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cells, "_finish", killed)
        with pytest.raises(KeyboardInterrupt):
            imprint.run(recipe(), tmp_path)
    [cell] = load_grid(tmp_path).cells
    assert (cell.outcome["status"], cell.epochs) == ("unfinished", 1)
    imprint.run(recipe(), tmp_path)
    [cell] = load_grid(tmp_path).cells
    assert cell.outcome["status"] == "done"
    assert not list(tmp_path.rglob("state.safetensors"))
