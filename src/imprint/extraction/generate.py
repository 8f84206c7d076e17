"""What a tuned model writes after a beginning, and how probable the true ending is when it is sampled.

Transformers' own `generate` is not used: it obeys the `generation_config.json` of the model's folder (penalties, cuts,
forced and forbidden tokens), pads on the left, and hands virtual tokens to each architecture in another way. Here texts
of one length go through the model together, nothing is padded, and what stands before all of them is computed once.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from peft import PeftModel, PeftType
from torch import nn
from transformers import DynamicCache
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from imprint.data.tokens import Encoded, batches, pad
from imprint.extraction.passages import written
from imprint.extraction.spec import ExtractionSpec, Scheme
from imprint.tuning.models import autocast, base_of, head_of
from imprint.tuning.virtual import cache_pairs
from imprint.types import Floats

LOGITS = 1 << 27
"""Logits that are looked at together: half a GiB in float32, of which sorting needs a few."""
PROBE = (4, 1, 2)
"""Lengths of the pieces in which the cached way is compared with the model itself."""

Step = Callable[[torch.Tensor], torch.Tensor]
"""[B, T] the next tokens of B texts → [B, V] logits of what follows; a step goes on where the last one was."""


def measure_extraction(model: nn.Module, passages: Sequence[Encoded], asked: ExtractionSpec, budget: int) -> pa.Table:
    """Write after every prefix, and ask how probable its suffix is: one row per passage, without texts or tokens.

    Args:
        model: left in evaluation mode.
        passages: records cut by `passage`, with a suffix of `asked.suffix` tokens each.
        budget: tokens that are kept in mind at once.
    """
    prefixes = [cut.ids[: len(cut) - asked.suffix] for cut in passages]
    texts = continuations(model, prefixes, asked.suffix, budget)
    return written(passages, texts, suffix_log_probability(model, passages, asked.scheme, budget))


@torch.inference_mode()
def continuations(
    model: nn.Module,
    prefixes: Sequence[NDArray[np.int32]],
    length: int,
    budget: int,
    progress: Callable[[int], None] | None = None,
) -> list[NDArray[np.int32]]:
    """The most probable next token, `length` times over, after each prefix; an end token ends nothing.

    The model's own logits decide, in its own precision. Where two are equal up to rounding, which is common in 16 bits,
    the batch may decide.

    Args:
        model: tuned by any method, or not at all; left in evaluation mode.
        prefixes: N beginnings, each of at least one token.
        length: tokens to write.
        budget: tokens that are kept in mind at once.
        progress: called with the number of texts after each batch.
    """
    model.eval()
    device = next(model.parameters()).device
    found = [np.zeros(0, np.int32)] * len(prefixes)
    with _after_the_last(model), autocast(model):
        begin = _quickest(model)
        for group in _alike([len(prefix) for prefix in prefixes], length, budget):
            ids = torch.from_numpy(np.stack([prefixes[n] for n in group])).long().to(device)
            step, written = begin(), []
            for _ in range(length):
                ids = step(ids).argmax(-1, keepdim=True).to(device)
                written.append(ids)
            for n, row in zip(group, torch.cat(written, 1).cpu().numpy().astype(np.int32), strict=True):
                found[n] = row
            if progress:
                progress(len(group))
    return found


def _alike(lengths: Sequence[int], more: int, budget: int) -> Iterator[list[int]]:
    """Positions of texts of one length, as many as the budget allows with what will be written.

    >>> list(_alike([3, 5, 3, 3], more=2, budget=10))
    [[0, 2], [3], [1]]
    """
    order = sorted(range(len(lengths)), key=lambda n: (lengths[n], n))
    for length, same in itertools.groupby(order, key=lambda n: lengths[n]):
        places, most = list(same), max(1, budget // (length + more))
        for first in range(0, len(places), most):
            yield places[first : first + most]


@contextmanager
def _after_the_last(model: nn.Module) -> Iterator[None]:
    """The output layer meets the last position only."""
    hook = head_of(model).register_forward_pre_hook(lambda _, args: (args[0][:, -1:], *args[1:]))
    try:
        yield
    finally:
        hook.remove()


def _quickest(model: nn.Module) -> Callable[[], Step]:
    """Keys and values kept from step to step, where that gives what the model gives; else the whole text every time."""
    rng = np.random.default_rng(0)
    size, device = base_of(model).config.get_text_config().vocab_size, next(model.parameters()).device
    ids = torch.from_numpy(rng.integers(0, size, (2, sum(PROBE)))).to(device)
    wanted = _told(_whole(model)(), ids)
    try:
        begin = _cached(model)
        found = _told(begin(), ids)
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return _whole(model)
    rounding = 5e-2 if base_of(model).config.dtype in (torch.float16, torch.bfloat16) else 1e-4
    same = (found - wanted).abs().mean() <= rounding * wanted.abs().mean()
    return begin if bool(same) else _whole(model)


def _told(step: Step, ids: torch.Tensor) -> torch.Tensor:
    """[3, B, V] logits after each piece of the probe, about their mean."""
    pieces = torch.split(ids, list(PROBE), dim=1)
    logits = torch.stack([step(piece).float() for piece in pieces])
    return logits - logits.mean(-1, keepdim=True)


def _whole(model: nn.Module) -> Callable[[], Step]:
    def begin() -> Step:
        seen: list[torch.Tensor] = []

        def step(ids: torch.Tensor) -> torch.Tensor:
            seen.append(ids)
            return model(input_ids=torch.cat(seen, 1), use_cache=False).logits[:, -1]  # type: ignore[no-any-return]

        return step

    return begin


def _cached(model: nn.Module) -> Callable[[], Step]:
    """Through the base, whose modules hold the updates of LoRA; virtual tokens are keys and values in front."""
    base = base_of(model)
    named = "cache" if "cache" in inspect.signature(base.forward).parameters else "past_key_values"  # renamed in 5.24
    front = _front(model, base, named)

    def begin() -> Step:
        kept: list[Any] = []

        def step(ids: torch.Tensor) -> torch.Tensor:
            if not kept:
                kept.append(DynamicCache())
                for layer, (keys, values) in enumerate(front):
                    kept[0].update(keys.expand(len(ids), -1, -1, -1), values.expand(len(ids), -1, -1, -1), layer)
            return base(input_ids=ids, use_cache=True, **{named: kept[0]}).logits[:, -1]  # type: ignore[no-any-return]

        return step

    return begin


def _front(model: nn.Module, base: Any, named: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of each layer, [1, H, P, D], that stand in front of every text; none without virtual tokens."""
    if not isinstance(model, PeftModel) or not model.active_peft_config.is_prompt_learning:
        return []
    prompt: Any = model.get_prompt(batch_size=1)
    if model.active_peft_config.peft_type == PeftType.PREFIX_TUNING:
        return cache_pairs(prompt)
    cache = DynamicCache()
    base(inputs_embeds=prompt.to(base.get_input_embeddings().weight.dtype), use_cache=True, **{named: cache})
    return cache_pairs(cache)


