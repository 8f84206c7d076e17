"""What the tuned model and its base say of every canary, and the tuned model of all that could have been drawn.

The evidence lies in an output folder as that of an audit does, the included canaries for members; the candidates beside
it. The same call again reads what is there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from imprint.auditing.folders import check_same_tokens, load_tuned, room_for, score_tuned, tokenizer_key
from imprint.auditing.ledger import Ledger, base_key, check_same, finish, open_ledger
from imprint.auditing.target import Target
from imprint.canaries.check import Check, Checker
from imprint.canaries.manifest import Manifest
from imprint.canaries.telling import Telling
from imprint.cells import score_base
from imprint.data import Pool
from imprint.data.templates import Templates
from imprint.data.tokens import Encoder
from imprint.errors import UsageError
from imprint.progress import Progress
from imprint.recipe import AnyCell
from imprint.records import Audit
from imprint.report import words
from imprint.scoring.score import token_stats
from imprint.spec import AuditSpec, Runtime
from imprint.store import read_stats, read_table, write_table
from imprint.tuning.base import Base
from imprint.tuning.models import load_tokenizer, resolve_device, resolve_dtype
from imprint.types import Floats, TokenStats

if TYPE_CHECKING:
    from torch import nn

Template = tuple[str, str]


@dataclass(frozen=True)
class Losses:
    """Negative log-likelihoods of whole records, summed over their tokens, in nats.

    Attributes:
        tuned, base: [N] of each canary.
        candidates: (family, prompt) → [S] of the tuned model on all that a canary of that template could have been.
    """

    tuned: Floats
    base: Floats
    candidates: dict[Template, Floats]


@dataclass(frozen=True)
class _Ready:
    target: Target
    base: Base
    compared: Base
    cell: AnyCell
    audit: Audit
    checker: Checker


def score_canaries(
    manifest: Manifest,
    telling: Telling,
    target: Target,
    out: Path,
    runtime: Runtime,
    max_length: int | None = None,
    template: str | None = None,
    document: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> tuple[Losses, Check]:
    """Score them, or read the scores that are there.

    Args:
        target: one tuned model and its base.
        telling: how the canaries were told in the training.
        max_length: tokens kept of a record, as in the training.
        template: the chat template, where it is not the tokenizer's own.
        document: what was asked for, for the folder.

    Raises:
        InvalidAudit: an included canary cannot have reached the model whole.
        UsageError: something cannot be used as asked, or the folder belongs to something else.
    """
    if len(target.tuned) > 1:
        raise UsageError(f"--adapter: {len(target.tuned)} checkpoints; canaries are scored by one: name it")
    progress = progress or Progress()
    tokenizer = load_tokenizer(target.base, target.tokenizer)
    own = tokenizer.chat_template
    if template is not None:
        tokenizer.chat_template = template
    with Templates(tokenizer) as templates:
        checker = Checker(tokenizer, room_for(max_length, target), templates=templates)
        check = checker.whole(manifest.included, telling)
        check.must_pass()
        ready = _prepared(manifest, telling, target, runtime, checker, own)
        [one] = target.tuned
        with open_ledger(out, ready.cell, ready.audit, ["ref"], None, document or {}) as ledger:
            if not check_same(ledger, [one.fingerprint]):
                progress.note(f"Scoring {len(manifest.canaries):,} canaries with the base and with {one.name}")
                score_base(ready.cell, ready.audit, ready.compared, ledger.store)
                stats, cost, sizes = score_tuned(one, ready.base, ready.audit, progress)
                ledger.write(stats, one.name, cost, fingerprint=one.fingerprint, **sizes)
            candidates = _kept_candidates(ledger, manifest, telling, ready, progress)
            if not ledger.folder.done:
                finish(ledger.folder)
            base = read_stats(ledger.store.base(ready.cell.base) / "stats.parquet")
            return Losses(_total(ledger.folder.stats(1)), _total(base), candidates), check


def _prepared(
    manifest: Manifest, telling: Telling, target: Target, runtime: Runtime, checker: Checker, template: str | None
) -> _Ready:
    """Every canary in tokens, and what is measured as an audit knows it."""
    dtype = resolve_dtype(target.model.dtype, resolve_device(runtime.device))
    model = target.model.model_copy(update={"fingerprint": target.base.fingerprint, "dtype": dtype})
    base = compared = Base.of(target.base, model, runtime)
    other = None
    if target.reference.fingerprint != target.base.fingerprint:
        compared = Base.of(target.reference, model, runtime)
        place = {"name": str(target.reference.path), "fingerprint": target.reference.fingerprint}
        other = model.model_copy(update=place)
    examples = tuple(telling.examples([(c.id, c.prompt, c.secret) for c in manifest.canaries]))
    pool = Pool("canaries", {"member": examples})
    check_same_tokens(target, checker.tokenizer, pool)
    changed = checker.tokenizer.chat_template if checker.tokenizer.chat_template != template else None
    data = telling.spec.model_copy(
        update={
            "fingerprint": pool.fingerprint,
            "sealed": manifest.seal,
            "max_length": checker.max_length,
            "seed": 0,
            "tokenizer": tokenizer_key(target, changed),
        }
    )
    spec = AuditSpec(model=model, data=data, method=target.method, seed=0, reference=other)
    audit = Audit(
        examples=examples,
        scored=tuple(checker.encoder(example) for example in examples),
        roles=tuple("member" if canary.included else "nonmember" for canary in manifest.canaries),
        tuned=(),
        dropped={},
        canaries={canary.id: canary for canary in manifest.canaries},
    )
    cell = AnyCell(spec, target.method.name, base_key(spec), target.base, pool)
    return _Ready(target, base, compared, cell, audit, checker)


def candidate_losses(
    manifest: Manifest,
    telling: Telling,
    encoder: Encoder,
    model: nn.Module,
    budget: int,
    say: Callable[[str], None] = lambda _: None,
) -> dict[Template, Floats]:
    """(family, prompt) → [S] losses of everything that could have been drawn with that prompt, in nats.

    Args:
        telling, encoder: how the canaries were told and made into tokens.
        budget: tokens per forward pass.
        say: is told what is scored.
    """
    templates = {c.template: c.prompt for c in manifest.canaries if c.family in manifest.spaces}
    found = {}
    for template, prompt in templates.items():
        secrets = manifest.spaces[template[0]].secrets()
        say(words.clean(f"Scoring {len(secrets):,} candidates of {template[0]}: {prompt[:80]} …"))
        told = telling.examples([(str(n), prompt, secret) for n, secret in enumerate(secrets)])
        found[template] = _total(token_stats(model, [encoder(example) for example in told], budget))
    return found


def _kept_candidates(
    ledger: Ledger, manifest: Manifest, telling: Telling, ready: _Ready, progress: Progress
) -> dict[Template, Floats]:
    """The same of the tuned model, from the folder once they are there."""
    file = ledger.folder.path / "candidates.parquet"
    if not file.exists():
        model = load_tuned(ready.target.tuned[0], ready.base)
        found = candidate_losses(manifest, telling, ready.checker.encoder, model, ready.base.budget, progress.note)
        rows = [{"family": f, "prompt": p, "losses": losses.tolist()} for (f, p), losses in found.items()]
        schema = pa.schema([("family", pa.string()), ("prompt", pa.string()), ("losses", pa.list_(pa.float64()))])
        write_table(file, pa.Table.from_pylist(rows, schema=schema))
    table = read_table(file)
    names = table.select(["family", "prompt"]).to_pylist()
    losses = [one.values.to_numpy() for one in table.column("losses")]
    return {(name["family"], name["prompt"]): one for name, one in zip(names, losses, strict=True)}


def _total(stats: TokenStats) -> Floats:
    return stats.nll * stats.lengths
