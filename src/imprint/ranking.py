"""Which records are at risk, by shadow models; and how well attacks that see one model rank them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imprint.attacks import evidence_needed, run_attack
from imprint.attacks.evidence import LEAST_SHADOWS
from imprint.errors import ImprintError, InvalidAudit
from imprint.evidence import Evidence
from imprint.risk import Agreement, Memorization, agreement, counterfactual
from imprint.rows import Cell
from imprint.types import Shadows


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

    Members alone: only of them does the cell's own model remember anything that its scores could tell. Attacks that use
    shadow models are given every other pair of them, and compared with the memorization that the others say.
    """
    evidence = Evidence(cell, cell.epochs)
    shadows = evidence["shadows"] if cell.epochs else None
    if shadows is None:
        return None
    rows = cell.rows("member")
    truth = counterfactual(shadows.select(rows))
    found: dict[str, Agreement | str] = {}
    groups = cell.groups("member").tolist()
    for attack in attacks:
        if not evidence.available(attack):
            continue
        try:
            if "shadows" in evidence_needed(attack):
                found[attack] = apart(evidence, attack, rows, groups)
            else:
                found[attack] = agreement(evidence.score(attack)[rows], truth.values, groups)
        except ImprintError as error:
            found[attack] = str(error)
    return Ranking(cell.epochs, shadows.losses.shape[1], truth, found)


def apart(evidence: Mapping[str, Any] | Evidence, attack: str, rows: NDArray[np.intp], groups: list[Any]) -> Agreement:
    """Of an attack that uses shadow models with a truth by others: their errors would agree with themselves.

    Models 2j and 2j + 1 have the two halves of one division, so every other pair goes to either.
    """
    shadows: Shadows = evidence["shadows"]
    count = shadows.losses.shape[1]
    if count < 2 * LEAST_SHADOWS:
        raise InvalidAudit(
            f"ranking by attacks that use shadow models takes {2 * LEAST_SHADOWS}, half for the attack and half for "
            f"the truth, and there are {count}"
        )
    pair = np.arange(count) // 2 % 2
    his, other = (Shadows(shadows.losses[:, pair == n], shadows.inside[:, pair == n]) for n in (0, 1))
    pieces = {name: his if name == "shadows" else evidence[name] for name in evidence_needed(attack)}
    return agreement(run_attack(attack, **pieces)[rows], counterfactual(other.select(rows)).values, groups)
