"""Models in memory: the base that lies below an adapter, and leaving somebody else's training as it was."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from imprint.errors import UsageError
from imprint.spec import MethodSpec
from imprint.tuning.locate import Located
from imprint.tuning.models import base_of, shared_copy

_SAMPLED = 256
"""Numbers of each weight that its fingerprint looks at."""
_ADAPTED = (BaseTunerLayer, AuxiliaryTrainingWrapper)
_KINDS = {"PREFIX_TUNING": "prefix", "PROMPT_TUNING": "prompt", "P_TUNING": "p_tuning"}


def plain_copy(model: nn.Module) -> nn.Module:
    """Modules of its own around the same weights, in evaluation mode, with the forward pass of its class.

    A trainer may have put its own in the place of the whole model's (mixed precision, a loss that never sees all
    logits), and such a function keeps calling the model that it was made for.
    """
    copied = shared_copy(model)
    for module in (copied, base_of(copied)):
        if "forward" not in vars(module):
            continue
        if hook := getattr(module, "_hf_hook", None):  # Accelerate moves the inputs to the device of the layer
            module._old_forward = MethodType(type(module).forward, module)
            module.forward = partial(_hooked, module, hook)
        else:
            del module.forward
    config: Any = base_of(copied).config
    if isinstance(config.dtype, str):  # once it has been saved
        config.dtype = getattr(torch, config.dtype)
    return copied.eval()


def _hooked(module: Any, hook: Any, *args: Any, **kwargs: Any) -> Any:
    args, kwargs = hook.pre_forward(module, *args, **kwargs)
    return hook.post_forward(module, module._old_forward(*args, **kwargs))


def pristine(model: PeftModel) -> nn.Module:
    """The model below an adapter as it was before: modules of its own around the same weights.

    Raises:
        UsageError: the adapter has been merged into the weights.
    """
    base: nn.Module = base_of(plain_copy(model))
    tuned = [(path, module) for path, module in base.named_modules() if isinstance(module, _ADAPTED)]
    done: list[str] = []
    for path, module in tuned:
        if any(path.startswith(f"{above}.") for above in done):
            continue  # what lies inside of an adapted module went with it
        _put(base, path, _original(module))
        done.append(path)
    return base.eval()


def base_trains(model: nn.Module) -> bool:
    """Whether training changes what `pristine` would give: the whole model, or some of the weights below an adapter."""
    if not isinstance(model, PeftModel):
        return True
    below = {id(parameter) for parameter in pristine(model).parameters()}
    return any(parameter.requires_grad and id(parameter) in below for parameter in model.parameters())


def _original(module: Any) -> nn.Module:
    """The module that the adapter was put on; of a layer that is trained whole, its untrained copy."""
    if isinstance(module, ModulesToSaveWrapper):
        return module.original_module  # type: ignore[no-any-return]
    inner = module if isinstance(module, BaseTunerLayer) else module.token_adapter
    if inner.merged:
        raise UsageError("the adapter is merged into the model: unmerge it, or name the base as `reference`")
    return inner.get_base_layer()  # type: ignore[no-any-return]


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """What is done inside leaves no trace: random numbers, modes and what trains are as before.

    Weights are only read. Gradients are not touched: a copy that is tuned freezes the weights that it shares.
    """
    modes = [(module, module.training) for module in model.modules()]
    trains = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    plain, arrays, numbers = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    of_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, wanted in trains:
            parameter.requires_grad_(wanted)
        random.setstate(plain)
        np.random.set_state(arrays)  # noqa: NPY002
        torch.set_rng_state(numbers)
        if of_gpus:
            torch.cuda.set_rng_state_all(of_gpus)
            torch.cuda.empty_cache()  # training had all the memory there was


def method_of(model: nn.Module) -> MethodSpec:
    """How a model in memory is tuned, as its configuration says."""
    if not isinstance(model, PeftModel):
        return MethodSpec(name="full")
    config: Any = model.active_peft_config
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind == "LORA":
        targets = config.target_modules
        named = sorted(targets) if isinstance(targets, (set, list, tuple)) else [str(targets)]
        return MethodSpec(name="lora", options={"rank": config.r, "alpha": float(config.lora_alpha), "targets": named})
    options = {"tokens": config.num_virtual_tokens} if config.is_prompt_learning else {}
    return MethodSpec(name=_KINDS.get(kind, kind.lower()), options=options)


def located(base: nn.Module) -> Located:
    """What an audit needs to know of a base, for one that is in memory."""
    config: Any = base.config
    return Located(Path(config._name_or_path or type(base).__name__), weights_fingerprint(base), config.to_dict())


@torch.no_grad()
def weights_fingerprint(model: nn.Module) -> str:
    """SHA-256 of names, shapes and evenly spaced numbers of every weight: enough to tell one model from another."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}\n".encode())
        if torch.is_tensor(weight) and not weight.is_meta:
            flat = weight.detach().reshape(-1)
            some = flat[torch.linspace(0, len(flat) - 1, min(len(flat), _SAMPLED), device=flat.device).long()]
            digest.update(some.to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()
