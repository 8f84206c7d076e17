"""The ways the benchmarks compare with: what public scripts do, written anew, with no waste of our own added.

Scoring: one text at a time with a Python loop over tokens (mimir), one text at a time with moments (Min-K%++), padded
batches with a full log-softmax. Training: transformers.Trainer with its defaults, with or without length grouping.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PrinterCallback, Trainer, TrainingArguments

from imprint.data.tokens import Encoded

Logps = list[NDArray[np.float32]]
"""Per text the log-probabilities of its tokens but the first."""
BATCH = 8
"""Texts of a padded batch, and the Trainer's own default."""


def _ids(model: nn.Module, record: Encoded) -> torch.Tensor:
    return torch.from_numpy(record.ids).long()[None].to(next(model.parameters()).device)


@torch.no_grad()
def mimir_like(model: nn.Module, records: Sequence[Encoded]) -> Logps:
    """The model's own loss, a log-softmax of all of [T, V], every token asked for alone, all rows stacked again."""
    found = []
    for record in records:
        ids = _ids(model, record)
        logits = model(input_ids=ids, labels=ids).logits
        everything = torch.log_softmax(logits[:, :-1], dim=-1)
        rows, own = [], []
        for place, token in enumerate(ids[0, 1:].tolist()):
            rows.append(everything[0, place])
            own.append(everything[0, place, token].item())
        torch.stack(rows)
        found.append(np.array(own, np.float32))
    return found


@torch.no_grad()
def mink_like(model: nn.Module, records: Sequence[Encoded]) -> Logps:
    """The model's own loss, softmax and log-softmax of all of [T, V], mean and deviation of log p under p."""
    found = []
    for record in records:
        ids = _ids(model, record)
        output = model(input_ids=ids, labels=ids)
        output.loss.item()
        logits = output.logits[0, :-1]
        p, logp = torch.softmax(logits, dim=-1), torch.log_softmax(logits, dim=-1)
        own = logp.gather(-1, ids[0, 1:, None])[:, 0]
        mean = (p * logp).sum(-1)
        deviation = ((p * logp.square()).sum(-1) - mean.square()).sqrt()
        ((own - mean) / deviation).float().cpu().numpy()
        found.append(own.float().cpu().numpy())
    return found


@torch.no_grad()
def padded(model: nn.Module, records: Sequence[Encoded]) -> Logps:
    """Batches of eight in the given order, padded, with a mask and a log-softmax of all of [B, T, V]."""
    device, found = next(model.parameters()).device, []
    for start in range(0, len(records), BATCH):
        some = records[start : start + BATCH]
        batch = {key: value.to(device) for key, value in collate([example(record) for record in some]).items()}
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        logp = torch.log_softmax(logits[:, :-1], dim=-1)
        own = logp.gather(-1, batch["input_ids"][:, 1:, None])[..., 0].float().cpu().numpy()
        found += [row[: len(record) - 1] for row, record in zip(own, some, strict=True)]
    return found


def example(record: Encoded) -> dict[str, list[int]]:
    """A record as a tokenized dataset holds it."""
    labels = np.where(record.scored, record.ids, -100)
    return {"input_ids": record.ids.tolist(), "labels": labels.tolist(), "attention_mask": [1] * len(record)}


def collate(rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Padded on the right, as DataCollatorForSeq2Seq does it."""
    width = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    return {
        key: torch.tensor([row[key] + [value] * (width - len(row[key])) for row in rows]) for key, value in fill.items()
    }


def trainer(
    model: nn.Module,
    records: Sequence[Encoded],
    rate: float,
    device: str = "cpu",
    sampling: str = "random",
    **more: Any,
) -> Trainer:
    """A Trainer for one epoch, its defaults but for the learning rate, without reports, progress or saving.

    Args:
        sampling: "random", "group_by_length" or "sequential" (`train_sampling_strategy`; up to transformers 4 length
            grouping was a flag of its own).
    """
    grouped = {"train_sampling_strategy": sampling}
    if "train_sampling_strategy" not in TrainingArguments.__dataclass_fields__:
        grouped = {"group_by_length": sampling == "group_by_length"}
    settings = TrainingArguments(
        output_dir=tempfile.mkdtemp(prefix="imprint-bench-"),
        num_train_epochs=1,
        per_device_train_batch_size=BATCH,
        learning_rate=rate,
        max_grad_norm=1.0,
        use_cpu=device == "cpu",
        bf16=device == "cuda",
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        **grouped,
    )
    rows: Any = [example(record) for record in records]
    made = Trainer(model=model, args=settings, train_dataset=rows, data_collator=collate, **more)
    made.remove_callback(PrinterCallback)
    return made


def epoch(own: Trainer) -> Callable[[], object]:
    """Trains one more epoch each time it is called."""
    return lambda: own.train()
