"""Pretrain the tiny models that ship with Imprint, on the public part of the offline world.

    python scripts/pretrain.py [NAME ...]      # default: all four, about an hour on one CPU core

Every text is seen once: the stream of the public world has no end. Results go to `src/imprint/tiny/NAME`
(weights in float16, tokenizer, a model card with the training curve and the hash of the data).
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
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from imprint.data.world import public_texts

OUT = Path(__file__).parent.parent / "src" / "imprint" / "tiny"
END = "<|endoftext|>"
VOCABULARY = 1024
CONTEXT = 256
ROWS = 24  # rows of CONTEXT tokens per step
STEPS = 1400
HELD_OUT = 800  # texts
PEAK_RATE = {"gpt2-small": 6e-3, "gpt2-medium": 4e-3, "gpt2-large": 3e-3, "llama-medium": 4e-3}


def build(name: str) -> torch.nn.Module:
    common = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}
    if name == "llama-medium":
        return LlamaForCausalLM(
            LlamaConfig(
                hidden_size=96,
                intermediate_size=256,
                num_hidden_layers=4,
                num_attention_heads=3,
                max_position_embeddings=CONTEXT,
                tie_word_embeddings=False,
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
            logits = model(ids).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100)
        loss.backward()
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
    folder = OUT / name
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    card = {
        "name": f"tiny/{name}",
        "parameters": sum(p.numel() for p in model.parameters()),
        "pretraining_texts_sha256": digest,
        "tokens": curve[-1]["tokens"],
        "held_out_perplexity": round(held_out_perplexity(model.float(), tokenizer), 3),
        "curve": curve,
    }
    (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n")
    print(name, "held-out perplexity", card["held_out_perplexity"], flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for chosen in sys.argv[1:] or list(PEAK_RATE):
        pretrain(chosen)
