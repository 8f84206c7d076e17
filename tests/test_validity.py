"""Evidence of the gates and its judgement, end to end: measured once per base, without text, never in a run's way."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import imprint
from imprint import controls
from imprint.gates import Gate, blind_scores, withheld
from imprint.measures import auc
from imprint.rows import Cell, load_grid
from imprint.store import read_json, read_stats, read_table, write_json, write_table
from imprint.tuning.methods import METHODS
from imprint.types import Example
from imprint.validity import gates, gates_of, write_gates
from tests.conftest import save_model

GATES = ["base control", "blind baseline", "overlap", "power", "positive control"]
MEMBERS, NONMEMBERS = 20, 24
FREE = {"loss", "zlib", "zlib_sum", "min_k", "min_k_plus", "surp"}
COMPARES = {"ref", "ratio", "wbc", "ez_mia", "ref_min_k_plus"}
"""Attacks that need no reference."""


def only_cell(folder: Path) -> Cell:
    return load_grid(folder).cells[0]


def by_name(found: list[Gate]) -> dict[str, Gate]:
    assert [gate.name for gate in found] == GATES
    return {gate.name: gate for gate in found}


def judged(folder: Path) -> dict[str, Gate]:
    """The gates of a grid with one base, by name."""
    [found] = gates(load_grid(folder)).values()
    return by_name(found)


def files(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in (folder / "base").rglob("*")}


@pytest.fixture(scope="module")
def lively(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2 with wide initial weights, which LoRA can teach texts by heart."""
    return save_model(tmp_path_factory.mktemp("models") / "lively", "gpt2", initializer_range=0.2)


