"""The audit of folders: a base and its tuned versions are loaded one after another, and scored."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imprint.auditing.identity import hidden, hidden_audit
from imprint.auditing.ledger import base_key, check_same, check_texts, finish, open_ledger
from imprint.auditing.span import Span, trained_span
from imprint.auditing.target import Target, Tuned, has_tokenizer
from imprint.data import Pool, resolve_sizes
from imprint.errors import ModelError, UsageError
from imprint.passes.spec import EvidenceSpec
from imprint.progress import Progress
from imprint.recipe import AnyCell, default_length
from imprint.records import Audit, prepare
from imprint.spec import AuditSpec, Budget, DataSpec, Runtime
from imprint.tuning.adapters import Adapter, adapter_parameters, attach
from imprint.tuning.base import Base
from imprint.tuning.locate import tokenizer_fingerprint
from imprint.tuning.models import count_parameters, load_model, load_tokenizer, resolve_device, resolve_dtype
from imprint.types import Chat, TokenStats

if TYPE_CHECKING:
    from torch import nn


COMPARED = 200
"""Members on which two tokenizers are compared."""


@dataclass(frozen=True)
class Prepared:
    """An audit of folders that is ready to begin; nothing has been written.

    Attributes:
        cell: what will be measured.
        audit: its records, encoded.
        span: what was found out about the loss that it was trained with; None where nothing had to be.
        base: the model that adapters are put on.
        compared: the model that is scored at epoch 0; mostly `base` itself.
        doubts: whether the records are told as in the training, where the files give reason to ask.
    """

    target: Target
    cell: AnyCell
    audit: Audit
    span: Span | None
    base: Base
    compared: Base
    tokenizer: Any
    doubts: tuple[str, ...] = ()


def prepare_folders(
    target: Target,
    pool: Pool,
    data: DataSpec,
    loss: str,
    key: bytes,
    show_text: bool,
    runtime: Runtime,
    template: str | None = None,
) -> Prepared:
    """Split and encode the records as they were trained on, and load what is needed to find out how that was.

    Args:
        target: what is to be audited.
        pool: the records, in the parts `member` and `nonmember`.
        data: how they are read; sizes and length may be left open.
        loss: `auto`, `target` or `all`: which tokens were trained on.
        key: hides ids and owners.
        show_text: whether tokens may be written.
        template: the chat template, where it is not the tokenizer's own.

    Raises:
        UsageError: the data or the models cannot be used as asked.
    """
    device = resolve_device(runtime.device)
    dtype = resolve_dtype(target.model.dtype, device)
    model = target.model.model_copy(update={"fingerprint": target.base.fingerprint, "dtype": dtype})
    base = Base.of(target.base, model, runtime)
    compared = base
    if target.reference.fingerprint != target.base.fingerprint:
        compared = Base.of(target.reference, model, runtime)
    tokenizer = load_tokenizer(target.base, target.tokenizer)
    check_same_tokens(target, tokenizer, pool)
    doubts = tuple(_doubts(target, pool, tokenizer, template))
    if template is not None:
        tokenizer.chat_template = template
    private = hidden(pool, key)
    data = resolve_sizes(data, private).model_copy(
        update={
            "fingerprint": private.fingerprint,
            "max_length": room_for(data.max_length, target),
            "seed": data.seed or 0,
            "tokenizer": tokenizer_key(target, template),
        }
    )
    span = None
    if loss == "auto":
        span = trained_span(pool, data, tokenizer, base, lambda: load_tuned(target.tuned[-1], base))
    data = data.model_copy(update={"loss": (span.loss if span else "target") if loss == "auto" else loss})
    audit = hidden_audit(replace(prepare(pool, data, tokenizer), private=not show_text), key)
    other = None
    if compared is not base:
        other = model.model_copy(
            update={"name": str(target.reference.path), "fingerprint": target.reference.fingerprint}
        )
    spec = AuditSpec(model=model, data=data, method=target.method, seed=0, reference=other)
    cell = AnyCell(spec, target.method.name, base_key(spec), target.base, private)
    return Prepared(target, cell, audit, span, base, compared, tokenizer, doubts)


def audit_folders(
    ready: Prepared,
    out: Path,
    attacks: Sequence[str],
    budget: Budget | None,
    document: dict[str, Any],
    passes: EvidenceSpec,
    progress: Progress,
) -> None:
    """Score what has not been scored yet, and write it.

    Raises:
        UsageError: the output folder belongs to something else.
        ImprintError: scores are not finite.
    """
    with open_ledger(out, ready.cell, ready.audit, attacks, budget, document, passes) as ledger:
        check_texts(ledger)
        done = check_same(ledger, [one.fingerprint for one in ready.target.tuned])
        left = [n for n in range(1, len(ready.target.tuned) + 1) if n > done or ledger.missing_passes(n)]
        if not left and ledger.folder.done and ledger.has_base and not ledger.missing_passes(0):
            return progress.note("already done")
        ledger.reopen()
        progress.cells([ready.cell.label], [1], 1)
        progress.base(ready.cell.label, ledger.measure_base(ready.compared), ready.audit)
        if not ready.audit.private:
            ledger.write_texts(ready.tokenizer)
        memo: dict[str, Any] = {}
        further = ready.tokenizer, ready.base.budget, memo, progress
        ledger.measure_passes(0, ready.compared.model, *further)
        for number in left:
            one = ready.target.tuned[number - 1]
            model = load_tuned(one, ready.base)
            if number > done:
                stats, cost, sizes = _scored(model, one, ready.base, ready.audit, progress)
                ledger.write(stats, one.name, cost, fingerprint=one.fingerprint, **sizes)
                progress.checkpoint(ready.cell.label, one.name, stats, ready.audit)
            ledger.measure_passes(number, model, *further)
        finish(ledger.folder)


def score_tuned(
    one: Tuned, base: Base, audit: Audit, progress: Progress
) -> tuple[TokenStats, dict[str, Any], dict[str, int]]:
    """Load a checkpoint and score it: its scores, what they cost, and its tuned and all parameters."""
    return _scored(load_tuned(one, base), one, base, audit, progress)


def _scored(
    model: nn.Module, one: Tuned, base: Base, audit: Audit, progress: Progress
) -> tuple[TokenStats, dict[str, Any], dict[str, int]]:
    from imprint.engine.costs import measured_scoring
    from imprint.engine.forward import forward_of

    started = time.perf_counter()
    forward = forward_of(model)
    stats = audit.stats(model, base.budget, progress.scored, forward)
    cost = measured_scoring(model, forward, audit.scored, time.perf_counter() - started)
    total = count_parameters(model)[1]
    own = adapter_parameters(one.what) if isinstance(one.what, Adapter) else total
    return stats, cost, {"trainable": own, "parameters": total}


def load_tuned(one: Tuned, base: Base) -> nn.Module:
    """The tuned model; a whole one takes the place of the base in memory."""
    if isinstance(one.what, Adapter):
        return attach(base.model, one.what)  # type: ignore[no-any-return]
    base.release()
    return load_model(one.what, base.dtype, base.device, base.quantize, base.device_map)


def room_for(given: int | None, target: Target) -> int:
    """Tokens kept of a text: what fits into the context behind the virtual tokens, at most 1,024 unless asked for."""
    room = target.base.context - target.virtual
    if given and given > room:
        raise UsageError(
            f"--max-length {given} and {target.virtual} virtual tokens exceed the model's context of "
            f"{target.base.context} tokens: give at most {room}"
        )
    return given or default_length(room)


def _doubts(target: Target, pool: Pool, tokenizer: Any, template: str | None) -> Iterator[str]:
    own, chats = tokenizer.chat_template, isinstance(pool.parts["member"][0].form, Chat)
    if template is not None and own and template != own:
        yield f"The template given is not that of the tokenizer in {target.tokenizer or target.base.path}"
    if target.tokenizer and own and pool.parts["member"][0].form is None:
        yield f"{target.tokenizer} brings a chat template, and these records are no chats: were they tuned on so?"
    if template is not None and not chats:
        yield "A template is given, and these records are no chats: it is not used"


def tokenizer_key(target: Target, template: str | None) -> str:
    """What sets the tokens apart from those of the base's own tokenizer; empty where nothing does."""
    own = tokenizer_fingerprint(target.tokenizer) if target.tokenizer else ""
    return own if template is None else hashlib.sha256(f"{own}\n{template}".encode()).hexdigest()


