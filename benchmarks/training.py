"""Training: one epoch of every method by Imprint, against transformers.Trainer with PEFT; then crews, then FT head.

    python benchmarks/training.py [--quick] [--device cuda]

Same model, records, adapter and number of optimiser steps (batches of eight). "defaults": the Trainer as it comes;
"grouped": with length grouping. Imprint's FT head counts a fifteenth of the hidden states it computes once. Neither
side draws dropout. `crews.py` and `head.py` run the second and third part alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

import crews
import head
from common import SHAPES, arguments, budget_of, build, header, interleaved, ratio, some_texts, table, tokens_of
from imprint.data.tokens import Encoded
from imprint.engine.features import features, kept_forward
from imprint.engine.forward import Forward, forward_of
from imprint.spec import MethodSpec, TrainSpec
from imprint.tuning.methods import METHODS, resolve_method
from imprint.tuning.models import shared_copy
from imprint.tuning.train import Trainer, train
from naive import BATCH, epoch, trainer

TUNED = ("head", "lora", "prefix", "prompt", "p_tuning")
EPOCHS = 15
WORK = {"cpu": 1.5e11, "cuda": 1e14}
"""Operations of one forward pass over the records; an epoch takes two to three times as many."""


def attach(base: nn.Module, method: str) -> tuple[nn.Module, float]:
    """A tunable copy that shares the base's weights, and the method's learning rate."""
    spec = resolve_method(MethodSpec(name=method), base.config.hidden_size, None)
    torch.manual_seed(0)
    return METHODS[method].attach(shared_copy(base), spec.options), spec.options["learning_rate"]


def imprint_epochs(
    model: nn.Module, records: Sequence[Encoded], rate: float, forward: Forward, rounds: int
) -> Callable[[], object]:
    """Trains the next epoch of one run each time it is called."""
    spec = TrainSpec(epochs=rounds, batch_size=BATCH, learning_rate=rate)
    budget = budget_of(next(model.parameters()).device.type)
    running = train([Trainer(model, records, spec, rate, 0)], forward, budget)
    return lambda: next(running)


def compare(shape: str, length: str, device: str, work: float, rounds: int, methods: Sequence[str]) -> None:
    base = build(SHAPES[shape](), device)
    records = some_texts(base, length, work, least=2 * BATCH)
    records = records[: len(records) // BATCH * BATCH]
    print(f"{shape}, {length}: {len(records)} texts, {tokens_of(records):,} tokens, {len(records) // BATCH} steps")
    rows = []
    for method in methods:
        model, rate = attach(base, method)
        once = 0.0
        if method == "head":
            started = time.perf_counter()
            forward = kept_forward(model, features(model, records, budget_of(device)))
            if device == "cuda":
                torch.cuda.synchronize()
            once = (time.perf_counter() - started) / EPOCHS
        else:
            forward = forward_of(model)
        ways = {
            "Imprint": imprint_epochs(model, records, rate, forward, rounds + 1),
            "defaults": epoch(trainer(attach(base, method)[0], records, rate, device)),
            "grouped": epoch(trainer(attach(base, method)[0], records, rate, device, "group_by_length")),
        }
        interleaved(ways, 1, device)  # everything is warm afterwards
        taken = interleaved(ways, rounds, device)
        own = [value + once for value in taken["Imprint"]]
        middle = [f"{np.median(spent):.2f} s" for spent in (own, taken["defaults"], taken["grouped"])]
        rate_of = f"{tokens_of(records) / float(np.median(own)):,.0f}"
        rows.append([method, *middle, rate_of, ratio(taken["defaults"], own), ratio(taken["grouped"], own)])
    table(["method", "Imprint", "defaults", "grouped", "tokens/s", "defaults / Imprint", "grouped / Imprint"], rows)


def main() -> None:
    args = arguments(__doc__).parse_args()
    device = args.device
    shapes: Sequence[str] = ("gpt2-6x256", "gpt2-124M") if device == "cpu" else ("gpt2-124M", "gpt2-1.5B")
    lengths, rounds, work = ("short", "medium"), 3, WORK[device]
    if args.quick:
        shapes, lengths, rounds, work = shapes[:1], ("short",), 1, work / 10
    header("Training an epoch", device)
    for shape in shapes:
        for length in lengths:
            compare(shape, length, device, work, rounds, TUNED)
    crews.report(device, args.quick)
    head.report(device, args.quick)


if __name__ == "__main__":
    main()
