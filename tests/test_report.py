"""Reports: numbers equal the stored ones, refusals stay words, hostile names stay text, the page is one safe file."""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from rich.console import Console

from imprint.report import print_summary, to_markdown, write_report
from imprint.report.costs import costs_table
from imprint.report.figures import Series, density_chart, line_chart
from imprint.report.readings import Curve, curves, keeps_budget
from imprint.report.tables import summary
from imprint.rows import _RESULTS, load_grid, results, write_results
from imprint.spec import DataSpec, MethodSpec, ModelSpec, RunSpec, TrainSpec
from imprint.store import Store, atomic_folder, write_json, write_stats, write_table
from imprint.types import TokenStats

EVIL = 'evil/<script>alert("1")</script>&amp;\x1b[31m\u202e'
MEMBERS, NONMEMBERS, VALIDATION, TOKENS = 400, 95, 30, 6
"""Enough for the power gate, and too few non-members for a true-positive rate at 1% FPR."""
ATTACKS = ("loss", "ref", "zlib", "min_k")


def stats(rng, level, gap, validation=None, sizes=(MEMBERS, NONMEMBERS, VALIDATION)):
    """Evidence in which members lose `gap` nats per token less than non-members."""
    N = sum(sizes)
    levels = np.repeat([level - gap, level, level if validation is None else validation], sizes)
    record = rng.gamma(9, levels / 9)
    logp = -np.repeat(record, TOKENS) * rng.uniform(0.5, 1.5, N * TOKENS)
    logp = logp.astype(np.float32)
    return TokenStats(
        ids=np.array([f"r{n}" for n in range(N)]),
        offsets=np.arange(N + 1, dtype=np.int64) * TOKENS,
        tokens=np.ones(N * TOKENS, np.int32),
        logp=logp,
        mean=logp - 0.5,
        std=np.ones(N * TOKENS, np.float32),
        top=logp > -0.5,
    )


def spec(method="lora", options=None, model="gpt2", source="world/customers", seed=0, epochs=4, split=None):
    sizes = {"members": MEMBERS, "nonmembers": NONMEMBERS, "validation": VALIDATION}
    split = seed if split is None else split
    return RunSpec(
        model=ModelSpec(name=model, fingerprint="f" * 64, dtype="float32"),
        data=DataSpec(source=source, max_length=64, seed=split, **sizes),
        method=MethodSpec(name=method, options=options or {"learning_rate": 1e-3}),
        train=TrainSpec(epochs=epochs),
        seed=seed,
    )


def write_gates(store, key, sizes=(MEMBERS, NONMEMBERS), tell=0.0):
    """Evidence that makes the gates green; with `tell` the texts alone give members away."""
    rng, known = np.random.default_rng(4), 40
    ids = [f"r{n}" for n in range(sum(sizes))]
    rows = np.r_[:known, sizes[0] : sizes[0] + 2 * known]
    with atomic_folder(store.base(key) / "gates") as path:
        scores = {name: rng.normal(np.repeat([tell, 0], sizes)) for name in ("tf-idf", "bag of words", "length")}
        write_table(path / "blind.parquet", pa.table({"id": ids, **scores}))
        counts = {"exact": 0, "near": 0, "groups": 0, "shared_runs": 3}
        write_json(path / "overlap.json", {**counts, "members": sizes[0], "nonmembers": sizes[1]})
        write_stats(path / "positive.parquet", stats(rng, 3.0, 2.8, sizes=(*sizes, 0)).select(rows))
        write_json(path / "meta.json", {"run": {"method": "lora", "epochs": 9}, "seconds": 1.0})


def write_base(store, key, rng, gap=0.0, sizes=(MEMBERS, NONMEMBERS, VALIDATION), level=3.0):
    roles = np.repeat(["member", "nonmember", "validation"], sizes)
    N = len(roles)
    with atomic_folder(store.base(key)) as path:
        write_stats(path / "stats.parquet", stats(rng, level, gap, sizes=sizes))
        columns = {
            "id": [f"r{n}" for n in range(N)],
            "role": roles,
            "group": [f"g{n // 2}" for n in range(N)],
            "scored_tokens": np.full(N, TOKENS, np.int32),
            "zlib_bytes": rng.integers(40, 90, N),
            "cut": [None] * N,
        }
        write_table(path / "records.parquet", pa.table(columns))
        counts = dict(zip(("members", "nonmembers", "validation"), sizes, strict=True))
        meta = {
            "counts": {**counts, "tuned": sizes[0]},
            "dropped": {"duplicate": 7, "<b>empty</b>": 1, "too short": 0},
            "truncated": {"prompt": 2, "target": 1},
            "tokens": N * TOKENS,
            "max_length": 64,
            "seconds": 1.5,
        }
        write_json(path / "meta.json", meta)


