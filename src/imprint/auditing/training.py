"""What an audit during a training is asked for, and what it leaves: a folder that grows with the checkpoints."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imprint.auditing.ledger import Ledger
from imprint.details import write_details
from imprint.errors import ImprintError, InvalidAudit, UsageError
from imprint.gates.judge import withheld
from imprint.measures import auc, tpr_at_fpr
from imprint.measures.sizes import passes_tpr
from imprint.report import write_report
from imprint.rows import FALSE_POSITIVE_RATES, Cell, load_grid, write_results
from imprint.spec import Budget
from imprint.types import Floats, Interval
from imprint.validity import gates_of, write_gates


@dataclass(frozen=True)
class Asked:
    """The arguments of `LeakageCallback`, checked; see there."""

    members: Any
    nonmembers: Any
    attacks: tuple[str, ...]
    out: Path
    budget: Budget | None
    stop: bool
    reference: Any
    data: Mapping[str, Any]
    id_key: Path
    token_budget: int | None
    seed: int
    device: str

    def document(self, model: str) -> dict[str, Any]:
        """For the annex of the report."""

        def named(thing: Any, own: str) -> str:
            return own if thing is None else str(thing) if isinstance(thing, str | Path) else "given to the callback"

        return {
            "audit": f"{model} in training",
            "reference": named(self.reference, "as it was before training"),
            "members": named(self.members, "train_dataset"),
            "nonmembers": named(self.nonmembers, "eval_dataset"),
            "data": dict(self.data),
            "attacks": list(self.attacks),
            "seed": self.seed,
        }


@dataclass(frozen=True)
class Found:
    """A checkpoint in numbers.

    Attributes:
        figures: what is logged.
        over: whether an upper bound is not below its limit.
    """

    figures: dict[str, float]
    over: bool


def take_up(ledger: Ledger, step: int, fingerprint: str = "") -> None:
    """Make the folder ready for a training that begins, or goes on after `step` steps: later checkpoints go.

    Args:
        fingerprint: of the weights that training goes on with, where they are in memory.

    Raises:
        UsageError: it holds the checkpoints of another training.
    """
    written, out = ledger.written(), ledger.store.path
    if any("step" not in meta for meta in written) or (written and not step):
        raise UsageError(
            f"out {out} holds the audit of another training ({len(written)} checkpoints): give another folder, or "
            "resume that training from a checkpoint"
        )
    if fingerprint and any(meta["step"] == step and meta["fingerprint"] != fingerprint for meta in written):
        raise UsageError(
            f"out {out} holds the audit of other weights at step {step}: give another folder, or resume the training "
            "that it belongs to"
        )
    for number, meta in reversed([*enumerate(written, 1)]):
        if meta["step"] > step:
            shutil.rmtree(ledger.folder.epoch(number))
    ledger.reopen()
    (ledger.folder.path / "failed.json").unlink(missing_ok=True)


def check_next(ledger: Ledger, step: int) -> None:
    """
    Raises:
        ImprintError: a checkpoint of this step or a later one is there: two trainings write here.
    """
    if any(meta["step"] >= step for meta in ledger.written()):
        raise ImprintError(f"out {ledger.store.path} is being written by another training: give each its own folder")


def check_power(out: Path, budget: Budget | None) -> None:
    """
    Raises:
        InvalidAudit: even a model that leaks nothing would not keep the budget, with so few records.
    """
    if budget is None:
        return
    cell = _cell(out)
    few = "the budget cannot be kept with so few records."
    if budget.auc is not None:
        [gate] = [gate for gate in gates_of(cell, load_grid(out).attacks, budget.auc) if gate.name == "power"]
        if gate.state != "green":
            raise InvalidAudit(f"{few} {gate.finding} {gate.advice}".rstrip())
    members, nonmembers = len(cell.rows("member")), len(cell.rows("nonmember"))
    for metric, limit in budget.model_dump(include=set(FALSE_POSITIVE_RATES), exclude_none=True).items():
        if passes_tpr(limit, FALSE_POSITIVE_RATES[metric], members, nonmembers) < 0.5:  # the power gate's rule for AUC
            raise InvalidAudit(
                f"{few} Of {members} members and {nonmembers} non-members the upper bound of {metric} would not be "
                f"expected to stay below {limit:g} even where nothing leaks. Bring more records; "
                f"`imprint plan --budget {metric}={limit:g}` says how many."
            )


def doubts(out: Path) -> str:
    """What is said of the gates that are not green; "" where all are."""
    grid = load_grid(out)
    return withheld(gates_of(grid.cells[0], grid.attacks, (grid.budget or {}).get("auc")))


def _cell(out: Path) -> Cell:
    return load_grid(out).cells[0]


def newest(out: Path, budget: Budget | None) -> Found:
    """The last checkpoint of a folder in numbers."""
    grid = load_grid(out)
    cell = grid.cells[0]
    groups: dict[str, Any] = {"member_groups": cell.groups("member"), "nonmember_groups": cell.groups("nonmember")}
    sides = {name: cell.sides(scores) for name, scores in cell.scores(cell.epochs, grid.attacks).items()}
    found = {name: auc(*both, **groups) for name, both in sides.items()}
    named = budget.attack if budget and budget.attack else max(found, key=lambda name: found[name].value)
    held_to = [budget.attack] if budget and budget.attack else list(found)
    over = [
        bound >= limit
        for metric, limit in (budget.model_dump(exclude={"attack"}, exclude_none=True) if budget else {}).items()
        for name in held_to
        if (bound := found[name].high if metric == "auc" else _rate(sides[name], groups, metric)) is not None
    ]
    perplexity = cell.folder.meta(cell.epochs)["validation_perplexity"]
    return Found({**_figures(found, named), "leakage_heldout_loss": math.log(perplexity)}, any(over))


def _figures(found: Mapping[str, Interval], named: str) -> dict[str, float]:
    first = found[named]
    headline = {"leakage_auc": first.value, "leakage_auc_low": first.low, "leakage_auc_high": first.high}
    return {**headline, **{f"leakage_{name}_auc": interval.value for name, interval in found.items()}}


def _rate(sides: tuple[Floats, Floats], groups: Mapping[str, Any], metric: str) -> float | None:
    """The upper bound of a true positive rate; None where there are too few records for one."""
    try:
        return tpr_at_fpr(*sides, FALSE_POSITIVE_RATES[metric], **groups).high
    except InvalidAudit:
        return None


def conclude(out: Path) -> None:
    """Results, gates, tables and report of what has been written: as `imprint.runs.finish`, of a failed audit too."""
    grid = load_grid(out)
    write_results(grid)
    write_gates(grid)
    write_details(grid)
    write_report(out)
