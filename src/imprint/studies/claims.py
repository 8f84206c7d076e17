"""The paper's four observations as comparisons: at equal utility, at each method's own best epoch, and as published."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from imprint.measures.estimate import Estimate, auc_over_seeds, mean
from imprint.measures.frontier import best
from imprint.report import words
from imprint.report.sheet import Sheet
from imprint.studies.evidence import Place, Variant, after, contrast, last, matched_contrast, pick
from imprint.studies.judgement import (
    LEVEL,
    NOT_SUPPORTED,
    SUPPORTED,
    UNDECIDED,
    Comparison,
    Contrast,
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
"""A change of the AUC below this, from the smallest model to the largest, counts as none."""
CEILING = 0.98
"""Above this AUC there is no room to grow."""


@dataclass(frozen=True)
class Reading:
    """A way to compare two runs, and what it is called; `epoch` where it needs runs of so many epochs."""

    name: str
    compare: Callable[[Variant, Variant, str], Contrast | None]
    epoch: int = 0


MATCHED = Reading("at equal validation perplexity", matched_contrast)
FIFTH = TABLE_EPOCH + 1


def at(name: str, place: Place, epoch: int = 0) -> Reading:
    return Reading(name, lambda a, b, attack: contrast(a, b, attack, place), epoch)


BEST, LAST = at("at the epoch of best validation perplexity", best), at("at the last epoch", last)
PUBLISHED = at(f"after {FIFTH} epochs, as published", after(FIFTH), FIFTH)
PLACES: tuple[tuple[str, Place, int], ...] = (
    (BEST.name, best, 0),
    (PUBLISHED.name, after(FIFTH), FIFTH),
    (LAST.name, last, 0),
)


def readings(found: Sequence[Variant], controlled: bool) -> list[Reading]:
    """Those that the protocol has, and that the runs are long enough for."""
    wanted = (MATCHED, BEST, PUBLISHED, LAST) if controlled else (PUBLISHED, LAST)
    return [one for one in wanted if one.epoch <= shortest(found)]


def places(found: Sequence[Variant], controlled: bool) -> list[tuple[str, Place]]:
    """The same for a run by itself."""
    wanted = PLACES if controlled else PLACES[1:]
    return [(name, place) for name, place, epoch in wanted if epoch <= shortest(found)]


def shortest(found: Iterable[Variant]) -> int:
    """Epochs that every run has."""
    return min(len(path) - 1 for one in found for path in one.paths)


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
    """Parameter-based tuning memorizes more than prompt-based tuning.

    A claim about a class of methods is one about each of them: every parameter-based method is compared with the mean
    of the prompt-based ones, on every data set.
    """
    claim = "Parameter-based tuning memorizes more than prompt-based tuning"
    answer = Answer([], [])
    for reading, attack in itertools.product(readings(found, controlled), attacks):
        means, pairs, missing = [], [], []
        for a in [one for one in found if one.method in PARAMETER_BASED]:
            of_one = []
            for b in [one for one in pick(found, data=a.data, model=a.model) if one.method in PROMPT_BASED]:
                name = f"{a.data}: {a.method} - {b.method}"
                compared = reading.compare(a, b, attack)
                if compared is None:
                    missing.append(name)
                else:
                    of_one.append(compared.called(name))
            pairs += of_one
            if of_one:
                means.append(_averaged(f"{a.data}: {a.method}", of_one))
        about = f"{attack} AUC less the mean of the prompt-based methods, {reading.name}"
        answer.verdicts.append(verdict(f"{claim}, {reading.name} ({attack})", family(means), about, missing))
        answer.sheets.append(comparison_sheet(f"{attack} AUC {reading.name}, pair by pair", family(pairs)))
    return answer


def _averaged(name: str, compared: Sequence[Contrast]) -> Contrast:
    """The mean over comparisons, a seed each."""
    bounds = [one.least for one in compared if one.least is not None]
    least = _means(bounds) if len(bounds) == len(compared) else None
    return Contrast(name, _means([one.estimates for one in compared]), least)


def _means(effects: Sequence[Sequence[Estimate]]) -> list[Estimate]:
    return [mean(of_seed) for of_seed in zip(*effects, strict=True)]


def observation2(found: Sequence[Variant], controlled: bool, attacks: Sequence[str] = ("loss", "ref")) -> Answer:
    """Memorization of parameter-based tuning grows with the epochs; that of prompt-based tuning stays low."""
    answer = Answer([], [])
    for attack in attacks:
        grown = family(
            [
                Contrast(f"{one.data}: {one.method}", [p[-1].auc[attack] - p[1].auc[attack] for p in one.paths])
                for one in found
                if one.method in PARAMETER_BASED
            ]
        )
        about = f"{attack} AUC of the last epoch less that of the first"
        grows = verdict("with parameter-based tuning it grows", grown, about)
        stays = _stays_low([one for one in found if one.method in PROMPT_BASED], attack)
        claim = f"Memorization grows with the epochs for parameter-based tuning, stays low for prompt-based ({attack})"
        answer.verdicts.append(joint(claim, [grows, stays]))
        answer.sheets.append(comparison_sheet(f"{attack} AUC: last epoch less first", grown))
        if controlled:
            rest = [
                Contrast(f"{one.data}: {one.method}", [p[-1].auc[attack] - best(p).auc[attack] for p in one.paths])
                for one in found
            ]
            note = "What training on after the best epoch adds: it buys no utility."
            title = f"{attack} AUC: last epoch less that of best perplexity"
            answer.sheets.append(comparison_sheet(title, family(rest), [note]))
    return answer


def _stays_low(found: Sequence[Variant], attack: str) -> Verdict:
    """Low: the interval of every epoch lies below `LOW`. Refuted: at the last epoch one lies above it.

    That all of several hypotheses hold needs no correction (intersection-union); that one of them fails does, for the
    number of methods and data sets.
    """
    said, parts = [], []
    for one in found:
        epochs = range(1, min(len(path) for path in one.paths))
        top = max((auc_over_seeds(one.aucs(attack, after(e))) for e in epochs), key=lambda effect: effect.high)
        low, high = top.high < LOW, auc_over_seeds(one.aucs(attack, last), 1 - LEVEL / len(found)).low > LOW
        said.append(SUPPORTED if low else NOT_SUPPORTED if high else UNDECIDED)
        parts.append(f"{one.data}: {one.method} {words.interval(top)}")
    claim = f"with prompt-based tuning it stays below an AUC of {words.share(LOW)}"
    shown = "; ".join(parts) or "no such method was run"
    return Verdict(claim, overall(said or [UNDECIDED]), f"{attack} AUC of the epoch with the highest bound: {shown}.")


def observation3(found: Sequence[Variant], controlled: bool, attacks: Sequence[str] = ("loss", "ref")) -> Answer:
    """Memorization grows with the size of the model for parameter-based tuning, hardly for prompt-based tuning."""
    answer = Answer([], [])
    sizes = {model: min(o.parameters for o in found if o.model == model) for model in names(found, "model")}
    for (name, place), attack in itertools.product(places(found, controlled), attacks):
        slopes: dict[str, list[Contrast]] = {"parameter": [], "prompt": []}
        full, span = [], 1.0
        for data, method in itertools.product(names(found, "data"), names(found, "method")):
            chosen = pick(found, data=data, method=method)
            x = [math.log2(sizes[one.model]) for one in chosen]
            if len(set(x)) < 2:
                continue
            span = max(x) - min(x)
            one = Contrast(f"{data}: {method}", [span * s for s in slope(chosen, x, attack, place)])
            smallest = chosen[x.index(min(x))]
            if auc_over_seeds(smallest.aucs(attack, place)).value > CEILING:
                full.append(one.name)
            else:
                slopes["prompt" if method in PROMPT_BASED else "parameter"].append(one)
        compared = {kind: family(of_kind) for kind, of_kind in slopes.items()}
        about = f"Change of the {attack} AUC over {span:.1f} doublings of the parameters"
        parts = [
            verdict("it grows for parameter-based tuning", compared["parameter"], about),
            _flat(compared["prompt"]),
            verdict("it grows more for parameter-based tuning", family(_apart(slopes)), "Difference of these changes"),
        ]
        claim = (
            f"Memorization grows with model size for parameter-based tuning, hardly for prompt-based, {name} ({attack})"
        )
        answer.verdicts.append(joint(claim, parts))
        everything = family([*slopes["parameter"], *slopes["prompt"]])
        note = [f"No room to grow, and left out: {', '.join(full)}."] if full else []
        answer.sheets.append(comparison_sheet(f"Change of the {attack} AUC with size, {name}", everything, note))
    return answer


def _apart(slopes: dict[str, list[Contrast]]) -> list[Contrast]:
    """Mean of the parameter-based less mean of the prompt-based methods."""
    if not slopes["parameter"] or not slopes["prompt"]:
        return []
    a, b = (_means([one.estimates for one in slopes[kind]]) for kind in ("parameter", "prompt"))
    return [Contrast("parameter-based - prompt-based", [x - y for x, y in zip(a, b, strict=True)])]


def slope(found: Sequence[Variant], x: Sequence[float], attack: str, place: Place) -> list[Estimate]:
    """Least-squares slope of the AUC on x, a seed each: linear in the AUCs."""
    centre = math.fsum(x) / len(x)
    scale = math.fsum((value - centre) ** 2 for value in x)
    per_seed = zip(*(one.aucs(attack, place) for one in found), strict=True)
    return [_sum([(value - centre) / scale * auc for value, auc in zip(x, aucs, strict=True)]) for aucs in per_seed]


def _sum(estimates: Sequence[Estimate]) -> Estimate:
    return len(estimates) * mean(estimates)


def _flat(compared: Sequence[Comparison]) -> Verdict:
    """Equivalence: every interval lies within ± `FLAT`; refuted where a change is significant and larger."""
    said = []
    for one in compared:
        inside = one.effect.low > -FLAT and one.effect.high < FLAT
        outside = one.p < LEVEL and abs(one.effect.value) > FLAT
        said.append(SUPPORTED if inside else NOT_SUPPORTED if outside else UNDECIDED)
    shown = "; ".join(str(one) for one in compared) or "nothing could be compared"
    claim = f"it changes by less than {words.share(FLAT)} for prompt-based tuning"
    return Verdict(claim, overall(said or [UNDECIDED]), f"Change from the smallest model to the largest: {shown}.")


def observation4(found: Sequence[Variant], controlled: bool, attacks: Sequence[str] = ("loss", "ref")) -> Answer:
    """Prompt-based tuning memorizes more on structured data than on other tasks.

    Controlled: the difference to the untouched base on the same records, so that a shift between members and
    non-members, which the base sees too, does not count. As published: the AUC as it is.
    """
    data = names(found, "data")
    structured, others = [d for d in data if d in STRUCTURED], [d for d in data if d not in STRUCTURED]
    answer = Answer([], [])
    what = "What tuning adds to the" if controlled else "The"
    for (name, place), attack in itertools.product(places(found, controlled), attacks):

        def gained(one: Variant, attack: str = attack, place: Place = place) -> list[Estimate]:
            if controlled:
                return [place(path).auc[attack] - path[0].auc[attack] for path in one.paths]
            return one.aucs(attack, place)

        contrasts = []
        for s, o in itertools.product(structured, others):
            pairs = [
                Contrast(method, [x - y for x, y in zip(gained(a), gained(b), strict=True)])
                for method in PROMPT_BASED
                for a in pick(found, data=s, method=method)
                for b in pick(found, data=o, method=method)
            ]
            if pairs:
                contrasts.append(_averaged(f"{s} - {o} ({', '.join(one.name for one in pairs)})", pairs))
        claim = f"Prompt-based tuning memorizes more on structured data, {name} ({attack})"
        about = f"{what} {attack} AUC, mean of the prompt-based methods, structured less other data"
        compared = family(contrasts)
        answer.verdicts.append(verdict(claim, compared, about))
        answer.sheets.append(comparison_sheet(f"{what} {attack} AUC, {name}", compared))
    return answer
