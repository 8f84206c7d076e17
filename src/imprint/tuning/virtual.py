"""Where virtual tokens start: from tokens of the vocabulary, which every model has, rather than from noise.

PEFT draws prompt embeddings and prefixes from N(0, 1), many times the scale of what the layers are used to. Lester et
al. 2021 (prompts) and Li & Liang 2021 (prefixes) found that starting from real tokens learns faster and more stably.
The draw comes from torch's seeded generator; no tuning text is used, so nothing of it is planted by the start.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from imprint.errors import ImprintError


def _draw(model: nn.Module, count: int) -> torch.Tensor:
    """[P] random token ids."""
    weight: torch.Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
    return torch.randint(weight.shape[0], (count,)).to(weight.device)


@torch.no_grad()
def fill_prompt(tuned: Any) -> None:
    """Prompt tuning: the embeddings of the drawn tokens, as the layer gives them (Gemma's scales its weights)."""
    base, encoder = tuned.get_base_model(), tuned.prompt_encoder[tuned.active_adapter]
    tokens = _draw(base, encoder.embedding.weight.shape[0])
    encoder.embedding.weight.copy_(base.get_input_embeddings()(tokens))


@torch.no_grad()
def fill_prefix(tuned: Any) -> None:
    """Prefix tuning: the keys and values that the drawn tokens give at positions 0 … P - 1.

    PEFT stores a prefix as one row per virtual token, [P, L · 2 · H · D]: per layer the keys, then the values.

    Raises:
        ImprintError: the installed peft does not put a prefix where this architecture looks for it.
    """
    base, encoder = tuned.get_base_model(), tuned.prompt_encoder[tuned.active_adapter]
    weight = encoder.embedding.weight
    tokens = _draw(base, weight.shape[0])
    output = base(input_ids=tokens[None], use_cache=True)
    cache = output["cache"] if "cache" in output else output["past_key_values"]  # renamed in Transformers 5.24
    pairs = [state for layer in cache_pairs(cache) for state in layer]  # 2 L tensors [1, H, P, D]
    rows = torch.stack([state[0].transpose(0, 1).flatten(1) for state in pairs], dim=1)  # [P, 2 L, H · D]
    weight.copy_(rows.flatten(1))
    _check_prefix(tuned, base, tokens)


def _check_prefix(tuned: Any, base: nn.Module, tokens_P: torch.Tensor) -> None:
    """A prefix made of tokens must act like those tokens; some versions of peft misplace it for some architectures."""
    text = tokens_P.flip(0)[None, :2]  # two fit into any context that the plan lets through
    want = base(input_ids=torch.cat([tokens_P[None], text], dim=1)).logits[:, -text.shape[1] :].float().log_softmax(-1)
    found = tuned(input_ids=text, use_cache=False).logits.float().log_softmax(-1)
    gap = (found - want).gather(-1, text[..., None]).abs().mean().item()
    if not gap < 0.1:  # float32 gives 1e-6, bfloat16 1e-2, a misplaced prefix 1 and more
        raise ImprintError(
            f"the installed peft does not place a prefix correctly in {type(base).__name__} (log-probabilities are off "
            f"by {gap:.2g} on average): upgrade peft and transformers, or use another method"
        )


def cache_pairs(cache: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of each layer, [B, H, T, D], from the cache types of several Transformers versions."""
    if hasattr(cache, "layers"):
        return [(layer.keys, layer.values) for layer in cache.layers]
    return [(layer[0], layer[1]) for layer in cache]
