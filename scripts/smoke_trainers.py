"""The trainers of `smoke.py`: what they are given, and how each is run with `LeakageCallback`.

Each leaves an adapter in `out` and an audit in `<out>-leakage`.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

WORDS = "red green blue one two three cat dog fox hen sings jumps sleeps under over the a quick lazy old".split()
COUNT = 40
"""Records a side: too few for a verdict, enough for every gate to be computed."""
LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
COMMON = {
    "num_train_epochs": 2,
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-2,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}
ATTACKS = ["loss", "ref"]


def base_model(folder: Path) -> Path:
    """A random Llama of two layers, and a tokenizer that puts `<s>` in front, with room to pad."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<s>", "</s>"]
    inner.train_from_iterator(
        [" ".join(WORDS)] * 20,
        trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, special_tokens=special, show_progress=False),
    )
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=128
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def records(folder: Path) -> tuple[Path, Path]:
    """Texts of one kind, half of them to train on."""
    dice, files = random.Random(0), (folder / "members.jsonl", folder / "nonmembers.jsonl")
    for side, file in enumerate(files):
        texts = [
            f"{' '.join(dice.choices(WORDS, k=dice.randint(5, 15)))} {dice.randint(0, 10**6)}" for _ in range(COUNT)
        ]
        rows = [{"id": f"{side}-{n}", "text": text} for n, text in enumerate(texts)]
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return files


def rows_of(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def by_transformers(base: Path, sides: Sequence[Path], out: Path) -> None:
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForLanguageModeling,
        Trainer,
        TrainingArguments,
    )

    from imprint import LeakageCallback

    tokenizer = AutoTokenizer.from_pretrained(base)
    data = [Dataset.from_list([dict(tokenizer(f"{x['text']}</s>")) for x in rows_of(file)]) for file in sides]
    torch.manual_seed(0)
    trainer = Trainer(
        get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**LORA)),
        TrainingArguments(str(out), **COMMON),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        train_dataset=data[0],
        eval_dataset=data[1],
        processing_class=tokenizer,
    )
    asked = {"attacks": ATTACKS, "data": {"loss": "all", "eos": True}}
    trainer.add_callback(LeakageCallback(trainer, members=sides[0], nonmembers=sides[1], **asked))
    trainer.train()
    trainer.save_model()


def by_trl(base: Path, sides: Sequence[Path], out: Path) -> None:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    from imprint import LeakageCallback

    data = [Dataset.from_list([{"text": row["text"]} for row in rows_of(file)]) for file in sides]
    trainer = SFTTrainer(
        str(base),
        SFTConfig(str(out), bf16=False, **COMMON),
        train_dataset=data[0],
        eval_dataset=data[1],
        peft_config=LoraConfig(**LORA),
    )
    trainer.add_callback(LeakageCallback(trainer, attacks=ATTACKS))
    trainer.train()
    trainer.save_model()


def by_llamafactory(base: Path, sides: Sequence[Path], out: Path) -> None:
    """By the file and the command that docs/audit.md shows: `imprint` is a key of LLaMA-Factory's configuration."""
    columns = {"columns": {"prompt": "text"}}
    (out.parent / "dataset_info.json").write_text(
        json.dumps({name: {"file_name": f"{name}.jsonl", **columns} for name in ("members", "nonmembers")})
    )
    asked = {
        "imprint": {"attacks": ATTACKS},
        "model_name_or_path": str(base),
        "stage": "pt",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_target": "all",
        "lora_rank": 4,
        "dataset_dir": str(out.parent),
        "dataset": "members",
        "eval_dataset": "nonmembers",
        "cutoff_len": 32,
        "packing": False,
        "output_dir": str(out),
        **COMMON,
    }
    _command(["-m", "imprint.integrations.llamafactory"], asked, out)


def by_axolotl(base: Path, sides: Sequence[Path], out: Path) -> None:
    """By its own command, with Imprint's plugin."""
    data = [{"path": str(file), "ds_type": "json", "type": "completion", "field": "text"} for file in sides]
    asked = {
        "plugins": ["imprint.integrations.axolotl.ImprintPlugin"],
        "imprint": {"attacks": ATTACKS},
        "base_model": str(base),
        "datasets": data[:1],
        "test_datasets": [data[1] | {"split": "train"}],
        "dataset_prepared_path": str(out.parent / "prepared"),
        "sequence_len": 64,
        "adapter": "lora",
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_target_linear": True,
        "output_dir": str(out),
        "num_epochs": COMMON["num_train_epochs"],
        "learning_rate": COMMON["learning_rate"],
        "micro_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "optimizer": "adamw_torch",
        "lr_scheduler": "linear",
        "bf16": False,
        "fp16": False,
        **dict.fromkeys(["lora_qkv_kernel", "lora_o_kernel", "lora_mlp_kernel"], False),  # Triton's, for GPUs
        "save_strategy": "no",
    }
    _command(["-m", "axolotl.cli.train"], asked, out)


def _command(command: Sequence[str], asked: dict[str, Any], out: Path) -> None:
    file = out.with_name(f"{out.name}.yaml")
    file.write_text(json.dumps(asked))  # which is YAML
    run([sys.executable, *command, str(file)])


TRAINERS: dict[str, Callable[[Path, Sequence[Path], Path], None]] = {
    "transformers": by_transformers,
    "trl": by_trl,
    "llamafactory": by_llamafactory,
    "axolotl": by_axolotl,
}


def run(command: Sequence[str], codes: Sequence[int] = (0,)) -> str:
    """What a command prints; one that ends otherwise than expected is told whole."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode not in codes or "Traceback" in done.stderr:
        raise AssertionError(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout
