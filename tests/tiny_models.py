"""Random models of every architecture family that scoring is proven on, small enough to score in milliseconds."""

from __future__ import annotations

import copy

import torch
import transformers as t
from torch import nn

VOCABULARY = 61
_COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    **_COMMON,
}

CONFIGS = {
    "gpt2": t.GPT2Config(n_layer=2, n_embd=32, n_head=4, n_positions=96, **_COMMON),
    "llama": t.LlamaConfig(**_LLAMA),
    "gpt_neox": t.GPTNeoXConfig(**{k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"}),
    "opt": t.OPTConfig(
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=96,
        word_embed_proj_dim=32,
        **_COMMON,
    ),
    "qwen2": t.Qwen2Config(**_LLAMA),
    "mistral": t.MistralConfig(sliding_window=64, **_LLAMA),
    "gemma": t.GemmaConfig(head_dim=8, **_LLAMA),
    "gemma2": t.Gemma2Config(
        head_dim=8, final_logit_softcapping=3.0, query_pre_attn_scalar=8, sliding_window=64, **_LLAMA
    ),
    "mixtral": t.MixtralConfig(num_local_experts=4, num_experts_per_tok=2, **_LLAMA),
    "qwen2_moe": t.Qwen2MoeConfig(
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=24, **_LLAMA
    ),
    "olmoe": t.OlmoeConfig(num_experts=4, num_experts_per_tok=2, **_LLAMA),
}


def build(name: str, seed: int = 0) -> nn.Module:
    """A random causal language model with lively logits (wide initial values), float32, evaluation mode."""
    torch.manual_seed(seed)
    config = copy.deepcopy(CONFIGS[name])  # untying a head writes into its model's configuration
    config.initializer_range = 0.2
    return t.AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(False)