def write_epoch(store, run_id, epoch, evidence):
    with atomic_folder(store.cell(run_id).epoch(epoch)) as path:
        write_stats(path / "stats.parquet", evidence)
        seconds = {"forward": 30.0, "backward": 20.0, "scoring": 2.0}
        cost = {"seconds": seconds, "flops": 1e12, "peak_memory": 1 << 30, "peak_flops": 2e11}
        meta = {"epoch": epoch, "training_loss": 2.0, "cost": cost}
        write_json(path / "meta.json", {**meta, "tokens_trained": 10, "tokens_scored": 10})


def write_lock(path, cells, attacks=ATTACKS, budget=None):
    """`cells` are (label, base key, spec)."""
    entries = [
        {"run_id": s.run_id, "base": base, "label": label, "spec": s.model_dump(mode="json")}
        for label, base, s in cells
    ]
    recipe = {"model": cells[0][2].model.name, "method": [s.method.name for _, _, s in cells]}
    lock = {"recipe": recipe, "attacks": list(attacks), "budget": budget, "imprint": "0.1.0", "cells": entries}
    write_json(path / "recipe.lock.json", lock)


def tuned(store, one, rng, curve):
    """Write an epoch for each (level, gap, validation) of `curve`."""
    for epoch, (level, gap, validation) in enumerate(curve, 1):
        write_epoch(store, one.run_id, epoch, stats(rng, level, gap, validation))
    return store.cell(one.run_id)


COUNTS = {"trainable": 20_480, "parameters": 124_000_000}


def build(path, model="gpt2", source="world/customers", budget=None, base_gap=0.0):
    """Three finished cells, one diverged, one failed, one unfinished; the gates are green unless `base_gap` is wide."""
    rng, store = np.random.default_rng(0), Store(path)
    write_base(store, "b0", rng, base_gap)
    write_gates(store, "b0")
    names = ("full", "lora", "prompt", "head", "prefix", "p_tuning")
    specs = {name: spec(name, model=model, source=source) for name in names}
    write_lock(path, [(name, "b0", one) for name, one in specs.items()], budget=budget)
    overfit = [(2.4, 0.3, 2.2), (1.8, 0.9, 2.0), (1.5, 1.2, 2.6), (1.5, 1.35, 3.5)]
    tuned(store, specs["full"], rng, overfit).finish(
        status="done", reason=None, trainable=124_000_000, parameters=124_000_000
    )
    slower = [(2.6, 0.1, 2.3), (2.3, 0.3, 2.1), (2.1, 0.5, 2.0), (2.0, 0.7, 2.05)]
    tuned(store, specs["lora"], rng, slower).finish(status="done", reason=None, **COUNTS)
    worse = [(3.2, 0.0, 5.0), (3.1, 0.0, 4.9), (3.1, 0.02, 4.8), (3.1, 0.03, 4.8)]
    tuned(store, specs["prompt"], rng, worse).finish(status="done", reason=None, **COUNTS)
    head = tuned(store, specs["head"], rng, overfit[:2])
    head.finish(status="diverged", reason="the loss is nan in epoch 3 at step <7>", **COUNTS)
    store.cell(specs["prefix"].run_id).fail("out of memory & <i>sorry</i>")
    tuned(store, specs["p_tuning"], rng, slower[:1])
    grid = load_grid(path)
    return grid, write_results(grid)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return build(tmp_path_factory.mktemp("small") / "grid")


@pytest.fixture(scope="module")
def evil(tmp_path_factory):
    path = tmp_path_factory.mktemp("evil") / "grid"
    return build(path, model=EVIL, source="<img src=x onerror=alert(1)>|b")


@pytest.fixture(scope="module")
def evil_page(evil):
    return write_report(evil[0].path).read_text(encoding="utf-8")


def row_of(rows, label):
    return next(row for row in rows if row.label == label)


def printed(grid, frame, width=80, terminal=False):
    console = Console(width=width, file=io.StringIO(), force_terminal=terminal, color_system=None)
    print_summary(grid, frame, console)
    return console.file.getvalue()


