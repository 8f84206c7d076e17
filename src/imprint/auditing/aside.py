"""The audit of a training whose model lies in pieces (FSDP, ZeRO-3): of its saved checkpoints, beside it.

No process of the training has the whole model, so each saved checkpoint is scored by a process of its own, one at a
time, while the training goes on. What these need lies in private folders, which are gone when the training ends.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel

from imprint.auditing.identity import keep_key, read_key
from imprint.auditing.ledger import finish
from imprint.auditing.live import alters_base, method_of, undisturbed
from imprint.auditing.running import tokenizer_of
from imprint.auditing.shared_work import Ranks
from imprint.auditing.trainer_data import records_of
from imprint.auditing.training import Asked, Found, check_power, conclude, doubts, newest
from imprint.auditing.worker import SAID
from imprint.data import resolve_sizes
from imprint.data.forms import IGNORED
from imprint.errors import ImprintError, UsageError
from imprint.recipe import default_length
from imprint.records import Audit, prepare
from imprint.rows import load_grid
from imprint.spec import DataSpec, ModelSpec
from imprint.store import Store
from imprint.tuning.locate import locate
from imprint.tuning.models import base_of

_LAUNCHER = ("RANK", "LOCAL_", "GROUP_", "ROLE_", "WORLD_SIZE", "MASTER_", "TORCHELASTIC_", "ACCELERATE_", "FSDP_")
"""Environment variables by which a process would take itself for one of the training."""
_NEEDED = ("*.safetensors", "*.safetensors.index.json", "config.json", "adapter_config.json")


class Aside:
    """From the first step of a training to its last; only the first of its processes has any of it in hand."""

    def __init__(self, trainer: Any, asked: Asked) -> None:
        self.trainer, self.asked, self.ranks = trainer, asked, Ranks.join()
        self.job: dict[str, Any] = {}
        self.waiting: deque[dict[str, Any]] = deque()
        self.at_work: tuple[subprocess.Popen[bytes], dict[str, Any]] | None = None
        self.folders: list[tempfile.TemporaryDirectory[str]] = []

    def begin(self, step: int, loader: Any) -> str:
        """Score the base and measure what the gates need; what is to be doubted, or "".

        Raises:
            UsageError: something cannot be used as asked.
            InvalidAudit: the budget cannot be kept with so few records.
        """
        check_whole(self.trainer)
        with undisturbed(self.trainer.model):
            return self.ranks.first(lambda: self._begin(step, loader))

    def checkpoint(self, name: str, step: int, epoch: float) -> None:
        """Have a saved checkpoint scored when its turn comes, even if the trainer deletes it before."""
        if self.ranks.rank == 0:
            saved = Path(self.trainer.args.output_dir) / f"checkpoint-{step}"
            kept = _kept(saved, Path(self.folders[1].name) / saved.name)
            asked = {"folder": str(kept), "name": name, "step": step, "epoch": epoch}
            self.waiting.append({**self.job, "begin": None, "checkpoint": asked})
            self._start_next()

    def ready(self, wait: bool) -> list[Found]:
        """Checkpoints that have been scored since; of all that were saved, if there is time to wait.

        Raises:
            ImprintError: one could not be scored; those behind it will not be.
        """
        if wait:
            return self.ranks.first(self._rest)
        return self._done() if self.ranks.rank == 0 else []

    def end(self, failed: str) -> None:
        """Mark it complete unless something failed, write results and report, and leave nothing else behind."""
        self.ranks.first(lambda: self._end(failed))

    def _begin(self, step: int, loader: Any) -> str:
        asked = self.asked
        self.folders = [_private(Path(tempfile.gettempdir())), _private(asked.out.parent)]
        weakref.finalize(self, _abandon, self.folders)
        self.job = {**self._job(loader), "begin": step, "checkpoint": None}
        keep_key(asked.id_key, read_key(asked.id_key))
        self.waiting.append(self.job)
        self._start_next()
        self._rest()
        check_power(asked.out, asked.budget)
        return doubts(asked.out)

    def _job(self, loader: Any) -> dict[str, Any]:
        """What is the same for all checkpoints; the records and the tokenizer are written beside it."""
        asked, folder = self.asked, Path(self.folders[0].name)
        whole = self.trainer.accelerator.unwrap_model(self.trainer.model)
        if isinstance(whole, PeftModel) and (why := alters_base(whole)):
            raise UsageError(
                f"the adapter cannot be scored beside the training, from its saved checkpoints ({why}): leave that "
                "out, or train a model that is not in pieces"
            )
        model, method = _base_spec(whole), method_of(whole)
        pool, data = records_of(self.trainer, loader, asked.members, asked.nonmembers, asked.data, asked.seed)
        tokenizer = tokenizer_of(self.trainer)
        tokenizer.save_pretrained(folder / "tokenizer")
        room = locate(model).context - int(method.options.get("tokens", 0))
        data = resolve_sizes(data, pool)
        data = data.model_copy(update={"max_length": data.max_length or default_length(room)})
        audit = prepare(pool, data, tokenizer)
        files = {side: _written(audit, side, folder / f"{side}s.jsonl") for side in ("member", "nonmember")}
        return {
            "model": model.model_dump(mode="json"),
            "reference": None if asked.reference is None else str(asked.reference),
            "method": method.model_dump(mode="json"),
            "tokenizer": str(folder / "tokenizer"),
            "members": str(files["member"]),
            "nonmembers": str(files["nonmember"]),
            "data": _in_tokens(data, audit).model_dump(mode="json"),
            "id_key": str(asked.id_key.resolve()),
            "out": str(asked.out.resolve()),
            "attacks": asked.attacks,
            "budget": asked.budget.model_dump() if asked.budget else None,
            "document": asked.document(model.name),
            "device": asked.device,
            "token_budget": asked.token_budget,
        }

    def _start_next(self) -> None:
        if self.at_work is not None or not self.waiting:
            return
        job, folder = self.waiting.popleft(), Path(self.folders[0].name)
        file = folder / "job.json"
        file.write_text(json.dumps(job), encoding="utf-8")
        environment = {key: value for key, value in os.environ.items() if not key.startswith(_LAUNCHER)}
        command = [sys.executable, "-m", "imprint.auditing.worker", str(file)]
        with (folder / "output").open("wb") as output:
            process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        weakref.finalize(self, _stop, process)
        self.at_work = process, job

    def _done(self) -> list[Found]:
        """What the process at work has found, if it is done; the next one then starts."""
        if self.at_work is None or self.at_work[0].poll() is None:
            return []
        (process, job), self.at_work = self.at_work, None
        if process.returncode:
            self.waiting.clear()
            raise _error(process.returncode, Path(self.folders[0].name))
        self._start_next()
        if not job["checkpoint"]:
            return []
        shutil.rmtree(job["checkpoint"]["folder"], ignore_errors=True)
        found = newest(self.asked.out, self.asked.budget)
        return [replace(found, figures={**found.figures, "leakage_step": job["checkpoint"]["step"]})]

    def _rest(self) -> list[Found]:
        found = []
        while self.at_work is not None:
            self.at_work[0].wait()
            found += self._done()
        return found

    def _end(self, failed: str) -> None:
        out = self.asked.out
        with Store(out).alone():
            folder = load_grid(out).cells[0].folder
            if failed:
                folder.fail(failed)
            elif folder.finished_epochs():
                finish(folder)
            conclude(out)
        _abandon(self.folders)


def check_whole(trainer: Any) -> None:
    """
    Raises:
        UsageError: what the trainer saves is in pieces too.
    """
    state = trainer.accelerator.state
    kind = str(getattr(getattr(state, "fsdp_plugin", None), "state_dict_type", None) or "")
    if "SHARDED" in kind.upper():
        raise UsageError(
            "the trainer saves its model in pieces: set fsdp_config={'state_dict_type': 'FULL_STATE_DICT'}, so that "
            "saved checkpoints can be audited"
        )
    deepspeed = getattr(state, "deepspeed_plugin", None)
    if deepspeed is not None and deepspeed.zero_stage == 3 and not deepspeed.zero3_save_16bit_model:
        raise UsageError(
            "the trainer saves its model in pieces: set stage3_gather_16bit_weights_on_model_save: true in the "
            "DeepSpeed configuration, so that saved checkpoints can be audited"
        )


def _base_spec(model: Any) -> ModelSpec:
    """The model that was there before training, by its name."""
    below = base_of(model)
    name = model.active_peft_config.base_model_name_or_path if isinstance(model, PeftModel) else below.name_or_path
    if not name:
        raise UsageError("the model does not say where it was loaded from, so it cannot be loaded beside the training")
    bits = [bits for bits in ("4bit", "8bit") if getattr(below, f"is_loaded_in_{bits}", False)]
    return ModelSpec.model_validate({"name": str(name), "quantize": bits[0] if bits else None})


def _written(audit: Audit, side: str, file: Path) -> Path:
    """The records of a side in tokens, a line each; for the eyes of the process beside the training alone."""
    with file.open("w", encoding="utf-8") as lines:
        for example, record, role in zip(audit.examples, audit.scored, audit.roles, strict=True):
            if role == side:
                labels = [int(token) if on else IGNORED for token, on in zip(record.ids, record.scored, strict=True)]
                row = {"id": example.id, "input_ids": record.ids.tolist(), "labels": labels}
                lines.write(json.dumps({**row, "owner": example.group, "kind": example.subgroup}) + "\n")
    return file


def _in_tokens(data: DataSpec, audit: Audit) -> DataSpec:
    """How the records that were written are read."""
    columns = {
        "group": "owner" if any(example.group is not None for example in audit.examples) else None,
        "subgroup": "kind" if any(example.subgroup is not None for example in audit.examples) else None,
    }
    return data.model_copy(update={"format": "tokens", "id": "id", "loss": "target", "eos": None, **columns})


def _kept(saved: Path, place: Path) -> Path:
    """The weights of a checkpoint under another name: links, where the file system has them."""
    place.mkdir()
    for file in (file for pattern in _NEEDED for file in saved.glob(pattern)):
        try:
            os.link(file, place / file.name)
        except OSError:
            shutil.copyfile(file, place / file.name)
    return place


def _private(parent: Path) -> tempfile.TemporaryDirectory[str]:
    """A folder for the eyes of its owner alone."""
    parent.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(prefix=".imprint-", dir=parent)


def _error(code: int, folder: Path) -> ImprintError:
    file = folder / SAID
    if not file.exists():  # killed, or it did not come to begin
        last = (folder / "output").read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        return ImprintError(f"the process that scores checkpoints ended with code {code}: {''.join(last)}".rstrip(": "))
    said = json.loads(file.read_text(encoding="utf-8"))
    file.unlink()
    return UsageError(said) if code == UsageError.exit_code else ImprintError(said)


def _abandon(folders: list[tempfile.TemporaryDirectory[str]]) -> None:
    for folder in folders:
        folder.cleanup()


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        process.wait()
