"""What the losses of canaries say: AUC, exposure and a lower bound on ε, by family and repetitions and over all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from imprint.canaries.manifest import Manifest
from imprint.errors import DataError, InvalidAudit
from imprint.measures import auc
from imprint.measures.epsilon import OneRun, one_run_audit
from imprint.measures.exposure import exposure, exposure_fitted
from imprint.types import Floats, Interval


@dataclass(frozen=True)
class Exposed:
    """Exposure of the canaries of a group, in bits.

    Attributes:
        median, highest: of the included ones.
        left_out: median of the others, which is near 1 where all is well.
        most: what it could be at most; None where it is not bounded.
    """

    median: float
    highest: float
    left_out: float
    most: float | None


@dataclass(frozen=True)
class Group:
    """Canaries that are looked at together.

    Attributes:
        family: None: all of them.
        repetitions: copies of a canary; the most, where they differ.
        mixed: whether they differ.
        included, left_out: how the coins fell.
        auc: of the included against the others, by the gain over the base; None where a side is empty.
        exposed: None where it was not measured.
        proof: the bound on ε; None where there are too few canaries.
        why: the reason, in that case.
    """

    family: str | None
    repetitions: int
    mixed: bool
    included: int
    left_out: int
    auc: Interval | None
    exposed: Exposed | None
    proof: OneRun | None
    why: str = ""

    @property
    def record_epsilon(self) -> float | None:
        """What a single record's ε is at least, for δ = 0: by group privacy that of k copies is k times that of one."""
        return None if self.proof is None or self.proof.delta else self.proof.epsilon / self.repetitions


@dataclass(frozen=True)
class CanaryAudit:
    """What the canaries of one training say.

    Attributes:
        manifest: the canaries.
        groups: each family at each number of repetitions; then, where there are several, each number of repetitions
            over all families; the last is everything.
        scores: [N] gain over the base in nats, less the mean gain of the canary's kind.
        exposures: [N] bits; NaN where not measured.
    """

    manifest: Manifest
    groups: tuple[Group, ...]
    scores: Floats
    exposures: Floats

    @property
    def whole(self) -> Group:
        """All canaries together."""
        return self.groups[-1]


def audit_canaries(
    manifest: Manifest,
    losses_tuned: ArrayLike,
    losses_base: ArrayLike,
    candidate_losses: Mapping[tuple[str, str], ArrayLike] | None = None,
    guesses: int | None = None,
    delta: float = 0.0,
    significance: float = 0.05,
) -> CanaryAudit:
    """Judge one training by its canaries.

    A canary's score is how much less the tuned model is surprised by it than its base, less the mean of that among all
    canaries of its template that would be told as often, in the data or not: what they have in common is no sign of any
    of them. The mean knows nothing of the coins, so that the bound on ε holds. Losses are sums over a record's tokens,
    so that it is all the same whether the prompt, which the canaries of a template share, is scored along.

    Exposure is exact where all that could have been drawn was scored: the rank among the candidates that are not in the
    data. Else it is fitted to the gains of the family's canaries that were left out.

    Args:
        losses_tuned: [N] negative log-likelihood of each canary, summed over its tokens, in nats.
        losses_base: [N] of the untouched base.
        candidate_losses: (family, prompt) → [S] of the tuned model on the candidates of that template in the order of
            `Space.secrets`.
        guesses: how many guesses the bound rests on, of all canaries; a group has its share. Fixed before the scores
            were seen; None tries several numbers and corrects for it.
        delta: δ of the claim.
        significance: probability that a bound exceeds the true ε, at most; of each bound by itself.

    Raises:
        DataError: losses that do not fit or are NaN.
        UsageError: guesses, delta or significance out of range.
    """
    tuned, base = (np.asarray(losses, np.float64) for losses in (losses_tuned, losses_base))
    shape = (len(manifest.canaries),)
    if tuned.shape != shape or base.shape != shape:
        raise DataError(f"there are {shape[0]} canaries, and losses of shape {tuned.shape} and {base.shape}.")
    if bad := int((~np.isfinite(tuned) | ~np.isfinite(base)).sum()):
        raise DataError(f"{bad} of {shape[0]} canaries have a loss that is not finite: find out why.")
    gains = base - tuned
    scores = _centred(gains, manifest)
    exposures, most = _exposures(manifest, gains, candidate_losses or {})
    groups = []
    for family, repetitions, rows in _groups(manifest):
        share = None if guesses is None else max(1, round(guesses * len(rows) / shape[0]))
        some = [manifest.canaries[n] for n in rows]
        inside = np.array([canary.included for canary in some])
        proof, why = _proof(scores[rows], inside, share, delta, significance)
        groups.append(
            Group(
                family=family,
                repetitions=repetitions or max(canary.repetitions for canary in some),
                mixed=repetitions is None,
                included=int(inside.sum()),
                left_out=int((~inside).sum()),
                auc=auc(scores[rows[inside]], scores[rows[~inside]]) if 0 < inside.sum() < len(rows) else None,
                exposed=_exposed(exposures[rows], inside, most[rows]),
                proof=proof,
                why=why,
            )
        )
    return CanaryAudit(manifest, tuple(groups), scores, exposures)


