"""LLaMA-Factory with an audit, from Python; `llamafactory.yaml` says the same in a file.

python examples/llamafactory_run.py
"""

from __future__ import annotations

from llamafactory.train.tuner import run_exp

from imprint import LeakageCallback

if __name__ == "__main__":
    run_exp(
        {
            "model_name_or_path": "Qwen/Qwen2.5-0.5B-Instruct",
            "stage": "sft",
            "do_train": True,
            "finetuning_type": "lora",
            "lora_target": "all",
            "dataset": "identity,alpaca_en_demo",
            "template": "qwen",
            "cutoff_len": 1024,
            "val_size": 0.3,  # evaluated on, and the non-members of the audit
            "output_dir": "saves/qwen",
            "num_train_epochs": 3,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-4,
            "bf16": True,
            "report_to": "none",
        },
        callbacks=[LeakageCallback(out="saves/qwen-leakage")],
    )
