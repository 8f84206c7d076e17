"""Verdicts: what a study's numbers say of a claim, with the size of the effect and a corrected test."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from imprint.measures.estimate import Effect, Estimate, holm, over_seeds
from imprint.report import words
from imprint.report.sheet import Entry, Sheet

SUPPORTED, NOT_SUPPORTED, UNDECIDED = "supported", "not supported", "undecided at this sample size"
LEVEL = 0.05
SMALLEST = 0.02
"""The smallest difference of AUCs that is worth a claim."""
BETWEEN = (
    "A path is read in a straight line between two checkpoints, which overstates the AUC of a curve that bends up. At "
    "least: the smallest difference that the checkpoints on either side allow; a claim needs it to be positive."
)


@dataclass(frozen=True)
class Comparison:
    """One test of a family.

    Attributes:
        name: what is compared.
        effect: in the direction of the claim: positive speaks for it.
        p: Holm's adjusted p-value within the family.
        high: upper bound of the effect at Bonferroni's level within the family.
        smallest: the smallest effect that is worth the claim.
        least: the effect at the least that reading between two checkpoints allows; None where nothing is read between.
    """

    name: str
    effect: Effect
    p: float
    high: float
    smallest: float = SMALLEST
    least: float | None = None

    @property
    def word(self) -> str:
        """Supported: significant, and large enough. Not supported: significantly negative, or surely too small."""
        if self.p < LEVEL and self.effect.value >= self.smallest and (self.least is None or self.least > 0):
            return SUPPORTED
        if (self.effect.value < 0 and self.p < LEVEL) or self.high < self.smallest:
            return NOT_SUPPORTED
        return UNDECIDED

    def __str__(self) -> str:
        return f"{self.name} {signed(self.effect)} (p {pvalue(self.p)})"


@dataclass(frozen=True)
class Verdict:
    """What the comparisons say of a claim."""

    claim: str
    word: str
    sentence: str


@dataclass(frozen=True)
class Contrast:
    """What is to be tested: an effect of each seed, and the least that it can be between two checkpoints."""

    name: str
    estimates: Sequence[Estimate]
    least: Sequence[Estimate] | None = None

    def called(self, name: str) -> Contrast:
        """The same by another name, with its own after it."""
        return replace(self, name=f"{name} ({self.name})" if self.name else name)


def family(contrasts: Sequence[Contrast], smallest: float = SMALLEST) -> list[Comparison]:
    """Tests that are corrected together; one without a standard error (a single group of records) is left out."""
    known = [(one, effect) for one in contrasts if math.isfinite((effect := over_seeds(one.estimates)).p)]
    adjusted = holm([effect.p for _, effect in known])
    compared = []
    for (one, effect), p in zip(known, adjusted, strict=True):
        high = over_seeds(one.estimates, 1 - LEVEL / len(known)).high
        least = None if one.least is None else over_seeds(one.least).value
        compared.append(Comparison(one.name, effect, p, high, smallest, least))
    return compared


def verdict(claim: str, comparisons: Sequence[Comparison], about: str, missing: Sequence[str] = ()) -> Verdict:
    """All of the comparisons have to support a general claim; one against it is enough to refute it.

    Args:
        about: what the numbers are, as in "difference of the LOSS AUC".
        missing: what could not be compared, which leaves a claim that nothing refutes undecided.
    """
    word = overall([*(one.word for one in comparisons), *([UNDECIDED] if missing or not comparisons else [])])
    parts = [str(one) + _bracket(one) for one in comparisons] or ["nothing could be compared"]
    left = f" Not comparable, because a method never came below the base's perplexity: {', '.join(missing)}."
    return Verdict(claim, word, f"{about}: {'; '.join(parts)}.{left if missing else ''}")


def _bracket(one: Comparison) -> str:
    return "" if one.least is None else f", at least {words.share(one.least)} between checkpoints"


def overall(found: Sequence[str]) -> str:
    """Every part has to hold; one that is refuted refutes the whole."""
    return SUPPORTED if set(found) == {SUPPORTED} else NOT_SUPPORTED if NOT_SUPPORTED in found else UNDECIDED


def joint(claim: str, parts: Sequence[Verdict]) -> Verdict:
    """A claim that has several parts: each has to hold."""
    word = overall([part.word for part in parts])
    return Verdict(claim, word, " ".join(f"{part.claim} ({part.word}): {part.sentence}" for part in parts))


def comparison_sheet(title: str, comparisons: Sequence[Comparison], notes: Sequence[str] = ()) -> Sheet:
    """Effect, interval, both parts of its error, and the adjusted p of each."""
    bracketed = any(one.least is not None for one in comparisons)
    rows: tuple[tuple[Entry | str, ...], ...] = tuple(
        (
            one.name,
            entry(one.effect),
            Entry(f"{one.effect.error:.4f}"),
            Entry("" if one.effect.seeds < 2 else f"{one.effect.spread:.4f}"),
            Entry(pvalue(one.p)),
            *([Entry("" if one.least is None else words.share(one.least))] if bracketed else []),
            {SUPPORTED: "yes", NOT_SUPPORTED: "no"}.get(one.word, "undecided"),
        )
        for one in comparisons
    )
    explained = (
        "Positive: yes where it is so significantly, no where surely not or by too little to matter. Sampling: "
        "standard error from drawing records; seeds: standard deviation between training seeds on the same records. p: "
        f"two-sided, Holm-corrected over the {len(rows)} rows.",
    )
    header = ("comparison", "effect", "sampling", "seeds", "p", *(["at least"] if bracketed else []), "positive")
    if bracketed:
        notes = (BETWEEN, *notes)
    return Sheet(title, header, rows, (*explained, *notes))


def entry(effect: Effect, paper: float | None = None) -> Entry:
    """An AUC, or a difference of two, with its interval."""
    shown = "" if paper is None else f"{paper:.4f}".lstrip("0")
    return Entry(words.share(effect.value), words.share(effect.low), words.share(effect.high), shown)


def signed(effect: Effect) -> str:
    """
    >>> signed(Effect(0.051, 0.02, 0.08, 0.001, 0.01, 0.01, 3))
    '+.051 [.020 .080]'
    """
    return f"{'+' if effect.value > 0 else ''}{words.interval(effect)}"


def pvalue(p: float) -> str:
    """
    >>> pvalue(0.00002), pvalue(0.0314), pvalue(1.0)
    ('<.001', '.031', '1.000')
    """
    return "<.001" if p < 0.001 else words.share(p)
