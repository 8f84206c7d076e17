"""Is this installation fit to audit? What there is, and whether a planted leak is found and an absent one is not."""

from __future__ import annotations

import platform
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from imprint.attacks import ATTACKS
from imprint.checkpoint import save_trained
from imprint.data import read_pool
from imprint.data.tokens import Encoder
from imprint.measures import auc
from imprint.report import words
from imprint.rows import load_grid
from imprint.spec import DataSpec, MethodSpec, ModelSpec, Runtime, Source, TrainSpec
from imprint.types import Example, Interval

PACKAGES = ("imprint-audit", "torch", "transformers", "peft", "accelerate", "datasets", "numpy", "pyarrow", "trl")
MODEL, DATA = "tiny/gpt2-medium", "world/triples"
MEMBERS, NONMEMBERS, EPOCHS = 96, 192, 12
"""Of the control: a leak that no attack should miss, in well under a minute on two cores."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at; `good` is None for what is only told."""

    name: str
    good: bool | None
    finding: str


def examine(runtime: Runtime) -> Iterator[Check]:
    """The environment, then the two controls."""
    yield from environment(runtime)
    yield from controls(runtime)


def environment(runtime: Runtime) -> list[Check]:
    """Versions, devices, memory and disk."""
    import torch

    from imprint.engine.costs import peak_flops
    from imprint.engine.memory import free_bytes
    from imprint.tuning.models import resolve_device

    device = resolve_device(runtime.device)
    free = free_bytes(device)
    found = [
        Check(name, None if name == "trl" else _version(name) != "", _version(name) or "not installed")
        for name in PACKAGES
    ]
    gpus = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    speed = peak_flops(device, torch.float32)
    return [
        Check("python", None, f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        *found,
        Check("device", None, f"{device}, {speed / 1e9:,.0f} GFLOP/s in float32; GPUs: {words.listed(gpus) or 'none'}"),
        Check("memory", None, "unknown" if free is None else f"{words.size(free)} free"),
        Check("disk", None, f"{words.size(shutil.disk_usage(Path.cwd()).free)} free here"),
    ]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def controls(runtime: Runtime) -> list[Check]:
    """Audit an adapter that was overfitted on the shipped model, and one that was never trained."""
    from imprint.auditing.api import audit

    examples = _records()
    members, nonmembers = ([{"id": e.id, "text": e.prompt + e.target} for e in side] for side in examples)
    with tempfile.TemporaryDirectory(prefix="imprint-") as name:
        folder = Path(name)
        untrained, overfitted = _adapters(folder, members, runtime)
        audit(
            MODEL,
            members=members,
            nonmembers=nonmembers,
            adapter=[untrained, overfitted],
            out=folder / "out",
            runtime=runtime,
        )
        grid = load_grid(folder / "out")
        [cell] = grid.cells
        scores = [cell.scores(epoch, list(ATTACKS)) for epoch in range(cell.epochs + 1)]
        found = [{name: auc(*cell.sides(score)) for name, score in one.items()} for one in scores]
    base, before, after = found
    blind = [name for name, x in after.items() if not x.low > 0.5]
    heard = [name for name, x in before.items() if base[name].value not in x]
    return [
        Check("an overfitted adapter is found", not blind, _told(after)),
        Check(
            "an untrained one is not", not heard, f"{_told(before)}: as the base itself" if not heard else _told(before)
        ),
    ]


def _told(found: dict[str, Interval]) -> str:
    return ", ".join(f"{name} {words.interval(x)}" for name, x in found.items())


def _records() -> tuple[list[Example], list[Example]]:
    pool = read_pool(DataSpec(source=Source(name=DATA)))
    everything = [example for name in pool.part_names for example in pool.parts[name]]
    firsts = list({example.group: example for example in everything}.values())  # one of each group
    return firsts[:MEMBERS], firsts[MEMBERS : MEMBERS + NONMEMBERS]


def _adapters(folder: Path, members: list[dict[str, str]], runtime: Runtime) -> tuple[Path, Path]:
    """Two adapters as `peft` saves them: as it starts, and after it has learned its members by heart."""
    from imprint.engine.forward import forward_of
    from imprint.tuning.base import Base
    from imprint.tuning.locate import locate
    from imprint.tuning.methods import resolve_method
    from imprint.tuning.models import load_tokenizer
    from imprint.tuning.train import Trainer, train

    model = ModelSpec(name=MODEL, dtype="float32")
    place = locate(model)
    base = Base.of(place, model, runtime)
    method = resolve_method(MethodSpec(name="lora", options={"rank": 16}), place.hidden_size, None)
    tuned = base.tuned(method, 0)
    encode = Encoder(load_tokenizer(place), place.context)
    records = [encode(Example(row["id"], "", row["text"])) for row in members]
    save_trained(folder / "checkpoint-0", tuned)
    spec = TrainSpec(epochs=EPOCHS, batch_size=8, schedule="constant")
    for _ in train([Trainer(tuned, records, spec, method.options["learning_rate"], 0)], forward_of(tuned), base.budget):
        pass
    save_trained(folder / "checkpoint-1", tuned)
    return folder / "checkpoint-0", folder / "checkpoint-1"
