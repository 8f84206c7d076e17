"""What an epoch leaves on disk, and how a run goes on from it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imprint.errors import ImprintError
from imprint.records import Audit
from imprint.store import CellFolder, atomic_folder, write_json, write_stats
from imprint.tuning.private import PrivateTrainer
from imprint.types import TokenStats

if TYPE_CHECKING:
    from torch import nn

    from imprint.tuning.train import EpochReport, Trainer


def resume(folder: CellFolder, trainer: Trainer) -> int:
    """Restore the newest finished epoch and return its number; 0 where there is none."""
    from safetensors.torch import load_file

    done = folder.finished_epochs()
    if not done:
        return 0
    state = folder.epoch(done) / "state.safetensors"
    if not state.exists():
        raise ImprintError(f"{state} is missing: delete {folder.path} and run the same command again")
    trainer.restore(load_file(state))
    return done


def write_epoch(
    folder: CellFolder, report: EpochReport, stats: TokenStats, trainer: Trainer, audit: Audit, cost: dict[str, Any]
) -> None:
    """Evidence, weights and resume state of an epoch appear together; what they replace then goes.

    Weights are kept of the newest epoch and of the best one, which is what one would ship. `cost` is what
    `costs.measured` says of the epoch.
    """
    from safetensors.torch import save_file

    meta = {
        "epoch": report.epoch,
        "training_loss": report.training_loss,
        "tokens_trained": report.tokens,
        "tokens_scored": audit.tokens,
        "validation_perplexity": audit.perplexity(stats),
        "cost": cost,
    }
    if isinstance(trainer, PrivateTrainer):
        meta["privacy"] = {"epsilon": trainer.spent(report.epoch), "delta": trainer.delta, "noise": trainer.noise}
    with atomic_folder(folder.epoch(report.epoch)) as path:
        write_stats(path / "stats.parquet", stats)
        write_json(path / "meta.json", meta)
        save_trained(path / "adapter", trainer.model)
        save_file(trainer.state(), path / "state.safetensors")
    folder.drop_states(keep=report.epoch)
    folder.drop_adapters(keep={report.epoch, folder.best_epoch()})


def load_trained(path: Path, model: nn.Module) -> None:
    """The inverse of `save_trained`, into a model to which the same method has been attached; no configuration is read.

    Raises:
        ImprintError: the weights are not there, or are another method's.
    """
    import torch
    from peft import PeftModel, set_peft_model_state_dict
    from safetensors.torch import load_file

    from imprint.tuning.models import trainable

    file = path / ("adapter_model.safetensors" if isinstance(model, PeftModel) else "trained.safetensors")
    if not file.exists():
        raise ImprintError(f"{file} is missing: weights are kept of the last epoch and of the best one")
    weights, wanted = load_file(file), trainable(model)
    if isinstance(model, PeftModel):
        unexpected = [key for key in set_peft_model_state_dict(model, weights).unexpected_keys if "prompt_" not in key]
        model.active_peft_config.inference_mode = True  # virtual tokens are saved as they come out of their encoder
    else:
        unexpected = sorted(weights.keys() ^ wanted.keys())
        with torch.no_grad():
            for name in wanted.keys() & weights.keys():
                wanted[name].copy_(weights[name])
    if unexpected:
        raise ImprintError(f"{file} holds the weights of another method: {unexpected[0]} has no place in this model")


def save_trained(path: Path, model: nn.Module) -> None:
    """A PEFT adapter where the method is one; else the trained weights by name."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import save_file

    from imprint.tuning.models import trainable

    path.mkdir()
    name, weights = "trained.safetensors", {name: p.detach() for name, p in trainable(model).items()}
    if isinstance(model, PeftModel):  # as `save_pretrained` does, but for the model card it writes every time
        name, weights = "adapter_model.safetensors", get_peft_model_state_dict(model, save_embedding_layers=False)
        config = copy.copy(model.active_peft_config)
        config.inference_mode = True
        config.save_pretrained(str(path))
    save_file({key: value.cpu().contiguous() for key, value in weights.items()}, path / name)
