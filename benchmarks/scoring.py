"""Scoring against a naive loop: one text at a time, the full log-softmax, the same statistics.

    python benchmarks/scoring.py

Ratios come from interleaved runs, so a busy machine slows both sides alike. Share of peak is against a plain matrix
product at the same moment. Never asserted in a test.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from imprint.data.tokens import Encoded
from imprint.scoring.score import token_stats

ROUNDS = 3


def texts(low: int, high: int, count: int, vocabulary: int) -> list[Encoded]:
    rng = np.random.default_rng(0)
    made = []
    for n, length in enumerate(rng.integers(low, high + 1, count)):
        ids = rng.integers(0, vocabulary, length).astype(np.int32)
        made.append(Encoded(str(n), ids, np.arange(length) > 0, 1))
    return made


@torch.no_grad()
def naive(model: torch.nn.Module, records: list[Encoded]) -> None:
    for record in records:
        ids = torch.from_numpy(record.ids).long()[None]
        logp = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
        p = logp.exp()
        mean = (p * logp).sum(-1)
        variance = (p * logp.square()).sum(-1) - mean.square()
        _ = logp.gather(-1, ids[0, 1:, None]), mean, variance, logp.argmax(-1) == ids[0, 1:]


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def peak() -> float:
    """FLOP/s of a plain matrix product."""
    a, b = torch.randn(2048, 1024), torch.randn(1024, 2048)
    return 2 * 2048 * 1024 * 2048 * 5 / seconds(lambda: [a @ b for _ in range(5)])


def main() -> None:
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    for layers, width, vocabulary in ((4, 96, 1024), (6, 256, 50257)):
        config = GPT2Config(n_layer=layers, n_embd=width, n_head=width // 32, vocab_size=vocabulary, n_positions=512)
        model = GPT2LMHeadModel(config).eval()
        flops_per_token = 2 * (12 * layers * width**2 + vocabulary * width)
        for name, low, high in (("short", 15, 60), ("medium", 20, 300)):
            records = texts(low, high, 120, vocabulary)
            tokens = sum(len(record) for record in records)
            ratios, shares = [], []
            for _ in range(ROUNDS):
                slow = seconds(lambda: naive(model, records))  # noqa: B023
                fast = seconds(lambda: token_stats(model, records, 4096))  # noqa: B023
                ratios.append(slow / fast)
                shares.append(flops_per_token * tokens / fast / peak())
            print(
                f"{layers} x {width}, vocabulary {vocabulary:6,}, {name:6}: {np.median(ratios):.1f} x the naive loop "
                f"({min(ratios):.1f} to {max(ratios):.1f}), {np.median(shares):.0%} of peak, {tokens / fast:,.0f} tok/s"
            )


if __name__ == "__main__":
    main()
