"""The audit of a model in memory: as it is now, against the base below its adapter or one that is handed over."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from torch import nn

from imprint.auditing.identity import hidden, hidden_audit
from imprint.auditing.ledger import base_key, check_same, finish, open_ledger
from imprint.auditing.live import (
    alters_base,
    base_trains,
    located,
    method_of,
    plain_copy,
    precision_of,
    pristine,
    tunable,
    undisturbed,
    weights_fingerprint,
)
from imprint.auditing.span import Span, trained_span
from imprint.cells import score_base
from imprint.data import Pool, resolve_sizes
from imprint.engine.costs import measured_scoring
from imprint.engine.forward import forward_of
from imprint.errors import UsageError
from imprint.passes.spec import EvidenceSpec
from imprint.progress import Progress
from imprint.recipe import AnyCell, default_length
from imprint.records import Audit, prepare
from imprint.scoring.score import token_stats
from imprint.spec import AuditSpec, Budget, DataSpec, ModelSpec
from imprint.tuning.base import Base
from imprint.tuning.models import count_parameters

if TYPE_CHECKING:
    from imprint.data.tokens import Encoded
    from imprint.types import TokenStats


@dataclass(frozen=True)
class Live:
    """A model in memory that is ready to be audited; nothing has been written.

    Attributes:
        base: the model that it is compared with; shares its weights where there is an adapter.
        span: what was found out about the loss that it was trained with; None where nothing had to be.
    """

    cell: AnyCell
    audit: Audit
    base: Base
    span: Span | None = None


def prepare_live(
    model: nn.Module,
    tokenizer: Any,
    pool: Pool,
    data: DataSpec,
    key: bytes,
    reference: nn.Module | None = None,
    token_budget: int | None = None,
    show_text: bool = False,
    known: ModelSpec | None = None,
    loss: str | None = None,
) -> Live:
    """Encode the records, and find the base.

    Args:
        model: a PEFT model, or a whole one.
        tokenizer: that of the training.
        pool: the records, in the parts `member` and `nonmember`.
        data: how they are read; sizes and length may be left open.
        key: hides ids and owners.
        reference: what the model is compared with; needed where tuning has changed its base: of a whole one, and of an
            adapter that began with a part of the base's weights or with which some of them were trained.
        token_budget: tokens of one forward pass.
        show_text: whether tokens may be written.
        loss: `auto` finds out which tokens were trained on (default: as `data` says).
        known: the base as it was found before the training, where that has changed it since and its scores are kept.

    Raises:
        UsageError: there is no base to compare with, or the data cannot be used as asked.
    """
    if reference is None and known is None:
        _check_base(model)
    below = reference if reference is not None else pristine(model) if known is None else plain_copy(model)
    place, method = located(below), method_of(model)
    if known is not None:
        place = replace(place, path=Path(known.name), fingerprint=known.fingerprint)
    precision = precision_of(below)
    private = hidden(pool, key)
    room = place.context - int(method.options.get("tokens", 0))
    data = resolve_sizes(data, private).model_copy(
        update={
            "fingerprint": private.fingerprint,
            "max_length": data.max_length or default_length(room),
            "seed": data.seed or 0,
        }
    )
    base, span = Base.around(below, place, precision, token_budget), None
    if loss == "auto":
        with undisturbed(model):
            span = trained_span(pool, data, tokenizer, base, lambda: model)
        data = data.model_copy(update={"loss": span.loss if span else "target"})
    spec = AuditSpec(model=_named(place.path.name, place.fingerprint, precision), data=data, method=method, seed=0)
    audit = hidden_audit(replace(prepare(pool, data, tokenizer), private=not show_text), key)
    cell = AnyCell(spec, method.name, base_key(spec), place, private)
    return Live(cell, audit, base, span)


def _check_base(model: nn.Module) -> None:
    """
    Raises:
        UsageError: the model that it was tuned from is not there any more.
    """
    if not isinstance(model, PeftModel):
        raise UsageError("a whole model has no adapter to turn off: give the model it was tuned from as `reference`")
    why = alters_base(model) or ("weights of the base are trained beside the adapter's" if base_trains(model) else "")
    if why:
        raise UsageError(
            f"the model below the adapter is not the one that it was put on ({why}): name the base as `reference`"
        )


def for_controls(base: Base) -> Base:
    """The same, where it is a model with an adapter, as one that the positive control can be tuned on."""
    if not isinstance(base.model, PeftModel):
        return base
    return Base.around(tunable(base.model), base.located, base.dtype, base.budget)


def _named(name: str, fingerprint: str, precision: str) -> ModelSpec:
    known = {"float32", "bfloat16", "float16"}
    return ModelSpec.model_validate(
        {"name": name, "fingerprint": fingerprint, "dtype": precision if precision in known else "auto"}
    )


def score_live(model: nn.Module, records: Sequence[Encoded], budget: int) -> tuple[TokenStats, dict[str, Any]]:
    """The scores of a model as it is now, and what they cost; the model itself is not called."""
    started = time.perf_counter()
    copied = plain_copy(model)
    forward = forward_of(copied)
    stats = token_stats(copied, records, budget, None, forward)
    return stats, measured_scoring(copied, forward, records, time.perf_counter() - started)


def sizes_of(model: nn.Module, base: Base) -> dict[str, int]:
    """Tuned and all parameters."""
    total, below = (count_parameters(one)[1] for one in (model, base.model))
    return {"trainable": total - below if isinstance(model, PeftModel) else total, "parameters": total}


def audit_live(
    model: nn.Module,
    live: Live,
    out: Path,
    attacks: Sequence[str],
    budget: Budget | None,
    document: dict[str, Any],
    passes: EvidenceSpec,
    tokenizer: Any,
    progress: Progress,
) -> None:
    """Score the base and the model as it is now, and write both.

    Raises:
        UsageError: the output folder belongs to something else.
        ImprintError: scores are not finite.
    """
    fingerprint = weights_fingerprint(model)
    with open_ledger(out, live.cell, live.audit, attacks, budget, document, passes) as ledger, undisturbed(model):
        score_base(live.cell, live.audit, live.base, ledger.store)
        ledger.measure_base(for_controls(live.base))
        if not check_same(ledger, [fingerprint]):
            stats, cost = score_live(model, live.audit.scored, live.base.budget)
            ledger.write(stats, "in memory", cost, fingerprint=fingerprint, **sizes_of(model, live.base))
        memo: dict[str, Any] = {}
        for number, one in ((0, live.base.model), (1, model)):
            ledger.measure_passes(number, plain_copy(one), tokenizer, live.base.budget, memo, progress)
        finish(ledger.folder)
