"""What the reader of an audit sees: checkpoints, subgroups, exposed records; as text, as Markdown, on the page."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import yaml

from imprint.details import write_details
from imprint.exposed import exposed
from imprint.release import release
from imprint.report import gate, to_markdown, words, write_report
from imprint.report.tables import summary
from imprint.rows import load_grid, write_results
from imprint.spec import AuditSpec, DataSpec, MethodSpec, ModelSpec, RunSpec, TrainSpec
from imprint.store import Store, atomic_folder, read_json, write_json, write_stats, write_table
from imprint.subgroups import subgroups
from imprint.types import TokenStats
from tests.test_report import EVIL, Page, build, printed

ATTACKS = ("loss", "ref", "zlib", "min_k")
TOKENS = 6
NAMES = ("checkpoint-38", "checkpoint-76", "checkpoint-114")


def audit_spec(method="lora", model="tiny/llama-medium", data="tickets.jsonl", reference=None, **changes):
    options = {"rank": 8, "alpha": 16.0, "targets": ["q_proj", "v_proj"]} if method == "lora" else {}
    source = {"source": data, "split": "given", "overlong": "keep_start", "max_length": 1024, "seed": 0}
    return AuditSpec(
        model=ModelSpec(name=model, fingerprint="f" * 64, dtype="float32"),
        data=DataSpec(**{**source, "fingerprint": "d" * 64, **changes}),
        method=MethodSpec(name=method, options=options),
        seed=0,
        reference=ModelSpec(name=reference, fingerprint="e" * 64) if reference else None,
    )


def token_stats(ids, logp):
    """`logp`: [N, TOKENS]."""
    flat = np.minimum(logp, -1e-3).astype(np.float32).ravel()
    offsets = np.arange(len(ids) + 1, dtype=np.int64) * TOKENS
    ones = np.ones(len(flat), np.float32)
    return TokenStats(np.array(ids), offsets, np.zeros(len(flat), np.int32), flat, flat - 0.5, ones, flat > -0.5)


def build_audit(
    path,
    gains=(0.1, 0.3, 0.6),
    names=NAMES,
    sizes=(300, 300),
    one=None,
    labels=None,
    extra=None,
    owners=1,
    budget=None,
    attacks=ATTACKS,
    texts=None,
    finished=True,
    gated=True,
    ids=None,
):
    """An audit as `imprint audit` leaves it; a checkpoint for each of `gains`, in nats per token over the base.

    Args:
        labels: [N] of subgroups.
        extra: [members] what the last checkpoint gained on each member besides.
        owners: records of one owner.
        texts: writes these, as `--show-text` does.
    """
    rng, store, one = np.random.default_rng(5), Store(path), one or audit_spec()
    N = sum(sizes)
    ids = ids or [f"{n:016x}" for n in range(N)]
    level = 4 + rng.gamma(4, 1 / 4, N)
    base = -level[:, None] * rng.uniform(0.8, 1.2, (N, TOKENS))
    with atomic_folder(store.base("b0")) as folder:
        write_stats(folder / "stats.parquet", token_stats(ids, base))
        columns = {
            "id": ids,
            "role": np.repeat(["member", "nonmember"], sizes),
            "group": [f"group {n // owners}" if owners > 1 else f"record {ids[n]}" for n in range(N)],
            "subgroup": pa.array(labels if labels is not None else [None] * N, pa.string()),
            "scored_tokens": np.full(N, TOKENS, np.int32),
            "zlib_bytes": rng.integers(40, 90, N),
            "cut": [None] * N,
        }
        write_table(folder / "records.parquet", pa.table(columns))
        counts = {"members": sizes[0], "nonmembers": sizes[1], "validation": 0, "tuned": sizes[0]}
        dropped, cut = {"duplicate": 7, "nothing to score": 0}, {"prompt": 0, "target": 12}
        meta = {"counts": counts, "dropped": dropped, "truncated": cut, "tokens": N * TOKENS, "max_length": 1024}
        write_json(folder / "meta.json", {**meta, "seconds": 1.5})
        if texts:
            write_table(folder / "texts.parquet", pa.table({"id": list(texts), "text": list(texts.values())}))
    if gated:
        gate_evidence(store, ids, sizes)
    cell = store.cell(one.run_id)
    member = np.repeat([1.0, 0.0], sizes)
    for number, (gain, name) in enumerate(zip(gains, names, strict=True), 1):
        gained = rng.normal(0.3 + gain * member, 0.3)
        if extra is not None and number == len(gains):
            gained[: sizes[0]] += extra
        with atomic_folder(cell.epoch(number)) as folder:
            write_stats(folder / "stats.parquet", token_stats(ids, base + gained[:, None]))
            cost = {"seconds": {"scoring": 4.0}, "flops": 2e11, "peak_memory": 1 << 30, "peak_flops": 2e11}
            meta = {"epoch": number, "name": name, "step": 38 * number, "fingerprint": f"{number:064x}", "cost": cost}
            meta |= {"tokens_trained": 0, "tokens_scored": N * TOKENS, "validation_perplexity": 20.0 / number}
            write_json(folder / "meta.json", {**meta, "trainable": 20_480, "parameters": 1_020_480})
    if finished:
        cell.finish(status="done", reason=None, trainable=20_480, parameters=1_020_480)
    asked = {"audit": one.model.name, "adapter": ["runs/out/checkpoint-*"], "members": "tickets.jsonl"}
    entry = {"run_id": one.run_id, "base": "b0", "label": one.method.name, "spec": one.model_dump(mode="json")}
    lock = {"recipe": asked, "attacks": list(attacks), "budget": budget, "imprint": "0.1.0", "cells": [entry]}
    write_json(path / "recipe.lock.json", lock)
    grid = load_grid(path)
    return grid, write_results(grid)


def gate_evidence(store, ids, sizes, tell=0.0):
    """Green gates; with `tell` the texts alone give members away."""
    rng, known = np.random.default_rng(4), 40
    rows = np.r_[:known, sizes[0] : sizes[0] + 2 * known]
    with atomic_folder(store.base("b0") / "gates") as path:
        scores = {name: rng.normal(np.repeat([tell, 0], sizes)) for name in ("tf-idf", "bag of words", "length")}
        write_table(path / "blind.parquet", pa.table({"id": ids, **scores}))
        counts = {"exact": 0, "near": 0, "groups": 0, "shared_runs": 3}
        write_json(path / "overlap.json", {**counts, "members": sizes[0], "nonmembers": sizes[1]})
        logp = -np.repeat([[0.2], [3.0]], [known, 2 * known], axis=0) * rng.uniform(0.5, 1.5, (3 * known, TOKENS))
        write_stats(path / "positive.parquet", token_stats([ids[n] for n in rows], logp))
        write_json(path / "meta.json", {"run": {"method": "lora", "epochs": 9}, "seconds": 1.0})


ROOT = Path(__file__).parent.parent
LANGUAGES = ["German"] * 120 + ["English"] * 160 + ["Basque"] * 10 + [None] * 10
"""Of each side of 300."""


@pytest.fixture(scope="module")
def leaky(tmp_path_factory):
    """German members gain most; eight members more than anybody; texts may be shown."""
    path = tmp_path_factory.mktemp("leaky") / "audit"
    ids = [f"{hash_of(n)}" for n in range(600)]
    extra = np.where(np.array(LANGUAGES, object) == "German", 0.5, 0.0)
    extra[:8] += 2.0
    texts = {ids[n]: f"<b>ticket {n}</b> & more " * 40 for n in range(300)}
    budget = {"attack": "ref", "auc": 0.55}
    return build_audit(path, labels=LANGUAGES * 2, extra=extra, texts=texts, ids=ids, budget=budget)


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """One checkpoint that remembers nothing."""
    path = tmp_path_factory.mktemp("clean") / "audit"
    return build_audit(path, gains=(0.0,), names=("adapter",))


@pytest.fixture(scope="module")
def evil(tmp_path_factory):
    """Everything that can have a hostile name has one."""
    path, ids = tmp_path_factory.mktemp("evil") / "audit", [f"{EVIL}|{n}" for n in range(600)]
    one = audit_spec(model=EVIL, data="<img src=x onerror=alert(1)>|b", reference=f"{EVIL}2", tokenizer=EVIL)
    labels = [EVIL, "*|`a`|<i>"] * 300
    texts = dict.fromkeys(ids, f"{EVIL}\n" * 40)
    return build_audit(path, one=one, names=(EVIL, EVIL, f"{EVIL}2"), labels=labels, ids=ids, texts=texts)


def hash_of(n):
    return hashlib.sha256(str(n).encode()).hexdigest()[:16]


def page_of(grid):
    return Page(write_report(grid.path).read_text(encoding="utf-8"))


def table_of(page, caption):
    """Header and rows as text."""
    table = next(t for t in page.root.iter("table") if t.find("caption").text.startswith(caption))
    lines = [[" ".join("".join(cell.itertext()).split()) for cell in row] for row in table.iter("tr")]
    return lines[0], lines[1:]


def everything(grid, frame):
    """What is shown in a terminal, as Markdown and on the page."""
    return printed(grid, frame, width=250), to_markdown(grid, frame), page_of(grid).words()


# ---- words


def test_an_audit_is_told_as_an_audit(leaky, clean):
    """Nothing was tuned here, there are no epochs, no validation records and no recipe."""
    for grid, frame in (leaky, clean):
        for shown in everything(grid, frame):
            told = shown.replace("untuned", "").replace("by epoch", "")
            assert not re.search(r"epoch|validation perplexity|val\. ppl|recipe|tuned on tickets|Seed|Cells:", told)
    head = page_of(leaky[0]).root.find(".//h1").text
    assert head == "checkpoint-38 to checkpoint-114 (lora) audited against tiny/llama-medium on tickets.jsonl"
    assert printed(*leaky, width=250).startswith(
        f"{head}\nAudited: lora (alpha=16, rank=8, targets=[q_proj, v_proj]) on "
    )
    assert to_markdown(*clean).startswith(
        "**adapter (lora) audited against tiny/llama-medium on tickets.jsonl**\n\nAudited"
    )


def test_a_run_is_told_as_a_run(tmp_path):
    grid, frame = build(tmp_path / "grid")
    for shown in everything(grid, frame):
        assert not re.search("checkpoint(?! within)|audited|perplexity of the non-members", shown)
        assert "At the last epoch" in shown


def test_what_was_audited_is_told_in_full(leaky, tmp_path):
    _, rows = table_of(page_of(leaky[0]), "What was audited, and how")
    told = dict(rows)
    assert told["audited"] == "lora (alpha=16, rank=8, targets=[q_proj, v_proj])"
    assert told["base"] == f"name=tiny/llama-medium, dtype=float32, fingerprint={'f' * 64}"
    assert told["compared with"] == "the same weights with the adapter off"
    assert told["records"] == f"name=tickets.jsonl, format=auto, fingerprint={'d' * 64}"
    assert told["texts are cut"] == "at their end, to 1,024 tokens"
    assert told["tokenizer and template"] == "the base's own"
    spans = {"loss": "all", "tokenizer": "a" * 64, "format": {"prompt": "q", "target": "a"}, "members": 300}
    one = audit_spec("full", reference="org/older", subgroup="language", eos=True, **spans)
    _, rows = table_of(page_of(build_audit(tmp_path / "a", one=one)[0]), "What was audited, and how")
    told = dict(rows)
    assert (told["audited"], told["scored tokens"]) == ("whole model", "every token, those of prompts too")
    assert told["compared with"] == f"name=org/older, dtype=auto, fingerprint={'e' * 64}"
    assert "format=(prompt=q, target=a), subgroup=language" in told["records"]
    assert told["tokenizer and template"] == "a" * 64
    assert told["end token"].startswith("follows every text")
    assert told["drawn"] == "at most 300 members, drawn with seed 0"


# ---- results


def test_every_checkpoint_has_a_row_with_its_stored_numbers(leaky):
    grid, frame = leaky
    rows = summary(grid, frame)
    assert [(row.label, row.last.epoch, row.step) for row in rows] == [
        ("base", 0, None),
        *((name, n, 38 * n) for n, name in enumerate(NAMES, 1)),
    ]
    for row in rows:
        for attack, reading in row.last.auc.items():
            stored = frame.query(f"epoch == {row.last.epoch} and attack == '{attack}' and metric == 'auc'").iloc[0]
            assert (reading.value, reading.interval.low) == (stored.value, stored.low)
    header, shown = table_of(page_of(grid), "Every checkpoint")
    names = ["checkpoint", "no.", "step", "perplexity of the non-members", *(f"AUC, {a}" for a in ATTACKS), "budget"]
    assert header == names
    assert [row[:3] for row in shown] == [
        ["base", "0", ""],
        *([n, str(k), str(38 * k)] for k, n in enumerate(NAMES, 1)),
    ]
    assert [row[-1] for row in shown] == ["", "over", "over", "over"]


def test_checkpoints_are_held_to_the_budget_one_by_one(tmp_path):
    grid, frame = build_audit(tmp_path / "a", gains=(0.0, 0.6), names=("a", "b"), budget={"attack": "ref", "auc": 0.58})
    assert [row.budget for row in summary(grid, frame)] == [None, True, False]
    assert [row.budget for row in summary(grid, frame, {"b0"})] == [None, None, None]
    assert "over" in to_markdown(grid, frame)
    assert "It is kept up to a, the first 1 of 2." in page_of(grid).words()


def test_one_checkpoint_has_one_table_and_no_curve(clean, leaky):
    page = page_of(clean[0])
    captions = [caption.text for caption in page.root.iter("caption")]
    assert sum(caption.startswith(("At the", "Every")) for caption in captions) == 1
    assert len(list(page.root.iter("svg"))) == 2  # the losses of the base and of the model
    assert "Utility against leakage" not in page.words()
    assert printed(*clean).count("AUC by each attack") == to_markdown(*clean).count("| base | 0 |") == 1
    titles = [
        svg.find("{*}title").text if svg.find("{*}title") is not None else ""
        for svg in page_of(leaky[0]).root.iter("svg")
    ]
    assert titles[:3] == ["Utility against leakage (ref)", "AUC by attack", "Perplexity of the non-members"]


def test_all_attacks_of_one_cell_share_a_chart(leaky):
    chart = next(svg for svg in page_of(leaky[0]).root.iter("svg") if svg.find("title").text == "AUC by attack")
    texts = [text.text for text in chart.iter("text")]
    assert [text for text in texts if text in ATTACKS] == list(ATTACKS)
    assert "checkpoint (0 = the model it is compared with)" in texts
    assert [text.text for text in chart.iter("text") if text.get("class") == "tick middle"] == ["0", "1", "2", "3"]


def test_the_verdict_stands_above_the_gates(leaky, clean):
    page = page_of(leaky[0])
    sections = page.root.findall(".//main/section")
    assert sections[0].get("class") == "release red"
    assert "".join(sections[0].find("h2").itertext()) == "Verdict over budget"
    assert sections[0].find("p").text == gate.paragraph(release(*leaky)).removeprefix("OVER BUDGET: ")
    assert sections[1].find("h2").text == "Validity gates"
    assert page_of(clean[0]).root.find(".//main/section").get("class") == "release grey"  # measured, no more


def test_a_red_gate_withholds_the_verdict_and_marks_what_rests_on_it(tmp_path):
    grid, _ = build_audit(tmp_path / "a", labels=LANGUAGES * 2, budget={"attack": "ref", "auc": 0.55})
    shutil.rmtree(grid.cells[0].base / "gates")
    gate_evidence(Store(grid.path), grid.cells[0].records["id"].tolist(), (300, 300), tell=1.0)
    grid = load_grid(grid.path)
    terminal, marked, page = everything(grid, write_results(grid))
    assert "Verdict invalid The audit proves nothing either way. Blind baseline is red" in page
    for shown in (terminal, marked, page):
        assert "Subgroups (not valid as they stand)" in shown
        assert "Most exposed records (not valid as they stand)" in shown
        assert "over budget" not in shown
    assert page.count("(not valid as it stands)") == 3  # subgroups, records, counts


def test_an_unfinished_audit_and_one_that_has_not_begun(tmp_path):
    grid, frame = build_audit(tmp_path / "a", finished=False, gains=(0.1, 0.2), names=("a", "b"))
    for shown in everything(grid, frame):
        assert shown.count("The audit: unfinished after 2 checkpoints: the same command again continues it.") == 1
    assert "Verdict could not finish" in page_of(grid).words()
    none = build_audit(tmp_path / "b", finished=False, gains=(), names=(), labels=LANGUAGES * 2)
    for shown in everything(*none):
        assert "lora audited against tiny/llama-medium on tickets.jsonl" in shown
        assert "unfinished after 0 checkpoints" in shown
        assert "Most exposed" not in shown


# ---- subgroups


def test_subgroups_are_those_of_the_last_checkpoint_by_the_attack_of_the_budget(leaky):
    grid, frame = leaky
    found = {row.label: row for row in subgroups(grid.cells[0], 3, ["ref"])}
    header, rows = table_of(page_of(grid), "Subgroups, by ref")
    assert header == ["subgroup", "members", "non-members", "AUC", "TPR at 10% FPR", "TPR at 1% FPR", "vs. others", "p"]
    assert [row[0] for row in rows] == ["English", "German"]
    german = dict(zip(header, rows[1], strict=True))
    x, difference = found["German"].auc, found["German"].difference
    assert german["AUC"] == words.interval(x)
    assert german["vs. others"] == f"+{words.interval(difference)}"
    assert german["p"] == words.probability(found["German"].p)
    assert german["TPR at 10% FPR"] == words.interval(found["German"].tpr["tpr_at_10pct_fpr"].interval)
    assert german["TPR at 1% FPR"].startswith("~")
    for shown in everything(grid, frame):
        assert f"Leaks more than all other records: German (AUC {words.share(difference.value)} higher)." in shown
        assert (
            "Basque: 10 members of 10 subjects and 10 non-members of 10; an interval needs 20 subjects a side." in shown
        )


def test_without_a_named_attack_the_strongest_is_shown(tmp_path):
    grid, frame = build_audit(tmp_path / "a", labels=LANGUAGES * 2, gains=(0.6,), names=("a",))
    highest = frame.query("epoch == 1 and metric == 'auc'").sort_values("value").iloc[-1]["attack"]
    assert highest == "ref"
    assert "Subgroups, by ref" in to_markdown(grid, frame)
    grid = replace(grid, budget={"attack": "zlib", "auc": 0.55})
    assert "Subgroups, by zlib" in to_markdown(grid, frame)


def test_subgroups_alike_say_so_and_those_too_small_are_counted(tmp_path):
    grid, frame = build_audit(tmp_path / "a", gains=(0.3,), names=("a",), labels=["a", "b"] * 300)
    assert "None is told apart from all other records." in to_markdown(grid, frame)
    few = build_audit(tmp_path / "b", gains=(0.3,), names=("a",), labels=[f"g{n % 40:02}" for n in range(600)])
    for shown in everything(*few):
        assert "Every subgroup has too few records." in shown
        assert "g00: 8 members of 8 subjects and 7 non-members of 7;" in shown
    assert "30 more have too few records; subgroups.parquet counts them." in to_markdown(*few)
    assert "20 more have too few records" in page_of(few[0]).words()


def test_a_long_list_of_subgroups_is_cut_and_says_so(tmp_path):
    labels = [f"g{n % 12:02}" for n in range(600)]
    grid, frame = build_audit(tmp_path / "a", gains=(0.3,), names=("a",), labels=labels)
    assert "Shown are 10 of 12, the largest first; subgroups.parquet has all." in to_markdown(grid, frame)
    assert len(table_of(page_of(grid), "Subgroups")[1]) == 12


def test_subgroups_of_a_grid_of_runs_have_a_column_for_the_cell(tmp_path):
    one = audit_spec()
    data = one.data.model_dump() | {"split": "random", "subgroup": "language"}
    run = RunSpec(model=one.model, data=data, method=one.method, train=TrainSpec(epochs=3), seed=0)
    grid, frame = build_audit(tmp_path / "a", one=run, names=(None,) * 3, labels=LANGUAGES * 2)
    assert "Subgroups, by ref" in printed(grid, frame)
    assert "exposed since" in printed(grid, frame)
    assert "epoch 3" in to_markdown(grid, frame)
    other = run.model_copy(update={"seed": 1})
    shutil.copytree(grid.cells[0].folder.path, Store(grid.path).cell(other.run_id).path)
    lock = read_json(grid.path / "recipe.lock.json")
    lock["cells"].append({**lock["cells"][0], "run_id": other.run_id, "spec": other.model_dump(mode="json")})
    write_json(grid.path / "recipe.lock.json", lock)
    grid = load_grid(grid.path)
    frame = write_results(grid)
    header, rows = table_of(page_of(grid), "Subgroups, by ref")
    assert header[:2] == ["cell", "subgroup"]
    assert [row[:2] for row in rows] == [["lora", name] for name in ("English", "German")] * 2
    assert "Most exposed" not in to_markdown(grid, frame)  # of which cell?


# ---- exposed records


def test_the_most_exposed_records_are_the_planted_ones(leaky):
    grid, frame = leaky
    found = exposed(grid.cells[0], 20)
    header, rows = table_of(page_of(grid), "The 20 members of highest gain")
    assert header == ["rank", "record", "gain", "p", "by chance", "tokens", "exposed since", "text"]
    assert {row[1] for row in rows[:8]} == {hash_of(n) for n in range(8)}
    for row, one in zip(rows, found.rows, strict=True):
        since = "never" if one.first is None else NAMES[one.first - 1]
        gain, p, chance = f"{one.score:.2f}", words.probability(one.p), f"{one.chance:.1f}"
        assert row[:7] == [str(one.rank), one.id, gain, p, chance, "6", since]
    header, rows = table_of(page_of(grid), "Exposed members by checkpoint")
    assert header == ["checkpoint", "exposed", "by chance", "p"]
    assert [row[0] for row in rows] == list(NAMES)
    assert [int(row[1]) for row in rows] == [one.exposed for one in found.epochs]
    for epoch, row in enumerate(rows, 1):
        rate = frame.query(f"epoch == {epoch} and attack == 'ref' and metric == 'tpr_at_1pct_fpr'").iloc[0]
        assert int(row[1]) == round(rate.value * 300)
    for shown in everything(grid, frame):
        assert found.finding in shown
    assert printed(grid, frame).count(hash_of(0)) == to_markdown(grid, frame).count(hash_of(0)) == 1
    assert "The 10 members of highest gain" in to_markdown(grid, frame)


def test_a_list_that_is_no_more_than_chance_says_so(clean):
    found = exposed(clean[0].cells[0], 10)
    assert found.named == 0
    for shown in everything(*clean):
        assert "None more than chance explains: " in shown
        assert "Exposed members by checkpoint" not in shown  # there is one, and the sentence has its number


def test_too_few_non_members_for_a_list_say_so(tmp_path):
    grid, frame = build_audit(tmp_path / "a", sizes=(300, 95), gains=(0.3,), names=("a",))
    for shown in everything(grid, frame):
        assert (
            "Not told: TPR at 1% FPR needs at least 100 non-members (one expected false positive): there are 95."
            in shown
        )
        assert "highest gain" not in shown


def test_owners_are_shown_where_records_have_them(tmp_path):
    grid, _ = build_audit(tmp_path / "a", gains=(0.3,), names=("a",), owners=3)
    header, rows = table_of(page_of(grid), "The 20 members")
    assert header[:3] == ["rank", "record", "owner"]
    records = grid.cells[0].records.set_index("id")["group"]
    assert [f"group {row[2]}" for row in rows] == [records[row[1]] for row in rows]


def test_texts_are_shown_on_the_page_alone_and_only_where_they_were_kept(leaky, clean):
    page = write_report(leaky[0].path).read_text(encoding="utf-8")
    assert '<td class="wide">&lt;b&gt;ticket 0&lt;/b&gt; &amp; more &lt;b&gt;ticket 0&lt;/b&gt;' in page
    _, rows = table_of(Page(page), "The 20 members")
    assert all(len(row[-1]) == 401 for row in rows)
    assert all(row[-1].endswith("…") for row in rows)
    assert "ticket" not in printed(*leaky, width=250).replace("tickets.jsonl", "")
    assert "ticket" not in to_markdown(*leaky).replace("tickets.jsonl", "")
    assert "text" not in table_of(page_of(clean[0]), "The 20 members")[0]


# ---- text and page


@pytest.mark.parametrize("width", [80, 100, 200])
def test_an_audit_fits_the_console(leaky, width):
    lines = printed(*leaky, width=width).splitlines()
    assert max(map(len, lines)) <= width
    assert not any("…" in line for line in lines)


def test_hostile_names_are_text(evil):
    grid, frame = evil
    raw = write_report(grid.path).read_text(encoding="utf-8")
    page = Page(raw)
    assert not page.tags() & {"script", "img", "i", "b", "iframe", "object", "link", "base", "form"}
    assert not [name for element in page.root.iter() for name in element.attrib if name.startswith("on")]
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", raw)
    attributes = {name for element in page.root.iter() for name in element.attrib}
    assert not attributes & {"src", "href", "style", "srcset", "action"}
    assert not re.search(r"https?:|url\(|@import|//[a-z]", raw)
    markdown = to_markdown(grid, frame)
    assert "<" not in markdown
    for block in re.findall(r"(?:^\|.*\n)+", markdown, re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1
    assert not re.search("[\x1b\u202e]", printed(grid, frame))
    assert not re.search("[\x1b\u202e]", gate.paragraph(release(grid, frame)))
    told = dict(table_of(page, "What was audited, and how")[1])
    assert told["tokenizer and template"] == words.clean(EVIL)


def test_the_same_audit_gives_the_same_bytes(leaky):
    assert write_report(leaky[0].path).read_bytes() == write_report(leaky[0].path).read_bytes()


def test_a_folder_can_be_moved(leaky, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(leaky[0].path, moved)
    assert write_report(moved).read_bytes() == write_report(leaky[0].path).read_bytes()


# ---- tables for other programs


def test_details_are_what_the_functions_say(leaky, tmp_path):
    path = tmp_path / "copy"
    shutil.copytree(leaky[0].path, path)
    grid = load_grid(path)
    write_details(grid)
    cell = grid.cells[0]
    frame = pd.read_parquet(path / "subgroups.parquet")
    for row in subgroups(cell, 3, ATTACKS):
        mine = frame[(frame["attack"] == row.attack) & (frame["subgroup"] == row.label)].set_index("metric")
        assert set(mine["members"]) == {row.members}
        if row.status != "ok":
            assert (mine.loc["auc", "status"], mine.loc["auc", "reason"]) == ("too_few", row.reason)
            assert mine["value"].isna().all()
            continue
        for metric, x in (("auc", row.auc), ("auc_difference", row.difference)):
            assert (mine.loc[metric, "value"], mine.loc[metric, "low"], mine.loc[metric, "high"]) == (
                x.value,
                x.low,
                x.high,
            )
        assert mine.loc["auc_difference", "p"] == row.p
        assert mine.loc["tpr_at_10pct_fpr", "value"] == row.tpr["tpr_at_10pct_fpr"].interval.value
    records, found = pd.read_parquet(path / "exposed.parquet"), exposed(cell, 300)
    assert records["record_id"].tolist() == [one.id for one in found.rows]
    assert records["rank"].tolist() == list(range(1, 301))
    assert records["q"].tolist() == [one.q for one in found.rows]
    assert [None if pd.isna(x) else int(x) for x in records["first"]] == [one.first for one in found.rows]
    counts = pd.read_parquet(path / "exposed_counts.parquet")
    assert counts["exposed"].tolist() == [one.exposed for one in found.epochs]
    assert counts["epoch"].tolist() == [1, 2, 3]
    assert set(counts["members"]) == {300}
    assert not any("ticket" in str(value) for value in records.to_numpy().ravel())


@pytest.mark.parametrize("name", ["subgroups", "exposed", "exposed_counts"])
def test_the_documented_columns_are_the_written_ones(leaky, tmp_path, name):
    write_details(replace(leaky[0], path=tmp_path))
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8").split(f"## {name}.parquet")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \|", text, re.M)
    told = re.findall(r"`(\w+)`", " ".join(rows)) if rows else re.search("`(.*)`: how many", text)[1].split(", ")
    assert told == list(pd.read_parquet(tmp_path / f"{name}.parquet").columns)


def test_details_without_evidence_are_empty_tables(tmp_path):
    grid, _ = build_audit(tmp_path / "a", gains=(), names=(), finished=False)
    write_details(grid)
    for name in ("subgroups", "exposed", "exposed_counts"):
        assert len(pd.read_parquet(grid.path / f"{name}.parquet")) == 0


# ---- the workflow that is offered


def test_the_workflow_pins_what_it_uses_and_asks_for_little():
    text = (ROOT / "examples" / "github-leakage-gate.yml").read_text(encoding="utf-8")
    workflow = yaml.safe_load(text)
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    assert all(re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", step["uses"]) for step in steps if "uses" in step)
    assert workflow["permissions"] == {}
    permissions = {name: job["permissions"] for name, job in workflow["jobs"].items()}
    assert permissions == {"audit": {"contents": "read"}, "comment": {"pull-requests": "write"}}
    assert not any("${{" in step.get("run", "") for step in steps)  # what others write comes through the environment
    assert "pull_request_target" not in text


def test_the_commands_of_the_workflow_and_of_the_guide_are_options_of_ours():
    from typer.main import get_command

    from imprint.cli import app

    known = get_command(app).commands
    guide = (ROOT / "docs" / "audit.md").read_text(encoding="utf-8")
    workflow = (ROOT / "examples" / "github-leakage-gate.yml").read_text(encoding="utf-8")
    text = re.sub(r"\\\n", " ", workflow + guide)
    used = [re.sub("#.*", "", line) for line in re.findall(r"^\s*imprint (.*)$", text, re.M)]
    assert len(used) >= 6
    for line in used:
        name, *words_of_it = line.split()
        options = {option for parameter in known[name].params for option in parameter.opts}
        assert {word for word in words_of_it if word.startswith("--")} <= options, line


def test_the_verdict_of_the_workflow_reaches_its_last_step(leaky, tmp_path):
    """Its steps as the shell runs them, with `imprint` from here."""
    workflow = yaml.safe_load((ROOT / "examples" / "github-leakage-gate.yml").read_text(encoding="utf-8"))
    [script] = [step["run"] for step in workflow["jobs"]["audit"]["steps"] if step.get("id") == "verdict"]
    shutil.copytree(leaky[0].path, tmp_path / "audit")
    write_report(tmp_path / "audit")
    files = {name: tmp_path / name for name in ("GITHUB_STEP_SUMMARY", "GITHUB_OUTPUT")}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "RUNNER_TEMP": str(tmp_path), **{k: str(v) for k, v in files.items()}}
    work = tmp_path / "work"
    work.mkdir()
    subprocess.run(["bash", "-e", "-c", script], cwd=work, env=environment, check=True, capture_output=True)
    assert files["GITHUB_OUTPUT"].read_text() == "code=1\n"
    assert (work / "found" / "verdict.md").read_text(encoding="utf-8").startswith("### Imprint: over budget\n")
    assert sorted(file.name for file in (work / "found").iterdir()) == ["report.html", "verdict.md"]
