"""Leakage of each subgroup (a language, a region: `data.subgroup`) apart, and its difference from all other records.

One rule for every number, so that subgroups can be read beside the main table:

- AUC: `auc`, as in the main table, of the subgroup's members against the subgroup's non-members.
- TPR: the main table's value; the interval contains its for the same groups: subjects and threshold are drawn anew
  (`tpr_over_subjects`), since a subgroup has few non-members to place a threshold with. Where subjects own several
  records, `indicative` and `too_few` go by what these are worth at worst, each subject's as one.
- Difference: AUC of the subgroup less the AUC of all other records (`auc_difference`), its p-value corrected by Holm's
  method over the subgroups of an attack. Of two subgroups that are all there is, each is the other's others: one
  difference, told twice and corrected as two.

Measured by `benchmarks/subgroups.py`, whose results stand in `benchmarks/RESULTS.md`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd

from imprint.measures.auc import Codes, auc, codes
from imprint.measures.bootstrap import Draws, draw, tpr_over_subjects
from imprint.measures.contrast import Sides, auc_difference
from imprint.measures.estimate import holm
from imprint.measures.sizes import design_effect
from imprint.measures.tpr import ROUNDING
from imprint.rows import FALSE_POSITIVE_RATES, Cell
from imprint.types import Floats, Interval

SMALLEST = 20
"""Subjects a side below which a subgroup is refused.

With 20 a side the interval at chance is .32 to .68 and an AUC under .76 is missed more often than in one case of five:
fewer could only tell what nobody needs told. In simulation the difference's 95% interval holds the truth in 93% to 97%
of cases there, at AUCs from .5 to .99 and with one or five records a subject.
"""
RATES = ("tpr_at_10pct_fpr", "tpr_at_1pct_fpr")
LEVEL = 0.95


@dataclass(frozen=True)
class Rate:
    """A TPR, and its status as in the results: `ok`, `indicative` or `too_few`, where the interval is None."""

    interval: Interval | None
    status: str


@dataclass(frozen=True)
class SubgroupRow:
    """What one attack finds in one subgroup.

    Attributes:
        label: as it stands in the data: nobody's text but the data's, to be cleaned before it is shown.
        members, nonmembers: records of the subgroup.
        subjects: who owns them, on either side.
        auc: None where refused.
        tpr: metric → TPR at 10% and 1% FPR; empty where refused.
        difference: AUC less that of all other records; None where either has too few subjects.
        p: of no difference, two-sided, corrected over the subgroups of this attack.
        status: `ok`, or `too_few` where the subgroup is refused.
        reason: empty, or one sentence: why the subgroup or its difference is refused.
    """

    label: str
    attack: str
    members: int
    nonmembers: int
    subjects: tuple[int, int]
    auc: Interval | None = None
    tpr: dict[str, Rate] = field(default_factory=dict)
    difference: Interval | None = None
    p: float | None = None
    status: str = "ok"
    reason: str = ""


@dataclass(frozen=True)
class _Labelled:
    """Who belongs where, as codes of both sides' records: [M] and [N] the label (−1 none), [M] and [N] the subject."""

    labels: list[str]
    label: tuple[Codes, Codes]
    subjects: tuple[Codes, Codes]

    def records(self, side: int) -> Codes:
        """[labels] how many records of a side."""
        return np.bincount(self.label[side][self.label[side] >= 0], minlength=len(self.labels))

    def owners(self, side: int) -> Codes:
        """[labels] how many subjects of a side."""
        pairs = np.unique(np.stack([self.label[side], self.subjects[side]]), axis=1)
        return np.bincount(pairs[0][pairs[0] >= 0], minlength=len(self.labels))


