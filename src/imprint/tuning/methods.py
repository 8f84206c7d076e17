"""`METHODS`: how a base model is made tunable. One table row per method: its options and how it is attached.

Learning rates. A method that changes weight matrices (full, head, LoRA) wants a rate that falls with the width of the
model (Yang et al. 2022, "Tensor Programs V": Adam's rate for hidden matrices goes as 1/width), one that learns input
vectors does not. The constants below come from the search recorded in docs/learning-rates.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from imprint.errors import UsageError, unknown
from imprint.spec import MethodSpec, Strict, validated

if TYPE_CHECKING:
    from torch import nn

REFERENCE_WIDTH = 96
"""The width at which the rates of `full`, `head` and `lora` were searched."""


class Options(Strict):
    """Options that every method has."""

    learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate of AdamW (default: the method's own, see `docs/learning-rates.md`)."""


class LoraOptions(Options):
    """Low-rank adapters (Hu et al. 2021)."""

    rank: int = Field(default=8, ge=1)
    """Rank of the update."""
    alpha: float | None = Field(default=None, gt=0)
    """The update is scaled by alpha / rank (default: twice the rank)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    placement: str = "both"
    """`attention`, `projection` (feed-forward, experts), `both`, `experts`, `router`, `all`, or names with commas."""


class VirtualOptions(Options):
    """Options of the methods that learn virtual tokens."""

    tokens: int = Field(default=20, ge=1)
    """Number of virtual tokens."""


class InitOptions(VirtualOptions):
    """Prefix tuning (Li & Liang 2021) and prompt tuning (Lester et al. 2021)."""

    init: Literal["vocabulary", "random"] = "vocabulary"
    """Start from tokens drawn from the vocabulary (prefix: the keys and values they give), or at random."""


class PTuningOptions(VirtualOptions):
    """P-tuning (Liu et al. 2021): virtual tokens that come out of a small network."""

    encoder_width: int | None = Field(default=None, ge=1)
    """Width of the prompt encoder (default: the model's)."""


@dataclass(frozen=True)
class Method:
    """A row of `METHODS`.

    Attributes:
        options: what may be set, with defaults.
        attach: `(model, options) -> model` whose parameters with `requires_grad` are what trains, in float32.
        rate: default learning rate at `REFERENCE_WIDTH`.
        scaled: whether the rate falls with the width of the model.
        leaves_base: whether the base's weights stay as they are, so that runs can share them.
    """

    options: type[Options]
    attach: Callable[[nn.Module, dict[str, Any]], nn.Module]
    rate: float
    scaled: bool
    leaves_base: bool = True

    def default_rate(self, width: int) -> float:
        """Rounded to two digits, so that it reads well and hashes the same everywhere."""
        return float(f"{self.rate * REFERENCE_WIDTH / width:.1e}") if self.scaled else self.rate


def _full(model: nn.Module, options: dict[str, Any]) -> nn.Module:
    return model.float().requires_grad_(True)


def _head(model: nn.Module, options: dict[str, Any]) -> nn.Module:
    from imprint.tuning.models import own_head

    model.requires_grad_(False)
    own_head(model).float().requires_grad_(True)
    return model


def _peft(model: nn.Module, config: Any) -> nn.Module:
    from peft import get_peft_model

    tuned: nn.Module = get_peft_model(model, config)
    return tuned


def _lora(model: nn.Module, options: dict[str, Any]) -> nn.Module:
    from peft import LoraConfig

    from imprint.tuning.models import names_as_they_are
    from imprint.tuning.placement import targets

    modules, parameters, transposed = targets(model, options["placement"])
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=options["rank"],
        lora_alpha=options["alpha"],
        lora_dropout=options["dropout"],
        target_modules=modules,
        fan_in_fan_out=transposed,
        **({"target_parameters": parameters} if parameters else {}),
    )
    with names_as_they_are(model):
        return _peft(model, config)


def _prefix(model: nn.Module, options: dict[str, Any]) -> nn.Module:
    from peft import PrefixTuningConfig

    from imprint.tuning.virtual import fill_prefix

    tuned = _peft(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=options["tokens"]))
    if options["init"] == "vocabulary":
        fill_prefix(tuned)
    return tuned


def _prompt(model: nn.Module, options: dict[str, Any]) -> nn.Module:
    from peft import PromptTuningConfig

    from imprint.tuning.virtual import fill_prompt

    tuned = _peft(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=options["tokens"]))
    if options["init"] == "vocabulary":
        fill_prompt(tuned)
    return tuned


def _p_tuning(model: nn.Module, options: dict[str, Any]) -> nn.Module:
    from peft import PromptEncoderConfig

    config = PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=options["tokens"], encoder_hidden_size=options["encoder_width"]
    )
    return _peft(model, config)


METHODS: dict[str, Method] = {
    "full": Method(Options, _full, rate=5e-4, scaled=True, leaves_base=False),
    "head": Method(Options, _head, rate=2e-3, scaled=True),
    "lora": Method(LoraOptions, _lora, rate=5e-3, scaled=True),
    "prefix": Method(InitOptions, _prefix, rate=1e-1, scaled=False),
    "prompt": Method(InitOptions, _prompt, rate=1e-1, scaled=False),
    "p_tuning": Method(PTuningOptions, _p_tuning, rate=2e-2, scaled=False),
}


def method_named(name: str) -> Method:
    """The row of `METHODS` of that name.

    Raises:
        UsageError: there is none; the nearest right name is given.
    """
    if name not in METHODS:
        raise UsageError(unknown("method", name, METHODS))
    return METHODS[name]


def resolve_method(spec: MethodSpec, width: int, learning_rate: float | None) -> MethodSpec:
    """Fill in every option: the method's own `learning_rate`, else `learning_rate` (the recipe's), else the default.

    Args:
        spec: name and the options that were given.
        width: the model's hidden size.
        learning_rate: `train.learning_rate` of the recipe.

    Raises:
        UsageError: unknown method or option.
    """
    method = method_named(spec.name)
    options = validated(method.options, spec.options, f"method.{spec.name}").model_dump()
    options["learning_rate"] = options["learning_rate"] or learning_rate or method.default_rate(width)
    if "alpha" in options:
        options["alpha"] = options["alpha"] or 2.0 * options["rank"]
    if "encoder_width" in options:
        options["encoder_width"] = options["encoder_width"] or width
    return MethodSpec(name=spec.name, options=options)
