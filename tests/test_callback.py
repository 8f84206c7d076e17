"""An audit beside a training: the training stays what it was, and its figures reach whoever asks for them."""

from __future__ import annotations

import gc
import json
import random
import runpy
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pydantic
import pytest
import torch
import yaml
from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import imprint
from imprint import callback as callback_module
from imprint.auditing import aside, running, worker
from imprint.auditing.live import undisturbed
from imprint.auditing.shared_work import joined, share
from imprint.auditing.trainer_data import draw, records_of
from imprint.auditing.training import newest
from imprint.callback import LeakageCallback
from imprint.data import resolve_sizes
from imprint.data.tokens import Encoded
from imprint.errors import InvalidAudit, UsageError
from imprint.measures import auc
from imprint.records import prepare
from imprint.release import release
from imprint.rows import load_grid, results
from imprint.spec import Budget
from imprint.types import TokenStats
from tests.conftest import save_model, sentence, write_jsonl

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}A:{% generation %}{{ m.content }}</s>{% endgeneration %}"
    "{% else %}Q:{{ m.content }}{% endif %}{% endfor %}"
)
LORA = {"r": 4, "target_modules": ["c_attn"], "lora_dropout": 0.2, "fan_in_fan_out": True, "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module", autouse=True)
def frozen() -> Iterator[None]:
    """Each training collects garbage; what was imported is none."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The classifiers of the blind baseline take seconds, and are tested elsewhere."""
    from imprint import controls

    def none(members: Sequence[Any], nonmembers: Sequence[Any], *_: Any) -> dict[str, Any]:
        return {"none": np.arange(len(members) + len(nonmembers)) % 7 / 7}

    monkeypatch.setattr(controls, "blind_scores", none)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2 with dropout, and a tokenizer with a chat template and something to pad with."""
    folder = save_model(tmp_path_factory.mktemp("models") / "gpt2", "gpt2")
    words = AutoTokenizer.from_pretrained(folder)
    words.pad_token, words.chat_template = "<s>", TEMPLATE
    words.save_pretrained(folder)
    return folder


@pytest.fixture
def words(model_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(model_folder)


def texts(count: int, seed: int) -> list[str]:
    dice = random.Random(seed)
    return [sentence(dice) for _ in range(count)]


def tokens(words: Any, count: int, seed: int, **columns: Any) -> Dataset:
    rows = [{"input_ids": words(text).input_ids, **columns} for text in texts(count, seed)]
    return Dataset.from_list([{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows])


def load(folder: Path, lora: bool = False) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder)
    return get_peft_model(model, LoraConfig(**LORA)) if lora else model


class Events(TrainerCallback):
    """Everything that is logged, in order, with the event before it."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        kind = next((kind for kind in ("leakage_auc", "eval_loss", "loss") if kind in logs), "")
        if kind:
            self.seen.append((kind, state.global_step))
        self.logs.append({**logs, "step": state.global_step})

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        self.seen.append(("evaluated" + " by leakage" * ("eval_leakage_auc" in metrics), state.global_step))


@pytest.fixture
def made(model_folder: Path, words: Any, tmp_path: Path) -> Callable[..., Trainer]:
    """A trainer of 12 records, three steps an epoch; `callback` takes the arguments of ours, None for none of it."""

    if not hasattr(Accelerator, "parallelism_config"):
        pytest.skip("this Accelerate is too old for Transformers' own Trainer")

    def trainer(
        callback: dict[str, Any] | None = None, lora: bool = False, others: Sequence[Any] = (), **changes: Any
    ) -> Trainer:
        options: dict[str, Any] = {
            "output_dir": str(tmp_path / changes.pop("name", "run")),
            "num_train_epochs": 2,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "logging_strategy": "epoch",
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            "dataloader_pin_memory": False,
        }
        given = {
            "train_dataset": tokens(words, 12, 0),
            "eval_dataset": tokens(words, 12, 1),
            "data_collator": DataCollatorForLanguageModeling(words, mlm=False),
            **{key: changes.pop(key) for key in ("train_dataset", "eval_dataset", "data_collator") if key in changes},
        }
        model = changes.pop("model", None) or load(model_folder, lora)
        found = Trainer(
            model,
            TrainingArguments(**{**options, **changes}),
            processing_class=words,
            callbacks=list(others),
            **given,
        )
        if callback is not None:
            found.add_callback(LeakageCallback(found, **{"out": tmp_path / "audit", **callback}))
        return found

    return trainer


def metas(out: Path) -> list[dict[str, Any]]:
    cell = load_grid(out).cells[0]
    return [cell.folder.meta(number) for number in range(1, cell.epochs + 1)]


# ---- training stays what it was ----


