"""The audit of a model that is being trained, in memory; with several processes, each scores its share."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from torch import nn

from imprint.auditing.identity import keep_key, read_key
from imprint.auditing.ledger import Ledger, finish, open_ledger
from imprint.auditing.live import (
    WITH_ADAPTER,
    adds_something,
    alters_base,
    base_trains,
    load_beside,
    plain_copy,
    pristine,
    undisturbed,
    weights_fingerprint,
)
from imprint.auditing.memory import Live, for_controls, prepare_live, score_live
from imprint.auditing.shared_work import Ranks, joined, share
from imprint.auditing.trainer_data import records_of
from imprint.auditing.training import Asked, Found, check_next, check_power, conclude, doubts, newest, take_up
from imprint.cells import score_base
from imprint.errors import ImprintError, UsageError
from imprint.records import Audit
from imprint.spec import AuditSpec, ModelSpec
from imprint.store import Store
from imprint.tuning.models import count_parameters
from imprint.types import TokenStats

if TYPE_CHECKING:
    from imprint.data.tokens import Encoded

Scored = tuple[TokenStats, dict[str, Any]]


@dataclass(frozen=True)
class Known(Audit):
    """An audit whose next pass has been made already, by several processes together."""

    scores: TokenStats | None = None

    def stats(self, *_: Any, **__: Any) -> TokenStats:
        assert self.scores is not None
        return self.scores


class Running:
    """From the first step of a training to its last.

    Attributes:
        trainer: whose model it is.
        ranks: the processes of the training. Only the first one has `live`, and writes.
        sizes: trained and all parameters.
        whole: whether the base is the model as it was before training, with its adapter if it has one.
    """

    def __init__(self, trainer: Any, asked: Asked) -> None:
        self.trainer, self.asked, self.ranks = trainer, asked, Ranks.join()
        self.model: nn.Module = getattr(trainer.model, "_orig_mod", trainer.model)
        self.live: Live
        self.sizes = dict(zip(("trainable", "parameters"), count_parameters(self.model), strict=True))
        self.records: Sequence[Encoded] = ()
        self.token_budget, self.whole = 0, False

    def begin(self, step: int, loader: Any) -> str:
        """Score the base and measure what the gates need; what is to be doubted, or "".

        Args:
            step: where the training goes on.
            loader: what it trains from.

        Raises:
            UsageError: something cannot be used as asked.
            InvalidAudit: the budget cannot be kept with so few records.
        """
        with undisturbed(self.model):
            found = self.ranks.first(lambda: self._prepare(step, loader))
            self.records, self.token_budget, self.whole, done = found
            parts = [] if done else self.ranks.each(lambda: self._score(self._base))
            said = self.ranks.first(lambda: self._measure_base(parts))
        vars(self).pop("_base", None)
        return said

    def checkpoint(self, name: str, step: int, epoch: float) -> Found:
        """Score the model as it is now, and write it.

        Raises:
            ImprintError: it could not be scored or written; nothing has been written.
        """
        with undisturbed(self.model):
            parts = self.ranks.each(lambda: self._score(self.model))
            return self.ranks.first(lambda: self._write(parts, name, step, epoch))

    def ready(self, wait: bool) -> list[Found]:
        """What was left for later: nothing."""
        return []

    def end(self, failed: str) -> None:
        """Mark it complete unless something failed, and write results and report of what there is."""

        def work() -> None:
            with self._ledger() as ledger:
                if failed:
                    ledger.folder.fail(failed)
                elif ledger.written():
                    finish(ledger.folder)
            conclude(self.asked.out)

        self.ranks.first(work)

    def _prepare(self, step: int, loader: Any) -> tuple[Sequence[Encoded], int, bool, bool]:
        """The records, how many tokens of them make a pass, what the base is, and whether it has been scored before."""
        asked = self.asked
        pool, data = records_of(self.trainer, loader, asked.members, asked.nonmembers, asked.data, asked.seed)
        known = self._known(step) if asked.reference is None else None
        key = read_key(asked.id_key)
        tokenizer = tokenizer_of(self.trainer)
        below = None if known else self._base
        self.live = prepare_live(self.model, tokenizer, pool, data, key, below, asked.token_budget, known=known)
        keep_key(asked.id_key, key)
        with self._ledger() as ledger:
            take_up(ledger, step, weights_fingerprint(self.model))
            done = ledger.store.base(self.live.cell.base).is_dir()
        return self.live.audit.scored, self.live.base.budget, self.whole, done

    @cached_property
    def _base(self) -> nn.Module:
        """What the model is compared with; not kept, as training changes the weights of a whole one."""
        reference = self.asked.reference
        if isinstance(reference, nn.Module):
            return reference
        if reference is not None:
            return load_beside(reference, self.model)
        return plain_copy(self.model) if self.whole else pristine(self.model)

    def _known(self, step: int) -> ModelSpec | None:
        """The base as it was found before the first step, where it is not at hand any more.

        What it is is found out at the first step, and is written: later an adapter says something in any case.

        Raises:
            UsageError: the folder does not hold it.
        """
        model = self.model
        changes = base_trains(model)
        if not step:
            self.whole = changes or adds_something(model)
            return None
        found = self._found()
        if found and (changes or found.fingerprint.endswith(WITH_ADAPTER)):
            return found
        if changes or (not found and isinstance(model, PeftModel) and alters_base(model)):
            raise UsageError(
                f"the training goes on with a model that has changed since, and out {self.asked.out} holds no scores "
                "of what it was before: give the folder of the first part, or the model it was tuned from as "
                "`reference`"
            )
        return None

    def _found(self) -> ModelSpec | None:
        """The base of the folder, if it has been scored."""
        store = Store(self.asked.out)
        if (store.path / "recipe.lock.json").exists():
            for cell in store.lock()["cells"]:
                if store.gates(cell["base"]).is_dir():
                    return AuditSpec.model_validate(cell["spec"]).model
        return None

    def _measure_base(self, parts: Sequence[Scored | None]) -> str:
        asked, live = self.asked, self.live
        audit: Audit = live.audit
        if parts:
            audit = Known(**vars(audit), scores=joined([part and part[0] for part in parts], self.records))
        with self._ledger() as ledger:
            score_base(live.cell, audit, live.base, ledger.store)
            check_power(asked.out, asked.budget)
            replace(ledger, audit=audit).measure_base(for_controls(live.base))
        live.base.release()
        return doubts(asked.out)

    def _score(self, model: nn.Module) -> Scored | None:
        """This process's share."""
        mine = [self.records[n] for n in share(self.records, self.ranks.rank, self.ranks.count)]
        return score_live(model, mine, self.token_budget) if mine else None

    def _write(self, parts: Sequence[Scored | None], name: str, step: int, epoch: float) -> Found:
        stats = joined([part and part[0] for part in parts], self.records)
        cost = _together([part[1] for part in parts if part])
        about = {"step": step, "trained_epochs": epoch, "fingerprint": weights_fingerprint(self.model), **self.sizes}
        with self._ledger() as ledger:
            check_next(ledger, step)
            ledger.write(stats, name, cost, **about)
        return newest(self.asked.out, self.asked.budget)

    @contextmanager
    def _ledger(self) -> Iterator[Ledger]:
        asked, live = self.asked, self.live
        document = asked.document(live.cell.spec.model.name)
        with open_ledger(asked.out, live.cell, live.audit, asked.attacks, asked.budget, document) as ledger:
            yield ledger


def tokenizer_of(trainer: Any) -> Any:
    """A copy of the trainer's own."""
    processing = getattr(trainer, "processing_class", None)
    tokenizer = getattr(processing, "tokenizer", processing)
    if not callable(getattr(tokenizer, "get_vocab", None)):
        raise UsageError("the trainer has no tokenizer: give it one as `processing_class`")
    return copy.deepcopy(tokenizer)


def _together(costs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What all processes spent: the longest time, the most memory of one, and all operations."""
    if not costs:
        raise ImprintError("there was nothing to score")
    return {
        **costs[0],
        "seconds": {"scoring": max(cost["seconds"]["scoring"] for cost in costs)},
        "flops": sum(cost["flops"] for cost in costs),
        "peak_memory": max(cost["peak_memory"] for cost in costs),
    }