# ---- the table


def test_every_cell_has_a_row_after_its_base(small):
    rows = summary(*small)
    assert [row.label for row in rows] == ["base (epoch 0)", "full", "lora", "prompt", "head", "prefix", "p_tuning"]
    assert [row.status for row in rows[1:]] == ["done", "done", "done", "diverged", "failed", "unfinished"]
    assert (rows[2].trainable, rows[2].parameters, rows[2].seconds) == (20_480, 124_000_000, 4 * 52.0)


def test_points_hold_the_stored_numbers(small):
    grid, frame = small
    rows = {row.run_id: row for row in summary(grid, frame) if row.run_id}
    compared = 0
    for r in frame[(frame["metric"] == "auc") & frame["value"].notna()].itertuples():
        for point in (rows[r.run_id].last, rows[r.run_id].best):
            if point and point.epoch == r.epoch:
                x = point.auc[r.attack].interval
                assert (x.value, x.low, x.high) == (r.value, r.low, r.high)
                compared += 1
    assert compared == 4 * (2 + 2 + 2 + 1 + 2)  # full, lora, prompt; head's best only; p_tuning's one epoch twice


def test_best_epoch_is_the_earliest_of_lowest_perplexity_and_may_be_the_base(small):
    rows = summary(*small)
    assert row_of(rows, "full").best.epoch == 2
    assert row_of(rows, "prompt").best.epoch == 0
    assert "best epoch is 0, the base itself" in printed(*small, width=300)


def made(values, attack_values=None, nonmembers=100):
    """A curve from perplexities by epoch and {(epoch, attack, metric): (value, low, high)}."""
    rows = [("r", e, "", "perplexity", v, v, v, "ok") for e, v in enumerate(values)]
    rows += [("r", *key, *x, "ok" if x[0] is not None else "too_few") for key, x in (attack_values or {}).items()]
    return pd.DataFrame(rows, columns=["run_id", "epoch", "attack", "metric", "value", "low", "high", "status"])


@pytest.mark.parametrize(
    ("perplexities", "best"),
    [([5.0, 4.0, 4.0, 4.5], 1), ([3.0, 4.0], 0), ([4.0, 4.0], 0), ([5.0, np.nan, 4.9], 2), ([np.inf, np.inf], None)],
)
def test_best_epoch(perplexities, best):
    assert curves(made(perplexities))["r"].best == best


def test_unfinished_cells_stay_with_their_reason_and_without_numbers(small):
    rows = summary(*small)
    head, prefix, p_tuning = (row_of(rows, label) for label in ("head", "prefix", "p_tuning"))
    assert head.last.epoch == 3
    assert head.last.perplexity.interval is None
    assert {reading.status for reading in head.last.auc.values()} == {"diverged"}
    assert head.best.epoch in (1, 2)
    assert prefix.last is None
    assert prefix.best is None
    assert (p_tuning.last.epoch, p_tuning.planned) == (1, 4)
    shown = printed(*small, width=300)
    assert "head: diverged after 2 of 4 epochs: the loss is nan in epoch 3 at step <7>." in shown
    assert "prefix: failed after 0 of 4 epochs: out of memory & <i>sorry</i>." in shown
    assert "p_tuning: unfinished after 1 of 4 epochs" in shown


def test_columns_for_model_data_and_seed_only_where_they_differ(tmp_path, small):
    assert "| method | epoch |" in to_markdown(*small)
    store, rng = Store(tmp_path), np.random.default_rng(1)
    write_base(store, "b0", rng)
    cells = [("lora", "b0", spec(seed=0)), ("lora", "b1", spec(seed=1)), ("lora", "b2", spec(model="opt"))]
    write_lock(tmp_path, cells)
    grid = load_grid(tmp_path)
    markdown = to_markdown(grid, write_results(grid))
    assert "| method | model | seed | epoch |" in markdown
    assert "| lora | opt | 0 | - | unfinished |" in markdown
    assert "Records of opt, seed 0: not counted: the base was never scored." in markdown


# ---- the budget


class Stub:
    """What `keeps_budget` asks of a cell."""

    run_id, training = "r", {"epochs": 2}

    def __init__(self, status="done"):
        self.outcome = {"status": status}


def kept(grid, frame, cell):
    return keeps_budget(grid, curves(frame[frame["run_id"] == cell.run_id]).get(cell.run_id, Curve({})), cell)


