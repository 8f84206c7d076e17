"""What the validity gates need besides the base's scores, measured once per base while texts and model are there.

base/<key>/gates/blind.parquet       cross-validated scores of classifiers that see the texts alone
                 overlap.json        what members and non-members have in common
                 positive.parquet    evidence of a run that was overfitted on purpose
                 meta.json           why one of them is missing, what the run was, seconds
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from imprint.errors import ImprintError, first_line
from imprint.gates import blind_scores, overlap
from imprint.recipe import AnyCell
from imprint.records import Audit
from imprint.spec import MethodSpec, TrainSpec
from imprint.store import Store, atomic_folder, write_json, write_stats, write_table
from imprint.tuning.methods import resolve_method
from imprint.types import TokenStats

if TYPE_CHECKING:
    from imprint.data.tokens import Encoded
    from imprint.tuning.base import Base

MEMORIZED = 64
"""Members that the positive control is tuned on, and at most four times as many non-members beside them."""
EPOCHS = 30
"""At most; it ends when the members' loss is below `LEARNED` of the non-members'."""
LEARNED = 0.4
"""By heart, and not only by kind: on texts unlike any that the base knows, the loss of both falls at first."""


def measure_controls(cell: AnyCell, audit: Audit, base: Base, store: Store) -> None:
    """Write the evidence of the gates of a base, if nobody has."""
    path = store.gates(cell.base)
    if path.is_dir():
        return
    started = time.perf_counter()
    meta: dict[str, Any] = {}
    sides = [[n for n, role in enumerate(audit.roles) if role == side] for side in ("member", "nonmember")]
    members, nonmembers = ([audit.examples[n] for n in side] for side in sides)
    with atomic_folder(path) as folder:
        try:
            labels = [e.group for e in members], [e.group for e in nonmembers]
            scores = blind_scores(members, nonmembers, labels, cell.spec.data.seed or 0)
            ids = [e.id for e in (*members, *nonmembers)]
            write_table(folder / "blind.parquet", pa.table({"id": ids, **scores}))
        except ImprintError as error:
            meta["blind"] = str(error)
        write_json(folder / "overlap.json", asdict(overlap(members, nonmembers)))
        try:
            tuned = sides[0][:MEMORIZED]
            records = [audit.scored[n] for n in (*tuned, *sides[1][: 4 * MEMORIZED])]
            meta["run"], found = _overfit(cell, records, len(tuned), base)
            write_stats(folder / "positive.parquet", audit.kept(found))
        except (ImprintError, RuntimeError) as error:  # out of memory, for one: the cells themselves may fit
            meta["positive"] = first_line(error)
        write_json(folder / "meta.json", {**meta, "seconds": time.perf_counter() - started})


def _overfit(cell: AnyCell, records: list[Encoded], members: int, base: Base) -> tuple[dict[str, Any], TokenStats]:
    """Tune LoRA on the first `members` records until it knows them, score all, and say what was done."""
    from imprint.engine.forward import forward_of
    from imprint.scoring.score import token_stats
    from imprint.tuning.train import Trainer, train

    method = resolve_method(MethodSpec(name="lora", options={"rank": 16}), cell.located.hidden_size, None)
    spec = TrainSpec(epochs=EPOCHS, batch_size=8, schedule="constant")
    model = base.tuned(method, cell.spec.data.seed or 0)
    forward = forward_of(model)
    forward.spare_memory(records[:members], base.budget)
    trainer = Trainer(model, records[:members], spec, method.options["learning_rate"], cell.spec.data.seed or 0)
    unseen = records[members : 2 * members]
    losses: list[float] = []
    held_out = math.inf
    for [report] in train([trainer], forward, base.budget):
        if report is None or report.diverged:
            raise ImprintError(f"it diverged in epoch {len(losses) + 1}")
        losses.append(report.training_loss)
        held_out = -float(token_stats(model, unseen, base.budget, None, forward).logp.mean())
        if losses[-1] < LEARNED * held_out:
            break
    run = {
        "method": method.model_dump(),
        "records": members,
        "epochs": len(losses),
        "training_loss": losses[-1],
        "held_out": held_out,
    }
    return run, token_stats(model, records, base.budget, None, forward)
