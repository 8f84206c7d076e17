"""Leakage beside the loss: an audit of the model after every epoch or save of a Transformers Trainer."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from transformers import Trainer, TrainerCallback

from imprint.attacks import one_pass
from imprint.auditing.training import Asked, Found
from imprint.errors import ImprintError, UsageError, first_line
from imprint.recipe import attack_names, checked_budget
from imprint.recommend import parse_budget
from imprint.spec import Budget

if TYPE_CHECKING:
    from imprint.auditing.aside import Aside
    from imprint.auditing.running import Running

EVERY = ("epoch", "save")
_LOG = logging.getLogger("imprint")


class LeakageCallback(TrainerCallback):  # type: ignore[misc]
    """Scores members and non-members before the first step and after every epoch or save, and logs the AUC.

    Training is left as it is: with and without the callback the weights come out bit by bit the same. What is wrong
    with the request stops it before its first step; what goes wrong later is logged, and the training goes on.

    `leakage_auc` (with `_low` and `_high`: the attack that finds most, or the one that the budget names),
    `leakage_<attack>_auc` and `leakage_heldout_loss` go to every tracker of the trainer. An evaluation has them as
    `eval_leakage_auc` …, so that `metric_for_best_model="leakage_auc"` and `EarlyStoppingCallback` can go by them. The
    folder is that of `imprint audit`. A second `train()` of the same trainer needs another, in a callback of its own.

    Args:
        trainer: whose training it is (default: the one that calls).
        members: records that are trained on: a file, rows, texts or a data set (default: the trainer's train_dataset).
        nonmembers: records that are like them and not trained on (default: its eval_dataset).
        attacks: names (default: all).
        every: `epoch` or `save`.
        out: output folder (default: beside the trainer's output_dir, `<output_dir>-leakage`).
        budget: limits that an upper bound has to stay below, as `{"auc": 0.6}` or `"auc=0.6"`.
        stop: whether training stops once it does not.
        reference: a model to compare with, in memory or by name (default: the model as it was before training, without
            its virtual tokens where it has some).
        data: keys of a recipe's `data`: `format`, `loss`, `eos`, `max_length`, `overlong`, `group`, `subgroup`, `id`,
            `members`, `nonmembers` (at most so many, default 2,000 each), `seed`.
        id_key: file with the key that hides ids (default: beside the folder, `<out>.key`; made where there is none).
        token_budget: tokens of one forward pass (default: 2,048 on a CPU, 16,384 on a GPU).
        seed: draws records where there are more.
        device: where saved checkpoints are scored if the model in training lies in pieces (FSDP, ZeRO-3).

    Raises:
        UsageError: an argument cannot be used as asked.
    """

    def __init__(
        self,
        trainer: Trainer | None = None,
        members: Any = None,
        nonmembers: Any = None,
        *,
        attacks: Sequence[str] | None = None,
        every: str = "epoch",
        out: str | Path | None = None,
        budget: Mapping[str, Any] | str | Sequence[str] | None = None,
        stop: bool = False,
        reference: Any = None,
        data: Mapping[str, Any] | None = None,
        id_key: str | Path | None = None,
        token_budget: int | None = None,
        seed: int = 0,
        device: str = "auto",
    ) -> None:
        if every not in EVERY:
            raise UsageError(f"every: expected {' or '.join(EVERY)}, not {every!r}")
        names = attack_names(None if attacks is None else list(attacks))
        if further := [name for name in names if name not in one_pass(names, besides=("trace",))]:
            raise UsageError(f"attacks: {further[0]} needs more than one pass: audit the saved checkpoints for it")
        limits = _budget(budget, names)
        if stop and limits is None:
            raise UsageError('stop needs a budget to stop at, as in budget={"auc": 0.6}')
        self._trainer, self._every, self._out, self._key = trainer, every, out, id_key
        self._asked = {
            "members": members,
            "nonmembers": nonmembers,
            "attacks": names,
            "budget": limits,
            "stop": stop,
            "reference": reference,
            "data": dict(data or {}),
            "token_budget": token_budget,
            "seed": seed,
            "device": device,
        }
        self._work: Running | Aside | None = None
        self._speaks = True
        self._step, self._last, self._failed = -1, Found({}, False), ""

    # ---- what the trainer calls ----

    def on_train_begin(self, args: Any, state: Any, control: Any, **at_hand: Any) -> None:
        """The base, before the first step."""
        trainer = self._trainer = _calling_trainer() or self._trainer
        if trainer is None:
            raise UsageError("no Trainer called this callback: give it as LeakageCallback(trainer)")
        out = Path(self._out or f"{str(args.output_dir).rstrip('/')}-leakage").expanduser()
        self._check(args, out)
        self._work, self._step, self._last, self._failed = None, -1, Found({}, False), ""
        _go_first(self, trainer.callback_handler.callbacks)
        key = Path(self._key).expanduser() if self._key else out.with_name(f"{out.name}.key")
        work = self._worker(trainer, Asked(out=out, id_key=key, **self._asked))
        self._speaks = state.is_world_process_zero
        if doubts := work.begin(state.global_step, at_hand["train_dataloader"]):
            self._say(doubts)
        self._work = work

    def on_epoch_end(self, args: Any, state: Any, control: Any, **at_hand: Any) -> None:
        """A checkpoint, of the model in memory."""
        if self._every == "epoch":
            self._audit(f"epoch {round(state.epoch, 4):g}", state, control)

    def on_save(self, args: Any, state: Any, control: Any, **at_hand: Any) -> None:
        """A checkpoint that has just been saved."""
        if self._every == "save":
            self._audit(f"checkpoint-{state.global_step}", state, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **at_hand: Any) -> None:
        """The figures among those of an evaluation; measured now if the best model is to be chosen by them."""
        if self._work is None or not state.global_step:
            return
        chosen_by = _chosen_by(args)
        if chosen_by:
            name = f"epoch {round(state.epoch, 4):g}" if self._every == "epoch" else f"checkpoint-{state.global_step}"
            self._audit(name, state, control)
        if self._step == state.global_step:
            metrics.update({f"eval_{name}": value for name, value in self._last.figures.items()})
        if chosen_by and self._failed:
            metrics.setdefault(f"eval_{chosen_by}", math.nan)  # which is better than nothing, and than no number

    def on_step_end(self, args: Any, state: Any, control: Any, **at_hand: Any) -> None:
        """What has been found out beside the training since."""
        self._log_later(False, control)

    def on_train_end(self, args: Any, state: Any, control: Any, **at_hand: Any) -> None:
        """Results and report."""
        self._log_later(True, control)
        work, self._work = self._work, None
        if work is None:
            return
        try:
            work.end(self._failed)
        except Exception as error:  # the model is trained: it must still be saved
            self._fail("the audit could not be finished", error)
        work.ranks.leave()

    # ---- what it does then ----

    def _audit(self, name: str, state: Any, control: Any) -> None:
        """Once for every step, however many events ask for it."""
        if self._work is None or self._failed or self._step == state.global_step:
            return
        try:
            found = self._work.checkpoint(name, state.global_step, state.epoch)
        except Exception as error:  # days of training are worth more than an audit
            self._fail(f"no audit of {name}, and none of later checkpoints", error)
            return
        if found is None:
            return
        self._step, self._last = state.global_step, found
        self._log(found, control)
        if self._asked["stop"] and found.over:
            self._say(f"{name} does not keep the budget: training stops")
            control.should_training_stop = True

    def _log_later(self, wait: bool, control: Any) -> None:
        if self._work is None or (self._failed and not wait):
            return
        try:
            for found in self._work.ready(wait):
                self._log(found, control)
        except Exception as error:
            self._fail("no audits of saved checkpoints any more", error)

    def _log(self, found: Found, control: Any) -> None:
        """To every tracker. What a trainer of another kind adds to its own logs stays there for the next of them."""
        trainer: Any = self._trainer
        kept = control.should_log
        Trainer.log(trainer, dict(found.figures))
        control.should_log = trainer.control.should_log = kept

    def _fail(self, what: str, error: Exception) -> None:
        sentence = str(error) if isinstance(error, ImprintError) else f"{type(error).__name__}: {first_line(error)}"
        self._failed = self._failed or sentence
        self._say(f"{what}: {sentence}", None if isinstance(error, ImprintError) else error)

    def _say(self, sentence: str, error: Exception | None = None) -> None:
        if self._speaks:
            _LOG.warning("Imprint: %s", sentence, exc_info=error)

    def _check(self, args: Any, out: Path) -> None:
        """
        Raises:
            UsageError: what is asked for of the callback and of the trainer does not go together.
        """
        if self._every == "save" and str(getattr(args.save_strategy, "value", args.save_strategy)) == "no":
            raise UsageError("every='save', and the trainer saves nothing (save_strategy='no'): audit every='epoch'")
        chosen_by = _chosen_by(args)
        if chosen_by and not chosen_by.endswith("loss") and args.greater_is_better:
            raise UsageError(
                f"the best model by {chosen_by} would be the one that leaks most: set greater_is_better=False"
            )
        if args.push_to_hub and out.resolve().is_relative_to(Path(args.output_dir).resolve()):
            raise UsageError(f"out {out} and its key lie in what is pushed to the Hub: give a folder elsewhere")

    def _worker(self, trainer: Trainer, asked: Asked) -> Running | Aside:
        if not in_pieces(trainer):
            from imprint.auditing.running import Running

            return Running(trainer, asked)
        from imprint.auditing.aside import Aside

        why = "the model lies in pieces (FSDP, ZeRO-3 or tensor parallel), so that saved checkpoints are audited beside"
        if self._every != "save":
            raise UsageError(f"{why} the training: say every='save'")
        if asked.stop or _chosen_by(trainer.args):
            what = "stop" if asked.stop else f"metric_for_best_model={trainer.args.metric_for_best_model!r}"
            raise UsageError(f"{why} it, too late to act on: leave out {what}")
        return Aside(trainer, asked)


def in_pieces(trainer: Any) -> bool:
    """Whether no process of the training has the whole model."""
    marks = ("ds_id", "device_mesh")  # of DeepSpeed's ZeRO-3 and of torch's DTensor
    return bool(getattr(trainer, "is_fsdp_enabled", False)) or any(
        hasattr(parameter, mark) for parameter in trainer.model.parameters() for mark in marks
    )


def _budget(given: Mapping[str, Any] | str | Sequence[str] | None, attacks: tuple[str, ...]) -> Budget | None:
    if given is None or isinstance(given, Mapping):
        return checked_budget(given, attacks) if given else None
    return parse_budget([given] if isinstance(given, str) else given, attacks)


def _chosen_by(args: Any) -> str:
    """The figure of ours by which the best model is chosen; "" where it is none."""
    metric = (args.metric_for_best_model or "").removeprefix("eval_")
    return metric if metric.startswith("leakage_") else ""


def _calling_trainer() -> Trainer | None:
    """The trainer that is at work: every event comes from one of its methods."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if isinstance(owner := frame.f_locals.get("self"), Trainer):
            return owner
        frame = frame.f_back
    return None


def _go_first(callback: TrainerCallback, callbacks: list[TrainerCallback]) -> None:
    """Behind the one that decides what happens when, ahead of those that act on figures or pass them on.

    They are being walked through: a place earlier than the walk has come leaves it where it is.
    """
    place = callbacks.index(callback) if callback in callbacks else 0
    if place > 1:
        callbacks.insert(1, callbacks.pop(place))
