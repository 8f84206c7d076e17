"""Writing on: 50 tokens after 50 given, greedily, by each tuning method.

    python benchmarks/extraction.py [--quick] [--device cuda]

*naive* has the whole text go through the model for every token, one text at a time, as the tests' oracle does;
*generate* is Transformers' (and PEFT's) own, with its cache, on one text or on all together. The last column counts the
texts for which a way writes what *naive* writes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from common import SHAPES, arguments, budget_of, build, header, interleaved, ratio, table
from imprint.extraction.generate import continuations
from imprint.spec import MethodSpec
from imprint.tuning.methods import METHODS, resolve_method
from imprint.tuning.models import trainable

GIVEN = WRITTEN = 50
TEXTS = 16
NAIVE = 4
"""Texts that the naive way is timed on; its time is scaled up. The other ways are compared with it on these."""
CPU_SHAPES = {"gpt2-6x256": ("full", "lora", "prefix", "prompt"), "gpt2-124M": ("lora",)}
DEVICE_SHAPES = {"gpt2-1.5B": ("lora", "prompt"), "llama2-7B": ("lora",)}
Texts = list[list[int]]


def tuned(shape: str, method: str, device: str) -> nn.Module:
    """A random model; what trains has been moved away from where it starts."""
    base = build(SHAPES[shape](), device)
    spec = resolve_method(MethodSpec(name=method, options={}), base.config.hidden_size, None)
    model = METHODS[method].attach(base, spec.options).eval()
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def naive(model: nn.Module, given: Sequence[NDArray[np.int32]], device: str) -> Texts:
    written = []
    for prefix in given:
        ids = torch.from_numpy(prefix).long()[None].to(device)
        for _ in range(WRITTEN):
            ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        written.append(ids[0, len(prefix) :].tolist())
    return written


@torch.no_grad()
def generate(model: nn.Module, given: Sequence[NDArray[np.int32]], device: str, size: int) -> Texts:
    written = []
    for first in range(0, len(given), size):
        ids = torch.from_numpy(np.stack(given[first : first + size])).long().to(device)
        options = {"max_new_tokens": WRITTEN, "min_new_tokens": WRITTEN, "do_sample": False, "pad_token_id": 0}
        found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), eos_token_id=-1, **options)
        written += found[:, -WRITTEN:].tolist()
    return written


def compare(shape: str, method: str, device: str, rounds: int) -> None:
    model = tuned(shape, method, device)
    vocabulary = SHAPES[shape]().vocab_size
    given = list(np.random.default_rng(0).integers(0, vocabulary, (TEXTS, GIVEN)).astype(np.int32))
    imprint = "Imprint"
    ways: dict[str, Callable[[], Texts]] = {
        imprint: lambda: [t.tolist() for t in continuations(model, given, WRITTEN, budget_of(device))],
        "generate, all together": lambda: generate(model, given, device, TEXTS),
        "generate, one by one": lambda: generate(model, given, device, 1),
        "naive": lambda: naive(model, given[:NAIVE], device),
    }
    wanted, same = naive(model, given[:NAIVE], device), {}
    for name, work in list(ways.items()):  # which also warms it
        try:
            same[name] = sum(a == b for a, b in zip(work(), wanted, strict=False))
        except (IndexError, RuntimeError, TypeError, ValueError) as error:  # of the libraries' own way
            print(f"{name} fails: {type(error).__name__}: {error}")
            del ways[name]
    taken = interleaved(ways, rounds, device)
    taken["naive"] = [value * TEXTS / NAIVE for value in taken["naive"]]
    rows = [
        [
            name,
            f"{TEXTS * WRITTEN / float(np.median(spent)):,.0f}",
            ratio(spent, taken[imprint]),
            f"{same[name]} of {NAIVE}",
        ]
        for name, spent in taken.items()
    ]
    print(f"{shape}, {method}: {TEXTS} texts, {GIVEN} tokens given, {WRITTEN} written")
    table(["way", "tokens/s", "x Imprint's time", "as naive"], rows)


def main() -> None:
    args = arguments(__doc__).parse_args()
    header("Writing on", args.device)
    shapes = CPU_SHAPES if args.device == "cpu" else DEVICE_SHAPES
    if args.quick:
        shapes = {"llama-4x128": ("lora", "prompt")}
    for shape, methods in shapes.items():
        for method in methods:
            compare(shape, method, args.device, 1 if args.quick else 3)


if __name__ == "__main__":
    main()