def judged(frame, budget, status="done", attacks=None):
    attacks = attacks or [attack for attack in frame["attack"].unique() if attack]
    grid = type("Grid", (), {"budget": budget, "attacks": attacks})()
    return kept(grid, frame, Stub(status))


AT_BEST = {
    (1, "loss", "auc"): (0.52, 0.50, 0.54),
    (1, "zlib", "auc"): (0.56, 0.53, 0.59),
    (1, "loss", "tpr_at_10pct_fpr"): (0.3, 0.25, 0.35),
    (1, "zlib", "tpr_at_10pct_fpr"): (0.1, 0.05, 0.15),
    (1, "loss", "tpr_at_1pct_fpr"): (0.02, 0.01, 0.03),
    (1, "zlib", "tpr_at_1pct_fpr"): (None, None, None),
    (2, "loss", "auc"): (0.9, 0.88, 0.92),
    (2, "zlib", "auc"): (0.8, 0.78, 0.82),
}


@pytest.mark.parametrize(
    ("budget", "verdict"),
    [
        (None, None),
        ({"attack": None, "auc": None}, None),
        ({"attack": "loss", "auc": 0.55}, True),  # the upper bound .54, at epoch 1
        ({"attack": "loss", "auc": 0.54}, False),  # below, not at
        ({"attack": None, "auc": 0.58}, False),  # zlib is the strongest: .56 is below, its upper bound .59 is not
        ({"attack": None, "auc": 0.60}, True),
        ({"attack": None, "tpr_at_10pct_fpr": 0.2}, False),  # zlib, of the highest AUC, is below; loss is not
        ({"attack": None, "tpr_at_10pct_fpr": 0.4}, True),
        ({"attack": None, "tpr_at_1pct_fpr": 0.05}, None),  # of loss it is below, of zlib nobody knows
        ({"attack": "zlib", "auc": 0.60, "tpr_at_1pct_fpr": 0.05}, None),  # the TPR was refused
        ({"attack": "zlib", "auc": 0.58, "tpr_at_1pct_fpr": 0.05}, False),  # over is over
    ],
)
def test_budget_holds_the_upper_bound_at_the_best_epoch(budget, verdict):
    assert judged(made([5.0, 4.0, 4.2], AT_BEST), budget) is verdict


def test_budget_of_a_cell_nobody_can_judge():
    budget = {"attack": "loss", "auc": 0.99}
    frame = made([5.0, 4.0, 4.2], AT_BEST)
    assert judged(frame, budget, "failed") is None
    assert judged(frame, budget, "unfinished") is None
    assert judged(frame, budget, "diverged") is True
    assert judged(frame, {"auc": 0.99}, attacks=("loss", "zlib", "min_k")) is None
    base_is_best = made([3.0, 4.0], {(0, "loss", "auc"): (0.5, 0.48, 0.52)})
    assert judged(base_is_best, budget, "diverged") is None
    assert judged(base_is_best, budget, "done") is True


def test_budget_at_the_base_takes_no_uncertainty_from_an_attack_that_compares_with_it():
    frame = made([3.0, 4.0], {(0, "ref", "auc"): (0.5, 0.4, 0.6), (0, "loss", "auc"): (0.49, 0.46, 0.52)})
    assert judged(frame, {"attack": "ref", "auc": 0.55}) is True
    assert judged(frame, {"attack": None, "auc": 0.55}) is True
    assert judged(frame, {"attack": None, "auc": 0.515}) is False


def test_budget_is_a_column(tmp_path):
    grid, frame = build(tmp_path / "grid", budget={"attack": "loss", "auc": 0.9, "tpr_at_1pct_fpr": None})
    found = {cell.label: kept(grid, frame, cell) for cell in grid.cells}
    assert found == {"full": False, "lora": True, "prompt": True, "head": False, "prefix": None, "p_tuning": None}
    best = to_markdown(grid, frame).split("**At the epoch")[1]
    assert re.search(r"\| full \|.*\| over \|", best)
    assert re.search(r"\| lora \|.*\| within \|", best)
    assert re.search(r"\| prefix \|.*\| cannot tell \|", best)
    page = write_report(grid.path).read_text(encoding="utf-8")
    assert "Budget: kept by 2 of 6 cells: lora and prompt." in page


# ---- text


@pytest.mark.parametrize("width", [80, 100, 200])
def test_summary_fits_the_console(small, width):
    lines = printed(*small, width=width).splitlines()
    assert max(map(len, lines)) <= width
    assert not any("…" in line for line in lines)


