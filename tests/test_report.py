"""Reports: numbers equal the stored ones, refusals stay words, hostile names stay text, and the page is one safe file."""

from __future__ import annotations

import base64
import hashlib
import io
import re
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from rich.console import Console

from imprint.report import print_summary, to_markdown, within_budget, write_report
from imprint.report.figures import Series, density_chart, line_chart
from imprint.report.readings import curves
from imprint.report.tables import summary
from imprint.results import _RESULTS, load_grid, results, write_results
from imprint.spec import DataSpec, MethodSpec, ModelSpec, RunSpec, TrainSpec
from imprint.store import Store, atomic_folder, write_json, write_stats, write_table
from imprint.types import TokenStats

EVIL = 'evil/<script>alert("1")</script>&amp;\x1b[31m\u202e'
MEMBERS, NONMEMBERS, VALIDATION, TOKENS = 60, 40, 30, 6
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


def spec(method="lora", options=None, model="gpt2", source="world/customers", seed=0, epochs=4):
    return RunSpec(
        model=ModelSpec(name=model, fingerprint="f" * 64, dtype="float32"),
        data=DataSpec(source=source, members=MEMBERS, nonmembers=NONMEMBERS, validation=VALIDATION, max_length=64),
        method=MethodSpec(name=method, options=options or {"learning_rate": 1e-3}),
        train=TrainSpec(epochs=epochs),
        seed=seed,
    )


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
        meta = {"epoch": epoch, "training_loss": 2.0, "seconds_training": 50.0, "seconds_scoring": 2.0}
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
    """Three finished cells, one diverged, one failed, one unfinished."""
    rng, store = np.random.default_rng(0), Store(path)
    write_base(store, "b0", rng, base_gap)
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
