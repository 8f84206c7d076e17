"""What each study says, from finished runs to tables, charts and verdicts."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from imprint.measures.estimate import auc_over_seeds
from imprint.measures.frontier import best
from imprint.paths import auc_of, strata
from imprint.progress import Progress
from imprint.report.figures import density, density_chart
from imprint.report.sheet import Entry, Sheet
from imprint.rows import Cell, Grid
from imprint.store import read_stats, write_stats
from imprint.studies import claims, paper, tables
from imprint.studies.claims import MATCHED, Answer, Reading, names, places, readings
from imprint.studies.evidence import Place, Variant, contrast, last, pick
from imprint.studies.judgement import SMALLEST, Contrast, comparison_sheet, entry, family, pvalue, verdict
from imprint.studies.parts import RANK, THREE, active_parameters
from imprint.studies.setting import ATTACKS, Setting
from imprint.types import Floats, TokenStats

if TYPE_CHECKING:
    from imprint.mechanism.distance import Gap
    from imprint.studies.checkpoints import Checkpoints


@dataclass(frozen=True)
class Findings:
    """The finished runs of a study, those of its search for learning rates, and what further measurements need."""

    setting: Setting
    grid: Grid
    variants: tuple[Variant, ...]
    searched: tuple[Variant, ...]
    checkpoints: Checkpoints
    progress: Progress


def table2(found: Findings) -> Answer:
    """The paper's main table at three places of each path, and at equal perplexity."""
    sheets = [tables.at_equal_perplexity(found.variants, ATTACKS)] if found.setting.controlled else []
    sheets += tables.table2(found.variants, ATTACKS)
    everything = (*found.variants, *found.searched)
    sheets += [tables.frontier(everything, attack) for attack in ("loss", "ref")]
    charts = tables.frontier_charts(found.variants, "loss") + tables.frontier_charts(found.variants, "ref")
    return Answer([], sheets, charts)


def table3(found: Findings) -> Answer:
    return Answer([], list(tables.table3(found.variants, ("loss", "ref"))))


def figure1(found: Findings) -> Answer:
    auc, _ = tables.curves(found.variants, "loss")
    return Answer([], [auc, *_published(found, "figure1")], tables.curve_charts(found.variants, "loss"))


def figure3(found: Findings) -> Answer:
    _, perplexity = tables.curves(found.variants, "loss")
    return Answer([], [perplexity, *_published(found, "figure3")], tables.curve_charts(found.variants, "loss"))


def _published(found: Findings, block: str) -> list[Sheet]:
    sheet = tables.paper_curves(found.variants, block)
    return [sheet] if sheet else []


def observation1(found: Findings) -> Answer:
    return claims.observation1(found.variants, found.setting.controlled)


def observation2(found: Findings) -> Answer:
    return claims.observation2(found.variants, found.setting.controlled)


def observation3(found: Findings) -> Answer:
    return claims.observation3(found.variants, found.setting.controlled)


def observation4(found: Findings) -> Answer:
    return claims.observation4(found.variants, found.setting.controlled)


def table4(found: Findings) -> Answer:
    """The paper's layout, then the order of its placements: at equal rank as published, at equal parameters."""
    answer = Answer([], list(tables.table4(found.variants, ATTACKS)), tables.frontier_charts(found.variants, "loss"))
    three = [one for one in found.variants if one.options["placement"] in THREE]
    grids = [("equal rank", _equal_rank(three))]
    if found.setting.controlled:
        grids.append(("equal trainable parameters", _equal_parameters(three)))
    for alike, chosen in grids:
        for reading, attack in itertools.product(readings(found.variants, found.setting.controlled), ("loss", "ref")):
            contrasts, missing = _placed(chosen, reading, attack, PAIRS)
            compared = family(contrasts)
            claim = f"Projection memorizes more than attention, both most: {alike}, {reading.name} ({attack})"
            answer.verdicts.append(verdict(claim, compared, f"Difference of the {attack} AUC", missing))
            title = f"{attack} AUC by placement, {alike}, {reading.name}"
            answer.sheets.append(comparison_sheet(title, compared))
    single = [one for one in found.variants if one not in three]
    pairs = list(itertools.combinations(names_of(single), 2))
    for attack in ("loss", "ref") if pairs else ():
        contrasts, _ = _placed(single, MATCHED, attack, pairs)
        answer.sheets.append(comparison_sheet(f"{attack} AUC of single matrices, {MATCHED.name}", family(contrasts)))
    return answer


