"""One base model, loaded once and lent to one run after another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from imprint.data.tokens import Encoded
from imprint.engine.features import Features, features
from imprint.errors import ImprintError, first_line
from imprint.recipe import AnyCell
from imprint.spec import MethodSpec, ModelSpec, Runtime
from imprint.tuning.locate import Located
from imprint.tuning.methods import METHODS
from imprint.tuning.models import load_model, resolve_device, shared_copy, trainable

CPU_BUDGET, GPU_BUDGET = 2048, 16384
"""Tokens of one forward pass: on a CPU what stays in the cache, on a GPU what keeps it busy."""


class Base:
    """A base model in memory.

    Attributes:
        located, dtype, device, quantize, device_map: what is loaded, how, and where to.
        budget: tokens of one forward pass.
    """

    def __init__(
        self,
        located: Located,
        dtype: str,
        device: torch.device,
        budget: int,
        quantize: str | None = None,
        device_map: bool = False,
    ) -> None:
        self.located, self.dtype, self.device, self.budget = located, dtype, device, budget
        self.quantize, self.device_map = quantize, device_map
        self._model: nn.Module | None = None
        self._features: tuple[str, Features] | None = None

    @classmethod
    def of(cls, located: Located, model: ModelSpec, runtime: Runtime) -> Base:
        """The model at `located`, in the precision and on the device that are asked for."""
        device = resolve_device(runtime.device)
        budget = runtime.token_budget or (CPU_BUDGET if device.type == "cpu" else GPU_BUDGET)
        return cls(located, model.dtype, device, budget, model.quantize, runtime.device_map)

    @classmethod
    def around(cls, model: nn.Module, located: Located, dtype: str, budget: int | None = None) -> Base:
        """A model that somebody else has loaded; not to be changed, so only methods that leave it alone fit."""
        device = next(model.parameters()).device
        base = cls(located, dtype, device, budget or (CPU_BUDGET if device.type == "cpu" else GPU_BUDGET))
        base._model = model
        return base

    def serves(self, cell: AnyCell) -> bool:
        return (self.located.fingerprint, self.dtype, self.quantize or "") == cell.model_key

    @property
    def model(self) -> nn.Module:
        """As it was loaded; not to be changed."""
        if self._model is None:
            self._model = load_model(self.located, self.dtype, self.device, self.quantize, self.device_map)
        return self._model

    def release(self) -> None:
        """Give the memory back; the next use loads the model again."""
        self._model, self._features = None, None

    def tuned(self, method: MethodSpec, seed: int) -> nn.Module:
        """A model to tune. It shares the base's weights where the method leaves them alone, else it takes them along.

        Raises:
            UsageError: an option does not fit this model.
            ImprintError: the method does not work with this architecture; the reason is the library's own first line.
        """
        row, model = METHODS[method.name], self.model
        if row.leaves_base:
            model = shared_copy(model)
        else:
            self._model = None
        torch.manual_seed(seed)
        try:
            tuned = row.attach(model, method.options)
        except ImprintError:
            raise
        except Exception as error:  # peft raises many kinds where an architecture lacks what a method needs
            raise ImprintError(
                f"{method.name} does not work with {type(model).__name__}: {first_line(error)}"
            ) from error
        if any(parameter.is_meta for parameter in trainable(tuned).values()):
            raise ImprintError(
                f"{method.name} cannot train layers that lie on the CPU beside a GPU: quantize the model, use larger "
                "or more GPUs, or tune its head, a prefix or a prompt"
            )
        return tuned

    def features(self, key: str, records: Sequence[Encoded], folder: Path) -> Features:
        """The base's hidden states of the records that `key` stands for; those of the last key are kept."""
        if self._features is None or self._features[0] != key:
            self._features = None  # free the old ones first
            self._features = key, features(self.model, records, self.budget, folder)
        return self._features[1]
