"""Base models in 4 or 8 bits: what bitsandbytes is asked for, and what it must not do for scores to be scores.

A score is a function of one text. Two things in bitsandbytes would make it one of the texts beside it, or of what was
computed before, and are turned off:

* LLM.int8 (Dettmers et al. 2022) takes a feature out of the eight-bit product if *any* token of the pass exceeds a
  threshold there. Without the threshold every token is rounded by its own largest value.
* On CPUs with bfloat16 instructions a four-bit layer rearranges its weights at the first pass without gradients, for a
  product that knows no gradients. The weights are shared by all runs, and what is tuned below would stop learning.

Four bits are NF4 (Dettmers et al. 2023) in blocks of 64, their scales kept in float32.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from imprint.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import nn


def require(bits: str) -> None:
    """
    Raises:
        UsageError: bitsandbytes is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise UsageError(
            f'model.quantize: {bits} needs bitsandbytes, which is not installed: pip install "imprint-audit[bnb]"'
        )


def quantisation(bits: str, dtype: torch.dtype) -> Any:
    """The configuration that Transformers loads a model by.

    Args:
        bits: `4bit` or `8bit`.
        dtype: of the products with four-bit weights; eight-bit ones are products of integers.

    Raises:
        UsageError: bitsandbytes is not installed.
    """
    require(bits)
    from transformers import BitsAndBytesConfig

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns about float32 inputs at every product
    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def keep_layout(model: nn.Module) -> None:
    """Four-bit weights stay as they were loaded."""
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False


def constants(model: nn.Module) -> list[Any]:
    """What quantised layers hold besides parameters and buffers, and no pass changes: integers and their scales.

    Eight-bit layers take them over from their parameters at their first pass: call this after one.
    """
    held: list[Any] = []
    for module in model.modules():
        state = getattr(module, "state", None)
        held += [getattr(module, "quant_state", None), getattr(state, "CB", None), getattr(state, "SCB", None)]
    return [one for one in held if one is not None]
