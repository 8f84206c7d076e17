"""Leakage beside the loss with TRL's SFTTrainer: LoRA on conversations.

    python examples/trl_sft.py MODEL TRAIN.jsonl HELDOUT.jsonl OUT

Both files hold one JSON object with `messages` a line. HELDOUT are conversations like those in TRAIN that are not
trained on. `imprint gate OUT-leakage --budget auc=0.6` afterwards ends with exit code 0 only if the model may be
released.
"""

from __future__ import annotations

import argparse

from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from imprint import LeakageCallback

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("train")
parser.add_argument("heldout")
parser.add_argument("out")
parser.add_argument("--use-cpu", action="store_true")
given = parser.parse_args()

data = load_dataset("json", data_files={"train": given.train, "heldout": given.heldout})
trainer = SFTTrainer(
    given.model,
    SFTConfig(
        given.out,
        num_train_epochs=3,
        per_device_train_batch_size=8,
        assistant_only_loss=True,  # only these tokens are trained on, and only these are scored
        report_to=[],
        use_cpu=given.use_cpu,
        bf16=not given.use_cpu,
    ),
    train_dataset=data["train"],
    eval_dataset=data["heldout"],
    peft_config=LoraConfig(r=8, lora_dropout=0.05, target_modules="all-linear"),
)
trainer.add_callback(LeakageCallback(trainer, attacks=["loss", "ref", "min_k_plus"]))
trainer.train()