def check_same_tokens(target: Target, tokenizer: Any, pool: Pool) -> None:
    """The tuned model, its base and what it is compared with must be given the same tokens for the same text.

    The tokenizer beside an adapter is a stranger's: one that writes texts otherwise would hide what was learned.
    """
    texts = [example.prompt + example.target for example in pool.parts["member"][:COMPARED]]
    own, numbers = target.tokenizer or target.base.path, tokenizer.get_vocab()
    others = {target.base.path: target.base, target.reference.path: target.reference}
    for path, located in others.items():
        if path == target.tokenizer or not has_tokenizer(path):
            continue
        other = load_tokenizer(located)
        theirs = other.get_vocab()
        if differ := [token for token, number in theirs.items() if numbers.get(token, number) != number]:
            raise ModelError(
                f"the tokenizer of {path} numbers {len(differ):,} tokens otherwise than that of {own}: these models "
                "cannot be compared on the same tokens"
            )
        ids, wanted = (one(texts, add_special_tokens=False).input_ids for one in (tokenizer, other))
        if cut := sum(a != b for a, b in zip(ids, wanted, strict=True)):
            raise ModelError(
                f"the tokenizer of {own} cuts {cut} of {len(texts)} members otherwise than that of {path}: take its "
                "files out of that folder if the training used the base's"
            )
