"""A stranger's PEFT adapter: what it is, from its files alone; and the base model with it attached.

Nothing that PEFT would do with the stranger's configuration happens: a configuration is built here from checked values
and from the names and shapes of the tensors, and then filled. Torch and peft are imported by `attach` only.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imprint.errors import ModelError
from imprint.store import checksum
from imprint.tuning.adapter_config import CONFIG, read_config
from imprint.tuning.adapter_tensors import Shapes, lora_options, read_shapes, token_options

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn

WEIGHTS = "adapter_model.safetensors"
_PICKLED = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")


@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter on disk.

    Attributes:
        path: its folder.
        kind: `lora`, `prefix`, `prompt` or `p_tuning`, as in `METHODS`.
        options: what to say of it: rank, alpha, targets …, or tokens. Plain JSON.
        base: the name of the model that it was tuned from; empty where the file states none that can be looked up.
        revision: that model's revision, where it is stated.
        fingerprint: SHA-256 over its weights and its configuration.
        weights: the safetensors file.
        shapes: tensor → shape.
        settings: the checked values of adapter_config.json that decide what it computes.
    """

    path: Path
    kind: str
    options: dict[str, Any]
    base: str
    revision: str | None
    fingerprint: str
    weights: Path
    shapes: Shapes
    settings: dict[str, Any]


def is_adapter(path: Path) -> bool:
    """Whether a folder holds a PEFT adapter, good or bad."""
    return (path / CONFIG).is_file()


def adapter_parameters(adapter: Adapter) -> int:
    """Numbers in its weights file."""
    return sum(math.prod(shape) for shape in adapter.shapes.values())


def read_adapter(path: Path) -> Adapter:
    """What lies in an adapter's folder. Of the weights only names, shapes and types are looked at.

    Raises:
        ModelError: it cannot be used safely, or not at all; the sentence names the file and the key or tensor.
    """
    config, weights = path / CONFIG, path / WEIGHTS
    if not config.is_file():
        raise ModelError(f"{path} holds no PEFT adapter: {CONFIG} is missing")
    whole = sorted([*path.glob("model*.safetensors"), *path.glob("pytorch_model*")])
    if whole and (path / "config.json").exists():
        raise ModelError(
            f"{path} holds a whole model ({whole[0].name}) beside an adapter ({CONFIG}): move one of them to a folder "
            "of its own, and give the one that is meant"
        )
    if not weights.is_file():
        pickled = [name for name in _PICKLED if (path / name).exists()]
        found = f"only {pickled[0]}, a pickled file, which can run code when loaded" if pickled else "no other weights"
        raise ModelError(
            f"{weights} is missing, and {path} holds {found}: load the adapter where you trust it and save it with "
            "save_pretrained(…, safe_serialization=True)"
        )
    kind, settings = read_config(config)
    shapes = read_shapes(weights)
    options = (lora_options if kind == "lora" else token_options)(weights, shapes, settings)
    digest = hashlib.sha256("".join(f"{file.name}:{checksum(file)}\n" for file in (config, weights)).encode())
    base, revision = settings["base_model_name_or_path"], settings["revision"]
    return Adapter(path, kind, options, base, revision, digest.hexdigest(), weights, shapes, settings)


def attach(model: nn.Module, adapter: Adapter) -> PeftModel:
    """The base with an adapter on it, frozen and in evaluation mode; what the adapter adds is in float32.

    Args:
        model: the base. It shares its weights with the result and is left as it was: to score "the same weights with
            the adapter off", score it.

    Raises:
        ModelError: a tensor has no place in this model, or a place no tensor; shapes differ; a number is not finite.
    """
    from imprint.tuning.adapter_attach import attached

    return attached(model, adapter)