def test_summary_off_a_terminal_is_plain_and_survives_a_narrow_encoding(evil):
    grid, frame = evil
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding="ascii"), width=80)
    print_summary(grid, frame, console)
    console.file.flush()
    assert b"\x1b" not in raw.getvalue()
    assert "\x1b[31m" not in printed(grid, frame, terminal=True)


def test_markdown_holds_neither_html_nor_stray_columns(evil):
    grid, frame = evil
    markdown = to_markdown(grid, frame)
    assert "<" not in markdown
    for block in re.findall(r"(?:^\|.*\n)+", markdown, re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


# ---- the page


class Page:
    """A report parsed as XML, which it also is."""

    def __init__(self, text):
        self.text = text
        self.root = ET.fromstring(text.removeprefix("<!DOCTYPE html>\n"))

    def words(self):
        return " ".join(" ".join(self.root.itertext()).split())

    def tags(self):
        return {element.tag for element in self.root.iter()}

    def numbers(self):
        return [element.get("value") for element in self.root.iter("data")]

    def gates(self):
        """Name -> state."""
        lists = [ul for ul in self.root.iter("ul") if ul.get("class") == "gates"]
        return {li.find("strong").text: li.find("span").text for ul in lists for li in ul}


def test_page_is_well_formed_and_hostile_names_are_text(evil_page):
    page = Page(evil_page)
    assert 'evil/<script>alert("1")</script>&amp;�[31m�' in page.words()
    assert "<img src=x onerror=alert(1)>" in page.words()
    assert not page.tags() & {"script", "img", "i", "b", "iframe", "object", "link", "base", "form"}
    assert not [name for element in page.root.iter() for name in element.attrib if name.startswith("on")]
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", evil_page)


def test_page_needs_no_network_and_its_policy_allows_only_its_own_style(evil_page):
    page = Page(evil_page)
    assert not re.search(r"https?:|url\(|@import|//[a-z]", evil_page)
    attributes = {name for element in page.root.iter() for name in element.attrib}
    assert not attributes & {"src", "href", "style", "srcset", "action"}
    [policy] = [m.get("content") for m in page.root.iter("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    [style] = re.findall(r"<style>(.*?)</style>", evil_page, re.S)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy == (
        f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    )


def test_numbers_on_the_page_are_the_stored_ones(small):
    grid, frame = small
    page = Page(write_report(grid.path).read_text(encoding="utf-8"))
    stored = {float(v) for v in frame.loc[frame["metric"].isin(["auc", "perplexity"]), "value"].dropna()}
    shown = [float(d.get("value")) for d in page.root.iter("data") if "." in d.get("value")]
    assert len(shown) > 50
    assert set(shown) <= stored
    full = frame[(frame["method"] == "full") & (frame["epoch"] == 4) & (frame["attack"] == "ref")].iloc[0]
    x = full[["value", "low", "high"]].map(lambda v: f"{v:.3f}".replace("0.", "."))
    assert f"{x['value']} [{x['low']} {x['high']}]" in page.words()


def test_refused_rates_are_words(small):
    grid, frame = small
    table = Page(write_report(grid.path).read_text(encoding="utf-8")).root.findall(".//table")[-1]
    header = [th.text for th in table.iter("th")]
    assert header == ["method", "epoch", "attack", "TPR at 10% FPR", "TPR at 1% FPR", "TPR at 0.1% FPR"]
    rows = [[td.text for td in tr.iter("td")] for tr in table.iter("tr")][1:]
    assert {row[4] for row in rows} == {row[5] for row in rows} == {"too few"}  # 40 non-members
    assert all(row[3].endswith("] indicative") for row in rows)
    assert frame.loc[frame["metric"] == "tpr_at_1pct_fpr", "value"].isna().all()


def test_verdict_names_the_extremes_and_the_control(small):
    text = Page(write_report(small[0].path).read_text(encoding="utf-8")).words()
    assert re.search(r"best after full \(AUC 1?\.\d+ \[.*worst after prompt \(AUC", text)
    assert "every interval contains .5, as it should" in text
    assert "Not compared, because not finished: head, prefix and p_tuning." in text
    assert "Not valid as it stands" not in text
    assert "compliant" not in text


def test_page_of_a_grid_that_has_only_failed(tmp_path):
    one = spec()
    write_lock(tmp_path, [("lora", "b0", one)])
    Store(tmp_path).cell(one.run_id).fail("no memory")
    grid = load_grid(tmp_path)
    frame = write_results(grid)
    assert [row.status for row in summary(grid, frame)] == ["not measured", "failed"]
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "failed after 0 of 4 epochs: no memory" in page.words()
    assert page.gates() == dict.fromkeys(GATES, "missing")
    assert page.words().count("The base was never scored.") == len(GATES)
    assert "Headline withheld" in printed(grid, frame)


def test_the_same_store_gives_the_same_bytes(small):
    assert write_report(small[0].path).read_bytes() == write_report(small[0].path).read_bytes()


def test_reports_need_no_torch():
    code = "import sys, imprint.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- the gates


GATES = ("base control", "blind baseline", "overlap", "power", "positive control")


def withheld(path, budget=None):
    """A grid whose texts alone tell members from non-members; everything else is green."""
    build(path, budget=budget)
    write_gates(Store(path), "b0", tell=1.0)
    grid = load_grid(path)
    return grid, write_results(grid)


def two_bases(path, seeds=(0, 1)):
    """The second base has no evidence for its gates."""
    rng, store = np.random.default_rng(1), Store(path)
    entries = [(name, f"b{seed}", spec(name, seed=seed)) for seed in seeds for name in ("lora", "prompt")]
    for key in ("b0", "b1"):
        write_base(store, key, rng)
    write_gates(store, "b0")
    for _, _, one in entries:
        tuned(store, one, rng, [(2.0, 0.9, 2.0)]).finish(status="done", reason=None, **COUNTS)
    write_lock(path, entries, budget={"attack": "loss", "auc": 0.99})
    grid = load_grid(path)
    return grid, write_results(grid)


def test_gates_come_before_every_number(small):
    grid, frame = small
    text, marked = printed(grid, frame, width=300), to_markdown(grid, frame)
    page = Page(write_report(grid.path).read_text(encoding="utf-8"))
    assert text.startswith("Validity gates")
    assert marked.startswith("**Validity gates**")
    assert page.root.find(".//main/section/h2").text == "Validity gates"
    assert page.gates() == dict.fromkeys(GATES, "green")
    for shown in (text, marked):
        gates = [shown.index(f"{name} green: ") for name in GATES]
        assert gates == sorted(gates)
        assert gates[-1] < min(shown.index(name) for name in ("base (epoch 0)", "At the last epoch"))
    assert "withheld" not in text + marked + page.words()


def test_a_gate_that_is_not_green_withholds_the_verdict_and_shows_the_numbers(tmp_path, small):
    budget = {"attack": "loss", "auc": 0.9, "tpr_at_1pct_fpr": None}
    grid, frame = withheld(tmp_path / "grid", budget)
    page = Page(write_report(grid.path).read_text(encoding="utf-8"))
    assert page.gates() == {**dict.fromkeys(GATES, "green"), "blind baseline": "red"}
    warned = [p for p in page.root.iter("p") if p.get("class") == "warning"]
    assert [p.find("strong").text for p in warned] == ["Headline withheld."]
    assert "Not green: blind baseline (red);" in "".join(warned[0].itertext())
    assert "no evidence of memorization" in page.words()
    assert "divide one pool at random, whole groups on one side" in page.words()
    assert not re.search("best after|lies above .5|as it should|too little to tell", page.words())
    assert page.words().index("Headline withheld") < page.words().index("At the last epoch")
    for row in summary(grid, frame, {"b0"}):
        assert row.budget is None
    for shown in (printed(grid, frame, width=300), to_markdown(grid, frame)):
        assert "within" not in shown
        assert shown.count("cannot tell") == 6
        assert shown.index("Headline withheld. Not green: blind baseline") < shown.index("At the last epoch")
    with_verdict = Page(write_report(small[0].path).read_text(encoding="utf-8"))
    assert page.numbers() == with_verdict.numbers()


def test_a_base_that_tells_them_apart_withholds_the_verdict(tmp_path):
    grid, frame = build(tmp_path / "grid", base_gap=1.2)
    page = Page(write_report(grid.path).read_text(encoding="utf-8"))
    assert page.gates()["base control"] == "red"
    assert "best after" not in page.words()
    assert "Headline withheld. Not green: base control (red);" in printed(grid, frame, width=300)


@pytest.mark.parametrize("part", ["blind", "positive"])
def test_hostile_text_in_a_finding_is_text(tmp_path, part):
    """A reason may quote another library, and with it a name out of a model's files."""
    grid, frame = build(tmp_path)
    folder = Store(tmp_path).base("b0") / "gates"
    (folder / f"{part}.parquet").unlink()
    write_json(folder / "meta.json", {part: f"{EVIL}\n| a | *b* |"})
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert 'Not measured: evil/<script>alert("1")</script>&amp;�[31m� | a | *b* |.' in Page(page).words()
    assert "script" not in Page(page).tags()
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", page)
    markdown = to_markdown(grid, frame)
    assert "<" not in markdown
    assert "\\| a \\| \\*b\\* \\|" in markdown
    assert not re.search(
        "[\x1b\u202e]", printed(grid, frame, terminal=True).replace("\x1b[1m", "").replace("\x1b[0m", "")
    )


def test_only_what_rests_on_a_base_without_green_gates_is_withheld(tmp_path):
    grid, frame = two_bases(tmp_path)
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert len([ul for ul in page.root.iter("ul") if ul.get("class") == "gates"]) == 2
    assert "Headline withheld (split 1). Not green: blind baseline (missing)" in page.words()
    assert "Headline withheld (split 0)" not in page.words()
    assert "seed 0: At the last epoch" in page.words()
    assert "seed 1: At the last epoch" not in page.words()
    shown = printed(grid, frame, width=300)
    assert shown.splitlines()[1] == "split 0: all 5 gates are green"
    assert re.findall("split 1: (.*) (green|red|missing): ", shown) == [
        *(("base control", "green"), ("blind baseline", "missing"), ("overlap", "missing")),
        *(("power", "green"), ("positive control", "missing")),
    ]
    assert re.findall(r"^lora +(\d) .* (within|cannot tell) *$", shown, re.M) == [("0", "within"), ("1", "cannot tell")]


def test_a_base_that_several_seeds_share_has_one_list_of_gates_and_no_seed(tmp_path):
    """The seed of a run differs, that of its data does not."""
    rng, store = np.random.default_rng(1), Store(tmp_path)
    write_base(store, "b0", rng)
    entries = [("lora", "b0", spec(seed=seed, split=0)) for seed in (0, 1)]
    write_lock(tmp_path, entries)
    for _, _, one in entries:
        tuned(store, one, rng, [(2.0, 0.9, 2.0)]).finish(status="done", reason=None, **COUNTS)
    grid = load_grid(tmp_path)
    frame = write_results(grid)
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert len([ul for ul in page.root.iter("ul") if ul.get("class") == "gates"]) == 1
    for shown in (page.words(), printed(grid, frame, width=300)):
        assert "Headline withheld. Not green: " in shown
        assert "Headline withheld (" not in shown


# ---- size


def build_large(path, cells=100, epochs=15, models=2):
    """Many cells whose evidence is copied: only size and layout matter. Results are made up."""
    rng, store = np.random.default_rng(2), Store(path)
    sizes = (20, 20, 10)
    attacks = ("loss", "ref", "zlib", "min_k", "min_k_plus", "ratio")
    for m in range(models):
        write_base(store, f"b{m}", rng, sizes=sizes)
    template = path / "template"
    write_stats(template / "stats.parquet", stats(rng, 2.0, 0.5, sizes=sizes))
    write_json(
        template / "meta.json",
        {
            "epoch": 1,
            "tokens_trained": 10,
            "tokens_scored": 10,
            "cost": {"seconds": {"forward": 100.0, "scoring": 5.0}},
        },
    )
    entries, rows = [], []
    for n in range(cells):
        options = {"placement": ("attention", "projection", "both")[n // models % 3], "rank": n, "learning_rate": 1e-4}
        one = spec("lora", options, model=f"some-organisation/model-{n % models}", epochs=epochs)
        entries.append((f"lora placement={options['placement']} rank={n}", f"b{n % models}", one))
        folder = store.cell(one.run_id)
        for epoch in range(1, epochs + 1):
            shutil.copytree(template, folder.epoch(epoch), copy_function=os.link)
        write_json(folder.path / "done.json", {"status": "done", "reason": None, **COUNTS})
        rows += made_up_rows(one, epochs, attacks, rng)
    write_lock(path, entries, attacks)
    write_table(path / "results.parquet", pa.Table.from_pandas(pd.DataFrame(rows, columns=_RESULTS.names), _RESULTS))
    return load_grid(path), results(path)


def made_up_rows(one, epochs, attacks, rng):
    common = (one.run_id, one.model.name, one.data.source.name, one.method.name, "{}", 0)
    rows = []
    for epoch in range(epochs + 1):
        ppl = 8 + 0.02 * (epoch - 5) ** 2 + rng.normal(0, 0.1)
        rows.append((*common, epoch, "", "perplexity", ppl, ppl - 0.2, ppl + 0.2, 20, 20, "ok"))
        for attack in attacks:
            x = 0.5 + 0.45 * (1 - np.exp(-epoch * one.method.options["rank"] / 300)) + rng.normal(0, 0.003)
            rows.append((*common, epoch, attack, "auc", x, x - 0.02, min(1.0, x + 0.02), 20, 20, "ok"))
            for metric in ("tpr_at_10pct_fpr", "tpr_at_1pct_fpr", "tpr_at_0.1pct_fpr"):
                rows.append((*common, epoch, attack, metric, x / 2, x / 2 - 0.1, x / 2 + 0.1, 20, 20, "indicative"))
    return rows


def test_the_annex_says_what_each_cell_cost(tmp_path):
    """Four epochs of 52 s and 1 TFLOP on a machine of 200 GFLOP/s: 4e12 / 208 / 2e11 is a tenth."""
    build(tmp_path)
    header, rows = costs_table(load_grid(tmp_path))
    full = dict(zip(header, rows[0], strict=True))
    assert (full["method"], full["epochs"], full["tokens"], full["operations"]) == ("full", "4", "80", "4 TFLOP")
    assert (full["forward"], full["backward"], full["scoring"]) == ("120.0 s", "80.0 s", "8.0 s")
    assert "data" not in full  # never measured
    assert (full["peak memory"], full["share of peak"]) == ("1 GiB", "10%")
    assert len(rows) == sum(cell.epochs > 0 for cell in load_grid(tmp_path).cells)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "Cost of the finished epochs" in page


def test_a_hundred_cells_stay_under_two_megabytes(tmp_path):
    grid, frame = build_large(tmp_path)
    file = write_report(tmp_path)
    assert file.stat().st_size < 2_000_000
    page = Page(file.read_text(encoding="utf-8"))
    assert len(page.root.findall(".//svg")) == 2 * 8 * 8 + 102  # 50 methods in charts of 7; a density each, two bases
    assert max(map(len, printed(grid, frame).splitlines())) <= 80


# ---- figures


def lines(labels, values):
    return [
        Series(label, range(len(v)), v, [x - 0.1 for x in v], [x + 0.1 for x in v], number)
        for number, (label, v) in enumerate(zip(labels, values, strict=True))
    ]


def test_line_chart_labels_do_not_overlap_and_gaps_stay_gaps():
    chart = line_chart("h", "d", lines(["a", "b", "c"], [[1, 2, 3], [1, 2, 3], [1, np.nan, 3.01]]), "x", "y")
    root = ET.fromstring(chart)
    heights = sorted(float(t.get("y")) for t in root.iter("text") if t.get("class") == "label")
    assert all(b - a >= 14.9 for a, b in itertools.pairwise(heights))
    *_, c = [p.get("d") for p in root.iter("path") if p.get("class", "").startswith("line c2")]
    assert c.count("M") == 2
    assert "nan" not in chart
    assert (root.find("title").text, root.find("desc").text) == ("h", "d")


def test_line_chart_of_one_value_and_of_long_hostile_labels():
    assert "nan" not in line_chart("h", "d", lines(["a"], [[1.0]]), "x", "y")
    root = ET.fromstring(line_chart("h", "d", lines([EVIL * 9], [[1.0, 2.0]]), "x", "y", log=True))
    [label] = [t.text for t in root.iter("text") if t.get("class") == "label"]
    assert "…" in label


def test_density_chart_compares_on_one_axis():
    rng = np.random.default_rng(0)
    charts = [density_chart("h", "d", rng.normal(m, 0.3, 500), rng.normal(2, 0.3, 500), (0, 4)) for m in (1, 2)]
    ticks = [[t.text for t in ET.fromstring(c).iter("text") if t.get("class") == "tick middle"] for c in charts]
    assert ticks[0] == ticks[1]
    assert ticks[0][0] == "0"
    assert ticks[0][-1] == "4"
    assert "nan" not in density_chart("h", "d", np.ones(3), np.ones(1), (0, 2))
