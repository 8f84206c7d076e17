"""Pretrain the tiny models that ship with Imprint, on the public part of the offline world.

    python scripts/pretrain.py [NAME ...]      # default: all five, an hour and a quarter on one CPU core

Every text is seen once: the stream of the public world has no end. Results go to `src/imprint/tiny/NAME`
(weights in float16, tokenizer, a model card with the training curve and the hash of the data).

`mixtral-medium` is `llama-medium` with eight experts in place of each feed-forward layer. A token meets two of them,
half as wide each as the layer they replace: as many weights are active, but for the routers.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

from imprint.data.world import public_texts

OUT = Path(__file__).parent.parent / "src" / "imprint" / "tiny"
END = "<|endoftext|>"
VOCABULARY = 1024
CONTEXT = 256
ROWS = 24  # rows of CONTEXT tokens per step
STEPS = 1400
HELD_OUT = 800  # texts
PEAK_RATE = {"gpt2-small": 6e-3, "gpt2-medium": 4e-3, "gpt2-large": 3e-3, "llama-medium": 4e-3, "mixtral-medium": 4e-3}
LLAMA = {
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}
EXPERTS, CHOSEN = 8, 2
BALANCE = 0.02
"""Weight of the loss that keeps routers from using a few experts only (Fedus et al. 2021, equation 4), shares being
taken over all layers together, as Transformers does. Taken layer by layer they are more even (each expert of a layer
sees 11% to 33% of the tokens, not 0.4% to 63%), but held-out perplexity is 3.22 in place of 2.90, and `llama-medium`,
at 2.89, would be no twin any more."""


def build(name: str) -> torch.nn.Module:
    common = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}
    if name == "llama-medium":
        return LlamaForCausalLM(LlamaConfig(intermediate_size=256, **LLAMA, **common))
    if name == "mixtral-medium":
        return MixtralForCausalLM(
            MixtralConfig(
                intermediate_size=256 // CHOSEN,
                num_local_experts=EXPERTS,
                num_experts_per_tok=CHOSEN,
                router_aux_loss_coef=BALANCE,
                output_router_logits=True,
                **LLAMA,
                **common,
            )
        )
    layers, width = {"gpt2-small": (2, 64), "gpt2-medium": (4, 96), "gpt2-large": (5, 144)}[name]
    return GPT2LMHeadModel(
        GPT2Config(
            n_layer=layers,
            n_embd=width,
            n_head=width // (36 if width == 144 else 32),
            n_positions=CONTEXT,
            activation_function="gelu_pytorch_tanh",  # the same function as gelu_new, in one kernel
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **common,
        )
    )


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE; every text starts with the end-of-text token, so that its first token is predicted too."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(itertools.islice(public_texts("tokenizer"), 20_000), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", pair=f"{END} $A $B", special_tokens=[(END, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, unk_token=END, model_max_length=CONTEXT
    )


def rows(tokenizer: PreTrainedTokenizerFast, digest: hashlib._Hash) -> Iterator[list[int]]:
    """Rows of at most CONTEXT + 1 tokens: whole texts, shuffled, each between end-of-text tokens."""
    stream, row, generator = public_texts(), [0], np.random.default_rng(0)
    while True:
        texts = list(itertools.islice(stream, 4096))  # shuffled, so that two texts on one subject lie far apart
        digest.update("\n".join(texts).encode())
        encoded = tokenizer(texts, add_special_tokens=False).input_ids
        for n in generator.permutation(len(encoded)):
            if len(row) + len(encoded[n]) + 1 > CONTEXT + 1:
                yield row
                row = [0]
            row += [*encoded[n], 0]


def batches(tokenizer: PreTrainedTokenizerFast, digest: hashlib._Hash) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    stream = rows(tokenizer, digest)
    while True:
        ids = torch.zeros(ROWS, CONTEXT + 1, dtype=torch.long)
        labels = torch.full((ROWS, CONTEXT), -100)
        for n, row in enumerate(itertools.islice(stream, ROWS)):
            ids[n, : len(row)] = torch.tensor(row)
            labels[n, : len(row) - 1] = torch.tensor(row[1:])
        yield ids[:, :-1], labels


@torch.no_grad()
def held_out_perplexity(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast) -> float:
    texts = list(itertools.islice(public_texts("held out"), HELD_OUT))
    total, count = 0.0, 0
    for ids in tokenizer(texts).input_ids:
        row = torch.tensor([ids])
        logp = model(row[:, :-1]).logits.float().log_softmax(-1)
        total -= float(logp.gather(-1, row[:, 1:, None]).sum())
        count += len(ids) - 1
    return math.exp(total / count)


@torch.no_grad()
def expert_shares(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast) -> list[list[float]]:
    """[L, experts] share of the held-out tokens that each expert sees; a row sums to the experts a token meets."""
    counts, tokens = torch.zeros(len(model.model.layers), EXPERTS), 0
    for text in itertools.islice(public_texts("held out"), HELD_OUT):
        row = torch.tensor([tokenizer(text).input_ids])
        logits = model(row, output_router_logits=True).router_logits
        counts += torch.stack(
            [torch.bincount(layer.topk(CHOSEN).indices.flatten(), minlength=EXPERTS) for layer in logits]
        )
        tokens += row.numel()
    return [[round(share, 3) for share in layer] for layer in (counts / tokens).tolist()]


def pretrain(name: str) -> None:
    torch.manual_seed(0)
    tokenizer, model, digest = train_tokenizer(), build(name), hashlib.sha256()
    peak = PEAK_RATE[name]
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    curve, started, seen = [], time.time(), 0
    for step, (ids, labels) in enumerate(itertools.islice(batches(tokenizer, digest), STEPS)):
        rate = peak * min((step + 1) / 50, 0.5 * (1 + math.cos(math.pi * step / STEPS)) + 0.01)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", torch.bfloat16):
            output = model(ids)
        logits = output.logits.float().flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, labels.flatten(), ignore_index=-100)
        (loss + BALANCE * output.aux_loss if "aux_loss" in output else loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen += int((labels >= 0).sum())
        if (step + 1) % 100 == 0:
            curve.append({"step": step + 1, "tokens": seen, "training_loss": round(loss.item(), 4)})
            print(name, curve[-1], f"{seen / (time.time() - started):,.0f} tokens/s", flush=True)
    model.half()  # what is shipped is what is measured
    write(name, model, tokenizer, curve, digest.hexdigest())


def write(name: str, model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, curve: list, digest: str) -> None:
    folder, sparse = OUT / name, getattr(model.config, "output_router_logits", False)
    if sparse:
        model.config.output_router_logits = False
        model.config.rope_theta = LLAMA["rope_theta"]  # Transformers 4 reads it here, and has another default
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    card = {
        "name": f"tiny/{name}",
        "parameters": sum(p.numel() for p in model.parameters()),
        "pretraining_texts_sha256": digest,
        "tokens": curve[-1]["tokens"],
        "held_out_perplexity": round(held_out_perplexity(model.float(), tokenizer), 3),
        **({"expert_shares": expert_shares(model, tokenizer)} if sparse else {}),
        "curve": curve,
    }
    (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n")
    print(name, "held-out perplexity", card["held_out_perplexity"], flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for chosen in sys.argv[1:] or list(PEAK_RATE):
        pretrain(chosen)
