"""Shadow models, auxiliary records, further passes and early stopping, in whole runs on a tiny model."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

import imprint
from imprint import probes
from imprint.attacks import ATTACKS, DEFAULT_ATTACKS, allow, run_attack
from imprint.canaries.make import make
from imprint.canaries.manifest import write_manifest
from imprint.errors import ImprintError, UsageError
from imprint.evidence import Evidence
from imprint.halves import inside
from imprint.planted import planted
from imprint.ranking import apart, ranking
from imprint.recipe import plan, read_recipe
from imprint.recommend import held_to
from imprint.rows import load_grid, write_results
from imprint.runs import prepare_audits
from imprint.spec import Budget
from imprint.store import Store
from imprint.types import Shadows, TokenStats
from imprint.validity import gates_of

FURTHER = ["lowercase", "neighbourhood", "recall", "con_recall", "grad_norm"]
FITTED = ["camia", "ensemble"]
OUTSIDE = ["dc_pdd", "loss_trace", "rmia"]


def recipe(gpt2: Path, data: Path, **changes):
    document = {
        "model": str(gpt2),
        "data": {
            "source": str(data),
            "members": 12,
            "nonmembers": 10,
            "validation": 4,
            "auxiliary": 4,
            "max_length": 30,
        },
        "method": ["head", {"lora": {"rank": 2}}],
        "train": {"epochs": 2, "batch_size": 4},
        "shadows": 4,
        "evidence": {"neighbours": 2, "shots": 1},
        "attacks": ["loss", "ref", "lira", *OUTSIDE, *FURTHER],
    }
    return {**document, **changes}


@pytest.fixture(scope="module")
def finished(gpt2: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("shadows") / "finished"
    frame = imprint.run(recipe(gpt2, data), folder)
    return SimpleNamespace(recipe=recipe(gpt2, data), folder=folder, frame=frame, grid=load_grid(folder))


def test_every_attack_has_a_number_where_its_evidence_is(finished):
    aucs = finished.frame[finished.frame.metric == "auc"]
    for method in ("head", "lora"):
        of_method = aucs[(aucs.method == method) & (aucs.status == "ok")]
        assert set(of_method[of_method.epoch == 2].attack) == set(finished.recipe["attacks"])
        assert set(of_method[of_method.epoch == 0].attack) == {
            *("loss", "ref", "dc_pdd", "loss_trace"),
            *(name for name in FURTHER if name != "grad_norm"),
        }


def test_shadow_models_are_no_rows_of_the_results(finished):
    assert {cell.label for cell in finished.grid.cells} == {"head", "lora"}
    assert set(finished.frame.run_id) == {cell.run_id for cell in finished.grid.cells}
    assert all(len(cell.shadows) == 4 for cell in finished.grid.cells)


def test_a_shadow_model_is_tuned_on_its_half_and_the_auxiliary_records(finished, tmp_path):
    planned = plan(read_recipe(finished.recipe))
    [audit] = {id(a): a for a in prepare_audits(planned, Store(tmp_path / "new")).values()}.values()
    from imprint.records import tuned_for

    roles = np.array(audit.roles)
    groups = [f"record {e.id}" for e in audit.examples]
    pool = {r.id for r, role in zip(audit.scored, roles, strict=True) if role in ("member", "nonmember")}
    beside = {r.id for r, role in zip(audit.scored, roles, strict=True) if role == "auxiliary_in"}
    assert len(beside) == 4
    halves = []
    for shadow in planned.shadows_of(planned.cells[0]):
        tuned = {record.id for record in tuned_for(audit, shadow.spec).tuned}
        held = {
            r.id for r, i in zip(audit.scored, inside(audit.roles, groups, 0, shadow.spec.shadow), strict=True) if i
        }
        assert tuned == held | beside
        halves.append(held)
    assert halves[0] | halves[1] == pool == halves[2] | halves[3]
    assert not halves[0] & halves[1]
    assert halves[0] != halves[2]


def test_the_shadows_handed_to_attacks_are_what_those_models_say(finished):
    for cell in finished.grid.cells:
        found = Evidence(cell, 2)["shadows"]
        for n, shadow in enumerate(cell.shadows):
            np.testing.assert_allclose(found.losses[:, n], shadow.folder.stats(2).nll, rtol=1e-6)
        evaluated = cell.role_in("member", "nonmember")
        assert (found.inside[evaluated].sum(1) == 2).all()
        assert not found.inside[~evaluated].any()
        expected = run_attack("lira", target=cell.stats(2), shadows=found)
        np.testing.assert_array_equal(Evidence(cell, 2).score("lira"), expected)


def test_records_of_either_kind_are_known_or_evaluated_never_both(finished):
    cell = finished.grid.cells[0]
    known = Evidence(cell, 2)["known"]
    np.testing.assert_array_equal(known == 1, cell.role_in("auxiliary_in"))
    np.testing.assert_array_equal(known == 0, cell.role_in("auxiliary_out"))
    assert np.isnan(known[cell.role_in("member", "nonmember", "validation")]).all()
    population = Evidence(cell, 2)["population"]
    np.testing.assert_array_equal(population, cell.role_in("auxiliary_out", "validation"))


def test_evaluated_records_are_the_same_with_and_without_auxiliary_ones(finished, gpt2, data, tmp_path):
    plain = recipe(gpt2, data, attacks=["loss"], shadows=0, method=["head"])
    plain["data"] = {key: value for key, value in plain["data"].items() if key != "auxiliary"}
    imprint.run(plain, tmp_path / "plain")
    [other], cell = load_grid(tmp_path / "plain").cells, finished.grid.cells[0]
    for role in ("member", "nonmember", "validation"):
        a, b = (c.records["id"].to_numpy()[c.rows(role)].tolist() for c in (cell, other))
        assert a == b


def test_the_same_command_again_does_nothing_and_an_added_attack_uses_kept_weights(finished, gpt2, data, tmp_path):
    folder = tmp_path / "later"
    first = recipe(gpt2, data, attacks=["loss"], shadows=0, method=[{"lora": {"rank": 2}}])
    imprint.run(first, folder)
    before = {p: p.stat().st_mtime_ns for p in folder.glob("cells/*/epochs/*/*/*.safetensors")}
    before |= {p: p.stat().st_mtime_ns for p in folder.glob("cells/*/epochs/*/stats.parquet")}
    frame = imprint.run({**first, "attacks": ["loss", "grad_norm", "recall"]}, folder)
    assert before == {p: p.stat().st_mtime_ns for p in before}
    rows = frame[(frame.metric == "auc") & (frame.epoch == 2)].set_index("attack").value
    of_all = finished.frame
    same = of_all[(of_all.metric == "auc") & (of_all.epoch == 2) & (of_all.method == "lora")].set_index("attack").value
    assert rows.to_dict() == pytest.approx(same[["loss", "grad_norm", "recall"]].to_dict(), abs=1e-9)
    passes = {p: p.stat().st_mtime_ns for p in folder.glob("**/passes/*.parquet")}
    assert len(passes) >= 3  # recall at the base and after tuning, the gradient after tuning
    imprint.run({**first, "attacks": ["loss", "grad_norm", "recall"]}, folder)
    assert passes == {p: p.stat().st_mtime_ns for p in folder.glob("**/passes/*.parquet")}


def test_agreement_with_shadow_models_is_told_for_every_attack_that_has_scores(finished):
    found = ranking(finished.grid.cells[1], finished.grid.attacks)
    assert found is not None
    assert found.shadows == 4
    assert set(found.agreements) == set(finished.recipe["attacks"])
    assert all(isinstance(one, str) for one in found.agreements.values())  # twelve members are too few
    risk = pd.read_parquet(finished.folder / "risk.parquet")
    assert len(risk) == 2 * 12
    assert (risk.low <= risk.memorization).all()
    assert (risk.memorization <= risk.high).all()


def test_too_few_known_records_are_refused_with_the_reason(gpt2, data, tmp_path):
    frame = imprint.run(recipe(gpt2, data, attacks=["loss", *FITTED], shadows=0, method=["head"]), tmp_path / "few")
    for attack in FITTED:
        rows = frame[(frame.attack == attack) & (frame.metric == "auc")]
        assert set(rows.status) == {"refused"}
        assert rows.value.isna().all()
    from imprint.report import to_markdown

    text = to_markdown(load_grid(tmp_path / "few"), frame)
    assert "ensemble is refused: attack 'ensemble' is fitted on at least" in text.replace("\\", "")


@pytest.mark.parametrize(
    ("attack", "wrong", "sentence"),
    [
        ("ensemble", {"auxiliary": None}, "ensemble needs records to learn from: set data.auxiliary"),
        ("con_recall", {"auxiliary": None}, "con_recall needs tuned records outside the evaluated ones"),
        ("lira", {}, "lira needs shadow models: set `shadows` to 4 or more"),
    ],
)
def test_missing_evidence_is_found_before_anything_is_trained(gpt2, data, tmp_path, attack, wrong, sentence):
    document = recipe(gpt2, data, attacks=[attack], shadows=0)
    document["data"] = {**document["data"], **wrong}
    with pytest.raises(UsageError, match=sentence):
        imprint.run(document, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_an_attack_of_ones_own_works_wherever_a_name_does(gpt2, data, tmp_path, monkeypatch):
    (tmp_path / "my_attacks.py").write_text("def twice(target):\n    return -2 * target.nll\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    document = recipe(gpt2, data, attacks=["loss", "my_attacks:twice"], shadows=0, method=["head"])
    document["budget"] = {"attack": "my_attacks:twice", "auc": 0.9}
    frame = imprint.run(document, tmp_path / "own")
    aucs = frame[frame.metric == "auc"].pivot(index="epoch", columns="attack", values="value")
    assert aucs["loss"].tolist() == aucs["my_attacks:twice"].tolist()


@pytest.mark.parametrize(
    ("name", "code", "sentence"),
    [
        ("nowhere_at_all:attack", "", "cannot be imported"),
        ("my_broken:missing", "x = 1", "cannot be imported"),
        ("my_number:x", "x = 1", "is no function, but a int"),
        ("my_greedy:f", "def f(everything): return 0", "unknown evidence 'everything'"),
        ("my_raising:f", "raise RuntimeError('no')", r"cannot be imported \(no\)"),
    ],
)
def test_an_attack_of_ones_own_that_cannot_be_used_is_one_sentence(
    gpt2, data, tmp_path, monkeypatch, name, code, sentence
):
    (tmp_path / f"{name.partition(':')[0]}.py").write_text(code) if code else None
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UsageError, match=sentence):
        imprint.run(recipe(gpt2, data, attacks=[name], shadows=0), tmp_path / "own")


def test_training_stops_before_the_epoch_that_leaks_too_much(gpt2, data, tmp_path):
    train = {"epochs": 12, "batch_size": 4, "stop": {"attack": "ref", "auc": 0.7}}
    method = [{"full": {"learning_rate": 0.01}}]
    document = recipe(gpt2, data, attacks=["ref"], shadows=0, method=method, train=train)
    frame = imprint.run(document, tmp_path / "stopped")
    aucs = frame[frame.metric == "auc"].set_index("epoch").value
    [cell] = load_grid(tmp_path / "stopped").cells
    assert cell.outcome["status"] == "done"
    assert "stopped early: the AUC of ref reached" in cell.outcome["reason"]
    assert cell.epochs < 12
    assert aucs.max() <= 0.7
    whole = imprint.run({**document, "train": {"epochs": 12, "batch_size": 4}}, tmp_path / "whole")
    same = whole[whole.metric == "auc"].set_index("epoch").value
    assert same.loc[aucs.index].to_dict() == pytest.approx(aucs.to_dict())
    assert same.loc[cell.epochs + 1] > 0.7


def test_goldfish_leaves_tokens_out_of_the_loss_and_scores_all(gpt2, data, tmp_path):
    for method in ("head", "lora"):
        losses = {}
        for k in (None, 2):
            train = {"epochs": 1, "batch_size": 4, "goldfish": k}
            document = recipe(gpt2, data, attacks=["loss"], shadows=0, method=[method], train=train)
            imprint.run(document, tmp_path / f"{method}{k}")
            [cell] = load_grid(tmp_path / f"{method}{k}").cells
            losses[k] = cell.stats(1)
        np.testing.assert_array_equal(losses[None].offsets, losses[2].offsets)
        assert not np.allclose(losses[None].logp, losses[2].logp)


def test_the_default_is_every_attack_of_one_pass():
    assert set(DEFAULT_ATTACKS) < set(ATTACKS)
    assert {"loss", "ref", "ez_mia", "wbc", "surp"} <= set(DEFAULT_ATTACKS)
    assert not {"lira", "recall", "ensemble", "loss_trace"} & set(DEFAULT_ATTACKS)


# ---- what must not be believed


def test_code_that_a_folder_names_runs_only_if_the_user_names_it_too(gpt2, data, tmp_path, monkeypatch):
    (tmp_path / "their_attacks.py").write_text("def twice(target):\n    return -2 * target.nll\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    imprint.run(recipe(gpt2, data, attacks=["loss"], shadows=0, method=["head"]), tmp_path / "run")
    file = tmp_path / "run" / "recipe.lock.json"
    lock = json.loads(file.read_text())
    lock["attacks"] = ["loss", "their_attacks:twice"]
    file.write_text(json.dumps(lock))
    with pytest.raises(UsageError, match="is code that an output folder names: give it as --attack"):
        write_results(load_grid(tmp_path / "run"))
    assert "their_attacks" not in sys.modules
    allow(["their_attacks:twice"])
    assert "their_attacks:twice" in set(write_results(load_grid(tmp_path / "run")).attack)


def test_evidence_of_other_records_is_not_taken(finished, tmp_path):
    shutil.copytree(finished.folder, tmp_path / "copied")
    for file in [*(tmp_path / "copied").glob("cells/*/epochs/02/passes/gradient_norm-*.parquet")]:
        table = pq.read_table(file)
        pq.write_table(table.take(list(range(len(table)))[::-1]), file)
    with pytest.raises(ImprintError, match="is of other records: delete it"):
        write_results(load_grid(tmp_path / "copied"))
    for file in [*(tmp_path / "copied").glob("cells/*/epochs/02/passes/gradient_norm-*.parquet")]:
        pq.write_table(pq.read_table(file).select(["norm"]), file)
    with pytest.raises(ImprintError, match="is damaged"):
        write_results(load_grid(tmp_path / "copied"))


def test_shadow_scores_of_other_records_are_not_taken(finished, tmp_path):
    shutil.copytree(finished.folder, tmp_path / "copied")
    cell = load_grid(tmp_path / "copied").cells[0]
    file = cell.shadows[1].folder.epoch(2) / "stats.parquet"
    table = pq.read_table(file)
    pq.write_table(table.take(list(range(len(table)))[::-1]), file)
    with pytest.raises(ImprintError, match="is of other records"):
        Evidence(cell, 2)["shadows"]


def test_what_could_not_be_measured_is_refused_with_its_reason(gpt2, data, tmp_path):
    document = recipe(gpt2, data, attacks=["loss", "recall"], shadows=0, method=["head"])
    document["data"] = {**document["data"], "max_length": 64}
    frame = imprint.run(document, tmp_path / "long")
    refused = frame[(frame.attack == "recall") & (frame.metric == "auc")]
    assert set(refused.status) == {"refused"}
    reasons = json.loads((tmp_path / "long" / "refused.json").read_text())
    assert "no text fits in front of the longest record" in reasons["recall"]


def test_a_pass_that_fails_costs_nothing_else_and_is_tried_again(gpt2, data, tmp_path, monkeypatch):
    document = recipe(gpt2, data, attacks=["loss", "grad_norm"], shadows=0, method=["head"])

    def out_of_memory(bench):
        raise RuntimeError("out of memory")

    good = probes.PASSES["gradient_norm"]
    monkeypatch.setitem(probes.PASSES, "gradient_norm", replace(good, measure=out_of_memory))
    frame = imprint.run(document, tmp_path / "run")
    assert "grad_norm" not in set(frame.attack)
    monkeypatch.setitem(probes.PASSES, "gradient_norm", good)
    assert "grad_norm" in set(imprint.run(document, tmp_path / "run").attack)


def test_an_attack_of_ones_own_that_raises_is_refused_with_what_it_said(gpt2, data, tmp_path, monkeypatch):
    (tmp_path / "my_boom.py").write_text("def boom(target):\n    raise ValueError('no such luck')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    document = recipe(gpt2, data, attacks=["loss", "my_boom:boom"], shadows=0, method=["head"])
    frame = imprint.run(document, tmp_path / "run")
    assert set(frame[frame.attack == "my_boom:boom"].status) == {"refused"}
    assert "no such luck" in json.loads((tmp_path / "run" / "refused.json").read_text())["my_boom:boom"]


def test_the_positive_control_says_what_it_did_not_try(finished):
    cell = finished.grid.cells[0]
    control = {gate.name: gate for gate in gates_of(cell, ["loss", "neighbourhood"])}["positive control"]
    assert "Not tried, since one pass is not enough: neighbourhood." in control.finding
    for attacks, held in ((["neighbourhood"], None), (["loss", "neighbourhood"], "neighbourhood")):
        control = {gate.name: gate for gate in gates_of(cell, attacks, 0.55, held)}["positive control"]
        assert control.state == "missing"


def test_attacks_that_share_shadow_models_with_the_truth_agree_with_others():
    """With nothing remembered an attack must not agree with the truth because both have the same models' errors."""
    dice, found = np.random.default_rng(0), []
    for _ in range(10):
        halves = np.stack([dice.permutation(200) < 100 for _ in range(8)], axis=1)
        inside = np.concatenate([np.stack([half, ~half], axis=1) for half in halves.T], axis=1)
        hardness = dice.gamma(9, 0.3, 200)
        losses = hardness[:, None] + dice.normal(0, 0.2, inside.shape)
        shadows = Shadows(losses, inside)
        nll = hardness + dice.normal(0, 0.2, 200)
        ids = np.array([str(n) for n in range(200)])
        one = np.arange(201)
        target = TokenStats(
            ids,
            one.astype(np.int64),
            np.ones(200, np.int32),
            -nll.astype(np.float32),
            np.zeros(200, np.float32),
            np.ones(200, np.float32),
            np.ones(200, bool),
        )
        pieces = {"target": target, "shadows": shadows}
        found.append(apart(pieces, "lira_offline", np.arange(200), list(ids)).spearman.value)
    assert abs(np.mean(found)) < 0.1


