"""The five validity gates: pure judgements from evidence. One that is not green withholds the headline of an audit.

The two gates that ask several questions at once, base control and blind baseline, split one error rate among them
(Bonferroni): a clean audit is red at either with probability `FAMILY` at most. Of four plain 95% intervals, one for
each attack, one misses in 5% of clean audits if the attacks agree and in 19% if they do not, and a gate that cries
wolf is soon ignored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from scipy.special import ndtr, ndtri

from imprint.errors import DataError
from imprint.gates.overlap import RUN, Overlap
from imprint.measures import auc
from imprint.measures.auc import codes
from imprint.types import Floats, Interval

Sides = tuple[Floats, Floats]
"""[M] scores of the members, [N] of the non-members; higher = more likely a member."""
Groups = tuple[Sequence[object], Sequence[object]]
"""[M] and [N] labels of clusters; None marks a record on its own."""

FAMILY = 0.01
"""The chance of a red gate in a clean audit, for all attacks or classifiers of the gate together."""
CONFIDENCE = 0.95
POWER = 0.8
WORTH_FINDING = 0.6
"""Without a budget an audit must be able to tell this AUC from .5."""
BOTH_WAYS = math.sqrt(2)
"""How much wider a cross-validated AUC varies on a random split than DeLong's variance of its scores says.

