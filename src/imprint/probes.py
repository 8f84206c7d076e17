"""Evidence that takes passes of its own: what is missing of it, and measuring it where the weights are at hand.

A run keeps the weights of its last epoch and of its best one, and an attack that is added later finds them there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imprint.attacks import evidence_needed
from imprint.errors import ImprintError, first_line
from imprint.evidence import TUNED_ONLY, pass_file, refusal_file
from imprint.passes import PASSES
from imprint.progress import Progress
from imprint.recipe import AnyCell, AnyPlan, Plan, PlannedCell
from imprint.records import Audit
from imprint.spec import VIRTUAL_TOKEN_ROOM, Runtime, content_key
from imprint.store import Store, write_json, write_table

if TYPE_CHECKING:
    from torch import nn

    from imprint.passes.spec import EvidenceSpec
    from imprint.tuning.base import Base


@dataclass(frozen=True)
class Missing:
    """A piece of evidence that nobody has measured yet; of epoch 0 by the base."""

    name: str
    epoch: int
    file: Path


def pass_keys(planned: AnyPlan, cell: AnyCell) -> dict[str, str]:
    """Evidence that takes passes of its own → the key of how it is made."""
    names = dict.fromkeys(name for attack in planned.attacks for name in evidence_needed(attack) if name in PASSES)
    seed, context = cell.spec.data.seed or 0, _context(cell)
    settings = {name: PASSES[name].settings(planned.passes, seed) for name in names}
    return {name: content_key({**document, "context": context}) for name, document in settings.items()}


def _context(cell: AnyCell) -> int:
    """Tokens of the longest text: the same for all methods whose virtual tokens fit, so that they share the base's."""
    return cell.located.context - max(VIRTUAL_TOKEN_ROOM, int(cell.spec.method.options.get("tokens", 0)))


def missing(planned: AnyPlan, cell: AnyCell, store: Store, epochs: Iterable[int], base: bool = True) -> list[Missing]:
    """What is not there yet of a cell, at the epochs given and at the base."""
    folder, found = store.cell(cell.spec.run_id), []
    for name, key in pass_keys(planned, cell).items():
        for epoch in [*([0] if base and name not in TUNED_ONLY else []), *epochs]:
            file = pass_file(folder, store.base(cell.base), name, key, epoch)
            if not file.exists() and not refusal_file(file).exists():
                found.append(Missing(name, epoch, file))
    return found


def missing_passes(planned: Plan, cell: PlannedCell, store: Store) -> list[Missing]:
    """What is not there yet of a cell that was tuned here, at the base and at the epochs whose weights are kept."""
    if cell.spec.shadow is not None:
        return []
    kept = store.cell(cell.spec.run_id).path.glob("epochs/*/adapter")
    return missing(planned, cell, store, sorted(int(path.parent.name) for path in kept))


def measure_passes(
    planned: Plan, audits: Mapping[str, Audit], store: Store, runtime: Runtime, progress: Progress
) -> None:
    """Measure what is missing of the cells of a recipe, from the weights that were kept."""
    base: Base | None = None
    memos: dict[str, dict[str, Any]] = {}
    for cell in planned.cells:
        todo = missing_passes(planned, cell, store)
        if not todo:
            continue
        from imprint.checkpoint import load_trained
        from imprint.tuning.base import Base
        from imprint.tuning.models import load_tokenizer

        base = base if base and base.serves(cell) else Base.of(cell.located, cell.spec.model, runtime)
        tokenizer = load_tokenizer(cell.located)
        memo = memos.setdefault(cell.base, {})
        for epoch in sorted({one.epoch for one in todo}):
            if epoch == 0:
                model = base.model
            else:
                model = base.tuned(cell.spec.method, cell.spec.seed)
                load_trained(store.cell(cell.spec.run_id).epoch(epoch) / "adapter", model)
            progress.note(f"{cell.label}: further passes over {'the base' if epoch == 0 else f'epoch {epoch}'}")
            some = [one for one in todo if one.epoch == epoch]
            measure(some, model, cell, audits[cell.base], tokenizer, base.budget, planned.passes, memo, progress.note)


def measure(
    todo: Iterable[Missing],
    model: nn.Module,
    cell: AnyCell,
    audit: Audit,
    tokenizer: Any,
    budget: int,
    spec: EvidenceSpec,
    memo: dict[str, Any],
    note: Callable[[str], None],
) -> None:
    """Measure evidence of one checkpoint; what cannot be measured is refused with the reason, and asked for no more.

    Args:
        model: the checkpoint; left as it was.
        budget: tokens of one forward pass.
        memo: keeps what depends on the records alone, from one checkpoint to the next.
    """
    from imprint.data.templates import Templates
    from imprint.data.tokens import Encoder
    from imprint.engine.forward import forward_of
    from imprint.passes import Bench

    data = cell.spec.data
    assert data.max_length is not None  # resolved by the plan
    model.eval()
    with Templates(tokenizer, data.loss) as templates:
        encoder = Encoder(tokenizer, data.max_length, data.overlong, data.loss, data.eos, templates)
        bench = Bench(model, forward_of(model), audit, encoder, budget, spec, data.seed or 0, _context(cell), memo)
        for one in todo:
            try:
                table = PASSES[one.name].measure(bench)
            except ImprintError as error:
                note(f"{cell.label}: {one.name} cannot be measured: {error}")
                write_json(refusal_file(one.file), {"reason": str(error)})
                continue
            except Exception as error:  # out of memory, for one: the same command tries again
                note(f"{cell.label}: {one.name} failed: {type(error).__name__}: {first_line(error)}")
                continue
            write_table(one.file, table)
