"""An adapter's tensors put on a base model: every tensor must have a place and every place a tensor.

PEFT's modules do the work, so that a stranger's adapter computes here what it computes with PEFT; but PEFT reads
neither its configuration nor its weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from peft import (
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import nn

from imprint.errors import ModelError, first_line
from imprint.tuning.adapter_config import CONFIG
from imprint.tuning.adapter_lora import put_whole_weights, with_lora
from imprint.tuning.adapter_tensors import OTHER_BASE, PROMPT, misfit
from imprint.tuning.models import shared_copy

if TYPE_CHECKING:
    from imprint.tuning.adapters import Adapter

_VIRTUAL = {"prefix": PrefixTuningConfig, "prompt": PromptTuningConfig, "p_tuning": PromptEncoderConfig}


def attached(model: nn.Module, adapter: Adapter) -> PeftModel:
    """See `adapters.attach`."""
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    tensors = _load(adapter)
    host = shared_copy(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's, about settings that were made here on purpose
            if adapter.kind == "lora":
                tensors = put_whole_weights(host, adapter, tensors)
                tuned = with_lora(host, adapter)
            else:
                tuned = _with_virtual_tokens(host, adapter)
            _fill(tuned, adapter, tensors)
        return tuned.eval().requires_grad_(False)
    except ModelError:
        raise
    except Exception as error:  # peft raises many kinds; each means that the two do not go together
        raise ModelError(f"{adapter.path} does not go with {type(model).__name__}: {first_line(error)}") from None
    finally:
        for parameter, flag in trained:  # freezing the copy freezes what is shared
            parameter.requires_grad_(flag)


def _load(adapter: Adapter) -> dict[str, torch.Tensor]:
    try:
        tensors: dict[str, torch.Tensor] = load_file(adapter.weights)
    except Exception as error:  # changed since it was looked at
        raise ModelError(f"{adapter.weights} cannot be read as safetensors ({first_line(error)})") from None
    for name, tensor in tensors.items():
        if not tensor.float().isfinite().all():  # a number may be too large for the 32 bits that it gets
            raise ModelError(f"{adapter.weights}: the tensor {name} holds numbers that are not finite: it is damaged")
    return tensors


def _with_virtual_tokens(host: nn.Module, adapter: Adapter) -> PeftModel:
    """In inference mode PEFT keeps virtual tokens as they are saved: as they came out of their encoder."""

    def made(count: int) -> PeftModel:
        return get_peft_model(host, config(task_type="CAUSAL_LM", inference_mode=True, num_virtual_tokens=count))

    config = _VIRTUAL[adapter.kind]
    one = made(1)  # how wide a token is: a small file must not ask for a large matrix
    [found], count = adapter.shapes.values(), adapter.options["tokens"]
    if found != (count, width := _places(one)[PROMPT].shape[1]):
        raise misfit(adapter.weights, PROMPT, found, (count, width), host)
    for key in ("num_layers", "num_attention_heads", "token_dim") if adapter.kind == "prefix" else ():
        stated, needed = adapter.settings[key], getattr(one.active_peft_config, key)
        if stated not in (None, needed):
            raise ModelError(
                f"{adapter.path / CONFIG}: {key} is {stated}, {type(host).__name__} needs {needed}: {OTHER_BASE}"
            )
    return made(count)


def _places(tuned: PeftModel) -> dict[str, torch.Tensor]:
    """Name, as PEFT saves it → what the adapter has there in memory."""
    return get_peft_model_state_dict(tuned, save_embedding_layers=False)  # type: ignore[no-any-return]


@torch.no_grad()
def _fill(tuned: PeftModel, adapter: Adapter, tensors: Mapping[str, torch.Tensor]) -> None:
    places, base = _places(tuned), tuned.get_base_model()
    name = type(base).__name__
    if extra := sorted(tensors.keys() - places.keys()):
        raise ModelError(f"{adapter.weights}: the tensor {extra[0]} has no place in {name}: {OTHER_BASE}")
    if lacking := sorted(places.keys() - tensors.keys()):
        raise ModelError(f"{adapter.weights} lacks the tensor {lacking[0]}, which {CONFIG} asks for: {OTHER_BASE}")
    for key, tensor in tensors.items():
        if places[key].shape != tensor.shape:
            raise misfit(adapter.weights, key, tensor.shape, places[key].shape, base)
        places[key].copy_(tensor)