def test_the_head_with_goldfish_and_shadow_models(gpt2, data, tmp_path):
    train = {"epochs": 1, "batch_size": 4, "goldfish": 3}
    document = recipe(gpt2, data, attacks=["loss", "lira"], method=["head"], train=train)
    frame = imprint.run(document, tmp_path / "run")
    assert "lira" in set(frame[(frame.metric == "auc") & (frame.status == "ok")].attack)


def test_advice_is_given_on_a_grid_whose_attacks_need_more_passes(finished):
    frame_attacks = set(finished.recipe["attacks"])
    held = held_to(finished.grid.cells[:1], finished.grid, Budget(auc=0.9))
    assert {"loss", "ref", "lira", "rmia"} <= set(held) < frame_attacks | {"recall"}
    with pytest.raises(UsageError, match="has no number at some"):
        held_to(finished.grid.cells[:1], finished.grid, Budget(auc=0.9, attack="grad_norm"))


def test_private_training_cannot_look_at_the_members_to_stop(gpt2, data, tmp_path):
    train = {"epochs": 2, "dp": {"epsilon": 4}, "stop": {"auc": 0.6}}
    with pytest.raises(UsageError, match="which the ε of `dp` does not cover"):
        imprint.run(recipe(gpt2, data, attacks=["ref"], train=train), tmp_path / "none")


