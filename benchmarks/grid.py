"""A whole cell, end to end: LoRA tuned, everything scored after every epoch, all attacks, from files to numbers.

    python benchmarks/grid.py [--quick] [--demo]

`imprint.run` on a model folder and a JSONL file, against the naive stack on the same files: transformers.Trainer with
PEFT, then after each epoch one text at a time, target and reference (as mimir), perplexity on validation texts, attacks
and AUC in plain numpy. Both start from the same adapter, see the same records in the same order at the same rates, so
their AUC and perplexity should agree to rounding. `--demo` times recipes/demo.yaml instead, by part of the work.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import zlib
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, TrainerCallback

import imprint
from common import SHAPES, arguments, build, header, seconds, table
from imprint.attacks import ATTACKS
from imprint.data.tokens import Encoded
from imprint.recipe import PlannedCell, plan, read_recipe
from imprint.records import Audit
from imprint.runs import prepare_audits
from imprint.store import Store, read_json
from imprint.tuning.methods import METHODS
from imprint.tuning.train import Trainer as Order
from imprint.tuning.train import schedule
from naive import BATCH, Logps, mimir_like, trainer

ROOT = Path(__file__).parent.parent
SHAPE = "gpt2-6x256"
TOKENIZER = ROOT.parent / "shared" / "models" / "gpt2_tokenizer"
Numbers = list[dict[str, float]]
"""After each epoch: LOSS AUC and validation perplexity."""


def make_texts(count: int) -> list[str]:
    """Made-up words, few of them frequent; 10 to 35 to a text."""
    rng = np.random.default_rng(0)
    parts = [c + v for c in "bcdfglmnprstv" for v in "aeiou"]
    words = ["".join(rng.choice(parts, rng.integers(1, 4))) for _ in range(2000)]
    share = 1 / np.arange(2, 2002)
    return [" ".join(rng.choice(words, rng.integers(10, 36), p=share / share.sum())) for _ in range(count)]


def write_files(folder: Path, count: int) -> None:
    """A model folder with a tokenizer, and the texts."""
    texts = make_texts(count)
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    build(SHAPES[SHAPE]()).save_pretrained(folder / "model")
    if TOKENIZER.is_dir():
        AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder / "model")
        return
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=800, special_tokens=["<end>"]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder / "model")


def recipe_for(folder: Path, each: int, epochs: int) -> dict[str, Any]:
    source = str(folder / "texts.jsonl")
    return {
        "model": str(folder / "model"),
        "data": {"source": source, "members": each, "nonmembers": each, "validation": each // 2},
        "method": "lora",
        "train": {"epochs": epochs, "batch_size": BATCH, "learning_rate": 5e-3},
        "attacks": list(ATTACKS),
    }


def naive_stack(cell: PlannedCell, audit: Audit, order: list[int]) -> Numbers:
    """Only the split, the order of the records and the schedule are taken from Imprint; the rest is done here."""
    path = cell.located.path
    tokenizer = AutoTokenizer.from_pretrained(path)
    base, reference = (AutoModelForCausalLM.from_pretrained(path).eval() for _ in range(2))
    texts = [example.target for example in audit.examples]
    records = []
    for n, text in enumerate(texts):
        ids = np.array(tokenizer(text).input_ids, np.int32)
        records.append(Encoded(str(n), ids, np.arange(len(ids)) > 0, len(zlib.compress(text.encode()))))
    sides = [np.flatnonzero(np.array(audit.roles) == role) for role in ("member", "nonmember", "validation")]
    spec, options = cell.spec.train, cell.spec.method.options
    torch.manual_seed(cell.spec.seed)
    model = METHODS["lora"].attach(base.requires_grad_(False), options)  # get_peft_model
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=options["learning_rate"], weight_decay=spec.weight_decay
    )
    steps, whole = len(order) // spec.epochs // BATCH, len(order) // BATCH
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(spec, min(step, whole - 1), whole))
    found: Numbers = []

    class AfterEpoch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % steps == 0:
                model.eval()
                found.append(measure(model, reference, records, sides))
                model.train()

    # all epochs in one, so that the order is the one that Imprint draws
    once = [records[n] for n in order]
    trainer(
        model,
        once,
        options["learning_rate"],
        sampling="sequential",
        optimizers=(optimizer, rates),
        callbacks=[AfterEpoch()],
    ).train()
    return found


def measure(model: Any, reference: Any, records: list[Encoded], sides: list[Any]) -> dict[str, float]:
    """Attacks on members and non-members, perplexity of the validation texts."""
    members, nonmembers, validation = sides
    audited = [records[n] for n in (*members, *nonmembers)]
    target, before = mimir_like(model, audited), mimir_like(reference, audited)
    scores = attacks(target, before, [record.zlib_bytes for record in audited])
    nll = np.concatenate(mimir_like(model, [records[n] for n in validation])).astype(float)
    result = {f"auc {name}": auc(values, len(members)) for name, values in scores.items()}
    return {**result, "perplexity": float(np.exp(-nll.mean()))}


def attacks(target: Logps, reference: Logps, sizes: list[int]) -> dict[str, Any]:
    loss, before = (np.array([row.astype(float).mean() for row in side]) for side in (target, reference))
    lowest = [np.sort(row.astype(float))[: max(1, int(0.2 * len(row)))].mean() for row in target]
    return {"loss": loss, "ref": loss - before, "zlib": loss / np.array(sizes), "min_k": np.array(lowest)}


def auc(scores: Any, members: int) -> float:
    others = len(scores) - members
    return float((rankdata(scores)[:members].sum() - members * (members + 1) / 2) / (members * others))


def cell(quick: bool) -> None:
    each, epochs = (16, 2) if quick else (64, 15)
    with tempfile.TemporaryDirectory(prefix="imprint-bench-") as name:
        folder = Path(name)
        write_files(folder, 4 * each)
        recipe, out = recipe_for(folder, each, epochs), folder / "out"
        planned = plan(read_recipe(recipe), lambda _: "float32")
        [audit] = prepare_audits(planned, Store(folder / "other")).values()
        [one] = planned.cells
        place = {record.id: n for n, record in enumerate(audit.scored)}
        drawn = Order(torch.nn.Linear(1, 1), audit.tuned, one.spec.train, 1.0, one.spec.seed)
        order = [
            place[record.id] for number in range(1, epochs + 1) for batch in drawn.batches(number) for record in batch
        ]
        naive: Numbers = []
        slow = seconds(lambda: naive.extend(naive_stack(one, audit, order)))
        frames: list[Any] = []
        fast = seconds(lambda: frames.append(imprint.run(recipe, out, progress=None)))
        costs = [read_json(path)["cost"] for path in sorted((out / "cells").rglob("meta.json"))]
    texts = f"{each} members, {each} non-members, {each // 2} for validation, {audit.tokens:,} tokens"
    print(f"LoRA, {SHAPE}, {texts}, {epochs} epochs")
    rows = [["naive stack", f"{slow:.1f} s", f"{slow / epochs:.2f} s", f"{slow / fast:.1f}"]]
    rows += [["imprint.run", f"{fast:.1f} s", f"{fast / epochs:.2f} s", "1.0"]]
    table(["", "whole", "per epoch", "x"], rows)
    done, peak = sum(cost["flops"] for cost in costs), max(cost["peak_flops"] for cost in costs)
    print(f"  share of the engine's peak: naive {done / slow / peak:.0%}, Imprint {done / fast / peak:.0%}\n")
    agree(frames[0], naive)


def agree(frame: Any, naive: Numbers) -> None:
    rows = []
    for number, found in enumerate(naive, 1):
        for key, value in found.items():
            attack = key.removeprefix("auc ") if key.startswith("auc") else ""
            metric = "auc" if attack else "perplexity"
            chosen = frame[(frame.epoch == number) & (frame.attack == attack) & (frame.metric == metric)]
            own = float(chosen.value.iloc[0])
            rows.append([f"epoch {number} {key}", f"{own:.4f}", f"{value:.4f}", f"{abs(own - value):.1e}"])
    table(["", "Imprint", "naive", "difference"], rows)


def demo(quick: bool) -> None:
    """The demo's time, whole and by part: seconds that its epochs have recorded."""
    with tempfile.TemporaryDirectory(prefix="imprint-bench-") as name:
        program = str(Path(sys.executable).parent / "imprint")
        command = [program, "run", str(ROOT / "recipes" / "demo.yaml"), "--out", f"{name}/out"]
        command += ["--set", "train.epochs=1", "--set", "data.members=64"] if quick else []
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        whole = time.perf_counter() - started
        parts: dict[str, dict[str, float]] = {}
        for path in sorted(Path(name, "out", "cells").glob("*/spec.json")):
            own = parts.setdefault(read_json(path)["method"]["name"], defaultdict(float))
            for meta in path.parent.rglob("meta.json"):
                for part, value in read_json(meta)["cost"]["seconds"].items():
                    own[part] += value
    names = sorted({part for own in parts.values() for part in own})
    print(f"The demo: {whole:.1f} s from command to report; seconds by part of the work")
    rows = [[m, *(f"{own[p]:.1f}" for p in names), f"{sum(own.values()):.1f}"] for m, own in parts.items()]
    columns = [sum(own[part] for own in parts.values()) for part in names]
    rows.append(["all", *(f"{value:.1f}" for value in columns), f"{sum(columns):.1f}"])
    rows.append(["besides", *[""] * len(names), f"{whole - sum(columns):.1f}"])
    table(["method", *names, "sum"], rows)


def main() -> None:
    args = arguments(__doc__, "--demo").parse_args()
    header("The demo" if args.demo else "A whole cell", "cpu")
    (demo if args.demo else cell)(args.quick)


if __name__ == "__main__":
    main()