def after(trainer: Trainer) -> tuple[Any, ...]:
    """All that training leaves, but for what we log."""
    trainer.train()
    logged = [
        {k: v for k, v in one.items() if "runtime" not in k and "per_second" not in k}
        for one in trainer.state.log_history
    ]
    optimizer = trainer.optimizer.state_dict()["state"]
    return (
        {name: value.numpy().tobytes() for name, value in trainer.model.state_dict().items()},
        [one for one in logged if "leakage_auc" not in one],
        {n: {k: torch.as_tensor(v).numpy().tobytes() for k, v in one.items()} for n, one in optimizer.items()},
        torch.get_rng_state().tolist(),
        random.getstate(),
        [module.training for module in trainer.model.modules()],
        [(name, p.requires_grad, p.grad is None) for name, p in trainer.model.named_parameters()],
        trainer.model.config.to_json_string(),
        trainer.model.config._attn_implementation,
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lora": True},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 3, "eval_strategy": "epoch"},
        {"logging_strategy": "steps", "logging_steps": 2},
        {"lora": True, "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"bf16": True, "neftune_noise_alpha": 5.0},
    ],
    ids=["full", "lora", "accumulated", "logged by steps", "checkpointed", "mixed precision"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_training_is_bit_by_bit_what_it_would_have_been(
    made: Callable[..., Trainer], changes: dict[str, Any], tmp_path: Path
) -> None:
    without = after(made(**changes))
    trainer = made({}, **changes)
    found = after(trainer)
    for ours, theirs in zip(found, without, strict=True):
        assert ours == theirs
    assert [meta["name"] for meta in metas(tmp_path / "audit")] == ["epoch 1", "epoch 2"]
    assert sum("leakage_auc" in one for one in trainer.state.log_history) == 2


# ---- what is found, and who is told ----


def test_the_figures_are_those_of_the_scores(made: Callable[..., Trainer], tmp_path: Path) -> None:
    """AUC from losses that the model gives one record at a time, before and after training."""
    trainer = made({"attacks": ["loss", "ref"]})
    sides = [[row["input_ids"] for row in dataset] for dataset in (trainer.train_dataset, trainer.eval_dataset)]
    before = [[nll(trainer.model, ids) for ids in side] for side in sides]
    trainer.train()
    after = [[nll(trainer.model, ids) for ids in side] for side in sides]
    logged = [one for one in trainer.state.log_history if "leakage_auc" in one][-1]
    ref = auc(*[[b - a for a, b in zip(*both, strict=True)] for both in zip(after, before, strict=True)])
    loss = auc(*[[-one for one in side] for side in after])
    assert logged["leakage_loss_auc"] == pytest.approx(loss.value)
    assert logged["leakage_ref_auc"] == pytest.approx(ref.value)
    most = max(ref, loss, key=lambda one: one.value)
    assert [logged[f"leakage_auc{end}"] for end in ("", "_low", "_high")] == pytest.approx(
        [most.value, most.low, most.high]
    )
    lengths = [len(ids) - 1 for ids in sides[1]]
    assert logged["leakage_heldout_loss"] == pytest.approx(np.average(after[1], weights=lengths), rel=1e-4)
    assert logged["epoch"] == 2.0
    assert logged["step"] == 6
    frame = results(tmp_path / "audit")
    row = frame[(frame["epoch"] == 2) & (frame["attack"] == "ref") & (frame["metric"] == "auc")].iloc[0]
    assert row["value"] == pytest.approx(ref.value)


def nll(model: Any, ids: list[int]) -> float:
    model.eval()
    with torch.no_grad():
        return float(model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss)


def test_the_folder_is_an_audit(made: Callable[..., Trainer], tmp_path: Path) -> None:
    trainer = made({"budget": "auc=0.95"})
    trainer.train()
    out = tmp_path / "audit"
    grid = load_grid(out)
    assert grid.cells[0].outcome["status"] == "done"
    assert grid.cells[0].spec.method.name == "full"
    assert {f"{name}.parquet" for name in ("subgroups", "exposed", "exposed_counts")} <= {f.name for f in out.iterdir()}
    found = release(grid, results(out))
    assert {gate.name for gate in found.gates} >= {
        "base control", "blind baseline", "overlap", "power", "positive control"
    }  # fmt: skip
    assert not found.unable
    assert {"results.parquet", "scores.parquet", "gates.json", "report.html"} <= {file.name for file in out.iterdir()}
    assert (tmp_path / "audit.key").stat().st_mode & 0o777 == 0o600
    text = "".join(file.read_bytes().decode("latin-1") for file in out.rglob("*") if file.is_file())
    assert not any(word in text for word in texts(12, 0))
    assert [(meta["name"], meta["step"], meta["trained_epochs"]) for meta in metas(out)] == [
        ("epoch 1", 3, 1.0),
        ("epoch 2", 6, 2.0),
    ]


def test_bounds_of_the_callback_are_those_of_the_gate(made: Callable[..., Trainer], words: Any, tmp_path: Path) -> None:
    """Of records that hang together, owner by owner: that of every measure, within one part in a million."""
    sides = [tokens(words, 40, seed).add_column("owner", [f"{seed}, {n // 4}" for n in range(40)]) for seed in (0, 1)]
    data = {"train_dataset": sides[0], "eval_dataset": sides[1]}
    made({"attacks": ["loss", "ref"], "data": {"group": "owner"}}, **data).train()
    out = tmp_path / "audit"
    frame = results(out)
    clustered = frame[frame["epoch"] == 2].set_index(["attack", "metric"])["high"]
    cell = load_grid(out).cells[0]
    for attack in ("loss", "ref"):
        for metric in ("auc", "tpr_at_10pct_fpr"):
            high = clustered[attack, metric]
            over = [newest(out, Budget(attack=attack, **{metric: high * by})).over for by in (1 - 1e-6, 1 + 1e-6)]
            assert over == [True, False]
            kept = [release(load_grid(out), frame, Budget(attack=attack, **{metric: high * by})).cells[0].kept
                    for by in (1 - 1e-6, 1 + 1e-6)]  # fmt: skip
            assert kept == [False, True]
    plain = imprint.tpr_at_fpr(*cell.sides(cell.scores(2, ["loss"])["loss"]), 0.1).high
    assert plain != pytest.approx(clustered["loss", "tpr_at_10pct_fpr"])  # owners make a difference here


def test_a_trainer_that_calls_need_not_be_named(made: Callable[..., Trainer], tmp_path: Path) -> None:
    """LLaMA-Factory and others take callbacks and nothing else."""
    events = Events()
    callback = LeakageCallback(out=tmp_path / "audit", attacks=["loss"])
    trainer = made(others=[events, callback], num_train_epochs=1)
    trainer.train()
    assert [kind for kind, _ in events.seen] == ["leakage_auc", "loss"]
    assert sum("leakage_auc" in one for one in trainer.state.log_history) == 1


def test_without_a_trainer_it_says_so() -> None:
    with pytest.raises(UsageError, match=r"no Trainer called this callback: give it as LeakageCallback\(trainer\)"):
        LeakageCallback().on_train_begin(TrainingArguments("x", use_cpu=True), None, None, train_dataloader=None)


def test_a_log_of_ours_takes_nothing_from_the_trainers(made: Callable[..., Trainer], monkeypatch: Any) -> None:
    """TRL adds its own means to whatever is logged next, and begins anew."""
    added: list[dict[str, float]] = []
    trainer = made({"attacks": ["loss"]}, num_train_epochs=1)
    former = trainer.log
    monkeypatch.setattr(trainer, "log", lambda logs, *rest: (added.append(logs), former(logs, *rest)))
    trainer.train()
    assert not any("leakage_auc" in one for one in added)
    assert any("loss" in one for one in added)


@pytest.mark.parametrize(
    ("every", "changes", "want"),
    [
        (
            "epoch",
            {"eval_strategy": "epoch"},
            ["leakage_auc 3", "loss 3", "eval_loss 3", "evaluated by leakage 3"],
        ),
        (
            "epoch",
            {"eval_strategy": "steps", "eval_steps": 2},
            ["eval_loss 2", "evaluated 2", "leakage_auc 3", "loss 3"],
        ),
        (
            "epoch",
            {"eval_strategy": "steps", "eval_steps": 3},
            ["eval_loss 3", "evaluated 3", "leakage_auc 3", "loss 3"],
        ),
        (
            "save",
            {"eval_strategy": "epoch", "save_strategy": "epoch"},
            ["loss 3", "eval_loss 3", "evaluated 3", "leakage_auc 3"],
        ),
        (
            "save",
            {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 1},
            ["leakage_auc 1", "eval_loss 2", "evaluated 2", "leakage_auc 2", "leakage_auc 3", "loss 3"],
        ),
    ],
)
def test_what_comes_when(
    made: Callable[..., Trainer], every: str, changes: dict[str, Any], want: list[str], tmp_path: Path
) -> None:
    events = Events()
    made({"every": every, "attacks": ["loss"]}, others=[events], **changes).train()
    assert [f"{kind} {step}" for kind, step in events.seen][: len(want)] == want
    audited = [step for kind, step in events.seen if kind == "leakage_auc"]
    names = [f"epoch {n}" for n in (1, 2)] if every == "epoch" else [f"checkpoint-{step}" for step in audited]
    assert [(meta["name"], meta["step"]) for meta in metas(tmp_path / "audit")] == [*zip(names, audited, strict=True)]


# ---- acting on it ----


def leaking(monkeypatch: pytest.MonkeyPatch, values: Sequence[float]) -> list[int]:
    """The figures of each audit as they are given here, and which steps were audited."""
    from imprint.auditing.training import Found

    steps: list[int] = []
    former = running.Running.checkpoint

    def checkpoint(self: Any, name: str, step: int, epoch: float) -> Found:
        found = former(self, name, step, epoch)
        steps.append(step)
        return Found({**found.figures, "leakage_auc": values[len(steps) - 1]}, found.over)

    monkeypatch.setattr(running.Running, "checkpoint", checkpoint)
    return steps


@pytest.mark.parametrize("every", ["epoch", "save"])
def test_the_best_model_is_the_one_that_leaks_least(
    made: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch, every: str
) -> None:
    steps = leaking(monkeypatch, [0.7, 0.6, 0.65])
    trainer = made(
        {"attacks": ["loss"], "every": every},
        num_train_epochs=3,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="leakage_auc",
        greater_is_better=False,
    )
    trainer.train()
    assert steps == [3, 6, 9]  # each once
    assert trainer.state.best_metric == 0.6
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-6")


def test_early_stopping_goes_by_it_wherever_it_stands(
    made: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = leaking(monkeypatch, [0.6, 0.7, 0.5, 0.5])
    trainer = made(
        {"attacks": ["loss"]},
        others=[EarlyStoppingCallback(early_stopping_patience=1)],
        num_train_epochs=4,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_leakage_auc",
        greater_is_better=False,
    )
    trainer.train()
    assert steps == [2, 3, 4, 6]  # at evaluations and after epochs, each step once
    assert trainer.state.global_step == 6  # .5 at step 4 was better than .6, and at step 6 no better


def test_the_most_leaking_model_is_never_the_best_one(made: Callable[..., Trainer]) -> None:
    trainer = made(
        {},
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="leakage_auc",
    )
    with pytest.raises(UsageError, match="would be the one that leaks most: set greater_is_better=False"):
        trainer.train()


def test_training_stops_where_the_budget_is_not_kept(
    made: Callable[..., Trainer], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    budget = {"auc": 0.9, "attack": "ref"}
    trainer = made({"budget": budget, "stop": True}, num_train_epochs=40, learning_rate=3e-2)
    trainer.train()
    found = metas(tmp_path / "audit")
    frame = results(tmp_path / "audit")
    high = frame[(frame["attack"] == "ref") & (frame["metric"] == "auc")].set_index("epoch")["high"]
    assert 1 <= len(found) < 40
    assert high[len(found)] >= 0.9 > high[1 : len(found) - 1].max() or len(found) == 1
    assert trainer.state.global_step == 3 * len(found)
    assert f"epoch {len(found)} does not keep the budget: training stops" in caplog.text
    logged = [one for one in trainer.state.log_history if "leakage_auc" in one][-1]
    assert logged["leakage_auc"] == logged["leakage_ref_auc"]  # of the attack that the budget names


def test_a_budget_that_cannot_be_kept_is_refused_at_the_start(made: Callable[..., Trainer], tmp_path: Path) -> None:
    trainer = made({"budget": {"auc": 0.55}})
    with pytest.raises(InvalidAudit, match=r"cannot be kept with so few records\. 12 members .* Bring more records"):
        trainer.train()
    assert trainer.state.global_step == 0
    rate = (
        r"12 members and 12 non-members the upper bound of tpr_at_10pct_fpr .* below 0\.3 .* `imprint plan --budget tpr"
    )
    with pytest.raises(InvalidAudit, match=rate):
        made({"budget": {"tpr_at_10pct_fpr": 0.3}}).train()
    with pytest.raises(InvalidAudit, match="tpr_at_1pct_fpr"):  # for which there are too few in any case
        made({"budget": {"tpr_at_1pct_fpr": 0.99}}).train()
    budget = {"auc": 0.97, "tpr_at_10pct_fpr": 0.97}
    made({"budget": budget}, num_train_epochs=1).train()  # the folder may be used for what can be


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"every": "step"}, "every: expected epoch or save, not 'step'"),
        ({"stop": True}, "stop needs a budget to stop at"),
        ({"attacks": ["los"]}, "unknown attack 'los': did you mean 'loss'"),
        ({"budget": "0.6"}, "expected LIMIT=NUMBER"),
        ({"budget": {"acu": 0.6}}, "did you mean 'auc'"),
        ({"budget": "auc=0.6", "attacks": ["ref"], "every": "save"}, ""),
        ({"budget": ["auc=0.6", "attack=loss"], "attacks": ["ref"]}, "unknown attack 'loss'"),
    ],
)
def test_wrong_arguments_are_refused_at_once(arguments: dict[str, Any], why: str) -> None:
    if not why:
        LeakageCallback(**arguments)
        return
    with pytest.raises(UsageError, match=why):
        LeakageCallback(**arguments)


