"""Remedies in one table: what each leaks for what utility, and the ε it claims beside the least that canaries prove."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

from imprint.measures.frontier import best
from imprint.planted import Planted, planted
from imprint.report import words
from imprint.report.sheet import Entry, Sheet
from imprint.spec import RunSpec
from imprint.studies import tables
from imprint.studies.claims import LAST, MATCHED, Answer, Reading, names
from imprint.studies.evidence import Variant, last
from imprint.studies.judgement import Comparison, comparison_sheet, entry, family, pvalue, verdict
from imprint.studies.parts import RANK

if TYPE_CHECKING:
    from imprint.studies.answers import Findings

NONE = "none"


@dataclass(frozen=True)
class Pair:
    """A remedy: the runs without it, and those with it."""

    name: str
    without: Variant
    treated: Variant


def remedies(found: Findings) -> Answer:
    """Every remedy against the same method without it, by the Ref attack."""
    runs, twins = parted(found.variants)
    pairs = pairs_of(runs)
    made = [pair for pair in pairs if pair]
    matched, missing = _compared(made, MATCHED)
    at_last, _ = _compared(made, LAST)
    proofs = {_key(one): proof for one in twins if (proof := _proof(one))}
    answer = Answer([], [_table(runs, pairs, matched, proofs), _proofs(twins)])
    for pair in made:
        claim = f"{pair.name} lowers the Ref AUC {MATCHED.name}"
        lacking = [pair.name] if pair.name in missing else []
        compared = [matched[pair.name]] if pair.name in matched else []
        answer.verdicts.append(verdict(claim, compared, "Ref AUC without it less that with it", lacking))
    for reading, of_all in ((MATCHED, matched), (LAST, at_last)):
        answer.sheets.append(comparison_sheet(f"Ref AUC without less with, {reading.name}", list(of_all.values())))
    named = [_named(one) for one in runs]
    answer.sheets.append(tables.frontier(named, "ref"))
    answer.charts.extend(tables.frontier_charts(named, "ref"))
    answer.notes.extend(_notes(runs, missing))
    return answer


def parted(found: Sequence[Variant]) -> tuple[list[Variant], list[Variant]]:
    """Method by method, the runs whose leakage and utility are read, and their twins with canaries.

    The same where all have canaries.
    """
    by_method = sorted(found, key=lambda one: names(found, "method").index(one.method))
    twins = [one for one in by_method if one.cells[0].spec.data.sealed]
    return [one for one in by_method if not one.cells[0].spec.data.sealed] or twins, twins


def remedy(spec: RunSpec) -> str:
    """What sets a run apart from plain tuning by its method, as people call it; `NONE` where nothing does."""
    train, options, found = spec.train, spec.method.options, []
    if options.get("rank", RANK) != RANK:
        found.append(f"rank {options['rank']}")
    if options.get("placement", "both") != "both":
        found.append(f"{options['placement']} only")
    if options.get("dropout"):
        found.append(f"dropout {options['dropout']:g}")
    if train.weight_decay:
        found.append(f"weight decay {train.weight_decay:g}")
    if train.goldfish:
        found.append(f"Goldfish loss, k = {train.goldfish}")
    if train.stop:
        found.append(f"early stopping at {tables.title(train.stop.attack)} {words.share(train.stop.auc)}")
    if train.dp:
        found.append(f"DP-SGD, ε = {train.dp.epsilon:g}")
    if spec.data.repeat > 1:
        found.append(f"members told {spec.data.repeat} times")
    return ", ".join(found) or NONE


def pairs_of(found: Sequence[Variant]) -> list[Pair | None]:
    """For each variant the remedy that it is compared for; None where it is plain, or there is no plain one.

    What repeats members is no remedy: plain tuning, which tells them once, is the treated side there.
    """
    plain = {one.method: one for one in found if _remedy(one) == NONE}
    return [None if _remedy(one) == NONE else _pair(one, plain.get(one.method)) for one in found]


def _pair(one: Variant, plain: Variant | None) -> Pair | None:
    method, times = tables.title(one.method), one.cells[0].spec.data.repeat
    if plain is None:
        return None
    if times > 1:
        return Pair(f"{method}: deduplication (once, not {times} times)", one, plain)
    return Pair(f"{method}: {_remedy(one)}", plain, one)


def _compared(pairs: Sequence[Pair], reading: Reading) -> tuple[dict[str, Comparison], list[str]]:
    """By the remedy's name, corrected together; and the remedies that cannot be compared so."""
    contrasts, missing = {}, []
    for pair in pairs:
        one = reading.compare(pair.without, pair.treated, "ref")
        if one is None:
            missing.append(pair.name)
        else:
            one = one.called(pair.name)
            contrasts[one.name] = pair.name, one
    compared = family([one for _, one in contrasts.values()])
    return {contrasts[one.name][0]: one for one in compared}, missing


