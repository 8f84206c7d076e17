"""Verdicts: what a study's numbers say of a claim, with the size of the effect and a corrected test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from imprint.measures.estimate import Effect, Estimate, holm, over_seeds
from imprint.report import words
from imprint.report.sheet import Entry, Sheet

SUPPORTED, NOT_SUPPORTED, UNDECIDED = "supported", "not supported", "undecided at this sample size"
LEVEL = 0.05
SMALLEST = 0.02
"""The smallest difference of AUCs that is worth a claim."""


@dataclass(frozen=True)
class Comparison:
    """One test of a family.

    Attributes:
        name: what is compared.
        effect: in the direction of the claim: positive speaks for it.
        p: Holm's adjusted p-value within the family.
    """

    name: str
    effect: Effect
    p: float

    @property
    def word(self) -> str:
        """Supported: significantly positive. Not supported: significantly negative, or surely below `SMALLEST`."""
        if self.effect.value > 0 and self.p < LEVEL:
            return SUPPORTED
        if (self.effect.value < 0 and self.p < LEVEL) or self.effect.high < SMALLEST:
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


def family(named: Sequence[tuple[str, Sequence[Estimate]]]) -> list[Comparison]:
    """Tests that are corrected together: a name, and the effect of each seed."""
    effects = [over_seeds(estimates) for _, estimates in named]
    adjusted = holm([effect.p for effect in effects])
    return [Comparison(name, effect, p) for (name, _), effect, p in zip(named, effects, adjusted, strict=True)]


def verdict(claim: str, comparisons: Sequence[Comparison], about: str) -> Verdict:
    """All of the comparisons have to support a general claim; one against it is enough to refute it.

    Args:
        about: what the numbers are, as in "difference of the LOSS AUC".
    """
    if not comparisons:
        return Verdict(claim, UNDECIDED, "Nothing could be compared.")
    word = overall([one.word for one in comparisons])
    return Verdict(claim, word, f"{about}: {'; '.join(str(one) for one in comparisons)}.")


def overall(found: Sequence[str]) -> str:
    """Every part has to hold; one that is refuted refutes the whole."""
    return SUPPORTED if set(found) == {SUPPORTED} else NOT_SUPPORTED if NOT_SUPPORTED in found else UNDECIDED


def joint(claim: str, parts: Sequence[Verdict]) -> Verdict:
    """A claim that has several parts: each has to hold."""
    word = overall([part.word for part in parts])
    return Verdict(claim, word, " ".join(f"{part.claim} ({part.word}): {part.sentence}" for part in parts))


def comparison_sheet(title: str, comparisons: Sequence[Comparison], notes: Sequence[str] = ()) -> Sheet:
    """Effect, interval, both parts of its error, and the adjusted p of each."""
    rows = tuple(
        (
            one.name,
            entry(one.effect),
            Entry(f"{one.effect.error:.4f}"),
            Entry("" if one.effect.seeds < 2 else f"{one.effect.spread:.4f}"),
            Entry(pvalue(one.p)),
            {SUPPORTED: "yes", NOT_SUPPORTED: "no"}.get(one.word, "undecided"),
        )
        for one in comparisons
    )
    explained = (
        "Positive: yes where it is so significantly, no where surely not or by too little to matter. Sampling: "
        "standard error from drawing records; seeds: standard deviation between training seeds on the same records. p: "
        f"two-sided, Holm-corrected over the {len(rows)} rows.",
    )
    header = ("comparison", "effect", "sampling", "seeds", "p", "positive")
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
