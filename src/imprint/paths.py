"""A run as a path: perplexity and leakage of every checkpoint as estimates that can be compared record by record."""

from __future__ import annotations

from collections.abc import Sequence

from imprint.evidence import Evidence
from imprint.measures.estimate import Estimate, auc_estimate, log_perplexity_estimate
from imprint.measures.frontier import Checkpoint
from imprint.rows import Cell
from imprint.spec import content_key
from imprint.types import Floats, TokenStats


def path_of(cell: Cell, attacks: Sequence[str]) -> list[Checkpoint]:
    """Every finished checkpoint of a cell, the untouched base first, with the attacks that have scores there.

    Cells that score the same records agree in the names of their strata, whatever the model: their differences are
    paired.
    """
    names = strata(cell)
    return [_checkpoint(cell, epoch, attacks, names) for epoch in range(cell.epochs + 1)]


def strata(cell: Cell) -> dict[str, str]:
    """Role -> a name that says which records have it."""
    roles = ("member", "nonmember", "validation")
    return {role: f"{role}/{content_key(cell.records['id'].to_numpy()[cell.rows(role)].tolist())}" for role in roles}


def auc_of(cell: Cell, target: TokenStats, attack: str, names: dict[str, str]) -> Estimate:
    """The AUC of an attack on any pass over the records of the cell."""
    return _auc(cell, cell.scored(target, [attack])[attack], names)


def _auc(cell: Cell, scores: Floats, names: dict[str, str]) -> Estimate:
    sides = cell.sides(scores)
    return auc_estimate(*sides, cell.groups("member"), cell.groups("nonmember"), (names["member"], names["nonmember"]))


def _checkpoint(cell: Cell, epoch: int, attacks: Sequence[str], names: dict[str, str]) -> Checkpoint:
    evidence = Evidence(cell, epoch)
    held_out = evidence.target.select(cell.rows(cell.held_out))
    return Checkpoint(
        epoch,
        log_perplexity_estimate(held_out, cell.groups(cell.held_out), names[cell.held_out]),
        {name: _auc(cell, scores, names) for name, scores in evidence.scores(attacks).items()},
    )