def _table(
    found: Sequence[Variant],
    pairs: Sequence[Pair | None],
    matched: Mapping[str, Comparison],
    proofs: Mapping[tuple[str, str], Planted],
) -> Sheet:
    rows: list[tuple[Entry | str, ...]] = []
    for one, pair in zip(found, pairs, strict=True):
        compared = matched.get(pair.name) if pair else None
        rows.append(
            (
                tables.title(one.method),
                _remedy(one),
                _perplexity(one),
                entry(one.auc("loss", best)),
                entry(one.auc("ref", best)),
                entry(one.auc("ref", last)),
                entry(compared.effect) if compared else Entry(""),
                Entry(pvalue(compared.p) if compared else ""),
                *_claim(proofs.get(_key(one))),
            )
        )
    header = ("method", "remedy", "PPL, best", "LOSS, best", "Ref, best", "Ref, last", "Ref lower by", "p", *CLAIM)
    notes = (
        "Best, last: at the epoch of best validation perplexity, at the last one.",
        "Ref lower by: the AUC without the remedy less that with it, where both have reached the same validation "
        "perplexity; p is Holm-corrected. In the row of members told several times, for telling them once.",
        "ε: of a twin that is tuned on canaries as well.",
    )
    return Sheet("Remedies", header, tuple(rows), notes, group=2)


CLAIM = ("ε claimed", "ε at least")


def _claim(proof: Planted | None) -> list[Entry]:
    """What training claims of a record, and the least that canaries prove."""
    both = (proof.claimed, proof.epsilon) if proof else (None, None)
    return [Entry("" if epsilon is None else f"{epsilon:.2f}") for epsilon in both]


def _perplexity(one: Variant) -> Entry:
    effect = one.log_perplexity(best)
    return Entry(*(words.perplexity(math.exp(x)) for x in (effect.value, effect.low, effect.high)))


def _proofs(found: Sequence[Variant]) -> Sheet:
    rows: list[tuple[Entry | str, ...]] = []
    for one in found:
        proof = _proof(one)
        if proof is None:
            continue
        auc, audit = proof.auc, proof.found
        rows.append(
            (
                tables.title(one.method),
                _remedy(one),
                Entry(str(proof.epoch)),
                Entry(*map(words.share, (auc.value, auc.low, auc.high))) if auc else Entry(""),
                Entry(f"{audit.correct} of {audit.guesses}" if audit else ""),
                *_claim(proof),
                Entry(f"{audit.ceiling / proof.copies:.2f}" if audit else ""),
            )
        )
    header = ("method", "remedy", "epoch", "canaries' AUC", "right", *CLAIM, "at most")
    notes = (
        "First seed, last epoch. A fair coin put each canary in or left it out. At least: with 95% confidence training "
        "is private for no smaller ε (Steinke et al. 2023). At most: what right guesses alone would have proven, so a "
        "claim above that cannot be refuted here. A bound below a claim does not confirm it.",
    )
    return Sheet("ε as claimed and as proven by canaries", header, tuple(rows), notes, group=2)


def _proof(one: Variant) -> Planted | None:
    """What the canaries of the first seed prove, of those told least often."""
    return next(iter(planted(one.cells[0])), None)


def _key(one: Variant) -> tuple[str, str]:
    return one.method, _remedy(one)


def _remedy(one: Variant) -> str:
    return remedy(one.cells[0].run_spec)


def _named(one: Variant) -> Variant:
    """Under the name of its remedy."""
    if (label := _remedy(one)) == NONE:
        return one
    named = replace(one, method=f"{tables.title(one.method)}, {label}")
    named.__dict__["paths"] = one.paths  # which take reading all of its evidence
    return named


def _notes(found: Sequence[Variant], missing: Sequence[str]) -> list[str]:
    notes = [f"Never came below the base's perplexity, with it or without: {'; '.join(missing)}."] if missing else []
    stopped = [(one, cell) for one in found for cell in one.cells if cell.run_spec.train.stop]
    for one, cell in stopped:
        name = f"{tables.title(one.method)}: {_remedy(one)}"
        notes.append(f"{name}, {cell.epochs} of {cell.planned} epochs with seed {cell.spec.seed}.")
    if stopped:
        notes.append(
            "Early stopping leaves the path as it is, so that there is nothing to see at equal perplexity: the last "
            "epoch is where it counts."
        )
    if find_spec("opacus") is None:
        notes.append('Private training is left out, because it needs Opacus: pip install "imprint-audit[dp]".')
    return notes
