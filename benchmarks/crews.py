"""Crews: several LoRA runs on one base in shared passes, against one run after the other.

    python benchmarks/crews.py [--quick] [--device cuda]

`numbers` is tokens per step x width, of all runs together: what `cells.CREW_ROOM` bounds. A gain above 1 pays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from common import arguments, budget_of, build, gpt2, header, interleaved, ratio, table, texts, tokens_of
from imprint.data.tokens import Encoded
from imprint.engine.forward import Forward, forward_of, joined
from imprint.spec import MethodSpec, TrainSpec
from imprint.tuning.methods import METHODS, resolve_method
from imprint.tuning.models import shared_copy
from imprint.tuning.train import Trainer, train

RATES = (1e-3, 2e-3, 4e-3, 8e-3)
CPU_SHAPES = {"4x96, V 1,024": (4, 96, 1024), "6x256, V 8,192": (6, 256, 8192)}
CUDA_SHAPES = {"6x256, V 8,192": (6, 256, 8192), "12x768, V 50,257": (12, 768, 50257)}


def run_of(base: nn.Module, records: Sequence[Encoded], spec: TrainSpec, rate: float, seed: int) -> Trainer:
    options = resolve_method(MethodSpec(name="lora"), base.config.hidden_size, None).options
    torch.manual_seed(seed)
    return Trainer(METHODS["lora"].attach(shared_copy(base), options), records, spec, rate, seed)


def epochs(trainers: Sequence[Trainer], forward: Forward, budget: int) -> Callable[[], object]:
    """Trains the next epoch of these runs each time it is called."""
    running = train(trainers, forward, budget)
    return lambda: next(running)


def gain(base: nn.Module, records: Sequence[Encoded], batch: int, runs: int, rounds: int, device: str) -> list[str]:
    spec, budget = TrainSpec(epochs=rounds + 1, batch_size=batch), budget_of(device)
    apart, crew = (
        [run_of(base, records, spec, rate, seed) for seed, rate in enumerate(RATES[:runs])] for _ in range(2)
    )
    first = forward_of(crew[0].model)
    alone = [epochs([one], forward_of(one.model), budget) for one in apart]
    together = epochs(crew, joined([one.model for one in crew], first.output), budget)
    ways = {"apart": lambda: [work() for work in alone], "together": together}
    interleaved(ways, 1, device)
    taken = interleaved(ways, rounds, device)
    numbers = tokens_of(records) / crew[0].steps * base.config.hidden_size * runs
    return [f"{batch}", f"{runs}", f"{numbers:,.0f}", ratio(taken["apart"], taken["together"], digits=2)]


def report(device: str, quick: bool) -> None:
    rounds, batches, crew_sizes = 5, (1, 2, 4, 8, 16), (2, 4)
    if quick:
        rounds, batches, crew_sizes = 1, (1, 16), (2,)
    for name, (layers, width, vocabulary) in (CPU_SHAPES if device == "cpu" else CUDA_SHAPES).items():
        base = build(gpt2(layers, width, vocabulary, head=32), device)
        records = texts(15, 60, 16 if quick else 32, vocabulary)
        print(f"Crews of LoRA runs, {name}, {len(records)} short texts: time apart / time together")
        rows = [gain(base, records, batch, runs, rounds, device) for runs in crew_sizes for batch in batches]
        table(["batch", "runs", "numbers", "gain"], rows)


def main() -> None:
    args = arguments(__doc__).parse_args()
    header("Crews", args.device)
    report(args.device, args.quick)


if __name__ == "__main__":
    main()
