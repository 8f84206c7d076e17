"""Scoring: Imprint's single pass against what public scripts do.

    python benchmarks/scoring.py [--quick] [--device cuda] [--compiled]

All passes of a way are the same work, so one is timed and multiplied by the passes that the way makes: mimir's two are
target and reference; the padded way's four are one per attack (loss, the reference's, zlib, min-k). Imprint makes one
per checkpoint; the reference is scored once for all epochs and methods. Share of peak: the operations that one pass
needs (`engine.costs`) over the time of all passes, against a plain `a @ b` at the same moment and, behind the stroke,
against the engine's own product.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from common import (
    DEVICE_SHAPES,
    SHAPES,
    arguments,
    budget_of,
    build,
    header,
    in_child,
    interleaved,
    memory_above,
    peaks,
    ratio,
    some_texts,
    table,
    texts,
    tokens_of,
)
from imprint.data.tokens import Encoded
from imprint.engine.costs import costs_of
from imprint.engine.forward import Forward, forward_of
from imprint.scoring.score import token_stats
from naive import mimir_like, mink_like, padded

IMPRINT = "Imprint"
NAIVE = {"mimir-like": mimir_like, "mink-like": mink_like, "padded 8": padded}
PASSES = {
    IMPRINT: (IMPRINT, 1),
    "mimir-like, target + reference": ("mimir-like", 2),
    "mink-like": ("mink-like", 1),
    "padded 8, one pass per attack": ("padded 8", 4),
    "padded 8, one pass": ("padded 8", 1),
}
CPU_SHAPES = ("gpt2-124M", "gpt2-6x256", "llama-4x128", "gpt2-6x256-128k")
WORK = {"cpu": 3e11, "cuda": 5e14}
"""Operations of one pass: one to two seconds of Imprint's."""
MEMORY_SHAPE, MEMORY_TOKENS = "gpt2-6x256-128k", 1024


def way(name: str, model: nn.Module, records: Sequence[Encoded], forward: Forward) -> Callable[[], object]:
    if name == IMPRINT:
        budget = budget_of(next(model.parameters()).device.type)
        return lambda: token_stats(model, records, budget, forward=forward)
    return lambda: NAIVE[name](model, records)


def difference(model: nn.Module, records: Sequence[Encoded], forward: Forward) -> float:
    """Largest absolute difference of a token's log-probability, over the naive ways; every way is warm afterwards."""
    own = token_stats(model, records, budget_of(next(model.parameters()).device.type), forward=forward).logp
    return max(float(np.abs(own - np.concatenate(one(model, records))).max()) for one in NAIVE.values())


def compare(shape: str, length: str, device: str, work: float, rounds: int, compiled: bool) -> None:
    model = build(SHAPES[shape](), device)
    forward = forward_of(model)
    forward = forward.compiled() if compiled else forward
    records = some_texts(model, length, work)
    gap = difference(model, records[:12], forward)
    needed, tokens = costs_of(model).scoring(records), tokens_of(records)
    taken = interleaved({name: way(name, model, records, forward) for name in (IMPRINT, *NAIVE)}, rounds, device)
    plain, own = peaks(model)
    print(
        f"{shape}, {length}: {len(records)} texts, {tokens:,} tokens; a @ b {plain / 1e9:,.0f} GFLOP/s, the engine's "
        f"{own / 1e9:,.0f}; log p within {gap:.0e} of the naive ways"
    )
    rows = []
    for name, (single, passes) in PASSES.items():
        spent = [passes * value for value in taken[single]]
        middle = float(np.median(spent))
        rate = needed / middle
        share = f"{rate / plain:.0%} | {rate / own:.0%}"
        once = ratio(taken[single], taken[IMPRINT])
        rows.append(
            [
                name,
                f"{len(records) / middle:,.1f}",
                f"{tokens / middle:,.0f}",
                share,
                ratio(spent, taken[IMPRINT]),
                once,
            ]
        )
    table(["way", "texts/s", "tokens/s", "of peak", "x Imprint's time", "a single pass"], rows)


def child(name: str, tokens: int, device: str, compiled: bool) -> None:
    """Prints the bytes that scoring eight texts takes above the model."""
    model = build(SHAPES[MEMORY_SHAPE](), device)
    forward = forward_of(model)
    forward = forward.compiled() if compiled else forward
    records = texts(tokens, tokens, 8, model.config.vocab_size)
    way(name, model, texts(8, 8, 2, model.config.vocab_size), forward)()
    print(memory_above(way(name, model, records, forward), device))


def memory(tokens: int, device: str, compiled: bool) -> None:
    print(f"Memory above the model, {MEMORY_SHAPE}, 8 texts of {tokens:,} tokens, a process per way")
    found = {name: in_child(__file__, name, tokens, device, int(compiled)) for name in (IMPRINT, *NAIVE)}
    rows = [
        [name, f"{value / 2**20:,.0f} MB", f"{value / max(found[IMPRINT], 1):.1f}"] for name, value in found.items()
    ]
    table(["way", "peak", "x Imprint's"], rows)


def main() -> None:
    parser = arguments(__doc__, "--compiled", "--no-memory")
    args = parser.parse_args()
    device = args.device
    shapes = CPU_SHAPES if device == "cpu" else DEVICE_SHAPES
    lengths, rounds, work = ("short", "medium", "long"), 3, WORK[device]
    if args.quick:
        shapes, lengths, rounds, work = ("gpt2-6x256", "llama-4x128"), ("short", "medium"), 1, work / 20
    header("Scoring" + (", compiled" if args.compiled else ""), device)
    for shape in shapes:
        for length in lengths:
            compare(shape, length, device, work, rounds, args.compiled)
            if device == "cuda":
                torch.cuda.empty_cache()
    if not args.no_memory:
        memory(MEMORY_TOKENS // (4 if args.quick else 1), device, args.compiled)


if __name__ == "__main__":
    if "--child" in sys.argv:
        name, tokens, device, compiled = sys.argv[2:]
        child(name, int(tokens), device, compiled == "1")
    else:
        main()
