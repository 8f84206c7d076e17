"""Attacks: pure functions from evidence to one score per record; higher = more likely a member.

A parameter without a default names evidence (`EVIDENCE`); parameters with one are the attack's options. To add
an attack, write such a function and a row of `ATTACKS`; or give the function itself, or its import path
`module:function`, wherever a name is taken.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from imprint.attacks.evidence import EVIDENCE, ONE_PASS, check_evidence
from imprint.attacks.fitted import camia, ensemble, quantile
from imprint.attacks.perturbed import con_recall, grad_norm, lowercase, neighbourhood, recall
from imprint.attacks.reference import ez_mia, ratio, ref, ref_min_k_plus, wbc
from imprint.attacks.shadows import lira, lira_offline, rmia
from imprint.attacks.single import dc_pdd, loss, min_k, min_k_plus, surp, zlib, zlib_sum
from imprint.attacks.trace import loss_trace
from imprint.errors import ImprintError, UsageError, first_line, unknown
from imprint.types import Floats

__all__ = [
    "ATTACKS",
    "DEFAULT_ATTACKS",
    "EVIDENCE",
    "Attack",
    "allow",
    "evidence_needed",
    "one_pass",
    "resolve",
    "run_attack",
]

Attack = Callable[..., Floats]

ATTACKS: dict[str, Attack] = {
    "loss": loss,
    "ref": ref,
    "zlib": zlib,
    "min_k": min_k,
    "min_k_plus": min_k_plus,
    "ratio": ratio,
    "zlib_sum": zlib_sum,
    "surp": surp,
    "wbc": wbc,
    "ez_mia": ez_mia,
    "ref_min_k_plus": ref_min_k_plus,
    "dc_pdd": dc_pdd,
    "loss_trace": loss_trace,
    "camia": camia,
    "ensemble": ensemble,
    "quantile": quantile,
    "lowercase": lowercase,
    "neighbourhood": neighbourhood,
    "recall": recall,
    "con_recall": con_recall,
    "grad_norm": grad_norm,
    "lira": lira,
    "lira_offline": lira_offline,
    "rmia": rmia,
}


def resolve(attack: str | Attack) -> Attack:
    """The function of that name or import path `module:function`; a function is returned as it is.

    Raises UsageError for an unknown name, for an import path that nobody at work here has named (`allow`), and where
    nothing that can be called lies at it.

    >>> resolve("min_k").__name__
    'min_k'
    """
    if callable(attack):
        return attack
    if ":" in attack:
        if attack not in _ALLOWED:
            raise UsageError(
                f"attack {attack!r} is code that an output folder names: give it as --attack {attack} to run it, if "
                "you know whose it is"
            )
        return _imported(attack)
    if attack not in ATTACKS:
        raise UsageError(unknown("attack", attack, ATTACKS))
    return ATTACKS[attack]


_ALLOWED: set[str] = set()


def allow(attacks: Iterable[object]) -> None:
    """Import paths among these may be imported: the user has named them, and not only a folder that is read."""
    _ALLOWED.update(attack for attack in attacks if isinstance(attack, str) and ":" in attack)


def _imported(path: str) -> Attack:
    """Somebody's own attack, from what Python can import: nothing is looked for beside the data."""
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # a module's own code may raise anything
        told = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(
            f"attack {path!r} cannot be imported ({told}): expected module:function, of a module that Python finds: "
            "install it, or name its folder in PYTHONPATH"
        ) from error
    if not callable(found):
        raise UsageError(f"attack {path!r} is no function, but a {type(found).__name__}")
    return found  # type: ignore[no-any-return]


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
    if not needed:
        raise UsageError(f"attack {_title(function)} asks for no evidence: give it a parameter without a default.")
    for name in needed:
        if name not in EVIDENCE:
            hint = unknown("evidence", name, EVIDENCE)
            raise UsageError(f"attack {_title(function)} asks for {hint} Give an option a default.")
    return needed


def one_pass(attacks: Iterable[str], besides: Iterable[str] = ()) -> list[str]:
    """Those that need no more than every run and audit has, or than that and what is named.

    >>> one_pass(["ref", "recall", "rmia"])
    ['ref']
    """
    return [name for name in attacks if {*evidence_needed(name)} <= {*ONE_PASS, *besides}]


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
    missing = [f"{name} ({EVIDENCE[name].what})" for name in needed if name not in given]
    if missing:
        raise UsageError(f"attack {_title(function)} needs {' and '.join(missing)}.")
    try:
        scores_N = np.asarray(function(**{name: given[name] for name in needed}), np.float64)
    except Exception as error:
        if isinstance(error, ImprintError) or function in ATTACKS.values():
            raise
        raise UsageError(f"attack {_title(function)} failed: {type(error).__name__}: {first_line(error)}") from error
    if needed and scores_N.shape != (N,):
        raise UsageError(
            f"attack {_title(function)} must return one score per record, shape ({N},), not {scores_N.shape}."
        )
    return scores_N


def _title(function: Attack) -> str:
    inner = getattr(function, "func", function)  # functools.partial has no name of its own
    return repr(getattr(inner, "__name__", type(inner).__name__))


DEFAULT_ATTACKS = tuple(one_pass(ATTACKS))
"""What is run where nobody names attacks."""