@pytest.fixture(scope="module")
def finished(lively: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A finished grid of one base, to look at only."""
    recipe = {
        "model": str(lively),
        "data": {"source": str(data), "members": MEMBERS, "nonmembers": NONMEMBERS, "validation": 4},
        "method": "head",
        "train": {"epochs": 1, "batch_size": 8},
    }
    folder = tmp_path_factory.mktemp("validity") / "finished"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(controls, "EPOCHS", 30)
        imprint.run(recipe, folder)
    cell = only_cell(folder)
    texts = {row["id"]: row["text"] for row in map(json.loads, data.read_text().splitlines())}
    return SimpleNamespace(recipe=recipe, folder=folder, cell=cell, gates=cell.base / "gates", texts=texts)


@pytest.fixture
def copied(finished: SimpleNamespace, tmp_path: Path) -> Path:
    """The same grid to change."""
    return Path(shutil.copytree(finished.folder, tmp_path / "copy"))


# ---- evidence


def test_the_files_are_those_documented_and_hold_no_text(finished):
    assert {path.name for path in finished.gates.iterdir()} == {
        *("blind.parquet", "overlap.json", "positive.parquet", "meta.json")
    }
    for name in ("blind.parquet", "positive.parquet"):
        schema = read_table(finished.gates / name).schema
        assert [field.name for field in schema if pa.types.is_string(field.type)] == ["id"]
    documents = "".join(path.read_text() for path in finished.gates.glob("*.json"))
    spoken = {word for text in finished.texts.values() for word in text.split() if len(word) > 3}
    assert len(spoken) > 50
    assert not [word for word in spoken if word in documents]


def test_the_positive_control_knows_its_members_by_heart(finished):
    """Judged by its evidence, not by the gate: the loss tells nearly every pair, and is far below the base's."""
    target, cell = read_stats(finished.gates / "positive.parquet"), finished.cell
    members = set(cell.records["id"].to_numpy()[cell.rows("member")])
    known = np.isin(target.ids, list(members))
    assert (known.sum(), (~known).sum()) == (MEMBERS, NONMEMBERS)
    assert auc(-target.nll[known], -target.nll[~known]).value > 0.98
    base = cell.reference
    before = base.select(np.array([list(base.ids).index(key) for key in target.ids])).nll
    assert target.nll[known].mean() < 0.5 * before[known].mean()
    assert abs(auc(-before[known], -before[~known]).value - 0.5) < 0.2  # it is no property of the records
    run = read_json(finished.gates / "meta.json")["run"]
    assert run["records"] == MEMBERS
    assert run["epochs"] < 30  # it ended because it had learned
    assert run["method"]["name"] == "lora"


def test_the_positive_control_takes_some_members_and_four_times_as_many_others(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(controls, "MEMORIZED", 3)
    monkeypatch.setattr(controls, "EPOCHS", 1)
    imprint.run(recipe(data__nonmembers=16), tmp_path / "out")
    cell = only_cell(tmp_path / "out")
    ids = read_stats(cell.base / "gates" / "positive.parquet").ids.tolist()
    records = cell.records["id"].to_numpy()
    assert ids == [*records[cell.rows("member")][:3], *records[cell.rows("nonmember")][:12]]


def test_the_blind_scores_are_those_of_the_texts(finished):
    """The stored ones, members first, are what the classifiers say of the same texts in the same order."""
    table, cell = read_table(finished.gates / "blind.parquet"), finished.cell
    ids = table.column("id").to_pylist()
    records = cell.records["id"].to_numpy()
    assert ids == [*records[cell.rows("member")], *records[cell.rows("nonmember")]]
    examples = [Example(key, "", finished.texts[key]) for key in ids]
    alone = [None] * MEMBERS, [None] * NONMEMBERS
    wanted = blind_scores(examples[:MEMBERS], examples[MEMBERS:], alone, cell.spec.data.seed)
    assert set(table.column_names) == {"id", *wanted}
    for name, scores in wanted.items():
        np.testing.assert_array_equal(table.column(name).to_numpy(), scores)


def test_controls_are_measured_once_per_base(recipe, tmp_path, monkeypatch):
    measured: list[str] = []
    original = controls._overfit

    def spied(cell, *rest):
        measured.append(cell.base)
        return original(cell, *rest)

    monkeypatch.setattr(controls, "_overfit", spied)
    monkeypatch.setattr(controls, "EPOCHS", 1)
    imprint.run(recipe(method=["head", "prompt"]), tmp_path / "out")
    before = files(tmp_path / "out")
    assert len(measured) == 1
    imprint.run(recipe(method=["head", "prompt"]), tmp_path / "out")
    imprint.run(recipe(method=["head", "prompt", "lora"]), tmp_path / "out")
    assert len(measured) == 1
    assert files(tmp_path / "out") == before
    imprint.run(recipe(method=["head", "prompt"], seed=[0, 1]), tmp_path / "seeds")
    assert measured[1:] == list(dict.fromkeys(cell.base.name for cell in load_grid(tmp_path / "seeds").cells))
    assert len(set(measured)) == 2  # seed 0 of both folders is one and the same base


def test_a_run_older_than_its_gates_gets_them(finished, copied, monkeypatch):
    monkeypatch.setattr(controls, "EPOCHS", 30)
    wanted, before = judged(finished.folder), (copied / "results.parquet").read_bytes()
    cells = {path: path.stat().st_mtime_ns for path in (copied / "cells").rglob("*")}
    shutil.rmtree(only_cell(copied).base / "gates")
    imprint.run(finished.recipe, copied)
    assert judged(copied) == wanted
    assert (copied / "results.parquet").read_bytes() == before
    assert {path: path.stat().st_mtime_ns for path in (copied / "cells").rglob("*")} == cells


def test_controls_change_no_number_of_a_cell(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(controls, "EPOCHS", 2)
    document = recipe(method=["lora", "full"])
    imprint.run(document, tmp_path / "with")
    monkeypatch.setattr("imprint.cells.measure_controls", lambda *_: None)
    imprint.run(document, tmp_path / "without")
    with_controls, without = ((tmp_path / name / "results.parquet").read_bytes() for name in ("with", "without"))
    assert with_controls == without


# ---- a positive control that cannot be had


def without_positive(folder: Path) -> Gate:
    """The gate of a run whose cell has finished all the same."""
    assert only_cell(folder).outcome["status"] == "done"
    found = judged(folder)
    assert found["overlap"].state == "green"
    assert not (only_cell(folder).base / "gates" / "positive.parquet").exists()
    gate = found["positive control"]
    assert gate.state == "missing"
    assert "positive control (missing)" in withheld(list(found.values()))
    return gate


def test_an_architecture_that_takes_no_lora(recipe, tmp_path, monkeypatch):
    def broken(model: Any, options: Any) -> Any:
        raise ValueError("no matrices\nand more about it")

    whole = METHODS["lora"]
    monkeypatch.setitem(METHODS, "lora", type(whole)(whole.options, broken, whole.rate, whole.scaled))
    imprint.run(recipe(), tmp_path)
    assert without_positive(tmp_path).finding == "Not measured: lora does not work with GPT2LMHeadModel: no matrices."


def test_a_positive_control_that_diverges(recipe, tmp_path, monkeypatch):
    whole = METHODS["lora"]
    monkeypatch.setitem(METHODS, "lora", type(whole)(whole.options, whole.attach, 1e30, whole.scaled))
    imprint.run(recipe(), tmp_path)
    assert without_positive(tmp_path).finding == "Not measured: it diverged in epoch 2."


def test_a_positive_control_without_memory(recipe, tmp_path, monkeypatch):
    def full(model: Any) -> Any:
        raise RuntimeError("out of memory\nTried to allocate")

    monkeypatch.setattr("imprint.engine.forward.forward_of", full)  # the cells hold a name of their own for it
    imprint.run(recipe(), tmp_path)
    assert without_positive(tmp_path).finding == "Not measured: out of memory."


# ---- judgement


def test_gates_json_says_what_the_gates_say(finished):
    grid = load_grid(finished.folder)
    assert read_json(finished.folder / "gates.json") == {
        key: [asdict(gate) for gate in found] for key, found in gates(grid).items()
    }
    assert list(gates(grid)) == [finished.cell.base.name]


def test_what_each_gate_is_judged_on(finished):
    found, cell = judged(finished.folder), finished.cell
    assert set(found["base control"].figures["auc"]) == FREE
    assert set(found["positive control"].figures["auc"]) == FREE | COMPARES
    loss = auc(*(-nll for nll in cell.losses(0)))
    assert found["base control"].figures["auc"]["loss"]["value"] == pytest.approx(loss.value)
    table = read_table(finished.gates / "blind.parquet")
    for name, said in found["blind baseline"].figures["auc"].items():
        scores = table.column(name).to_numpy()
        assert said["value"] == pytest.approx(auc(scores[:MEMBERS], scores[MEMBERS:]).value)
    assert found["power"].figures["records"] == [MEMBERS, NONMEMBERS]
    counts = found["overlap"].figures
    assert (counts["members"], counts["nonmembers"], counts["exact"]) == (MEMBERS, NONMEMBERS, 0)
    states = {name: gate.state for name, gate in found.items()}
    assert (states["overlap"], states["power"]) == ("green", "red")


def test_an_attack_that_compares_with_the_base_has_the_loss_for_its_control(finished):
    found = by_name(gates_of(finished.cell, ["ref"]))
    assert set(found["base control"].figures["auc"]) == {"loss"}
    assert set(found["positive control"].figures["auc"]) == {"ref"}


def test_records_of_the_positive_control_are_found_by_their_ids(finished, copied):
    """Shuffled, and without a few: each score stays with its record, its compressed size and its base."""
    file = only_cell(copied).base / "gates" / "positive.parquet"
    table = read_table(file)
    order = np.random.default_rng(1).permutation(len(table))
    write_table(file, table.take(order))
    assert judged(copied)["positive control"] == judged(finished.folder)["positive control"]

    write_table(file, table.take(order[:30]))
    target, cell = read_stats(file), finished.cell
    place = {key: n for n, key in enumerate(cell.records["id"])}
    rows = np.array([place[key] for key in target.ids])
    nll, base = target.nll, cell.reference.nll[rows]
    wanted = {"loss": -nll, "ref": base - nll, "zlib": -nll / cell.records["zlib_bytes"].to_numpy()[rows]}
    member = (cell.records["role"] == "member").to_numpy()[rows]
    found = by_name(gates_of(only_cell(copied), list(wanted)))["positive control"].figures["auc"]
    for attack, scores in wanted.items():
        assert found[attack]["value"] == pytest.approx(auc(scores[member], scores[~member]).value)


def test_the_budget_reaches_the_power_gate(finished, copied):
    document = read_json(copied / "recipe.lock.json")
    free = judged(copied)["power"]
    assert (free.state, free.figures["budget"]) == ("red", None)
    half = free.figures["half_width"]
    for limit, state in ((0.49 + half, "red"), (0.51 + half, "green")):
        write_json(copied / "recipe.lock.json", {**document, "budget": {"attack": None, "auc": limit}})
        power = judged(copied)["power"]
        assert (power.state, power.figures["budget"]) == (state, limit)
        write_gates(load_grid(copied))
        [found] = read_json(copied / "gates.json").values()
        assert [gate["state"] for gate in found if gate["name"] == "power"] == [state]
    write_json(copied / "recipe.lock.json", {**document, "budget": {"attack": "loss", "tpr_at_1pct_fpr": 0.1}})
    assert judged(copied)["power"] == free


def test_texts_that_give_members_away_are_red(copied):
    """Scores of one classifier replaced by the answer, then by its opposite, from which nothing was learned."""
    file = only_cell(copied).base / "gates" / "blind.parquet"
    table = read_table(file)
    column = table.column_names.index("length")
    told = np.arange(len(table)) < MEMBERS
    write_table(file, table.set_column(column, "length", pa.array(told.astype(float))))
    gate = judged(copied)["blind baseline"]
    assert (gate.state, gate.figures["auc"]["length"]["value"]) == ("red", 1)
    write_table(file, table.set_column(column, "length", pa.array(1 - told.astype(float))))
    gate = judged(copied)["blind baseline"]
    assert (gate.state, gate.figures["auc"]["length"]["value"]) == ("green", 0)


def test_too_few_records_for_the_blind_baseline(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(controls, "EPOCHS", 1)
    imprint.run(recipe(), tmp_path)
    gate = judged(tmp_path)["blind baseline"]
    assert gate.state == "missing"
    assert gate.finding.startswith("Not measured: the blind baseline needs 10 records or groups a side, and the 8")
    assert not (only_cell(tmp_path).base / "gates" / "blind.parquet").exists()


def test_a_base_without_evidence_of_its_gates_is_not_green(copied):
    shutil.rmtree(only_cell(copied).base / "gates")
    found = judged(copied)
    gone = {"blind baseline", "overlap", "positive control"}
    assert {name for name, gate in found.items() if gate.state == "missing"} == gone
    assert {found[name].finding for name in gone} == {"Not measured."}
    shutil.rmtree(only_cell(copied).base)
    assert {gate.state for gate in judged(copied).values()} == {"missing"}


def test_every_base_of_a_grid_has_its_gates_in_its_order(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(controls, "EPOCHS", 1)
    imprint.run(recipe(seed=[3, 1], method=["head", "prompt"]), tmp_path)
    grid = load_grid(tmp_path)
    found = gates(grid)
    assert list(found) == list(dict.fromkeys(cell.base.name for cell in grid.cells))
    assert len(found) == 2
    first, second = (by_name(listed)["base control"].figures for listed in found.values())
    assert first != second
    for cell in grid.cells:
        assert gates_of(cell, grid.attacks) == found[cell.base.name]
