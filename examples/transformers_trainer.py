"""Leakage beside the loss with Transformers' Trainer: full fine-tuning on a file of texts.

    python examples/transformers_trainer.py MODEL TRAIN.jsonl HELDOUT.jsonl OUT [--budget auc=0.6]

Both files hold one JSON object with a `text` a line. HELDOUT are texts like those in TRAIN that are not trained on:
they are evaluated on, and they are the non-members of the audit. `imprint report OUT-leakage` shows what was found.
With a budget training stops after the first epoch that does not keep it.
"""

from __future__ import annotations

import argparse

from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from imprint import LeakageCallback

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("train")
parser.add_argument("heldout")
parser.add_argument("out")
parser.add_argument("--budget")
parser.add_argument("--use-cpu", action="store_true")
given = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(given.model)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token


def tokenized(row: dict[str, str]) -> dict[str, list[int]]:
    return dict(tokenizer(row["text"], truncation=True, max_length=512))


texts = load_dataset("json", data_files={"train": given.train, "heldout": given.heldout})
data = texts.map(tokenized, remove_columns=texts["train"].column_names)

trainer = Trainer(
    AutoModelForCausalLM.from_pretrained(given.model),
    TrainingArguments(
        given.out,
        num_train_epochs=3,
        per_device_train_batch_size=8,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",  # or "leakage_auc", with greater_is_better=False
        report_to=[],  # or "wandb", "tensorboard", …: `leakage_auc` goes where the loss goes
        use_cpu=given.use_cpu,
    ),
    train_dataset=data["train"],
    eval_dataset=data["heldout"],
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    processing_class=tokenizer,
)
trainer.add_callback(LeakageCallback(trainer, budget=given.budget, stop=given.budget is not None))
trainer.train()
