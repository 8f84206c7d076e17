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
from imprint.spec import MethodSpec, ModelSpec
from imprint.tuning.adapter_config import STARTS as LEAVE_BASE
from imprint.tuning.locate import Located, locate
from imprint.tuning.models import autocast, base_of, load_model, shared_copy

_SAMPLED = 256
"""Numbers of each weight that its fingerprint looks at."""
_ADAPTED = (BaseTunerLayer, AuxiliaryTrainingWrapper)
_ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-9}
"""What rounding may do to a logit, as a part of the largest one; 1e-2 in lower precisions."""
WITH_ADAPTER = "+adapter"
"""Ends the fingerprint of a base that is a model with its adapter."""
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
    return _forgotten(base)


def base_trains(model: nn.Module) -> bool:
    """Whether training changes what `pristine` would give: the whole model, or some of the weights below an adapter."""
    if not isinstance(model, PeftModel):
        return True
    below = {id(parameter) for parameter in pristine(model).parameters()}
    return any(parameter.requires_grad and id(parameter) in below for parameter in model.parameters())


def alters_base(model: PeftModel) -> str:
    """How an adapter changes the weights that it is put on, as its configuration says, so that they are lost; or ""."""
    for config in model.peft_config.values():
        start, bias = getattr(config, "init_lora_weights", None), getattr(config, "bias", None) or "none"
        if not (start is None or isinstance(start, bool) or start in LEAVE_BASE):
            return f"init_lora_weights={start!r} takes a part out of the base's weights"
        if getattr(config, "kasa_config", None):
            return "kasa_config takes a part out of the base's weights"
        if bias != "none":
            return f"bias={bias!r} trains biases of the base"
    return ""


@torch.no_grad()
def adds_something(model: PeftModel) -> bool:
    """Whether a model says anything else with its adapter than without, beyond rounding, on a few tokens.

    Before training it does not, unless the adapter took its start out of the weights (PiSSA and its like) or has been
    tuned before. Virtual tokens do, which start from anything: of them nothing is known.

    Raises:
        UsageError: the adapter has been merged into the weights.
    """
    without = pristine(model)
    if model.active_peft_config.is_prompt_learning:
        return False
    size = base_of(model).get_input_embeddings().weight.shape[0]
    ids = torch.arange(16, device=next(model.parameters()).device)[None] * size // 16
    with autocast(without):
        one, other = (
            each(input_ids=ids, use_cache=False).logits.float() for each in (without, base_of(plain_copy(model)))
        )
    rounding = _ROUNDING.get(next(without.parameters()).dtype, 1e-2)
    return bool((one - other).abs().max() > rounding * one.abs().max())


def tunable(model: nn.Module) -> nn.Module:
    """A copy that computes what the model does, with its adapter, and that another adapter can be put on.

    PEFT puts a second adapter in the place of the first, so that those layers that have one are hidden: each behind a
    layer of the kind that the adapter was put on, which hands on what the adapted one computes.
    """
    copied = plain_copy(model)
    if not isinstance(model, PeftModel) or model.active_peft_config.is_prompt_learning:
        return copied
    base: nn.Module = base_of(copied)
    done: list[str] = []
    for path, module in [*base.named_modules()]:
        if isinstance(module, _ADAPTED) and not any(path.startswith(f"{above}.") for above in done):
            layer: Any = shared_copy(_original(module))
            layer.hidden = nn.ParameterList(module.parameters())  # shared by copies, and part of the fingerprint
            layer.forward = partial(_handed_on, module)
            _put(base, path, layer)
            done.append(path)
    return _forgotten(base)


def _forgotten(base: nn.Module) -> nn.Module:
    """Without what PEFT left on it, which would be taken for further adapters of one that is put on next."""
    vars(base).pop("peft_config", None)
    return base.eval()


def _handed_on(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return module(*args, **kwargs)


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
    of_mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
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
        if of_mps is not None:
            torch.mps.set_rng_state(of_mps)
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


def precision_of(model: nn.Module) -> str:
    """Of its weights, by the name that recipes use."""
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def load_beside(name: str | Path, model: nn.Module) -> nn.Module:
    """The model to compare with, in the precision and on the device of the one that is at hand."""
    return load_model(locate(ModelSpec(name=str(name))), precision_of(model), next(model.parameters()).device)


def located(base: nn.Module) -> Located:
    """What an audit needs to know of a base, for one that is in memory."""
    config: Any = base_of(base).config
    fingerprint = weights_fingerprint(base) + WITH_ADAPTER * isinstance(base, PeftModel)
    return Located(Path(config._name_or_path or type(base_of(base)).__name__), fingerprint, config.to_dict())


@torch.no_grad()
def weights_fingerprint(model: nn.Module) -> str:
    """SHA-256 of names, shapes and evenly spaced numbers of every weight: enough to tell one model from another."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}\n".encode())
        if torch.is_tensor(weight) and not weight.is_meta:
            flat = weight.detach().reshape(-1)
            count = min(len(flat), _SAMPLED)
            # whole numbers: a float32 cannot tell places beyond 2²⁴ apart
            some = flat[torch.arange(count, device=flat.device) * (len(flat) - 1) // max(count - 1, 1)]
            digest.update(some.to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()
