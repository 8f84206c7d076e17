"""Does Imprint work beside what is installed here? Tunes tiny random models by every trainer there is, and audits them.

    python scripts/smoke.py [FOLDER]

First `imprint doctor`. Then LoRA by Transformers' Trainer, and by TRL, LLaMA-Factory and Axolotl where they can be
imported, each with `LeakageCallback`, and `imprint audit`, by command and from Python, of what was saved: its scores
must be those of peft's own model, one text at a time. Then `imprint gate` and `imprint report`. Needs no network and no
GPU; takes one to three minutes. What works is printed a line each; the exit code is 1 if anything does not.
"""

from __future__ import annotations

import hmac
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from smoke_trainers import COMMON, COUNT, TRAINERS, base_model, records, rows_of, run

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1")
os.environ.update(TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES="")
os.environ.update(WANDB_MODE="disabled", AXOLOTL_DO_NOT_TRACK="1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
warnings.simplefilter("ignore")  # other libraries' own

NATS = 1e-4
"""Allowed difference of a token's log-probability from the pass over one text, float32."""
SHOWN = "imprint-audit torch transformers peft accelerate datasets trl llamafactory axolotl numpy pydantic typer"
IMPRINT = str(Path(sys.executable).with_name("imprint"))


def check_scores(base: Path, adapter: Path, sides: Sequence[Path], out: Path) -> float:
    """Largest difference of a token's log-probability, tuned and base, from peft's own model on one text at a time."""
    import numpy as np
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from imprint.rows import load_grid

    [cell] = load_grid(out).cells
    key, tokenizer = out.with_name(f"{out.name}.key").read_bytes(), AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    rows, worst, moved = [*rows_of(sides[0]), *rows_of(sides[1])], 0.0, 0.0
    tuned, reference = cell.stats(cell.epochs), cell.reference
    places = {str(name): n for n, name in enumerate(tuned.ids)}
    assert len(places) == len(rows)
    assert list(reference.ids) == list(tuned.ids)
    for row in rows:
        ids = torch.tensor([[*tokenizer(row["text"]).input_ids, tokenizer.eos_token_id]])
        n = places[hmac.new(key, row["id"].encode(), "sha256").hexdigest()[:16]]
        with torch.no_grad():
            found = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
            with model.disable_adapter():
                below = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        for stats, logits in ((tuned, found), (reference, below)):
            wanted = logits.gather(-1, ids[0, 1:, None])[:, 0].numpy()
            worst = max(worst, float(np.abs(stats.logp[stats.offsets[n] : stats.offsets[n + 1]] - wanted).max()))
        moved = max(moved, float((found - below).abs().max()))
    assert worst < NATS, f"a token's log-probability is off by {worst:.2g} nats"
    assert moved > 100 * NATS, "the adapter changes nothing, so nothing has been tested"
    return worst


def check_callback(out: Path) -> str:
    """An audit with every epoch of the training, that `gate` and `report` can read."""
    from imprint.rows import load_grid

    [cell] = load_grid(out).cells
    assert cell.epochs == COMMON["num_train_epochs"], f"{cell.epochs} epochs audited"
    assert len(cell.stats(1)) == 2 * COUNT, f"{len(cell.stats(1))} records scored"
    return aftermath(out)


def aftermath(out: Path) -> str:
    """The verdict of `gate`; `report` has been written and can be printed."""
    said = run([IMPRINT, "gate", str(out), "--budget", "auc=0.99"], (0, 2))
    assert "| checkpoint |" in run([IMPRINT, "report", str(out), "--markdown"])
    assert (out / "report.html").stat().st_size > 10_000
    return said.split(":")[0]


def check_audits(base: Path, adapter: Path, sides: Sequence[Path], out: Path) -> str:
    """By the command, and from Python: the same scores, and they are right."""
    import numpy as np

    import imprint
    from imprint.rows import load_grid

    members, nonmembers = map(str, sides)
    command = [IMPRINT, "audit", "--model", str(base), "--adapter", str(adapter), "--out", str(out)]
    command += ["--members", members, "--nonmembers", nonmembers, "--loss", "all", "--eos"]
    run(command, (0, 2))
    worst = check_scores(base, adapter, sides, out)
    second, key = out.with_name(f"{out.name}-python"), out.with_name(f"{out.name}.key")
    records = {"members": members, "nonmembers": nonmembers, "data": {"eos": True}}
    found = imprint.audit(base, **records, adapter=adapter, loss="all", out=second, id_key=key)
    assert found.release.code in (0, 2), str(found)
    one, other = (load_grid(folder).cells[0].stats(1) for folder in (out, second))
    assert list(one.ids) == list(other.ids)
    assert np.array_equal(one.logp, other.logp)
    return f"scores within {worst:.1e} nats of peft's; {aftermath(out)}"


def attempt(what: str, work: Callable[[], Any]) -> bool:
    try:
        said = work()
    except Exception:
        print(f"FAILED  {what}\n{traceback.format_exc()}", flush=True)
        return False
    print(f"ok      {what}{f': {said}' if said else ''}", flush=True)
    return True


def main(folder: Path) -> int:
    from transformers.utils import logging

    logging.disable_progress_bar()
    for name in SHOWN.split():
        if find_spec(name.removesuffix("-audit")):
            print(f"{name} {metadata.version(name)}")
    base, sides = base_model(folder / "base"), records(folder)
    good = attempt("imprint doctor", lambda: run([IMPRINT, "doctor"]) and None)
    for name, train in TRAINERS.items():
        if not find_spec(name):
            print(f"-       {name} is not installed")
            continue
        out, watched, audited = (folder / f"{name}{what}" for what in ("", "-leakage", "-audit"))
        done = attempt(f"{name} trains with the callback", partial(train, base, sides, out))
        good &= done and attempt(f"{name}: what the callback wrote", partial(check_callback, watched))
        good &= done and attempt(f"{name}: imprint audit", partial(check_audits, base, out, sides, audited))
    return int(not good)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(main(Path(sys.argv[1]).resolve()))
    with tempfile.TemporaryDirectory() as temporary:
        sys.exit(main(Path(temporary)))
