"""FT head, fifteen epochs of training and scoring: hidden states computed once, every time anew, and the naive way.

    python benchmarks/head.py [--quick] [--device cuda]

An epoch is the same work as the next, so a few are timed and multiplied: 15 epochs = what is done once + 15 x the
median epoch. The naive way is transformers.Trainer with all but the head frozen, then one text at a time, target and
reference, as mimir does. The rows of LLaMA2-7B are extrapolations on a CPU: a model of its width and vocabulary is
measured with two layers and with none, in the same rounds; 32 layers are the latter and 16 times the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from common import SHAPES, arguments, budget_of, build, header, interleaved, llama, table, texts, tokens_of
from imprint.data.tokens import Encoded
from imprint.engine.features import features, kept_forward
from imprint.engine.forward import forward_of
from imprint.scoring.score import token_stats
from imprint.spec import TrainSpec
from imprint.tuning.methods import METHODS
from imprint.tuning.models import shared_copy
from imprint.tuning.train import Trainer, train
from naive import BATCH, mimir_like, trainer

EPOCHS, RATE = 15, 1e-4
MEASURED, WHOLE = 2, 32
"""Layers of the LLaMA2-7B width that are measured, and that there are."""
KEPT, ANEW, NAIVE = WAYS = ("kept hidden states", "computed anew", "naive")
Work = Callable[[], object]
Times = dict[str, tuple[float, float]]
"""way → (seconds once, seconds of an epoch)."""


def works(base: nn.Module, tuned: Sequence[Encoded], scored: Sequence[Encoded], rounds: int) -> dict[str, Work]:
    """Per way what is done once, if anything ("once WAY"), and an epoch of training and scoring ("epoch WAY")."""
    device = next(base.parameters()).device.type
    budget, spec = budget_of(device), TrainSpec(epochs=rounds, batch_size=BATCH)
    kept, anew, naive = (METHODS["head"].attach(shared_copy(base), {}) for _ in range(3))
    looked_up = kept_forward(kept, features(kept, [*tuned, *scored], budget))
    through = forward_of(anew)
    runs = {
        KEPT: train([Trainer(kept, tuned, spec, RATE, 0)], looked_up, budget),
        ANEW: train([Trainer(anew, tuned, spec, RATE, 0)], through, budget),
    }
    own = trainer(naive, tuned, RATE, device)

    def cache() -> None:  # and the reference's scores
        forward = kept_forward(kept, features(kept, [*tuned, *scored], budget))
        token_stats(kept, scored, budget, forward=forward)

    def epoch(way: str) -> None:
        next(runs[way])
        model, forward = {KEPT: (kept, looked_up), ANEW: (anew, through)}[way]
        token_stats(model, scored, budget, forward=forward)

    def naive_epoch() -> None:
        own.train()
        naive.eval()
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):  # a float32 head on 16 bits
            mimir_like(naive, scored)
            mimir_like(base, scored)

    return {
        f"once {KEPT}": cache,
        f"once {ANEW}": lambda: token_stats(anew, scored, budget, forward=through),
        f"epoch {KEPT}": lambda: epoch(KEPT),
        f"epoch {ANEW}": lambda: epoch(ANEW),
        f"epoch {NAIVE}": naive_epoch,
    }


def medians(ways: dict[str, Work], rounds: int, device: str) -> dict[str, float]:
    interleaved(ways, 1, device)  # everything is warm afterwards
    return {name: float(np.median(spent)) for name, spent in interleaved(ways, rounds, device).items()}


def show(title: str, taken: dict[str, float]) -> None:
    print(title)
    times: Times = {way: (taken.get(f"once {way}", 0.0), taken[f"epoch {way}"]) for way in WAYS}
    whole = {way: once + EPOCHS * each for way, (once, each) in times.items()}
    rows = [
        [way, f"{once:.2f} s", f"{each:.2f} s", f"{whole[way]:,.1f} s", f"{whole[way] / whole[KEPT]:.1f}"]
        for way, (once, each) in times.items()
    ]
    table(["way", "once", "an epoch", f"{EPOCHS} epochs", "x kept"], rows)


def extrapolated(quick: bool, rounds: int) -> None:
    """LLaMA2-7B by measured extrapolation."""
    width, inner, vocabulary = (512, 1376, 8000) if quick else (4096, 11008, 32000)
    base = build(llama(MEASURED, width, inner, vocabulary))
    bare = shared_copy(base)
    bare.model.layers = nn.ModuleList()  # type: ignore[union-attr]
    tuned, scored = texts(15, 60, 16, vocabulary, seed=1), texts(15, 60, 16, vocabulary, seed=2)
    ways = {
        f"{layers} {name}": work
        for layers, model in ((MEASURED, base), (0, bare))
        for name, work in works(model, tuned, scored, rounds + 1).items()
    }
    found = medians(ways, rounds, "cpu")
    taken = {}
    for name in (name.removeprefix("0 ") for name in found if name.startswith("0 ")):
        some, none = found[f"{MEASURED} {name}"], found[f"0 {name}"]
        # an epoch on kept states meets no layer: what differs there is noise
        taken[name] = some if name == f"epoch {KEPT}" else none + WHOLE / MEASURED * (some - none)
    shape = f"{'a small stand-in for LLaMA2-7B' if quick else 'LLaMA2-7B'} ({width}, {inner}, V {vocabulary:,})"
    counts = f"16 short texts tuned on ({tokens_of(tuned)} tokens), 16 scored"
    show(f"FT head, {shape}, EXTRAPOLATED from {MEASURED} layers and none to {WHOLE}; {counts}", taken)


def report(device: str, quick: bool) -> None:
    rounds = 1 if quick else 3
    for shape in ("gpt2-6x256",) if quick else ("gpt2-124M",) if device == "cpu" else ("gpt2-124M", "llama2-7B"):
        base = build(SHAPES[shape](), device)
        count = 64 if device == "cuda" else 8 if quick else 16
        tuned, scored = (texts(15, 60, n, base.config.vocab_size, seed=n) for n in (count, 2 * count))
        title = f"FT head, {shape}, {count} short texts tuned on ({tokens_of(tuned)} tokens), {2 * count} scored"
        show(title, medians(works(base, tuned, scored, rounds + 1), rounds, device))
    if device == "cpu":
        extrapolated(quick, rounds)


def main() -> None:
    args = arguments(__doc__).parse_args()
    header("FT head", args.device)
    report(args.device, args.quick)


if __name__ == "__main__":
    main()