def _centred(gains: Floats, manifest: Manifest) -> Floats:
    """Each less the mean of its kind: canaries of one template that would be told as often.

    Those of a family that have their prompt alone are taken together.
    """
    common = Counter(canary.template for canary in manifest.canaries)
    kinds = [(c.family, c.prompt if common[c.template] > 1 else "", c.repetitions) for c in manifest.canaries]
    return centred(gains, kinds)


def centred(gains: Floats, kinds: Sequence[Hashable]) -> Floats:
    """[N] each gain less the mean of its kind, which knows nothing of the coins.

    >>> centred(np.array([1.0, 3.0, 5.0]), ["digits", "digits", "names"]).tolist()
    [-1.0, 1.0, 0.0]
    """
    numbers = {kind: n for n, kind in enumerate(dict.fromkeys(kinds))}
    of = np.array([numbers[kind] for kind in kinds])
    means = np.bincount(of, gains) / np.bincount(of)
    return np.asarray(gains - means[of], np.float64)


def _exposures(
    manifest: Manifest, gains: Floats, candidate_losses: Mapping[tuple[str, str], ArrayLike]
) -> tuple[Floats, Floats]:
    """[N] exposure of each canary, and the most that it could be, infinite where nothing bounds it; NaN: unknown."""
    found, most = np.full(len(gains), np.nan), np.full(len(gains), np.nan)
    included = np.array([canary.included for canary in manifest.canaries])
    families = np.array([canary.family for canary in manifest.canaries])
    for family in dict.fromkeys(families.tolist()):
        rows = np.flatnonzero(families == family)
        if family in manifest.spaces:
            _rank(manifest, rows, candidate_losses, found, most)
            continue
        with suppress(InvalidAudit):  # too few of them, or nothing that tells one from another
            found[rows] = exposure_fitted(-gains[rows], -gains[rows[~included[rows]]])
            most[rows] = np.inf
    return found, most


def _rank(
    manifest: Manifest,
    rows: NDArray[np.intp],
    candidate_losses: Mapping[tuple[str, str], ArrayLike],
    found: Floats,
    most: Floats,
) -> None:
    """Exact exposures of one family, among what nobody put into the data."""
    canaries = manifest.canaries
    place = {secret: n for n, secret in enumerate(manifest.spaces[canaries[rows[0]].family].secrets())}
    for template in dict.fromkeys(canaries[n].template for n in rows):
        if template not in candidate_losses:
            continue
        losses = np.asarray(candidate_losses[template], np.float64)
        if losses.shape != (len(place),):
            raise DataError(f"{template[1]!r} has {len(place)} candidates, and losses of shape {losses.shape}.")
        own = [n for n in rows if canaries[n].template == template]
        free = np.ones(len(losses), bool)
        free[[place[canaries[n].secret] for n in own if canaries[n].included]] = False
        for n in own:
            loss = losses[place[canaries[n].secret]]
            others = free.copy()
            others[place[canaries[n].secret]] = True
            found[n], most[n] = exposure(losses[others], float(loss)), np.log2(others.sum())


def _groups(manifest: Manifest) -> list[tuple[str | None, int | None, NDArray[np.intp]]]:
    """Family and repetitions of each group, None where they differ, and whose they are."""
    families = np.array([canary.family for canary in manifest.canaries])
    copies = np.array([canary.repetitions for canary in manifest.canaries])
    names, numbers = list(dict.fromkeys(families.tolist())), sorted({*copies.tolist()})
    asked: list[tuple[str | None, int | None]] = [(name, number) for name in names for number in numbers]
    asked += [(None, number) for number in numbers] if len(names) > 1 else []
    asked += [(name if len(names) == 1 else None, None) for name in names[:1]] if len(numbers) > 1 else []
    found = []
    for name, number in asked:
        chosen = np.ones(len(families), bool) if name is None else families == name
        rows = np.flatnonzero(chosen if number is None else chosen & (copies == number))
        if len(rows):
            found.append((name, number, rows))
    return found


def _proof(
    scores: Floats, inside: NDArray[np.bool_], guesses: int | None, delta: float, significance: float
) -> tuple[OneRun | None, str]:
    """The bound on ε, or why there is none."""
    try:
        return one_run_audit(scores, inside, guesses, delta, significance), ""
    except InvalidAudit as error:
        return None, str(error)


def _exposed(bits: Floats, inside: NDArray[np.bool_], most: Floats) -> Exposed | None:
    known = ~np.isnan(bits)
    ins, outs = bits[known & inside], bits[known & ~inside]
    if not len(ins) or not len(outs):
        return None
    bound = float(most[known].max())
    highest = None if np.isinf(bound) else bound
    return Exposed(float(np.median(ins)), float(ins.max()), float(np.median(outs)), highest)