PAIRS = (("projection", "attention"), ("both", "attention"), ("both", "projection"))


def names_of(found: Sequence[Variant]) -> list[str]:
    """The placements, in the order of appearance."""
    return list(dict.fromkeys(str(one.options["placement"]) for one in found))


def _placed(
    found: Sequence[Variant], reading: Reading, attack: str, pairs: Iterable[tuple[str, str]]
) -> tuple[list[Contrast], list[str]]:
    """The difference of each pair of placements on every model and data that has both, and what cannot be compared."""
    compared, missing = [], []
    for (model, data), (a, b) in itertools.product(dict.fromkeys((o.model, o.data) for o in found), pairs):
        at = {str(one.options["placement"]): one for one in pick(found, model=model, data=data)}
        if a not in at or b not in at:
            continue
        name, one = f"{data}: {a} - {b}", reading.compare(at[a], at[b], attack)
        if one is None:
            missing.append(name)
        else:
            compared.append(one.called(name))
    return compared, missing


def _equal_rank(found: Sequence[Variant]) -> list[Variant]:
    return [one for one in found if one.options["rank"] == RANK]


def _equal_parameters(found: Sequence[Variant]) -> list[Variant]:
    """On every data set one of each placement, such that their trainable parameters differ least, and by little."""
    chosen: list[Variant] = []
    for data in names(found, "data"):
        places = [[o for o in pick(found, data=data) if o.options["placement"] == place] for place in THREE]
        best_of = min(itertools.product(*places), key=_mismatch, default=())
        if best_of and _mismatch(best_of) < ALIKE:
            chosen += best_of
    return chosen


ALIKE = 1.1
"""Numbers of parameters that differ by less than this factor count as equal."""


def _mismatch(found: Iterable[Variant]) -> float:
    counts = [one.trainable for one in found]
    return max(counts) / min(counts)


def figure2(found: Findings) -> Answer:
    """Densities of the losses before tuning, after LoRA and after prefix tuning, and how far apart they are."""
    from imprint.mechanism.distance import loss_shift

    rows: list[tuple[Entry | str, ...]] = []
    charts = []
    for data in names(found.variants, "data"):
        of_data = pick(found.variants, data=data)
        panels = [("pretrained", "base", of_data[0].cells[0].losses(0))]
        for one in of_data:
            panels.append((tables.title(one.method), one.method, one.cells[0].losses(one.cells[0].epochs)))
        everything = np.concatenate([np.concatenate(losses) for _, _, losses in panels])
        x_range = (max(0.0, float(np.quantile(everything, 0.002)) - 0.1), float(np.quantile(everything, 0.998)) + 0.1)
        drawn = []
        for shown, method, (members, nonmembers) in panels:
            gap = loss_shift(*panels[0][2], members, nonmembers).after
            beside = paper.figure2(data, method) if paper.comparable(of_data[0].model, data, "figure2") else None
            modes = [_mode(side, x_range) for side in (members, nonmembers)]
            rows.append((data, shown, *_modes(modes, beside), *_distances(gap)))
            about = f"Densities of the losses of members and non-members on {data}, {shown}."
            drawn.append(density_chart(shown, about, members, nonmembers, x_range))
        charts.append((data, drawn))
    header = ("data", "model", "mode, members", "mode, non-members", "KS", "p of KS", "Wasserstein (nats)")
    note = "First seed, last epoch. KS and Wasserstein: distance between the losses of members and of non-members."
    return Answer([], [Sheet("Losses of members and non-members", header, tuple(rows), (note,), group=2)], charts)