def test_a_grid_whose_only_attack_has_no_number_on_the_base(gpt2, data, tmp_path):
    frame = imprint.run(recipe(gpt2, data, attacks=["lira"], method=["head"]), tmp_path / "run")
    assert set(frame[frame.metric == "auc"].epoch) == {1, 2}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"shadows": 2}, "shadows: 2 say nothing of a record: set 0, or 4 or more"),
        ({"train": {"dp": {"epsilon": 8}}, "data": {"repeat": 2}}, "`train.dp` protects what is told once"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(gpt2, data, tmp_path, change, sentence):
    document = recipe(gpt2, data, attacks=["loss"], shadows=0)
    document |= {key: {**document[key], **part} if isinstance(part, dict) else part for key, part in change.items()}
    with pytest.raises(UsageError, match=sentence):
        imprint.run(document, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_labels_name_what_differs_and_is_there(gpt2, data):
    train = [{"epochs": 1}, {"epochs": 1, "goldfish": 3}, {"epochs": 1, "stop": {"auc": 0.6}}]
    train += [{"epochs": 1, "dp": {"epsilon": 8}}]
    cells = plan(read_recipe(recipe(gpt2, data, attacks=["loss"], shadows=0, method=["head"], train=train))).cells
    assert [cell.label for cell in cells] == ["head", "head goldfish=3", "head stop=0.6", "head dp=8"]


# ---- canaries in a run


def test_a_record_that_has_the_id_of_a_canary_is_refused(gpt2, tmp_path):
    rows = [{"id": f"canary {n:02}", "text": f"the quick fox {n} jumps over {n * 7} lazy dogs"} for n in range(40)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_manifest(tmp_path / "canaries.json", make(40, ("digits",), (1,), seed=3))
    document = recipe(gpt2, tmp_path / "data.jsonl", attacks=["loss"], shadows=0)
    document["data"] = {**document["data"], "canaries": str(tmp_path / "canaries.json")}
    with pytest.raises(UsageError, match="record 'canary 00' has the id of a canary"):
        imprint.run(document, tmp_path / "run")


@pytest.fixture(scope="module")
def planted_run(gpt2: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("canaries")
    manifest = make(40, ("digits",), (1, 8), seed=3)
    write_manifest(folder / "canaries.json", manifest)
    document = recipe(gpt2, data, attacks=["loss"], shadows=0, method=[{"full": {"learning_rate": 0.003}}])
    document["data"] = {**document["data"], "canaries": str(folder / "canaries.json"), "max_length": 64}
    document["train"] = {"epochs": 4, "batch_size": 8}
    frame = imprint.run(document, folder / "run")
    return SimpleNamespace(manifest=manifest, recipe=document, frame=frame, folder=folder / "run")


def test_canaries_are_tuned_on_where_their_coins_say_so_and_scored_either_way(planted_run, tmp_path):
    [cell] = load_grid(planted_run.folder).cells
    records = cell.records.set_index("id")
    for canary in planted_run.manifest.canaries:
        row = records.loc[canary.id]
        assert row["role"] == ("canary_in" if canary.included else "canary_out")
        assert (row["family"], row["repetitions"]) == (canary.family, canary.repetitions)
    planned = plan(read_recipe(planted_run.recipe))
    [audit] = prepare_audits(planned, Store(tmp_path / "new")).values()
    copies = Counter(record.id for record in audit.tuned)
    for canary in planted_run.manifest.canaries:
        assert copies[canary.id] == (canary.repetitions if canary.included else 0)


def test_canaries_told_often_are_found_and_bound_epsilon(planted_run):
    [cell] = load_grid(planted_run.folder).cells
    once, often = planted(cell)
    assert (once.copies, often.copies) == (1, 8)
    assert once.canaries + often.canaries == 40
    assert often.auc is not None
    assert often.auc.value > 0.9
    assert often.found is not None
    assert 0 < often.found.epsilon <= often.found.ceiling
    assert often.epsilon == pytest.approx(often.found.epsilon / 8)
    assert once.claimed is None


def test_canaries_are_told_of_in_tables_and_files(planted_run):
    from imprint.report import to_markdown

    text = to_markdown(load_grid(planted_run.folder), planted_run.frame)
    assert "**Canaries**" in text
    assert "With 95% confidence no claim of an ε below" in text
    table = pd.read_parquet(planted_run.folder / "canaries.parquet")
    assert table.copies.tolist() == [1, 8]


def test_members_and_nonmembers_are_the_same_with_canaries(planted_run, gpt2, data, tmp_path):
    plain = {**planted_run.recipe, "data": {k: v for k, v in planted_run.recipe["data"].items() if k != "canaries"}}
    [with_them], [without] = (
        prepare_audits(plan(read_recipe(one)), Store(tmp_path / "new")).values() for one in (planted_run.recipe, plain)
    )
    for role in ("member", "nonmember", "validation", "auxiliary_in"):
        a, b = ([r.id for r, x in zip(one.scored, one.roles, strict=True) if x == role] for one in (with_them, without))
        assert a == b


def test_a_private_run_says_what_it_claims_beside_what_is_proven(gpt2, data, tmp_path):
    pytest.importorskip("opacus")
    manifest = make(30, ("digits",), (1,), seed=3)
    write_manifest(tmp_path / "canaries.json", manifest)
    train = {"epochs": 2, "batch_size": 8, "dp": {"epsilon": 4, "delta": 0.01}}
    document = recipe(gpt2, data, attacks=["loss"], shadows=0, method=["lora", "prompt"], train=train)
    document["data"] = {**document["data"], "canaries": str(tmp_path / "canaries.json"), "max_length": 64}
    frame = imprint.run(document, tmp_path / "run")
    grid = load_grid(tmp_path / "run")
    for cell in grid.cells:
        [row] = planted(cell)
        assert row.claimed is not None
        assert 0 < row.claimed <= 4.0 * 1.01
        assert row.found is not None
        assert row.found.delta == 0.01
    from imprint.report import to_markdown

    assert "claimed ε" in to_markdown(grid, frame)


def test_canaries_that_would_be_cut_are_refused(planted_run, tmp_path):
    data = {**planted_run.recipe["data"], "max_length": 30}
    with pytest.raises(UsageError, match=r"40 of 40 canaries are longer than data\.max_length 30"):
        imprint.run({**planted_run.recipe, "data": data}, tmp_path / "cut")
    assert not (tmp_path / "cut").exists()