def test_what_does_not_go_together_is_refused(made: Callable[..., Trainer], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"the trainer saves nothing \(save_strategy='no'\): audit every='epoch'"):
        made({"every": "save"}).train()
    trainer = made()
    trainer.args.push_to_hub = True
    callback = LeakageCallback(trainer, out=tmp_path / "run" / "audit")
    with pytest.raises(UsageError, match="its key lie in what is pushed to the Hub"):
        callback.on_train_begin(trainer.args, trainer.state, trainer.control, train_dataloader=None)


# ---- what goes wrong later ----


def test_a_failure_later_leaves_the_training_alone(
    made: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    want = after(made(num_train_epochs=3))
    trainer = made({}, num_train_epochs=3)
    former, calls = running.score_live, []

    def broken(model: Any, *rest: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:  # the base, epoch 1, epoch 2
            raise RuntimeError("out of memory")
        return former(model, *rest)

    monkeypatch.setattr(running, "score_live", broken)
    assert after(trainer)[0] == want[0]
    assert len(calls) == 3
    assert caplog.text.count("no audit of epoch 2, and none of later checkpoints: RuntimeError: out of memory") == 1
    grid = load_grid(tmp_path / "audit")
    assert [meta["name"] for meta in metas(tmp_path / "audit")] == ["epoch 1"]
    verdict = release(grid, results(tmp_path / "audit"))
    assert verdict.code == 3
    assert "RuntimeError: out of memory" in verdict.unable[0]
    assert not list((tmp_path / "audit").rglob("*.part"))


def test_the_best_model_is_still_chosen_when_no_figure_comes(
    made: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = made(
        {"attacks": ["loss"]},
        num_train_epochs=3,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="leakage_auc",
        greater_is_better=False,
    )

    def broken(*_: Any) -> Any:
        raise OSError("no space left on device")

    former = running.Running._write
    monkeypatch.setattr(running.Running, "_write", lambda self, *rest: (broken if rest[2] > 3 else former)(self, *rest))
    trainer.train()
    assert trainer.state.global_step == 9
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-3")


def test_two_trainings_that_write_into_one_folder_are_found_out(
    made: Callable[..., Trainer], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    class Other(TrainerCallback):
        def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if not state.global_step:
                made({}, name="other").train()

    trainer = made({}, others=[Other()])
    trainer.train()
    assert "is being written by another training: give each its own folder" in caplog.text
    assert trainer.state.global_step == 6
    assert [meta["step"] for meta in metas(tmp_path / "audit")] == [3, 6]


# ---- going on ----


class Killed(Exception):
    pass


class Kill(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise Killed


def evidence(out: Path) -> dict[str, Any]:
    """Everything that is measured, without times."""
    cell = load_grid(out).cells[0]
    kept = [{k: v for k, v in meta.items() if k != "cost"} for meta in metas(out)]
    stats = [cell.stats(number).logp.tobytes() for number in range(len(kept) + 1)]
    return {"metas": kept, "stats": stats, "results": results(out).to_csv(), "run": cell.run_id, "base": cell.base.name}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_resumed_training_leaves_the_evidence_of_an_uninterrupted_one(
    made: Callable[..., Trainer], lora: bool, tmp_path: Path
) -> None:
    """Killed in epoch 3, after the audits of epochs 1 and 2, it goes on from the checkpoint of epoch 1."""
    changes = {"lora": lora, "num_train_epochs": 3, "save_strategy": "epoch"}
    made({"out": tmp_path / "whole"}, name="one", **changes).train()
    with pytest.raises(Killed):
        made({"out": tmp_path / "parts"}, others=[Kill(6)], name="two", **changes).train()
    assert [meta["step"] for meta in metas(tmp_path / "parts")] == [3, 6]
    before = load_grid(tmp_path / "parts").cells[0].folder.epoch(1) / "stats.parquet"
    written = before.stat().st_mtime_ns
    resumed = made({"out": tmp_path / "parts", "id_key": tmp_path / "parts.key"}, name="two", **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "two" / "checkpoint-3"))
    assert before.stat().st_mtime_ns == written  # what was measured stays
    first, second = evidence(tmp_path / "whole"), evidence(tmp_path / "parts")
    assert [meta["step"] for meta in second["metas"]] == [3, 6, 9]
    assert first["stats"][1:] == second["stats"][1:]
    assert first["stats"][0] == second["stats"][0]
    if not lora:
        assert [meta["fingerprint"] for meta in first["metas"]] == [meta["fingerprint"] for meta in second["metas"]]


def test_a_resumed_full_training_needs_the_scores_of_its_base(
    made: Callable[..., Trainer], model_folder: Path, tmp_path: Path
) -> None:
    made(save_strategy="epoch").train()
    saved = str(tmp_path / "run" / "checkpoint-3")
    with pytest.raises(UsageError, match=r"holds no scores of what it was before: give .* or .* as `reference`"):
        made({}, save_strategy="epoch").train(resume_from_checkpoint=saved)
    made({"reference": str(model_folder)}, save_strategy="epoch").train(resume_from_checkpoint=saved)
    assert [meta["step"] for meta in metas(tmp_path / "audit")] == [6]


# ---- the model as it was before training ----


def tuned_before(folder: Path) -> PeftModel:
    model = load(folder, lora=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return model


def pissa(folder: Path) -> PeftModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder)
    return get_peft_model(model, LoraConfig(**LORA, init_lora_weights="pissa"))


def with_biases(folder: Path) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(**LORA, bias="all"))


BEGUN = {"pissa": pissa, "tuned before": tuned_before, "biases": with_biases}


@pytest.mark.parametrize("start", BEGUN)
def test_the_base_is_the_model_as_it_was_before_training(
    made: Callable[..., Trainer], model_folder: Path, start: str, tmp_path: Path
) -> None:
    """Not what lies below an adapter that has taken something out of it, or that has been tuned before."""
    model = BEGUN[start](model_folder)
    trainer = made({"attacks": ["loss", "ref"]}, model=model, save_strategy="epoch", num_train_epochs=1)
    sides = [[row["input_ids"] for row in dataset] for dataset in (trainer.train_dataset, trainer.eval_dataset)]
    now, below = [sorted(nll(model, ids) for ids in side) for side in sides], load(model_folder)
    trainer.train()
    cell = load_grid(tmp_path / "audit").cells[0]
    np.testing.assert_allclose([sorted(side) for side in cell.losses(0)], now, rtol=1e-4)
    bare = [sorted(nll(below, ids) for ids in side) for side in sides]
    assert np.allclose(now, bare, rtol=1e-3) is (start != "tuned before")
    np.testing.assert_allclose(
        [sorted(side) for side in cell.losses(1)],
        [sorted(nll(trainer.model, ids) for ids in side) for side in sides],
        rtol=1e-4,
    )
    controls = json.loads((cell.base / "gates" / "meta.json").read_text())
    assert controls["run"]["records"] == 12  # the positive control was tuned on top of what there is
    assert "positive" not in controls


@pytest.mark.parametrize("start", BEGUN)
def test_what_the_base_is_is_not_decided_anew_when_training_goes_on(
    made: Callable[..., Trainer], model_folder: Path, start: str, tmp_path: Path
) -> None:
    changes = {"num_train_epochs": 2, "save_strategy": "epoch"}
    made({"out": tmp_path / "whole"}, name="one", model=BEGUN[start](model_folder), **changes).train()
    with pytest.raises(Killed):
        made(
            {"out": tmp_path / "parts"}, others=[Kill(3)], name="two", model=BEGUN[start](model_folder), **changes
        ).train()
    saved = str(tmp_path / "two" / "checkpoint-3")
    made({"out": tmp_path / "parts"}, name="two", model=BEGUN[start](model_folder), **changes).train(
        resume_from_checkpoint=saved
    )
    first, second = evidence(tmp_path / "whole"), evidence(tmp_path / "parts")
    assert [meta["step"] for meta in second["metas"]] == [3, 6]
    assert first["stats"][0] == second["stats"][0]
    again = made({"out": tmp_path / "other"}, name="two", model=BEGUN[start](model_folder), **changes)
    if start == "tuned before":  # which nothing tells any more: what lies below it is its base
        again.train(resume_from_checkpoint=saved)
        return
    with pytest.raises(UsageError, match=r"holds no scores of what it was before: give .* or .* as `reference`"):
        again.train(resume_from_checkpoint=saved)


def test_a_second_training_needs_a_folder_of_its_own(made: Callable[..., Trainer], tmp_path: Path) -> None:
    first = made({"attacks": ["loss"]}, save_strategy="epoch")
    first.train()
    again = r"holds the audit of another training \(2 checkpoints\): give another folder, or resume"
    with pytest.raises(UsageError, match=again):
        made({"attacks": ["loss"]}, save_strategy="epoch").train()
    with pytest.raises(UsageError, match="belongs to another recipe"):
        made({"attacks": ["loss"], "seed": 1}, save_strategy="epoch").train()
    other = made({"attacks": ["loss"]}, save_strategy="epoch", name="other", learning_rate=0.1)
    made(None, save_strategy="epoch", name="other", learning_rate=0.1).train()
    with pytest.raises(UsageError, match="holds the audit of other weights at step 3"):
        other.train(resume_from_checkpoint=str(tmp_path / "other" / "checkpoint-3"))
    assert [meta["step"] for meta in metas(tmp_path / "audit")] == [3, 6]


# ---- the records ----


def scored(trainer: Trainer, **arguments: Any) -> dict[str, list[tuple[list[int], list[int]]]]:
    """What an audit would score of each side: ids, and the ids that are learned; nothing is trained."""
    spec = {"members": None, "nonmembers": None, "data": {}, "seed": 0, **arguments}
    with undisturbed(trainer.model):
        pool, data = records_of(trainer, trainer.get_train_dataloader(), **spec)
    data = resolve_sizes(data, pool).model_copy(update={"max_length": data.max_length or 64})
    audit = prepare(pool, data, trainer.processing_class)
    found: dict[str, list[tuple[list[int], list[int]]]] = {"member": [], "nonmember": []}
    for role, record in zip(audit.roles, audit.scored, strict=True):
        found[role].append((record.ids.tolist(), record.ids[record.scored].tolist()))
    return {side: sorted(records) for side, records in found.items()}


def test_a_causal_collator_learns_all_but_padding(made: Callable[..., Trainer], words: Any) -> None:
    end = words.pad_token_id  # which is masked wherever it stands, as in training
    rows = [{"input_ids": [*words(text).input_ids, end], "unused": "column"} for text in texts(6, 0)]
    trainer = made(train_dataset=Dataset.from_list(rows))
    ids = [row["input_ids"] for row in rows]
    assert scored(trainer)["member"] == sorted((one, one[1:-1]) for one in ids)


def test_labels_of_the_data_set_are_kept(made: Callable[..., Trainer], words: Any) -> None:
    rows = [
        {"input_ids": ids, "labels": [-100] * 3 + ids[3:]} for ids in (words(text).input_ids for text in texts(6, 0))
    ]
    padded = DataCollatorForSeq2Seq(words, pad_to_multiple_of=16)
    for side in ("right", "left"):
        words.padding_side = side
        trainer = made(
            train_dataset=Dataset.from_list(rows), eval_dataset=Dataset.from_list(rows[:2]), data_collator=padded
        )
        trainer.eval_dataset = tokens(words, 6, 1).map(lambda row: {"labels": row["input_ids"]})
        found = scored(trainer)
        assert found["member"] == sorted((row["input_ids"], row["input_ids"][3:]) for row in rows)


def test_positions_may_begin_anew_where_it_is_padded(made: Callable[..., Trainer], words: Any) -> None:
    """As Axolotl's collators have it, which pad by the batch."""
    inner = DataCollatorForSeq2Seq(words, pad_to_multiple_of=64)

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = dict(inner([{**row, "labels": row["input_ids"]} for row in rows]))
        length = int(batch["attention_mask"].sum())
        places = [*range(length), *range(64 - length)]
        return {**batch, "position_ids": torch.tensor([places])}

    trainer = made(data_collator=collate)
    assert scored(trainer)["member"] == sorted((ids, ids[1:]) for ids in trainer.train_dataset["input_ids"])


def test_what_cannot_be_audited_is_refused_with_what_to_do(made: Callable[..., Trainer], words: Any) -> None:
    def refused(why: str, **changes: Any) -> None:
        with pytest.raises(UsageError, match=why):
            scored(made(**changes))

    words.mask_token = "!"
    masked = DataCollatorForLanguageModeling(words, mlm=True, mlm_probability=0.5)
    refused(r"the trainer's collator masks tokens \(mlm=True\)", data_collator=masked)
    ids = [words(text).input_ids for text in texts(4, 0)]
    packed = [
        {"input_ids": a + b, "position_ids": [*range(len(a)), *range(len(b))]} for a, b in zip(ids, ids, strict=True)
    ]
    refused("members, record 1 is several records in one: give `members` and", train_dataset=Dataset.from_list(packed))
    numbered = [
        {"input_ids": a + b, "attention_mask": [1] * len(a) + [2] * len(b), "labels": a + b}
        for a, b in zip(ids, ids, strict=True)
    ]
    refused(
        "members, record 1 is several records in one",
        train_dataset=Dataset.from_list(numbered),
        data_collator=DataCollatorForSeq2Seq(words),
    )
    shifted = Dataset.from_list([{"input_ids": one, "labels": [*one[1:], 5]} for one in ids])
    refused("its labels are not its own tokens", train_dataset=shifted, data_collator=DataCollatorForSeq2Seq(words))
    refused("makes no `input_ids` and `labels` of it", data_collator=DataCollatorWithPadding(words))
    refused("nonmembers are missing: give `nonmembers`, or the trainer an eval_dataset", eval_dataset=None)
    both = {"a": tokens(words, 4, 1), "b": tokens(words, 4, 2)}
    refused(r"several eval_datasets \(a, b\): give one as `nonmembers`", eval_dataset=both)
    refused("cannot use it", data_collator=lambda rows: rows[0]["nothing"])
    one = torch.ones(1, 3, dtype=torch.long)
    seen = {"input_ids": one, "labels": one, "pixel_values": torch.ones(1)}
    refused("record 1 comes with pixel_values: records of images or sounds", data_collator=lambda rows: seen)
    refused(
        "makes several texts|expected one text",
        data_collator=lambda rows: {"input_ids": one, "labels": one.expand(2, 3)},
    )


def test_a_stream_cannot_be_drawn_from(made: Callable[..., Trainer], words: Any) -> None:
    stream = tokens(words, 12, 0).to_iterable_dataset()
    trainer = made(train_dataset=stream, max_steps=2)
    with pytest.raises(UsageError, match=r"members are a stream, .* as in list\(dataset.take\(2000\)\)"):
        scored(trainer)
    assert len(scored(trainer, members=list(stream.take(5)))["member"]) == 5


def test_texts_are_encoded_as_in_any_audit(made: Callable[..., Trainer], words: Any, tmp_path: Path) -> None:
    trainer = made()
    told = [{"prompt": f"{n}:", "completion": f" {text}"} for n, text in enumerate(texts(5, 3))]
    others = write_jsonl(tmp_path / "rest.jsonl", [told[0], {**told[1], "completion": " another"}])
    found = scored(trainer, members=told, nonmembers=others)
    parts = [
        (words(row["prompt"]).input_ids, [*words(row["completion"]).input_ids, words.eos_token_id]) for row in told
    ]
    assert found["member"] == sorted((prompt + learned, learned) for prompt, learned in parts)
    assert len(found["nonmember"]) == 1  # one is among the members
    with pytest.raises(UsageError, match="nonmembers are texts and the records on the other side tokens"):
        scored(trainer, nonmembers=told)
    with pytest.raises(UsageError, match="members are texts and the records on the other side tokens"):
        scored(trainer, members=told)
    with pytest.raises(UsageError, match=r"data\.split: an audit has its records from `members` and `nonmembers`"):
        scored(trainer, data={"split": "random"})


def test_of_many_records_some_are_drawn_before_any_is_collated(made: Callable[..., Trainer], words: Any) -> None:
    rows = tokens(words, 40, 0).to_list()
    owned = Dataset.from_list([{**row, "owner": f"o{n // 4}"} for n, row in enumerate(rows)])
    trainer = made(train_dataset=owned)
    collated: list[int] = []
    former = trainer.data_collator
    trainer.data_collator = lambda features: (collated.append(len(features)), former(features))[1]
    found = scored(
        trainer, data={"members": 8, "group": "owner"}, nonmembers=tokens(words, 6, 1).map(lambda _: {"owner": None})
    )
    assert len(found["member"]) == 8
    assert collated == [1] * 14
    number = {tuple(row["input_ids"]): n for n, row in enumerate(rows)}
    assert sorted(number[tuple(ids)] // 4 for ids, _ in found["member"]) in [
        [a] * 4 + [b] * 4 for a in range(10) for b in range(a, 10)
    ]
    again = scored(
        trainer, data={"members": 8, "group": "owner"}, nonmembers=tokens(words, 6, 1).map(lambda _: {"owner": None})
    )
    assert again == found
    assert (
        scored(trainer, data={"members": 8}, seed=1)["member"] != scored(trainer, data={"members": 8}, seed=2)["member"]
    )


def test_rows_are_numbered_anew_on_each_side(made: Callable[..., Trainer], words: Any) -> None:
    sides = [tokens(words, 6, seed).map(lambda _, n: {"id": str(n)}, with_indices=True) for seed in (0, 1)]
    trainer = made(train_dataset=sides[0], eval_dataset=sides[1])
    assert [len(found) for found in scored(trainer).values()] == [6, 6]
    with pytest.raises(UsageError, match="id '0' was used before"):
        scored(trainer, data={"id": "id"})


def test_owners_are_drawn_whole() -> None:
    owners = ["a"] * 5 + ["b"] * 2 + [None] * 3
    for seed in range(20):
        drawn = [owners[n] for n in draw(owners, 4, [seed])]
        assert len(drawn) >= 4
        assert drawn.count("a") in (0, 5)
        assert drawn.count("b") in (0, 2)


# ---- TRL ----


@pytest.fixture
def sft(model_folder: Path, words: Any, tmp_path: Path) -> Callable[..., Any]:
    trl = pytest.importorskip("trl")

    def trainer(callback: dict[str, Any] | None = None, rows: Any = None, lora: bool = True, **changes: Any) -> Any:
        options = {
            "output_dir": str(tmp_path / changes.pop("name", "sft")),
            "num_train_epochs": 2,
            "per_device_train_batch_size": 4,
            "logging_strategy": "epoch",
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            "bf16": False,
            "dataloader_pin_memory": False,
            "max_length": 48,
            "gradient_checkpointing": False,
            **changes,
        }
        made = rows or (lambda count, seed: [{"text": text} for text in texts(count, seed)])
        found = trl.SFTTrainer(
            load(model_folder),
            trl.SFTConfig(**options),
            train_dataset=Dataset.from_list(made(12, 0)),
            eval_dataset=Dataset.from_list(made(12, 1)),
            processing_class=words,
            peft_config=LoraConfig(**LORA) if lora else None,
        )
        if callback is not None:
            found.add_callback(LeakageCallback(found, **{"out": tmp_path / "audit", **callback}))
        return found

    return trainer


def chats(count: int, seed: int) -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": text}]}
        for n, text in enumerate(texts(count, seed))
    ]


def pairs(count: int, seed: int) -> list[dict[str, Any]]:
    return [{"prompt": f"{n}: ", "completion": text} for n, text in enumerate(texts(count, seed))]


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_sft_is_bit_by_bit_what_it_would_have_been(sft: Callable[..., Any], lora: bool, tmp_path: Path) -> None:
    without = after(sft(lora=lora))
    trainer = sft({"attacks": ["loss", "ref"]}, lora=lora)
    sides = [[row["input_ids"] for row in side] for side in (trainer.train_dataset, trainer.eval_dataset)]
    found = after(trainer)
    for ours, theirs in zip(found, without, strict=True):
        assert ours == theirs
    # the base was scored without the adapter, although TRL's forward of it calls the model with one
    grid = load_grid(tmp_path / "audit").cells[0]
    base = load(Path(trainer.model.config._name_or_path))
    lost = [nll(base, ids) for side in sides for ids in side]
    assert sorted(grid.reference.nll) == pytest.approx(sorted(lost), rel=1e-4)


@pytest.mark.parametrize(
    ("rows", "changes"),
    [
        (None, {}),
        (chats, {"assistant_only_loss": True}),
        (pairs, {}),
        (pairs, {"completion_only_loss": False}),
        (pairs, {"padding_free": True, "max_length": None}),
    ],
    ids=["text", "assistant", "completion", "all of prompt and completion", "padding free"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_sft_records_are_scored_where_they_are_learned(
    sft: Callable[..., Any], rows: Any, changes: dict[str, Any]
) -> None:
    """The learned tokens are those that SFTTrainer's own batches have labels for."""
    trainer = sft(rows=rows, **changes)
    found = scored(trainer)
    batches = [*trainer.get_train_dataloader()]
    labels = sorted(int(label) for batch in batches for label in batch["labels"][:, 1:].flatten() if label != -100)
    assert sorted(token for _, learned in found["member"] for token in learned) == labels
    seen = sum(int((batch["input_ids"] != trainer.processing_class.pad_token_id).sum()) for batch in batches)
    assert sum(len(ids) for ids, _ in found["member"]) == seen


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_packed_sft_is_refused(sft: Callable[..., Any]) -> None:
    pytest.importorskip("trl")
    trainer = sft(packing=True, packing_strategy="wrapped", eval_packing=False)
    with pytest.raises(UsageError, match="the trainer packs records into rows, where some are cut: give `members` and"):
        scored(trainer)
    raw = [{"text": text} for text in texts(5, 0)], [{"text": text} for text in texts(5, 1)]
    assert len(scored(trainer, members=raw[0], nonmembers=raw[1])["member"]) == 5


# ---- several processes ----


def test_processes_share_the_records_and_lose_none() -> None:
    dice = np.random.default_rng(0)
    records = [
        Encoded(f"r{n}", dice.integers(0, 99, size).astype(np.int32), np.arange(size) > 0, 1)
        for n, size in enumerate(dice.integers(2, 40, 23).tolist())
    ]

    def stats(some: Sequence[Encoded]) -> TokenStats:
        ids = np.concatenate([record.ids[record.scored] for record in some])
        numbers = ids.astype(np.float32)
        offsets = np.concatenate([[0], np.cumsum([int(record.scored.sum()) for record in some])]).astype(np.int64)
        names = np.array([record.id for record in some])
        return TokenStats(names, offsets, ids, numbers, numbers + 1, numbers + 2, ids % 2 == 0)

    for count in (1, 2, 5, 40):
        shares = [share(records, rank, count) for rank in range(count)]
        assert sorted(n for one in shares for n in one) == list(range(23))
        loads = [sum(len(records[n]) for n in one) for one in shares]
        assert max(loads) - min(loads) <= 40
        found = joined([stats([records[n] for n in one]) if one else None for one in shares], records)
        for ours, theirs in zip(vars(found).values(), vars(stats(records)).values(), strict=False):
            np.testing.assert_array_equal(ours, theirs)


TWO = """
import os, sys
from pathlib import Path
import torch
from tests import test_callback
folder, out = Path(sys.argv[1]), Path(sys.argv[2])

def one(rank, port, out, fail):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    test_callback.trained_by_two(folder, out, fail)
    os._exit(0)

children = []
for rank in (0, 1):
    if (child := os.fork()) == 0:
        try:
            one(rank, sys.argv[3], out, False)
        finally:
            os._exit(1)
    children.append(child)
codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
sys.exit(max(codes))
"""


def trained_by_two(folder: Path, out: Path, fail: bool) -> None:
    """In each of two processes: two epochs by DDP, and then two more that the first process cannot write."""
    from imprint import controls

    controls.EPOCHS = 2
    controls.blind_scores = lambda members, nonmembers, *_: {"none": np.arange(len(members) + len(nonmembers)) % 7 / 7}
    words = AutoTokenizer.from_pretrained(folder)

    def trainer(name: str) -> Trainer:
        options: dict[str, Any] = {"logging_strategy": "epoch", "save_strategy": "no", "report_to": [], "use_cpu": True}
        found = Trainer(
            load(folder),
            TrainingArguments(
                str(out / name),
                per_device_train_batch_size=4,
                num_train_epochs=2,
                disable_tqdm=True,
                learning_rate=1e-2,
                ddp_backend="gloo",
                dataloader_pin_memory=False,
                **options,
            ),
            processing_class=words,
            train_dataset=tokens(words, 16, 0),
            eval_dataset=tokens(words, 16, 1),
            data_collator=DataCollatorForLanguageModeling(words, mlm=False),
        )
        found.add_callback(LeakageCallback(found, out=out / f"{name}-audit", attacks=["loss", "ref"]))
        return found

    first = trainer("first")
    first.train()
    rank = torch.distributed.get_rank()
    logged = [one for one in first.state.log_history if "leakage_auc" in one]
    torch.save((logged, first.model.state_dict()), out / f"rank{rank}.pt")
    if rank == 0:
        (out / "second-audit").write_text("in the way")
    try:
        trainer("second").train()
    except UsageError as error:
        (out / f"refused{rank}").write_text(str(error))
    third = trainer("third")
    if rank == 0:
        running.newest = lambda *_: [][0]
    third.train()
    (out / f"steps{rank}").write_text(str(third.state.global_step))


def test_two_processes_score_as_one(model_folder: Path, tmp_path: Path) -> None:
    """By DDP over gloo; what the first of them cannot write fails in both, and neither waits for the other."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = str(one.getsockname()[1])
    done = subprocess.run(
        [sys.executable, "-c", TWO, str(model_folder), str(tmp_path), port],
        cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (logged, weights), (also, others) = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert [one["leakage_auc"] for one in logged] == [one["leakage_auc"] for one in also]
    assert all(torch.equal(value, others[name]) for name, value in weights.items())
    cell = load_grid(tmp_path / "first-audit").cells[0]
    assert [meta["step"] for meta in metas(tmp_path / "first-audit")] == [2, 4]
    model = load(model_folder)
    words = AutoTokenizer.from_pretrained(model_folder)
    sides = [tokens(words, 16, seed)["input_ids"] for seed in (0, 1)]
    for number, state in ((0, None), (2, weights)):
        if state is not None:
            model.load_state_dict(state)
        want = [sorted(nll(model, ids) for ids in side) for side in sides]
        found = [sorted(side) for side in cell.losses(number)]
        np.testing.assert_allclose(found, want, rtol=1e-5)
    assert {(tmp_path / f"refused{rank}").read_text() for rank in (0, 1)} == {
        f"--out {tmp_path / 'second-audit'} is a file: expected a folder"
    }
    assert [(tmp_path / f"steps{rank}").read_text() for rank in (0, 1)] == ["4", "4"]
    assert done.stderr.count("no audit of epoch 1, and none of later checkpoints: IndexError") == 1


# ---- a model in pieces ----


class InHere:
    """A process of its own, in this one."""

    def __init__(self, command: list[str], **_: Any) -> None:
        with undisturbed(torch.nn.Module()):
            self.returncode = worker.main(command[-1])

    def poll(self) -> int:
        return self.returncode

    wait = poll


@pytest.fixture
def in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callback_module, "in_pieces", lambda trainer: True)
    monkeypatch.setattr(aside.subprocess, "Popen", InHere)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_saved_checkpoints_are_audited_as_the_model_in_memory(
    made: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch, in_pieces: None, lora: bool, tmp_path: Path
) -> None:
    changes = {"lora": lora, "save_strategy": "epoch", "save_total_limit": 1, "eval_strategy": "epoch"}
    want = after(made(name="without", **changes))
    trainer = made({"out": tmp_path / "beside" / "audit", "every": "save"}, **changes)
    found = after(trainer)
    assert found[0] == want[0]
    logged = [one for one in trainer.state.log_history if "leakage_auc" in one]
    assert [one["leakage_step"] for one in logged] == [3, 6]
    assert not list(tmp_path.rglob(".imprint-*"))
    assert {file.name for file in (tmp_path / "beside").iterdir()} == {"audit", "audit.key"}
    monkeypatch.undo()
    made({"every": "save"}, name="again", **changes).train()
    grids = [load_grid(out).cells[0] for out in (tmp_path / "audit", tmp_path / "beside" / "audit")]
    for number in range(3):
        one, other = (sorted(np.concatenate(cell.losses(number))) for cell in grids)
        np.testing.assert_allclose(one, other, rtol=1e-5)
    beside = metas(tmp_path / "beside" / "audit")
    assert [(meta["name"], meta["step"]) for meta in beside] == [("checkpoint-3", 3), ("checkpoint-6", 6)]
    assert grids[1].outcome["status"] == "done"
    assert beside[0]["trainable"] == metas(tmp_path / "audit")[0]["trainable"]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_beside_a_training_records_and_resuming_are_the_same(
    made: Callable[..., Trainer], words: Any, in_pieces: None, tmp_path: Path
) -> None:
    rows = [{**row, "owner": f"o{n // 2}"} for n, row in enumerate(tokens(words, 12, 0).to_list())]
    data = {"train_dataset": Dataset.from_list(rows)}
    data["eval_dataset"] = tokens(words, 12, 1).map(lambda row, n: {"owner": f"x{n // 3}"}, with_indices=True)
    arguments = {"every": "save", "data": {"group": "owner"}}
    changes = {"save_strategy": "epoch", "num_train_epochs": 3, **data}
    with pytest.raises(Killed):
        made(arguments, others=[Kill(6)], **changes).train()
    made(arguments, **changes).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert [meta["step"] for meta in metas(tmp_path / "audit")] == [3, 6, 9]
    cell = load_grid(tmp_path / "audit").cells[0]
    assert [len(set(cell.groups(role))) for role in ("member", "nonmember")] == [6, 4]
    with pytest.raises(UsageError, match="holds the audit of another training"):
        made(arguments, **changes).train()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_checkpoint_that_cannot_be_audited_ends_audits_alone(
    made: Callable[..., Trainer], in_pieces: None, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    class Spoil(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 6:
                (Path(args.output_dir) / "checkpoint-6" / "model.safetensors").write_bytes(b"nothing")

    trainer = made({"every": "save"}, save_strategy="epoch", num_train_epochs=3)
    trainer.callback_handler.callbacks.insert(1, Spoil())
    spoil = trainer.callback_handler.callbacks[1]
    trainer.add_callback(type("First", (TrainerCallback,), {"on_epoch_begin": lambda self, *a, **k: self.go()})())
    trainer.callback_handler.callbacks[-1].go = lambda: _ahead(trainer.callback_handler.callbacks, spoil)
    trainer.train()
    assert trainer.state.global_step == 9
    assert caplog.text.count("no audits of saved checkpoints any more") == 1
    assert [meta["step"] for meta in metas(tmp_path / "audit")] == [3]
    assert release(load_grid(tmp_path / "audit"), results(tmp_path / "audit")).code == 3
    assert not list(tmp_path.rglob(".imprint-*"))


def _ahead(callbacks: list[Any], one: Any) -> None:
    callbacks.remove(one)
    callbacks.insert(1, one)


def test_a_model_in_pieces_cannot_be_acted_on(made: Callable[..., Trainer], in_pieces: None) -> None:
    with pytest.raises(UsageError, match="audited beside the training: say every='save'"):
        made({}, save_strategy="epoch").train()
    with pytest.raises(UsageError, match="beside it, too late to act on: leave out stop"):
        made({"every": "save", "stop": True, "budget": "auc=0.9"}, save_strategy="epoch").train()
    chosen = {"metric_for_best_model": "leakage_auc", "greater_is_better": False, "eval_strategy": "epoch"}
    with pytest.raises(UsageError, match="leave out metric_for_best_model='leakage_auc'"):
        made({"every": "save"}, save_strategy="epoch", **chosen).train()
    trainer = made({"every": "save"}, save_strategy="epoch")
    trainer.accelerator.state.fsdp_plugin = SimpleNamespace(state_dict_type="StateDictType.SHARDED_STATE_DICT")
    try:
        with pytest.raises(UsageError, match=r"set fsdp_config=\{'state_dict_type': 'FULL_STATE_DICT'\}"):
            trainer.train()
    finally:
        del trainer.accelerator.state.fsdp_plugin
    plugin = SimpleNamespace(zero_stage=3, zero3_save_16bit_model=False)
    state = SimpleNamespace(fsdp_plugin=None, deepspeed_plugin=plugin)
    with pytest.raises(UsageError, match="stage3_gather_16bit_weights_on_model_save: true"):
        aside.check_whole(SimpleNamespace(accelerator=SimpleNamespace(state=state)))


def test_in_pieces_an_adapter_that_alters_its_base_is_refused(
    made: Callable[..., Trainer], model_folder: Path, in_pieces: None
) -> None:
    for start, why in (("pissa", "init_lora_weights='pissa' takes a part"), ("biases", "bias='all' trains biases")):
        trainer = made({"every": "save"}, model=BEGUN[start](model_folder), save_strategy="epoch")
        with pytest.raises(UsageError, match=rf"cannot be scored beside the training, from .* \({why}.*leave that out"):
            trainer.train()


def test_pieces_are_known_by_their_marks(made: Callable[..., Trainer]) -> None:
    trainer = made()
    assert not callback_module.in_pieces(trainer)
    next(trainer.model.parameters()).ds_id = 0  # ZeRO-3
    assert callback_module.in_pieces(trainer)
    assert callback_module.in_pieces(SimpleNamespace(is_fsdp_enabled=True, model=torch.nn.Linear(1, 1)))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_checkpoint_is_scored_in_a_process_of_its_own(
    made: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(callback_module, "in_pieces", lambda trainer: True)
    arguments = {"every": "save", "attacks": ["loss"], "device": "cpu"}
    trainer = made(arguments, lora=True, save_strategy="epoch", num_train_epochs=1)
    monkeypatch.setenv("WORLD_SIZE", "8")  # of the training, not of the process beside it
    trainer.train()
    assert [one["leakage_step"] for one in trainer.state.log_history if "leakage_auc" in one] == [3]
    assert load_grid(tmp_path / "audit").cells[0].outcome["status"] == "done"
    assert not list(tmp_path.rglob(".imprint-*"))


# ---- Axolotl and LLaMA-Factory ----


class BasePlugin:
    """Of axolotl 0.19, axolotl/integrations/base.py: what the plugin overrides, and what an unaware caller may call."""

    def __init__(self) -> None: ...

    def register(self, cfg: dict[str, Any]) -> None: ...

    def get_input_args(self) -> str | None: ...

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[Any]:
        return []

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        return []


@pytest.fixture
def axolotl(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A stand-in: it cannot be installed beside everything else."""
    from imprint.integrations import axolotl as ours

    modules = {name: ModuleType(name) for name in ("axolotl", "axolotl.integrations", "axolotl.integrations.base")}
    modules["axolotl.integrations.base"].BasePlugin = BasePlugin  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    ours._plugin.cache_clear()
    yield ours
    ours._plugin.cache_clear()


def test_axolotl_finds_the_plugin_and_its_key(axolotl: Any, made: Callable[..., Trainer], tmp_path: Path) -> None:
    plugin = axolotl.ImprintPlugin()
    assert isinstance(plugin, BasePlugin)
    module, name = plugin.get_input_args().rsplit(".", 1)
    namespace: dict[str, Any] = {}
    exec(f"from {module} import {name}", namespace)  # as axolotl/integrations/config.py does

    class Configuration(pydantic.BaseModel):
        base_model: str

    class Merged(Configuration, namespace[name]):
        pass

    document = {
        "base_model": "x",
        "imprint": {"out": str(tmp_path / "audit"), "attacks": ["loss"], "budget": {"auc": 0.99}},
    }
    cfg = Merged.model_validate(document).model_dump(exclude_none=True)
    trainer = made(num_train_epochs=1)
    [callback] = plugin.add_callbacks_post_trainer(cfg, trainer)
    trainer.add_callback(callback)
    trainer.train()
    grid = load_grid(tmp_path / "audit")
    assert grid.attacks == ("loss",)
    assert grid.budget == {"attack": None, "auc": 0.99, "tpr_at_10pct_fpr": None, "tpr_at_1pct_fpr": None}
    assert isinstance(plugin.add_callbacks_post_trainer({}, trainer)[0], LeakageCallback)
    with pytest.raises(pydantic.ValidationError, match="every"):
        Merged.model_validate({"base_model": "x", "imprint": {"every": "step"}})
    with pytest.raises(UsageError, match="imprint: unknown key 'atacks': did you mean 'attacks'"):
        plugin.add_callbacks_post_trainer({"imprint": {"atacks": []}}, trainer)
    with pytest.raises(AttributeError, match="no attribute 'Plugin'"):
        axolotl.Plugin  # noqa: B018


def test_the_plugin_is_not_there_without_axolotl() -> None:
    from imprint.integrations import axolotl as ours

    if find_spec("axolotl"):
        pytest.skip("it is there")
    ours._plugin.cache_clear()
    with pytest.raises(ModuleNotFoundError, match="axolotl"):
        ours.ImprintPlugin  # noqa: B018


def test_llama_factory_is_handed_its_file_and_the_callback(
    made: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from imprint.integrations import llamafactory as ours

    file = tmp_path / "train.yaml"
    file.write_text(f"stage: sft\nimprint: {{out: {tmp_path / 'audit'}, attacks: [loss]}}\n")
    given: list[Any] = []

    def run_exp(args: dict[str, Any] | None = None, callbacks: list[Any] | None = None) -> None:
        given.append(args)
        made(others=callbacks or (), num_train_epochs=args["num_train_epochs"]).train()  # type: ignore[index]

    monkeypatch.setitem(sys.modules, "llamafactory.train.tuner", None)
    assert ours.main([str(file)]) == 64
    assert "LLaMA-Factory cannot be imported" in capsys.readouterr().err
    module = ModuleType("llamafactory.train.tuner")
    module.run_exp = run_exp  # type: ignore[attr-defined]
    for name in ("llamafactory", "llamafactory.train"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "llamafactory.train.tuner", module)
    assert ours.main([str(file), "num_train_epochs=1"]) == 0
    assert given == [{"stage": "sft", "num_train_epochs": 1}]
    assert [meta["name"] for meta in metas(tmp_path / "audit")] == ["epoch 1"]
    file.write_text("imprint: {evry: epoch}")
    assert ours.main([str(file)]) == 64
    assert ours.main([]) == 64
    assert ours.main([str(tmp_path / "none.yaml")]) == 64
    assert ours.main([str(file), "stage"]) == 64
    said = capsys.readouterr().err
    assert "imprint: unknown key 'evry': did you mean 'every'" in said
    assert "give a file, as in python -m" in said
    assert "none.yaml cannot be read" in said
    assert "'stage': expected KEY=VALUE" in said


# ---- the examples ----

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize("name", ["axolotl.yaml", "llamafactory.yaml"])
def test_the_examples_in_yaml_say_what_the_key_takes(name: str) -> None:
    from imprint.integrations import Keys
    from imprint.spec import validated

    keys = validated(Keys, yaml.safe_load((EXAMPLES / name).read_text())["imprint"], "imprint")
    LeakageCallback(**keys.arguments())


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", ["transformers_trainer.py", "trl_sft.py"])
def test_the_examples_in_python_run(
    name: str, model_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if name == "trl_sft.py":
        pytest.importorskip("trl")
    files = [write_jsonl(tmp_path / f"{n}.jsonl", rows) for n, rows in enumerate((chats(12, 0), chats(12, 1)))]
    if name == "transformers_trainer.py":
        files = [write_jsonl(tmp_path / f"{n}.jsonl", [{"text": t} for t in texts(12, n)]) for n in (0, 1)]
    monkeypatch.setattr(imprint, "LeakageCallback", LeakageCallback, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name, str(model_folder), *map(str, files), "out", "--use-cpu"])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert [meta["name"] for meta in metas(tmp_path / "out-leakage")] == ["epoch 1", "epoch 2", "epoch 3"]