def _mode(losses: Floats, x_range: tuple[float, float]) -> float:
    grid = np.linspace(*x_range, 400)
    return float(grid[np.argmax(density(losses, grid))])


def _modes(modes: Sequence[float], beside: tuple[float, float] | None) -> list[Entry]:
    theirs = ("", "") if beside is None else tuple(f"{x:g}" for x in beside)
    return [Entry(f"{mode:.2f}", paper=x) for mode, x in zip(modes, theirs, strict=True)]


def _distances(gap: Gap) -> list[Entry]:
    return [Entry(f"{gap.ks.statistic:.3f}"), Entry(pvalue(gap.ks.p)), Entry(f"{gap.wasserstein:.3f}")]


def moe(found: Findings) -> Answer:
    """Dense against sparse at equal active parameters, and experts against attention at equal trainable ones."""
    answer = Answer([], list(tables.table4(found.variants, ATTACKS)), tables.frontier_charts(found.variants, "loss"))
    lora = [one for one in found.variants if one.method == "lora"]
    sparse = [one for one in lora if one.model == found.setting.sparse]
    for reading, attack in itertools.product(readings(lora, controlled=True), ("loss", "ref")):
        compared, missing = _placed(sparse, reading, attack, [("experts", "attention")])
        claim = f"Experts memorize more than attention, {reading.name} ({attack})"
        answer.verdicts.append(verdict(claim, family(compared), f"Difference of the {attack} AUC", missing))
        rest, _ = _placed(lora, reading, attack, EXPERT_PAIRS)
        answer.sheets.append(comparison_sheet(f"{attack} AUC by placement, {reading.name}", family(rest)))
    active = [active_parameters(model) for model in (found.setting.dense, found.setting.sparse)]
    alike = "of equal active parameters" if max(active) < ALIKE * min(active) else "of other active parameters"
    for (name, place), attack in itertools.product(places(lora, controlled=True), ("loss", "ref")):
        apart = family(_sparse_less_dense(found, attack, place))
        claim = f"A sparse model memorizes more than a dense one {alike}, {name} ({attack})"
        answer.verdicts.append(verdict(claim, apart, f"Difference of the {attack} AUC on the same records"))
        answer.sheets.append(comparison_sheet(f"{attack} AUC, sparse less dense, {name}", apart))
    answer.notes.append(
        f"Active parameters: dense {active[0]:,}, sparse {active[1]:,}. The two models have perplexities of their own, "
        "so there is no equal perplexity to compare them at."
    )
    return answer


EXPERT_PAIRS = (
    ("experts", "attention"),
    ("both", "attention"),
    ("both", "experts"),
    ("experts", "router"),
    ("attention", "router"),
    ("projection", "attention"),
    ("both", "projection"),
)


def _sparse_less_dense(found: Findings, attack: str, place: Place) -> list[Contrast]:
    """The methods that both models have; feed-forward layers stand against experts."""
    same = {"experts": "projection"}
    dense = {_key(one): one for one in pick(found.variants, model=found.setting.dense)}
    compared = []
    for one in pick(found.variants, model=found.setting.sparse):
        method, at = _key(one)
        other = dense.get((method, same.get(at, at)))
        if other:
            compared.append(replace(contrast(one, other, attack, place), name=f"{method} {at}".strip()))
    return compared


def _key(one: Variant) -> tuple[str, str]:
    return one.method, str(one.options.get("placement", ""))


