"""The paper's four observations as comparisons: at equal utility, at each method's own best epoch, and as published."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from imprint.measures.estimate import Estimate, mean
from imprint.measures.frontier import best
from imprint.report.sheet import Sheet
from imprint.studies.evidence import Place, Variant, after, differences, last, matched_differences, pick
from imprint.studies.judgement import (
    NOT_SUPPORTED,
    SUPPORTED,
    UNDECIDED,
    Comparison,
    Verdict,
    comparison_sheet,
    family,
    joint,
    overall,
    verdict,
)
from imprint.studies.paper import TABLE_EPOCH
from imprint.studies.setting import PARAMETER_BASED, PROMPT_BASED, STRUCTURED

LOW = 0.55
"""An AUC below this counts as low: the default leakage budget."""
FLAT = 0.02
"""A change of the AUC below this, per doubling of the parameters, counts as none."""
Compare = Callable[[Variant, Variant, str], list[Estimate] | None]


@dataclass(frozen=True)
class Reading:
    """A way to compare two runs, and what it is called."""

    name: str
    compare: Compare


MATCHED = Reading("at equal validation perplexity", matched_differences)


def at(name: str, place: Place) -> Reading:
    return Reading(name, lambda a, b, attack: differences(a, b, attack, place))


BEST, LAST = at("at the epoch of best validation perplexity", best), at("at the last epoch", last)
PUBLISHED = at(f"after {TABLE_EPOCH + 1} epochs, as published", after(TABLE_EPOCH + 1))
READINGS = (MATCHED, BEST, PUBLISHED, LAST)


@dataclass(frozen=True)
class Answer:
    """What a study says of its claim: the verdicts first, whatever supports them after; charts under headings."""

    verdicts: list[Verdict]
    sheets: list[Sheet]
    charts: list[tuple[str, list[str]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def names(found: Sequence[Variant], attribute: str) -> list[str]:
    """The values of an attribute, in the order of appearance."""
    return list(dict.fromkeys(getattr(one, attribute) for one in found))


def observation1(found: Sequence[Variant], controlled: bool, attacks: Sequence[str] = ("loss", "ref")) -> Answer:
    """Parameter-based tuning memorizes more than prompt-based tuning."""
    claim = "Parameter-based tuning memorizes more than prompt-based tuning"
    verdicts, sheets = [], []
    for reading, attack in itertools.product(READINGS if controlled else (PUBLISHED, LAST), attacks):
        means, pairs = [], []
        for data in names(found, "data"):
            of_data = [
                (a, b, effect)
                for a, b in _pairs(pick(found, data=data))
                if (effect := reading.compare(a, b, attack)) is not None
            ]
            pairs += [(f"{data}: {a.method} - {b.method}", effect) for a, b, effect in of_data]
            if of_data:
                means.append((data, _averaged([effect for _, _, effect in of_data])))
        about = f"Mean difference of the {attack} AUC, parameter-based less prompt-based, {reading.name}"
        verdicts.append(verdict(f"{claim}, {reading.name} ({attack})", family(means), about))
        sheets.append(comparison_sheet(f"{attack} AUC {reading.name}, pair by pair", family(pairs)))
    return Answer(verdicts, sheets)


def _pairs(found: Sequence[Variant]) -> list[tuple[Variant, Variant]]:
    return [(a, b) for a in found for b in found if a.method in PARAMETER_BASED and b.method in PROMPT_BASED]


def _averaged(effects: Sequence[Sequence[Estimate]]) -> list[Estimate]:
    """The mean over comparisons, a seed each."""
    return [mean(of_seed) for of_seed in zip(*effects, strict=True)]


def observation2(found: Sequence[Variant], controlled: bool, attacks: Sequence[str] = ("loss", "ref")) -> Answer:
    """Memorization of parameter-based tuning grows with the epochs; that of prompt-based tuning stays low."""
    verdicts, sheets = [], []
    for attack in attacks:
        grown = [
            (f"{one.data}: {one.method}", [path[-1].auc[attack] - path[1].auc[attack] for path in one.paths])
            for one in found
            if one.method in PARAMETER_BASED
        ]
        grows = verdict(
            "with parameter-based tuning it grows",
            family(grown),
            f"{attack} AUC of the last epoch less that of the first",
        )
        low = [_stays_low(one, attack) for one in found if one.method in PROMPT_BASED]
        words = [word for word, _ in low]
        stays = Verdict(
            f"with prompt-based tuning it stays below an AUC of {LOW}",
            overall(words),
            "; ".join(text for _, text in low) + ".",
        )
        claim = (
            f"Memorization grows with the epochs for parameter-based tuning and stays low for prompt-based ({attack})"
        )
        verdicts.append(joint(claim, [grows, stays]))
        sheets.append(comparison_sheet(f"{attack} AUC: last epoch less first", family(grown)))
        if controlled:
            rest = [
                (f"{one.data}: {one.method}", [path[-1].auc[attack] - best(path).auc[attack] for path in one.paths])
                for one in found
            ]
            note = "What training on after the best epoch adds: it buys no utility."
            sheets.append(
                comparison_sheet(f"{attack} AUC: last epoch less that of best perplexity", family(rest), [note])
            )
    return Answer(verdicts, sheets)


def _stays_low(one: Variant, attack: str) -> tuple[str, str]:
    """The epoch of highest AUC against `LOW`."""
    epochs = range(1, min(len(path) for path in one.paths))
    highest = max((one.auc(attack, after(epoch)) for epoch in epochs), key=lambda effect: effect.value)
    shown = f"{one.data}, {one.method}: at most {highest:.3f}"
    if highest.high < LOW:
        return SUPPORTED, shown
    return (NOT_SUPPORTED if highest.low > LOW else UNDECIDED), shown


def observation3(found: Sequence[Variant], controlled: bool, attacks: Sequence[str] = ("loss", "ref")) -> Answer:
    """Memorization grows with the size of the model for parameter-based tuning, hardly for prompt-based tuning."""
    verdicts, sheets = [], []
    readings = (("at the epoch of best validation perplexity", best), ("at the last epoch", last))
    for (name, place), attack in itertools.product(readings, attacks):
        slopes = [
            (f"{data}: {method}", slope(chosen, [one.parameters for one in chosen], attack, place))
            for data in names(found, "data")
            for method in names(found, "method")
            if len(chosen := pick(found, data=data, method=method)) > 1
        ]
        compared = family(slopes)
        parameter = [one for one in compared if one.name.split(": ")[1] in (*PARAMETER_BASED, "full")]
        grows = verdict("it grows for parameter-based tuning", parameter, f"Change of the {attack} AUC per doubling")
        flat = _flat([one for one in compared if one not in parameter])
        claim = (
            f"Memorization grows with model size for parameter-based tuning, hardly for prompt-based, {name} ({attack})"
        )
        verdicts.append(joint(claim, [grows, flat]))
        sheets.append(comparison_sheet(f"{attack} AUC per doubling of the parameters, {name}", compared))
    return Answer(verdicts, sheets)


def slope(found: Sequence[Variant], sizes: Sequence[float], attack: str, place: Place) -> list[Estimate]:
    """Least-squares slope of the AUC on log2 of the sizes, a seed each: linear in the AUCs."""
    x = [math.log2(size) for size in sizes]
    centre = math.fsum(x) / len(x)
    scale = math.fsum((value - centre) ** 2 for value in x)
    per_seed = zip(*(one.aucs(attack, place) for one in found), strict=True)
    return [_sum([(value - centre) / scale * auc for value, auc in zip(x, aucs, strict=True)]) for aucs in per_seed]


def _sum(estimates: Sequence[Estimate]) -> Estimate:
    return len(estimates) * mean(estimates)


def _flat(compared: Sequence[Comparison]) -> Verdict:
    """Equivalence: the interval lies within ± `FLAT`; refuted where it lies outside."""
    words = []
    for one in compared:
        inside = one.effect.low > -FLAT and one.effect.high < FLAT
        outside = one.effect.low > FLAT or one.effect.high < -FLAT
        words.append(SUPPORTED if inside else NOT_SUPPORTED if outside else UNDECIDED)
    shown = "; ".join(str(one) for one in compared)
    return Verdict(f"it changes by less than {FLAT} per doubling for prompt-based tuning", overall(words), f"{shown}.")


def observation4(found: Sequence[Variant], controlled: bool, attacks: Sequence[str] = ("loss", "ref")) -> Answer:
    """Prompt-based tuning memorizes more on structured data than on other tasks.

    The difference to the untouched base on the same records, so that a shift between members and non-members, which
    the base sees too, does not count.
    """
    data = names(found, "data")
    structured, others = [d for d in data if d in STRUCTURED], [d for d in data if d not in STRUCTURED]
    verdicts, sheets = [], []
    for (name, place), attack in itertools.product((("at the last epoch", last), ("at the best epoch", best)), attacks):

        def gained(of: str, attack: str = attack, place: Place = place) -> list[Estimate]:
            effects = [
                [place(path).auc[attack] - path[0].auc[attack] for path in one.paths]
                for one in pick(found, data=of)
                if one.method in PROMPT_BASED
            ]
            return _averaged(effects)

        compared = [
            (f"{s} - {o}", [a - b for a, b in zip(gained(s), gained(o), strict=True)])
            for s in structured
            for o in others
        ]
        claim = f"Prompt-based tuning memorizes more on structured data, {name} ({attack})"
        about = f"What tuning adds to the {attack} AUC, mean of the prompt-based methods, structured less other data"
        verdicts.append(verdict(claim, family(compared), about))
        sheets.append(comparison_sheet(f"What tuning adds to the {attack} AUC, {name}", family(compared)))
    return Answer(verdicts, sheets)