@torch.inference_mode()
def suffix_log_probability(model: nn.Module, records: Sequence[Encoded], scheme: Scheme, budget: int) -> Floats:
    """[N] log probability, in nats, that sampling writes the scored tokens of each record after those before them.

    log Π q(x_t | x_<t), where q is the model's distribution as `scheme` changes it, by Transformers' own code for that;
    −∞ where a token is cut off. One pass over prefix and suffix: nothing is drawn.

    Args:
        model: left in evaluation mode.
        records: N records, each with at least one scored token.
        budget: tokens of one forward pass.
    """
    model.eval()
    device = next(model.parameters()).device
    warpers = _warpers(scheme)
    found = np.empty(len(records))
    vocabulary = base_of(model).config.get_text_config().vocab_size
    for group in batches([len(record) for record in records], min(budget, max(1, LOGITS // vocabulary))):
        ids, scored = (torch.from_numpy(array).to(device) for array in pad([records[n] for n in group]))
        logits = _logits(model, ids, scored)
        for warp in warpers:
            logits = warp(None, logits)
        chosen = ids[scored].to(logits.device)
        logp = logits.log_softmax(-1).gather(1, chosen[:, None])[:, 0].cpu().numpy().astype(np.float64)
        counts = [int(records[n].scored.sum()) for n in group]
        found[group] = np.add.reduceat(logp, np.cumsum([0, *counts[:-1]]))
    return found


def _warpers(scheme: Scheme) -> list[Any]:
    """In the order in which `generate` applies them."""
    made: list[Any] = []
    if scheme.temperature != 1:
        made.append(TemperatureLogitsWarper(scheme.temperature))
    if scheme.top_k:
        made.append(TopKLogitsWarper(scheme.top_k))
    if scheme.top_p and scheme.top_p < 1:
        made.append(TopPLogitsWarper(scheme.top_p))
    return made


def _logits(model: nn.Module, ids: torch.Tensor, scored: torch.Tensor) -> torch.Tensor:
    """[R, V] what the model itself says where it predicts the scored tokens; the output layer meets no other position.

    Texts are padded on the right. Virtual tokens lengthen the hidden states or do not, so it is counted from that end.
    """
    rows, columns = scored.nonzero(as_tuple=True)

    def pick(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        places = columns - 1 + args[0].shape[1] - ids.shape[1]
        return (args[0][rows.to(args[0].device), places.to(args[0].device)][None], *args[1:])

    hook = head_of(model).register_forward_pre_hook(pick)
    try:
        with autocast(model):
            return model(input_ids=ids, use_cache=False).logits[0].float()  # type: ignore[no-any-return]
    finally:
        hook.remove()
