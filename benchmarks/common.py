"""What the benchmarks share: models and texts of stated shapes, interleaved timing, the machine's peak, memory.

Ratios come from interleaved rounds, so a busy machine slows every way alike; a ratio is the median over the rounds,
with the smallest and the largest. Nothing here asserts a time.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig
from transformers.utils import logging

from imprint.data.tokens import Encoded
from imprint.engine.costs import costs_of, peak_flops
from imprint.tuning.base import CPU_BUDGET, GPU_BUDGET

CONTEXT = 1024 + 32
"""The longest texts and room for virtual tokens."""
LENGTHS = {"short": (15, 60), "medium": (20, 300), "long": (512, 1024)}
"""Tokens of a text, both ends included."""
TEXTS_AT_MOST = {"cpu": 400, "cuda": 1600}

warnings.filterwarnings("ignore", category=FutureWarning)  # between peft, transformers and their Trainer
logging.set_verbosity_error()
logging.disable_progress_bar()


def gpt2(layers: int, width: int, vocabulary: int, head: int = 64) -> PretrainedConfig:
    """Without dropout: the public scripts' model.train() would draw masks that Imprint does not draw."""
    off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    size = {"n_layer": layers, "n_embd": width, "n_head": width // head, "vocab_size": vocabulary}
    return GPT2Config(**size, n_positions=CONTEXT, **off)


def llama(layers: int, width: int, inner: int, vocabulary: int, head: int = 128) -> PretrainedConfig:
    return LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=inner,
        num_attention_heads=width // head,
        num_key_value_heads=width // head,
        vocab_size=vocabulary,
        max_position_embeddings=4096,
    )


SHAPES: dict[str, Callable[[], PretrainedConfig]] = {
    "gpt2-124M": lambda: gpt2(12, 768, 50257),
    "gpt2-6x256": lambda: gpt2(6, 256, 50257, head=32),
    "llama-4x128": lambda: llama(4, 128, 352, 4096, head=32),
    "gpt2-6x256-128k": lambda: gpt2(6, 256, 128256, head=32),
    "gpt2-1.5B": lambda: gpt2(48, 1600, 50257),
    "llama2-7B": lambda: llama(32, 4096, 11008, 32000),
}
DEVICE_SHAPES = ("gpt2-124M", "gpt2-1.5B", "llama2-7B")


def arguments(description: str | None, *flags: str) -> argparse.ArgumentParser:
    """--quick, --device and further flags."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke run of under a minute")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    for flag in flags:
        parser.add_argument(flag, action="store_true")
    return parser


def build(config: PretrainedConfig, device: str = "cpu") -> nn.Module:
    """Random weights on the device: float32 on a CPU, bfloat16 on a GPU; frozen, in evaluation mode."""
    config.dtype = torch.float32 if device == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    return model.eval().requires_grad_(False)


def texts(low: int, high: int, count: int, vocabulary: int, seed: int = 0) -> list[Encoded]:
    """Random tokens; lengths evenly spread, so that few texts stand for many; all but the first token are scored."""
    rng = np.random.default_rng(seed)
    made = []
    for n, length in enumerate(rng.permutation(np.linspace(low, high, count).round().astype(int))):
        ids = rng.integers(0, vocabulary, length).astype(np.int32)
        made.append(Encoded(f"{seed}/{n}", ids, np.arange(length) > 0, 1))
    return made


def some_texts(model: nn.Module, length: str, work: float, least: int = 8) -> list[Encoded]:
    """As many texts as one pass of `work` floating point operations takes."""
    low, high = LENGTHS[length]
    vocabulary, device = model.config.vocab_size, next(model.parameters()).device.type
    each = costs_of(model).scoring(texts((low + high) // 2, (low + high) // 2, 1, vocabulary))
    return texts(low, high, int(np.clip(work / each, least, TEXTS_AT_MOST[device])), vocabulary)


def tokens_of(records: Sequence[Encoded]) -> int:
    return sum(len(record) for record in records)


def budget_of(device: str) -> int:
    return CPU_BUDGET if device == "cpu" else GPU_BUDGET


def seconds(work: Callable[[], object], device: str = "cpu") -> float:
    """Wall clock; a GPU has finished before it stops."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def interleaved(ways: Mapping[str, Callable[[], object]], rounds: int, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of every way, round after round."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, work in ways.items():
            taken[name].append(seconds(work, device))
    return taken


def ratio(slow: Sequence[float], fast: Sequence[float], digits: int = 1) -> str:
    """Median of the rounds' ratios, smallest and largest."""
    found = [a / b for a, b in zip(slow, fast, strict=True)]
    low, middle, high = (f"{value:.{digits}f}" for value in (min(found), np.median(found), max(found)))
    return middle if len(found) == 1 else f"{middle} ({low} to {high})"


def peaks(model: nn.Module) -> tuple[float, float]:
    """FLOP/s now: of a plain `a @ b`, and of the engine's own product (`engine.costs.peak_flops`, not its memory)."""
    weight = next(model.parameters())
    size = 1024 if weight.device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=weight.device).to(weight.dtype) for _ in range(2))
    plain = min(seconds(lambda: a @ b, weight.device.type) for _ in range(5))
    return 2.0 * size**3 / plain, peak_flops.__wrapped__(weight.device, weight.dtype)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as they need to be; the first to the left, the others to the right."""
    widths = [max(len(row[n]) for row in (head, *rows)) for n in range(len(head))]
    for row in (head, *rows):
        cells = [
            cell.ljust(w) if n == 0 else cell.rjust(w) for n, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        print("  " + "  ".join(cells), flush=True)
    print()


def header(title: str, device: str) -> None:
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"# {title}: {machine}, torch {torch.__version__}\n", flush=True)


def _status(key: str) -> int:
    """Bytes of a line of /proc/self/status; the process's maximum where there is no such file."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_above(work: Callable[[], object], device: str = "cpu") -> int:
    """Bytes that `work` held at its peak above what was held before.

    The kernel's high-water mark is set back first: `ru_maxrss` starts, in a child, at what its parent once held, and
    holds what building the model took for a moment.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux, or not allowed: then the difference of two maxima
        before = _status("VmHWM")
    else:
        before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def in_child(script: str, *values: object, **environment: str) -> float:
    """The number that `python SCRIPT --child VALUES` prints last: a process of its own, so that memory starts low."""
    command = [sys.executable, script, "--child", *map(str, values)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return float(json.loads(done.stdout.splitlines()[-1]))
