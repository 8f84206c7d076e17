"""Which records are at risk, by shadow models; and how well attacks that see one model rank them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from imprint.errors import ImprintError
from imprint.evidence import Evidence
from imprint.risk import Agreement, Memorization, agreement, counterfactual
from imprint.rows import Cell


@dataclass(frozen=True)
class Ranking:
    """The members of a cell at its last finished epoch.

    Attributes:
        epoch: at which models are compared.
        shadows: models that say how much each record is remembered.
        truth: [members] counterfactual memorization.
        agreements: attack → how its ranking agrees with the truth, or why that cannot be said.
    """

    epoch: int
    shadows: int
    truth: Memorization
    agreements: Mapping[str, Agreement | str]


def ranking(cell: Cell, attacks: Iterable[str]) -> Ranking | None:
    """How attacks rank the members by what shadow models say of each; None where there are no shadow models.

    Members alone: only of them does the cell's own model remember anything that its scores could tell.
    """
    evidence = Evidence(cell, cell.epochs)
    shadows = evidence["shadows"] if cell.epochs else None
    if shadows is None:
        return None
    rows = cell.rows("member")
    truth = counterfactual(shadows.select(rows))
    found: dict[str, Agreement | str] = {}
    for attack in attacks:
        if not evidence.available(attack):
            continue
        try:
            found[attack] = agreement(evidence.score(attack)[rows], truth.values, cell.groups("member").tolist())
        except ImprintError as error:
            found[attack] = str(error)
    return Ranking(cell.epochs, shadows.losses.shape[1], truth, found)
