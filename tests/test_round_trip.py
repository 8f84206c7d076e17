"""Trained by the tools that people use, audited by the one command: scores equal the tool's own tokens and mask.

The oracle knows nothing of Imprint: ids and labels are those that the trainer's collator gave to the model, and the
log-probabilities come from peft's or transformers' own model, one text at a time.
"""

from __future__ import annotations

import hmac
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import (
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

import imprint
from imprint import cli
from imprint.rows import Cell, load_grid
from imprint.tuning.locate import TINY
from tests.conftest import sentence, write_jsonl
from tests.test_audit import naive

pytestmark = pytest.mark.filterwarnings("ignore")  # the trainers' and peft's own
NATS = 1e-4
BASE = TINY / "gpt2-small"
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}[answer]{% generation %}{{ m['content'] }}{{ eos_token }}"
    "{% endgeneration %}\n{% else %}[{{ m['role'] }}] {{ m['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[answer]{% endif %}"
)
METHODS: dict[str, Any] = {
    "lora": LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear"),
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "p_tuning": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16),
    "full": None,
}


def arguments(kind: type, folder: Path, **more: Any) -> Any:
    return kind(
        output_dir=str(folder),
        num_train_epochs=2,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
        **more,
    )


def audited(monkeypatch: Any, capfd: Any, folder: Path, adapter: Path) -> Cell:
    """`imprint audit` with no other flags than model, adapter and data (and where to write)."""
    flags = {"model": BASE, "adapter": adapter, "out": folder / "out"}
    flags |= {"members": folder / "members.jsonl", "nonmembers": folder / "nonmembers.jsonl"}
    parts = [part for key, value in flags.items() for part in (f"--{key}", str(value))]
    monkeypatch.setattr(sys, "argv", ["imprint", "audit", *parts])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    printed = capfd.readouterr()
    assert ended.value.code == 2, printed.err  # so few records prove nothing
    [cell] = load_grid(folder / "out").cells
    return cell


def check(cell: Cell, key: bytes, model: Any, records: dict[str, tuple[list[int], list[int]]], epoch: int) -> None:
    """Every record's scores against a naive pass over the ids and labels that the trainer used."""
    stats = cell.stats(epoch)
    place = {str(name): n for n, name in enumerate(stats.ids)}
    for record, (ids, labels) in records.items():
        n = place[hmac.new(key, record.encode(), "sha256").hexdigest()[:16]]
        expected = naive(model, ids, [label != -100 for label in labels])
        np.testing.assert_allclose(stats.logp[stats.offsets[n] : stats.offsets[n + 1]], expected, atol=NATS)


def collated(trainer: Any, rows: Any) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of each row as the trainer's collator hands them to the model."""
    found = []
    keep = ("input_ids", "attention_mask", "labels", "completion_mask", "assistant_masks")
    for row in rows:
        batch = trainer.data_collator([{key: row[key] for key in keep if row.get(key) is not None}])
        length = int(batch["attention_mask"][0].sum())
        found.append((batch["input_ids"][0, :length].tolist(), batch["labels"][0, :length].tolist()))
    return found


@pytest.mark.parametrize("assistant_only", [True, False])
def test_a_lora_trained_by_sfttrainer_on_chats(tmp_path, monkeypatch, capfd, assistant_only):
    """Whether the loss was on the answers or on everything is found out, not told."""
    trl = pytest.importorskip("trl")
    dice = random.Random(1)
    rows = [
        {
            "id": f"r{n}",
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": sentence(dice)},
                {"role": "assistant", "content": sentence(dice)},
                {"role": "user", "content": "and then?"},
                {"role": "assistant", "content": sentence(dice)},
            ],
        }
        for n in range(64)
    ]
    write_jsonl(tmp_path / "members.jsonl", rows[:40])
    write_jsonl(tmp_path / "nonmembers.jsonl", rows[40:])
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.chat_template = TEMPLATE
    tokenizer.pad_token = tokenizer.eos_token
    trainer = trl.SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32),
        args=arguments(trl.SFTConfig, tmp_path / "run", assistant_only_loss=assistant_only, bf16=False),
        train_dataset=Dataset.from_list(rows[:40]),
        processing_class=tokenizer,
        peft_config=METHODS["lora"],
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    capfd.readouterr()
    cell = audited(monkeypatch, capfd, tmp_path, tmp_path / "adapter")
    assert cell.spec.data.loss == ("target" if assistant_only else "all")
    files = (tmp_path / "members.jsonl", tmp_path / "nonmembers.jsonl")
    imprint.audit(trainer.model, tokenizer, *files, out=tmp_path / "live", id_key=tmp_path / "out.key")
    [live] = load_grid(tmp_path / "live").cells
    assert live.spec.data.loss == cell.spec.data.loss  # found out in memory as from the folder
    for epoch in (0, 1):
        np.testing.assert_allclose(live.stats(epoch).logp, cell.stats(epoch).logp, atol=NATS)
    tokens = collated(trainer, trainer.train_dataset)
    assert all((-100 in labels) is assistant_only for _, labels in tokens)
    records = {f"r{n}": pair for n, pair in enumerate(tokens)}
    key = (tmp_path / "out.key").read_bytes()
    untouched = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    check(cell, key, untouched, records, 0)
    tuned = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32), tmp_path / "adapter"
    ).eval()
    check(cell, key, tuned, records, 1)


@pytest.mark.parametrize("method", METHODS)
def test_a_prompt_completion_mask_trained_by_trainer(tmp_path, monkeypatch, capfd, method):
    dice = random.Random(2)
    rows = [{"id": f"r{n}", "prompt": f"{sentence(dice)} =>", "completion": f" {sentence(dice)}"} for n in range(64)]
    write_jsonl(tmp_path / "members.jsonl", rows[:40])
    write_jsonl(tmp_path / "nonmembers.jsonl", rows[40:])
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.pad_token = tokenizer.eos_token

    def masked(row: dict[str, str]) -> dict[str, list[int]]:
        prompt, whole = (tokenizer(text).input_ids for text in (row["prompt"], row["prompt"] + row["completion"]))
        ids = [*whole, tokenizer.eos_token_id]
        labels = [-100] * len(prompt) + ids[len(prompt) :]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}

    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    if METHODS[method]:
        model = get_peft_model(model, METHODS[method])
    trainer = Trainer(
        model=model,
        args=arguments(TrainingArguments, tmp_path / "run"),
        train_dataset=Dataset.from_list([masked(row) for row in rows[:40]]),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "tuned"))
    capfd.readouterr()
    cell = audited(monkeypatch, capfd, tmp_path, tmp_path / "tuned")
    assert (cell.spec.method.name, cell.spec.data.loss) == (method, "target")
    records = {f"r{n}": pair for n, pair in enumerate(collated(trainer, trainer.train_dataset))}
    key = (tmp_path / "out.key").read_bytes()
    untouched = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    check(cell, key, untouched, records, 0)
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned" if method == "full" else BASE, dtype=torch.float32)
    if method != "full":
        tuned = PeftModel.from_pretrained(tuned, tmp_path / "tuned")
    check(cell, key, tuned.eval(), records, 1)
    moved = np.abs(cell.stats(1).nll - cell.stats(0).nll)
    assert np.median(moved) > 0.01  # the tuned model is another one
    assert torch.is_grad_enabled()