def data(found: Findings) -> Answer:
    """AUC by the number of records tuned on, and by how often a member occurs among them."""
    rows: list[tuple[Entry | str, ...]] = []
    for one in found.variants:
        spec = one.cells[0].spec.data
        cells = [entry(one.auc(attack, place)) for place in (best, last) for attack in ("loss", "ref")]
        rows.append((tables.title(one.method), Entry(f"{spec.tune_on:,}"), Entry(str(spec.repeat)), *cells))
    header = ("method", "tuned on", "times", "LOSS, best", "Ref, best", "LOSS, last", "Ref, last")
    note = (
        "The same members and non-members throughout. Each record once per epoch but for the members, which occur "
        "`times` times; the same number of epochs for all."
    )
    answer = Answer([], [Sheet("AUC by the amount of data", header, tuple(rows), (note,))])
    for attack, (claim, axis, sign) in itertools.product(("loss", "ref"), AXES):
        grown = [
            _per_doubling(pick(found.variants, method=m), axis, attack, sign) for m in names(found.variants, "method")
        ]
        compared = family([one for one in grown if one])
        about = f"Change of the {attack} AUC from the least to the most"
        answer.verdicts.append(verdict(f"{claim} ({attack}, last epoch)", compared, about))
        answer.sheets.append(comparison_sheet(f"{claim} ({attack})", compared))
    return answer


AXES = (
    ("Memorization of a record falls with more records beside it", "tune_on", -1.0),
    ("Memorization of a record grows with its repetitions", "repeat", 1.0),
)


def _per_doubling(found: Sequence[Variant], axis: str, attack: str, sign: float) -> Contrast | None:
    """Change of the last epoch's AUC along log2 of `tune_on` or `repeat`, the other one at its commonest value."""
    other = "repeat" if axis == "tune_on" else "tune_on"
    held = Counter(getattr(one.cells[0].spec.data, other) for one in found).most_common(1)[0][0]
    along = [one for one in found if getattr(one.cells[0].spec.data, other) == held]
    x = [math.log2(getattr(one.cells[0].spec.data, axis)) for one in along]
    span = max(x) - min(x)
    if not span:
        return None
    return Contrast(found[0].method, [sign * span * s for s in claims.slope(along, x, attack, last)])


def alignment(found: Findings) -> Answer:
    """AUC of the same checkpoints read rightly and off by the number of virtual tokens."""
    rows: list[tuple[Entry | str, ...]] = []
    lost: dict[str, list[Contrast]] = {attack: [] for attack in ATTACKS}
    for one in found.variants:
        wrong = [_misread(found, cell) for cell in one.cells]
        where = f"{one.data}, {one.cells[0].spec.data.members} members"
        for attack in ATTACKS:
            right = [path[-1].auc[attack] for path in one.paths]
            read = [auc_of(cell, stats, attack, strata(cell)) for cell, stats in zip(one.cells, wrong, strict=True)]
            shown = entry(auc_over_seeds(right)), entry(auc_over_seeds(read))
            if auc_over_seeds(right).low > 0.5 + SMALLEST:  # else there is nothing to lose
                differences = [a - b for a, b in zip(right, read, strict=True)]
                lost[attack].append(Contrast(f"{where}: {one.method}", differences))
            rows.append((where, tables.title(one.method), tables.title(attack), *shown))
    header = ("data", "method", "attack", "read rightly", "misread")
    note = "Last epoch. Misread: output t - 1 for token t, although P virtual tokens come first."
    answer = Answer([], [Sheet("The same checkpoints read twice", header, tuple(rows), (note,), group=3)])
    for attack in ATTACKS:
        compared = family(lost[attack])
        claim = f"Misreading virtual tokens hides memorization where there is some ({attack})"
        answer.verdicts.append(verdict(claim, compared, f"{attack} AUC lost by misreading"))
        answer.sheets.append(comparison_sheet(f"{attack} AUC lost by misreading", compared))
    return answer


def _misread(found: Findings, cell: Cell) -> TokenStats:
    """Scored once and kept beside the study."""
    from imprint.studies.alignment import read_twice

    file = found.grid.path / "misread" / f"{cell.run_id}.parquet"
    if not file.exists():
        found.progress.note(f"{cell.label}: read twice")
        model = found.checkpoints.tuned(cell, cell.epochs)
        write_stats(file, read_twice(model, found.checkpoints.records(cell), cell.stats(cell.epochs)))
    return read_stats(file)