Scores of a fold depend on the labels of the other folds, and theirs on the labels of this one: a pair of records in
different folds enters twice, once each way, with the same sign. On a random split nothing but such pairs varies, so
the variance is twice that of scores from a classifier trained elsewhere.
"""


@dataclass(frozen=True)
class Gate:
    """What one gate found.

    Attributes:
        name: `base control`, `blind baseline`, `overlap`, `power` or `positive control`.
        state: `green`, `red`, or `missing` where it could not be computed, which is not green.
        finding: one sentence with the figures.
        advice: what to do where it is not green, else empty.
        figures: the numbers behind it, ready for JSON.
    """

    name: str
    state: str
    finding: str
    advice: str
    figures: dict[str, Any]


ADVICE = {
    "base control": "Members and non-members differ before any tuning: divide one pool at random, whole groups on one "
    "side, or bring non-members from the members' own source.",
    "blind baseline": "The texts alone give members away: divide one pool at random, whole groups on one side, or "
    "bring non-members from the members' own source, time and format.",
    "overlap": "Remove the records or groups that lie on both sides, or divide one pool at random.",
    "power": "Bring more records, or more groups where each holds many.",
    "positive control": "These attacks cannot show that anything leaks here: bring longer records, or attacks that "
    "find the members of the control.",
    "direction": "Were members and non-members swapped, or the non-members tuned on?",
}


def missing(name: str, why: str) -> Gate:
    """A gate that could not be computed; `why` says what it takes."""
    return Gate(name, "missing", why, "", {})


def base_control(scores: Mapping[str, Sides], groups: Groups) -> Gate:
    """Can the attacks tell members from non-members on the base, which has seen neither?

    Red if the AUC interval of any attack misses .5 on either side, intervals at the level 1 − FAMILY / attacks.

    Args:
        scores: attack → its scores on the untuned base; of those that need no reference.
    """
    name, level = "base control", 1 - FAMILY / max(len(scores), 1)
    found = _intervals(name, scores, level, groups)
    if isinstance(found, Gate):
        return found
    off = [attack for attack, interval in found.items() if 0.5 not in interval]
    said = f"On the untuned base the AUC differs from .5 for {_listed(off)}" if off else "The untuned base is at chance"
    return _gate(name, not off, f"{said}: {_shown(found, level)}.", _figures(found, level))


def blind_baseline(scores: Mapping[str, Sides], groups: Groups) -> Gate:
    """Can a classifier tell members from non-members by their texts alone?

    Red if the lower bound of any AUC is above .5; below .5 nothing was learned. Bounds are one-sided at the level
    1 − FAMILY / classifiers, wider than DeLong's by `BOTH_WAYS`.

    Args:
        scores: what `imprint.gates.blind.blind_scores` gives, by sides.
    """
    name, tail = "blind baseline", FAMILY / max(len(scores), 1)
    found = _intervals(name, scores, 1 - 2 * float(ndtr(BOTH_WAYS * ndtri(tail))), groups)
    if isinstance(found, Gate):
        return found
    above = [classifier for classifier, interval in found.items() if interval.low > 0.5]
    who = _listed(above) if above else f"none of {len(found)} classifiers"
    said = f"By their texts alone members are told from non-members by {who}"
    return _gate(name, not above, f"{said}: {_shown(found, 1 - 2 * tail)}.", _figures(found, 1 - 2 * tail))


def overlap_gate(counts: Overlap) -> Gate:
    """Is a record or a group on both sides? Red if there is one; shared runs of words are told, not judged."""
    clean = not (counts.exact or counts.near or counts.groups)
    said = f"{counts.exact} exact and {counts.near} near duplicates and {counts.groups} shared groups across the sides"
    share = counts.shared_runs / counts.nonmembers if counts.nonmembers else 0.0
    told = f"{share:.1%} of the non-members share a run of {RUN} words with a member"
    return _gate("overlap", clean, f"{said}; {told}.", asdict(counts))


def power(scores_loss: Sides, groups: Groups, budget_auc: float | None = None) -> Gate:
    """Are there enough records for the claim?

    The standard error is DeLong's at AUC .5, clustered: there a record's structural component is its percentile, so
    that the percentiles of the base's own loss within each side tell how alike the records of a group are.

    With a budget, red if .5 plus the half-width of the 95% interval is not below it: even a model that leaks nothing
    would not be expected to pass. Without, red if an AUC of .60 would be missed more often than in one case of five
    (two-sided 5%).

    Args:
        scores_loss: the loss attack's scores on the untuned base.
        budget_auc: the AUC that the upper bound has to stay below.
    """
    labels = [codes(side) for side in groups]
    clusters = [len(set(side.tolist())) for side in labels]
    if min(clusters) < 2:
        counted = f"Groups of members: {clusters[0]}, of non-members: {clusters[1]}"
        return _gate("power", False, f"{counted}; an interval needs two a side.", {"clusters": clusters})
    if any(len(scores) != len(side) for scores, side in zip(scores_loss, labels, strict=True)):
        return missing("power", "The scores and the groups differ in number.")
    if np.isnan(np.concatenate(scores_loss)).any():
        return missing("power", "Some records have no loss.")
    error = math.sqrt(sum(_percentile_variance(*side) for side in zip(scores_loss, labels, strict=True)))
    if not error > 0:
        return missing("power", "The loss is the same for all records.")
    half = float(ndtri((1 + CONFIDENCE) / 2)) * error
    detectable = min(1.0, 0.5 + half + float(ndtri(POWER)) * error)
    records = [len(side) for side in labels]
    figures = {
        "records": records,
        "clusters": clusters,
        "standard_error": error,
        "half_width": half,
        "detectable": detectable,
        "budget": budget_auc,
        "passes": None if budget_auc is None else float(ndtr((budget_auc - 0.5 - half) / error)),
    }
    said = f"{records[0]} members and {records[1]} non-members in {clusters[0]} and {clusters[1]} groups"
    said += f" tell an AUC of {detectable:.3f} or more from .5 with {POWER:.0%} power"
    if budget_auc is None:
        return _gate("power", detectable <= WORTH_FINDING, f"{said}.", figures)
    told = f"a model that leaks nothing meets the budget of {budget_auc:g} with probability {figures['passes']:.2f}"
    return _gate("power", 0.5 + half < budget_auc, f"{said}; {told}.", figures)


def positive_control(scores: Mapping[str, Sides]) -> Gate:
    """Do the attacks find the members of a run that was overfitted on purpose? Red if any does not (95% interval)."""
    name = "positive control"
    found = _intervals(name, scores, CONFIDENCE, None)
    if isinstance(found, Gate):
        return found
    blind = [attack for attack, interval in found.items() if not interval.low > 0.5]
    said = "Every attack finds the members of a run overfitted on purpose"
    if all(found[attack].value > WORTH_FINDING for attack in blind) and blind:
        said = f"Too few records to be sure that a run overfitted on purpose is found by {_listed(blind)}"
        return replace(
            _gate(name, False, f"{said}: {_shown(found, CONFIDENCE)}.", _figures(found, CONFIDENCE)),
            advice=ADVICE["power"],
        )
    if blind:
        said = f"Blind to the members of a run overfitted on purpose: {_listed(blind)}"
    return _gate(name, not blind, f"{said}: {_shown(found, CONFIDENCE)}.", _figures(found, CONFIDENCE))


def direction(scores: Mapping[str, Sides], groups: Groups) -> Gate:
    """Do the attacks find the *non*-members of a model tuned elsewhere? Then the sides are not what they are called.

    Red if the upper bound of any AUC is below .5, intervals at the level 1 − FAMILY / attacks.

    Args:
        scores: attack → its scores on the tuned model.
    """
    name, level = "direction", 1 - FAMILY / max(len(scores), 1)
    found = _intervals(name, scores, level, groups)
    if isinstance(found, Gate):
        return found
    below = [attack for attack, interval in found.items() if interval.high < 0.5]
    said = "After tuning no attack takes the non-members for the members"
    if below:
        said = f"The non-members look more like what was tuned on than the members do, by {_listed(below)}"
    return _gate(name, not below, f"{said}: {_shown(found, level)}.", _figures(found, level))


def withheld(gates: Sequence[Gate]) -> str:
    """Empty if all gates are green, else the sentence that stands where the headline would.

    >>> withheld([overlap_gate(Overlap(1, 0, 0, 1, 100, 100)), overlap_gate(Overlap(0, 0, 0, 1, 100, 100))])
    'Not green: overlap (red); the numbers below are shown for inspection only and are no evidence of memorization.'
    """
    shut = [f"{gate.name} ({gate.state})" for gate in gates if gate.state != "green"]
    if not shut:
        return ""
    told = "the numbers below are shown for inspection only and are no evidence of memorization"
    return f"Not green: {_listed(shut)}; {told}."


def _intervals(
    name: str, scores: Mapping[str, Sides], level: float, groups: Groups | None
) -> dict[str, Interval] | Gate:
    """The AUC of each with its interval, or the gate that says why there is none."""
    if not scores:
        return missing(name, "There are no scores.")
    of_members, of_nonmembers = groups or (None, None)
    try:
        return {key: auc(*sides, level, of_members, of_nonmembers) for key, sides in scores.items()}
    except DataError as error:
        return missing(name, f"The AUC cannot be computed: {error}")


def _percentile_variance(scores: Floats, labels: Any) -> float:
    """Variance of the mean percentile of one side at chance, from sums by cluster (Obuchowski 1997)."""
    ranked = np.sort(scores)
    middle = (np.searchsorted(ranked, scores, "left") + np.searchsorted(ranked, scores, "right")) / 2
    sums = np.bincount(labels, middle / len(scores) - 0.5) / len(scores)
    return float(len(sums) / (len(sums) - 1) * sums @ sums)


def _gate(name: str, green: bool, finding: str, figures: dict[str, Any]) -> Gate:
    return Gate(name, "green" if green else "red", finding, "" if green else ADVICE[name], figures)


def _figures(found: Mapping[str, Interval], level: float) -> dict[str, Any]:
    return {"level": level, "auc": {key: asdict(interval) for key, interval in found.items()}}


def _shown(found: Mapping[str, Interval], level: float) -> str:
    return f"{', '.join(f'{key} {interval}' for key, interval in found.items())} (each at {level:.2%})"


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))
