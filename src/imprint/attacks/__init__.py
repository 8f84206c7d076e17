"""Attacks: pure functions from evidence to one score per record; higher = more likely a member.

A parameter without a default names evidence (`EVIDENCE`); parameters with one are the attack's options. To add
an attack, write such a function and a row of `ATTACKS`; or pass the function itself wherever a name is taken.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from imprint.attacks.evidence import EVIDENCE, check_evidence
from imprint.attacks.reference import ratio, ref
from imprint.attacks.single import loss, min_k, min_k_plus, zlib
from imprint.errors import UsageError, unknown
from imprint.types import Floats

__all__ = ["ATTACKS", "EVIDENCE", "Attack", "evidence_needed", "resolve", "run_attack"]

Attack = Callable[..., Floats]

ATTACKS: dict[str, Attack] = {
    "loss": loss,
    "ref": ref,
    "zlib": zlib,
    "min_k": min_k,
    "min_k_plus": min_k_plus,
    "ratio": ratio,
}


def resolve(attack: str | Attack) -> Attack:
    """The function of that name; a function is returned as it is. Raises UsageError for an unknown name.

    >>> resolve("min_k").__name__
    'min_k'
    """
    if callable(attack):
        return attack
    if attack not in ATTACKS:
        raise UsageError(unknown("attack", attack, ATTACKS))
    return ATTACKS[attack]


def evidence_needed(attack: str | Attack) -> tuple[str, ...]:
    """The evidence an attack asks for: its parameter names without defaults, in order.

    Raises UsageError for a name that is no evidence, so that a recipe fails before anything is trained.

    >>> evidence_needed("ref"), evidence_needed("min_k")
    (('target', 'reference'), ('target',))
    """
    function = resolve(attack)
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some compiled functions tell nothing about their parameters
        raise UsageError(f"attack {_title(function)} does not tell its parameters: wrap it in a function.") from None
    needed = tuple(p.name for p in parameters if p.default is p.empty)
    for name in needed:
        if name not in EVIDENCE:
            hint = unknown("evidence", name, EVIDENCE)
            raise UsageError(f"attack {_title(function)} asks for {hint} Give an option a default.")
    return needed


def run_attack(attack: str | Attack, **evidence: Any) -> Floats:
    """[N] scores of an attack, given by name or as a function, on the evidence its parameters name.

    Evidence that the attack does not name is checked but not passed; None counts as missing. Options are set with
    `functools.partial(min_k, k=0.1)`. Raises UsageError where evidence is missing, unknown or does not agree
    (`check_evidence`), or where the attack returns anything but one number per record.

    >>> from imprint.attacks.worked import REFERENCE, TARGET
    >>> run_attack("ref", target=TARGET, reference=REFERENCE).tolist()
    [2.0, 0.0]
    """
    function = resolve(attack)
    given = {name: piece for name, piece in evidence.items() if piece is not None}
    needed = evidence_needed(function)
    N = check_evidence(given)
    missing = [f"{name} ({EVIDENCE[name]})" for name in needed if name not in given]
    if missing:
        raise UsageError(f"attack {_title(function)} needs {' and '.join(missing)}.")
    scores_N = np.asarray(function(**{name: given[name] for name in needed}), np.float64)
    if needed and scores_N.shape != (N,):
        raise UsageError(
            f"attack {_title(function)} must return one score per record, shape ({N},), not {scores_N.shape}."
        )
    return scores_N


def _title(function: Attack) -> str:
    inner = getattr(function, "func", function)  # functools.partial has no name of its own
    return repr(getattr(inner, "__name__", type(inner).__name__))
