"""The audit of a model in memory: as it is now, against the base below its adapter or one that is handed over."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from torch import nn

from imprint.auditing.identity import hidden
from imprint.auditing.ledger import base_key
from imprint.auditing.live import located, method_of, pristine
from imprint.data import Pool, resolve_sizes
from imprint.engine.costs import measured_scoring
from imprint.engine.forward import forward_of
from imprint.errors import UsageError
from imprint.recipe import LONGEST_DEFAULT, AnyCell
from imprint.records import Audit, prepare
from imprint.spec import AuditSpec, DataSpec, ModelSpec
from imprint.tuning.base import Base
from imprint.tuning.models import count_parameters

if TYPE_CHECKING:
    from imprint.types import TokenStats


@dataclass(frozen=True)
class Live:
    """A model in memory that is ready to be audited; nothing has been written.

    Attributes:
        base: the model that it is compared with; shares its weights where there is an adapter.
    """

    cell: AnyCell
    audit: Audit
    base: Base


def prepare_live(
    model: nn.Module,
    tokenizer: Any,
    pool: Pool,
    data: DataSpec,
    key: bytes,
    reference: nn.Module | None = None,
    token_budget: int | None = None,
    show_text: bool = False,
) -> Live:
    """Encode the records, and find the base.

    Args:
        model: a PEFT model, or a whole one.
        tokenizer: that of the training.
        pool: the records, in the parts `member` and `nonmember`.
        data: how they are read; sizes and length may be left open.
        key: hides ids and owners.
        reference: what the model is compared with; needed for a whole one that has been tuned.
        token_budget: tokens of one forward pass.
        show_text: whether tokens may be written.

    Raises:
        UsageError: there is no base to compare with, or the data cannot be used as asked.
    """
    if reference is None and not isinstance(model, PeftModel):
        raise UsageError("a whole model has no adapter to turn off: give the model it was tuned from as `reference`")
    below = reference if reference is not None else pristine(model)
    place, method = located(below), method_of(model)
    precision = str(next(below.parameters()).dtype).removeprefix("torch.")
    private = hidden(pool, key)
    room = place.context - int(method.options.get("tokens", 0))
    data = resolve_sizes(data, private).model_copy(
        update={
            "fingerprint": private.fingerprint,
            "max_length": data.max_length or max(2, min(room, LONGEST_DEFAULT)),
            "seed": data.seed or 0,
        }
    )
    spec = AuditSpec(model=_named(place.path.name, place.fingerprint, precision), data=data, method=method, seed=0)
    audit = replace(prepare(private, data, tokenizer), private=not show_text)
    cell = AnyCell(spec, method.name, base_key(spec), place, private)
    return Live(cell, audit, Base.around(below, place, precision, token_budget))


def _named(name: str, fingerprint: str, precision: str) -> ModelSpec:
    known = {"float32", "bfloat16", "float16"}
    return ModelSpec.model_validate(
        {"name": name, "fingerprint": fingerprint, "dtype": precision if precision in known else "auto"}
    )


def score_live(model: nn.Module, live: Live) -> tuple[TokenStats, dict[str, Any], dict[str, int]]:
    """The model as it is now: its scores, what they cost, and its tuned and all parameters."""
    started = time.perf_counter()
    forward = forward_of(model)
    stats = live.audit.stats(model, live.base.budget, None, forward)
    cost = measured_scoring(model, forward, live.audit.scored, time.perf_counter() - started)
    total, below = (count_parameters(one)[1] for one in (model, live.base.model))
    return stats, cost, {"trainable": total - below if isinstance(model, PeftModel) else total, "parameters": total}
