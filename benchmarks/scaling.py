"""How cost grows: with texts, length, vocabulary, epochs and the adapter's rank; and that memory does not.

    python benchmarks/scaling.py [--quick] [--device cuda]

Slopes of a straight line through log(cost) against log(size), beside the slope of the operations that the formula of
`engine.costs` counts. Memory is the high-water mark of a process of its own, above the model and the texts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from common import (
    arguments,
    budget_of,
    build,
    gpt2,
    header,
    in_child,
    interleaved,
    memory_above,
    table,
    texts,
    tokens_of,
)
from imprint.data.tokens import Encoded
from imprint.engine.costs import costs_of
from imprint.engine.forward import forward_of
from imprint.scoring.score import token_stats
from imprint.spec import MethodSpec, TrainSpec
from imprint.tuning.methods import METHODS, resolve_method
from imprint.tuning.models import shared_copy
from imprint.tuning.train import Trainer, train
from naive import BATCH

LAYERS, WIDTH, VOCABULARY = 6, 256, 8192
ALLOCATORS = {"resident": {}, "in use": {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}}
"""glibc keeps large blocks that were freed, in a heap that many sizes break up: `resident` counts them. With a fixed
threshold it gives them back at once (which costs time), so the high-water mark is what was in use."""
Point = tuple[Callable[[], object], float]
"""(The work, its operations by the formula)."""


def slope(sizes: Sequence[float], costs: Sequence[float]) -> float:
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def scoring(model: nn.Module, records: Sequence[Encoded], device: str) -> Point:
    forward, budget = forward_of(model), budget_of(device)
    return lambda: token_stats(model, records, budget, forward=forward), costs_of(model).scoring(records)


def training(base: nn.Module, records: Sequence[Encoded], device: str, epochs: int = 1, rank: int = 8) -> Point:
    """LoRA, `epochs` epochs each time it is called, always from the start of a run."""
    options = resolve_method(MethodSpec(name="lora", options={"rank": rank}), WIDTH, None).options
    torch.manual_seed(0)
    model = METHODS["lora"].attach(shared_copy(base), options)
    forward, spec, budget = forward_of(model), TrainSpec(epochs=epochs, batch_size=BATCH), budget_of(device)

    def work() -> None:
        for _ in train([Trainer(model, records, spec, 1e-3, 0)], forward, budget):
            pass

    steps = Trainer(model, records, spec, 1e-3, 0).steps
    return work, epochs * costs_of(model).training(records, steps)


def sweep(what: str, points: dict[int, Point], device: str, rounds: int, per: Sequence[float] | None = None) -> None:
    """Args: per: what the seconds are divided by, the number of tokens for a cost per token."""
    sizes, units = list(points), list(per) if per else [1.0] * len(points)
    ways = {str(size): work for size, (work, _) in points.items()}
    interleaved(ways, 1, device)
    taken = interleaved(ways, rounds, device)
    spent = [float(np.median(taken[str(size)])) / unit for size, unit in zip(sizes, units, strict=True)]
    needed = [flops / unit for (_, flops), unit in zip(points.values(), units, strict=True)]
    unit = "µs/token" if per else "s"
    shown = [f"{value * 1e6:.1f}" if per else f"{value:.2f}" for value in spent]
    print(f"{what}: slope {slope(sizes, spent):+.2f}, of the operations {slope(sizes, needed):+.2f}")
    table(["size", *(f"{size:,}" for size in sizes)], [[unit, *shown]])


def per_token(records: dict[int, list[Encoded]]) -> list[float]:
    return [float(tokens_of(some)) for some in records.values()]


def growth(device: str, quick: bool) -> None:
    rounds, scale = (1, 1) if quick else (3, 4 if device == "cpu" else 32)
    base = build(gpt2(LAYERS, WIDTH, VOCABULARY, head=32), device)

    by_count = {n * scale: texts(20, 300, n * scale, VOCABULARY) for n in (8, 16, 32, 64)}
    sweep("Texts, scoring", {n: scoring(base, r, device) for n, r in by_count.items()}, device, rounds)
    sweep("Texts, a LoRA epoch", {n: training(base, r, device) for n, r in by_count.items()}, device, rounds)

    by_length = {n: texts(n, n, max(1, 2048 * scale // n), VOCABULARY) for n in (32, 64, 128, 256, 512, 1024)}
    points = {n: scoring(base, r, device) for n, r in by_length.items()}
    sweep("Length of a text, scoring", points, device, rounds, per_token(by_length))
    points = {n: training(base, r, device) for n, r in by_length.items()}
    sweep("Length of a text, a LoRA epoch", points, device, rounds, per_token(by_length))

    some = {v: texts(20, 300, 6 * scale, v) for v in (4096, 16384, 65536, 131072)}
    points = {v: scoring(build(gpt2(LAYERS, WIDTH, v, head=32), device), r, device) for v, r in some.items()}
    sweep("Vocabulary, scoring", points, device, rounds, per_token(some))

    few = by_count[8 * scale]
    sweep("Epochs, LoRA", {n: training(base, few, device, epochs=n) for n in (1, 2, 4, 8)}, device, rounds)
    ranks = {n: training(base, few, device, rank=n) for n in (1, 4, 16, 64)}
    sweep("Rank, a LoRA epoch", ranks, device, rounds)


def child(count: int, device: str, what: str) -> None:
    """Prints the bytes that scoring, or a LoRA epoch, takes above the model and `count` texts."""
    base = build(gpt2(LAYERS, WIDTH, VOCABULARY, head=32), device)
    make = scoring if what == "scoring" else training
    make(base, texts(8, 8, 2, VOCABULARY), device)[0]()
    work, _ = make(base, texts(20, 300, count, VOCABULARY), device)
    print(memory_above(work, device))


def memory(device: str, quick: bool) -> None:
    counts = (25, 50, 100) if quick else (200, 400, 800, 1600)
    for what in ("scoring", "training"):
        print(f"Memory of {what} above the model, against the number of texts of up to 300 tokens")
        rows = []
        for name, environment in ALLOCATORS.items():
            found = [in_child(__file__, count, device, what, **environment) for count in counts]
            rows.append([name, *(f"{value / 2**20:,.1f}" for value in found), f"{slope(counts, found):+.3f}"])
        table(["MB", *(f"{n:,}" for n in counts), "slope"], rows)


def main() -> None:
    args = arguments(__doc__).parse_args()
    header(f"Scaling, {LAYERS} x {WIDTH}, V {VOCABULARY:,}", args.device)
    growth(args.device, args.quick)
    memory(args.device, args.quick)


if __name__ == "__main__":
    if "--child" in sys.argv:
        child(int(sys.argv[2]), *sys.argv[3:])
    else:
        main()