def subgroups(cell: Cell, epoch: int, attacks: Sequence[str]) -> list[SubgroupRow]:
    """Every subgroup by every attack at an epoch: attack by attack, the largest subgroups first.

    Records without a label are no subgroup; they belong to the others that a subgroup is compared with. Empty where no
    record has a label.

    Raises:
        DataError: a score is NaN.
    """
    labelled = _labelled(cell)
    if not labelled.labels:
        return []
    sides = {attack: cell.sides(scores) for attack, scores in cell.scores(epoch, attacks).items()}
    counts = np.stack([f(side) for f in (labelled.records, labelled.owners) for side in (0, 1)], axis=1)
    order = np.lexsort((np.arange(len(counts)), -counts[:, 0] - counts[:, 1]))
    found: dict[str, list[SubgroupRow]] = {attack: [] for attack in sides}
    for n in order.tolist():
        for row in _rows(labelled, n, counts[n].tolist(), sides):
            found[row.attack].append(row)
    return [row for rows in found.values() for row in _corrected(rows)]


def _labelled(cell: Cell) -> _Labelled:
    rows = [cell.rows(role) for role in ("member", "nonmember")]
    subjects = codes([*cell.groups("member"), *cell.groups("nonmember")])
    if "subgroup" not in cell.records:  # a base scored before there were any
        return _Labelled([], (subjects[:0], subjects[:0]), (subjects[:0], subjects[:0]))
    label, labels = pd.factorize(cell.records["subgroup"].iloc[np.concatenate(rows)], sort=True)
    cut = len(rows[0])
    return _Labelled(list(labels), (label[:cut], label[cut:]), (subjects[:cut], subjects[cut:]))


def _rows(labelled: _Labelled, n: int, counts: list[int], sides: Mapping[str, Sides]) -> Iterator[SubgroupRow]:
    """The n-th label by every attack. `counts`: its members and non-members, and the subjects of either."""
    members, nonmembers, *owners = counts
    row = SubgroupRow(labelled.labels[n], "", members, nonmembers, (owners[0], owners[1]))
    if min(owners) < SMALLEST:
        reason = f"{_counted(*counts)}; an interval needs {SMALLEST} subjects a side."
        yield from (replace(row, attack=attack, status="too_few", reason=reason) for attack in sides)
        return
    inside = labelled.label[0] == n, labelled.label[1] == n
    others = [s[~here] for s, here in zip(labelled.subjects, inside, strict=True)]
    left = [len(np.unique(s)) for s in others]
    if min(left) < SMALLEST:
        told = f"among all other records are {_counted(*map(len, others), *left)}; it needs {SMALLEST} subjects a side."
        row = replace(row, reason=f"No difference: {told}")
    of = labelled.subjects[0][inside[0]], labelled.subjects[1][inside[1]]
    draws = draw(*of)
    for attack, (x, y) in sides.items():
        here = x[inside[0]], y[inside[1]]
        measured = replace(row, attack=attack, auc=auc(*here, LEVEL, *of), tpr=dict(_rates(*here, draws)))
        if row.reason:
            yield measured
        else:
            difference, p = auc_difference((x, y), inside, labelled.subjects, LEVEL)
            yield replace(measured, difference=difference, p=p)


def _corrected(rows: list[SubgroupRow]) -> list[SubgroupRow]:
    """The rows of one attack with Holm's p-values."""
    corrected = holm([math.nan if row.p is None else row.p for row in rows])
    return [row if row.p is None else replace(row, p=p) for row, p in zip(rows, corrected, strict=True)]


def _counted(members: int, nonmembers: int, of_members: int, of_nonmembers: int) -> str:
    return f"{members} members of {of_members} subjects and {nonmembers} non-members of {of_nonmembers}"


def _rates(members: Floats, nonmembers: Floats, draws: Draws) -> Iterator[tuple[str, Rate]]:
    worth = len(nonmembers) / design_effect(draws.subjects[1])
    for metric in RATES:
        fpr = FALSE_POSITIVE_RATES[metric]
        if fpr * worth + ROUNDING < 1:
            yield metric, Rate(None, "too_few")
            continue
        tpr = tpr_over_subjects(members, nonmembers, fpr, draws, LEVEL)
        status = "indicative" if fpr * worth + ROUNDING < 10 else "ok"
        yield metric, Rate(Interval(tpr.value, tpr.low, tpr.high), status)
