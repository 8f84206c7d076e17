"""The study `mechanism`: inside the stored checkpoints of each method, the first seed, at the last epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from imprint.measures.estimate import holm
from imprint.report import words
from imprint.report.sheet import Entry, Sheet
from imprint.studies import tables
from imprint.studies.claims import Answer
from imprint.studies.evidence import Variant
from imprint.studies.judgement import LEVEL, NOT_SUPPORTED, SUPPORTED, UNDECIDED, Verdict, pvalue
from imprint.types import Floats

if TYPE_CHECKING:
    from imprint.mechanism import Drift, LossShift, PrefixIdentity
    from imprint.studies.answers import Findings

RECORDS = 150
"""Of each side: enough for the permutation tests, few enough for a quadratic number of distances."""
EXACT = 1e-12
"""Residual of the identity in float64, in units of the largest value, up to which it is rounding."""
NOTICED = 0.01
"""Total variation between attention patterns up to which they count as unchanged."""


@dataclass(frozen=True)
class Inside:
    """What was measured inside one tuned model."""

    variant: Variant
    drift: Drift
    losses: LossShift
    identity: PrefixIdentity | None


def mechanism(found: Findings) -> Answer:
    """Identity, drift by layer, and whether members are moved otherwise than non-members, for every method."""
    inside = [_look_inside(found, one) for one in found.variants]
    verdicts = [_moved(one) for one in inside if one.variant.method != "head"]  # whose hidden states are the base's
    sheets = [_drift_sheet(inside), _loss_sheet(inside)]
    for one in inside:
        if one.identity is not None:
            verdicts = [*_prefix_verdicts(one), *verdicts]
            sheets = [_identity_sheet(one.identity, one.drift), *sheets]
    note = f"First seed, last epoch, {RECORDS} records of each side; attention computed eagerly."
    return Answer(verdicts, sheets, notes=[note])


def _look_inside(found: Findings, one: Variant) -> Inside:
    from imprint.mechanism import drift, loss_shift, prefix_identity

    cell = one.cells[0]
    found.progress.note(f"{cell.label}: looking inside")
    records = found.checkpoints.records(cell)
    sides = {role: cell.rows(role)[:RECORDS] for role in ("member", "nonmember")}
    members, nonmembers = ([records[n] for n in rows] for rows in sides.values())
    groups = [cell.records["group"].to_numpy()[rows].tolist() for rows in sides.values()]
    tuned = found.checkpoints.tuned(cell, cell.epochs)
    base = found.checkpoints.base(cell).model
    return Inside(
        one,
        drift(base, tuned, members, nonmembers, member_groups=groups[0], nonmember_groups=groups[1]),
        loss_shift(*cell.losses(0), *cell.losses(cell.epochs)),
        prefix_identity(tuned, [*members, *nonmembers]) if one.method == "prefix" else None,
    )


def _prefix_verdicts(one: Inside) -> list[Verdict]:
    assert one.identity is not None
    residual = float(one.identity.residual64_L.max())
    exact = Verdict(
        "Within a layer a prefix only mixes a bias into what attention gives without it",
        SUPPORTED if residual < EXACT else NOT_SUPPORTED,
        f"Largest residual of the identity {residual:.1e} in float64, {one.identity.residual_L.max():.1e} in the "
        "model's precision.",
    )
    drift_L = _mean_L(one.drift.members.shifted_NLH, one.drift.nonmembers.shifted_NLH)
    deeper = float(drift_L[1:].max()) if len(drift_L) > 1 else 0.0
    same = Verdict(
        "A prefix leaves the attention among the text's own tokens as it was",
        SUPPORTED if max(deeper, drift_L[0]) < NOTICED else NOT_SUPPORTED,
        f"Total variation distance from the base's attention (its positions shifted alike): {drift_L[0]:.1e} in the "
        f"first layer, up to {deeper:.3f} deeper, where the inputs have changed.",
    )
    return [exact, same]


def _mean_L(*sides: Floats) -> Floats:
    """[L] over the records of both sides and the heads."""
    mean: Floats = np.concatenate(sides).mean((0, 2))
    return mean


def _moved(one: Inside) -> Verdict:
    """Whether, and at which layers, members are displaced otherwise than non-members.

    Where the base itself tells them apart, nobody can say what tuning did; and no significance is no proof of none.
    """
    adjusted = holm(one.drift.moved.p_S.tolist())
    seen = [layer for layer, p in enumerate(adjusted) if p < LEVEL]
    control = holm(one.drift.control.p_S.tolist())
    where = f"at residual streams {words.listed([str(n) for n in seen])}" if seen else "at no layer"
    title = tables.title(one.variant.method)
    return Verdict(
        f"{title} moves the hidden states of members otherwise than those of non-members",
        SUPPORTED if seen and min(control) >= LEVEL else UNDECIDED,
        f"Displacements differ {where} (of {len(adjusted)}; Holm-corrected permutation tests, smallest p "
        f"{pvalue(min(adjusted))}); control, the untouched base: smallest p {pvalue(min(control))}. Losses of members "
        f"fall by {one.losses.members.fall:.3f} nats, of non-members by {one.losses.nonmembers.fall:.3f}.",
    )


def _identity_sheet(identity: PrefixIdentity, drift: Drift) -> Sheet:
    members = len(drift.members.base_NSD)
    rows = tuple(
        (
            str(layer),
            Entry(f"{identity.residual_L[layer]:.1e}"),
            Entry(f"{identity.residual64_L[layer]:.1e}"),
            Entry(f"{identity.mass_LH[layer].mean():.3f}"),
            Entry(f"{identity.mass_LH[layer].min():.3f}"),
            Entry(f"{identity.mass_LH[layer].max():.3f}"),
            Entry(f"{identity.mass_NL[:members, layer].mean():.3f}"),
            Entry(f"{identity.mass_NL[members:, layer].mean():.3f}"),
            Entry(f"{identity.bias_LH[layer].mean():.3f}"),
        )
        for layer in range(len(identity.residual_L))
    )
    header = ("layer", "residual", "float64", "mass", "least head", "most", "members", "non-members", "one direction")
    note = (
        "mass: share of attention on the prefix; one direction: mean cosine between what the prefix adds and its own "
        "mean (1: a bias that does not depend on the text)."
    )
    return Sheet("Prefix identity within each layer", header, rows, (note,))


def _drift_sheet(inside: Sequence[Inside]) -> Sheet:
    rows: list[tuple[Entry | str, ...]] = []
    for one in inside:
        adjusted, control = holm(one.drift.moved.p_S.tolist()), one.drift.control.p_S
        attention = [_mean_L(side.shifted_NLH) for side in (one.drift.members, one.drift.nonmembers)]
        for n, p in enumerate(adjusted):
            before = [Entry("") if n == 0 else Entry(f"{side[n - 1]:.3f}") for side in attention]
            members, nonmembers = one.drift.members, one.drift.nonmembers
            rows.append(
                (
                    tables.title(one.variant.method),
                    "embeddings" if n == 0 else f"after layer {n - 1}",
                    *before,
                    Entry(f"{members.shift_S[n]:.3f}"),
                    Entry(f"{nonmembers.shift_S[n]:.3f}"),
                    Entry(f"{members.cka_S[n]:.4f}"),
                    Entry(f"{nonmembers.cka_S[n]:.4f}"),
                    Entry(f"{one.drift.moved.relative_S[n]:.4f}"),
                    Entry(pvalue(p)),
                    Entry(pvalue(float(control[n]))),
                )
            )
    header = (
        "method",
        "stream",
        "attention, members",
        "non-members",
        "shift, members",
        "non-members ",
        "CKA, members",
        "non-members  ",
        "moved apart",
        "p",
        "p, base",
    )
    note = (
        "attention: total variation distance from the base's attention among the text's tokens in the layer before; "
        "shift: of the mean, in units of the base's spread; moved apart: relative energy distance between the "
        "displacements of members and of non-members, p Holm-corrected over the streams; p, base: the same test on the "
        "untouched base."
    )
    return Sheet("Drift from the base, layer by layer", header, tuple(rows), (note,), group=2)


def _loss_sheet(inside: Sequence[Inside]) -> Sheet:
    rows = tuple(
        (
            tables.title(one.variant.method),
            Entry(f"{one.losses.before.ks.statistic:.3f}"),
            Entry(f"{one.losses.after.ks.statistic:.3f}"),
            Entry(pvalue(one.losses.after.ks.p)),
            Entry(f"{one.losses.after.wasserstein:.3f}"),
            Entry(f"{one.losses.members.fall:.3f}"),
            Entry(f"{one.losses.nonmembers.fall:.3f}"),
        )
        for one in inside
    )
    header = ("method", "KS, base", "KS, tuned", "p", "Wasserstein", "fall, members", "fall, non-members")
    note = "Losses of members against those of non-members, all records; falls are of the mean loss, nats per token."
    return Sheet("Losses before and after", header, rows, (note,))
