"""Which charts a grid has: curves by epoch for every model and data, and loss densities for every base."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from imprint.report import words
from imprint.report.figures import COLOURS, LOG_FROM, Series, density_chart, frontier_chart, line_chart, value_range
from imprint.report.readings import Curve, leading_attack, needs_reference
from imprint.report.svg import CHARACTER, WIDTH, fit
from imprint.report.tables import by_base, places, sources
from imprint.report.terms import point_names, terms
from imprint.rows import Cell, Grid
from imprint.types import Floats


@dataclass(frozen=True)
class Panels:
    """Charts that belong together, and what they share."""

    title: str
    charts: list[str]


def worth_drawing(measured: dict[str, Curve]) -> bool:
    """Whether there is a curve to draw: not of one point and the base, which the table says as well."""
    tuned = [epoch for curve in measured.values() for epoch in curve.epochs if epoch]
    return len(tuned) != 1


def attack_order(grid: Grid, measured: dict[str, Curve]) -> list[str]:
    """`loss` first where it was run, else the attack that ever found most; the others as in the recipe."""
    if "loss" in grid.attacks:
        first = "loss"
    else:
        highest = {a: max((_highest(c, a) for c in measured.values()), default=0.0) for a in grid.attacks}
        first = max(grid.attacks, key=lambda a: highest[a])
    return [first, *(attack for attack in grid.attacks if attack != first)]


def _highest(curve: Curve, attack: str) -> float:
    return max((r.value for e in curve.epochs if (r := curve.get(e, attack)).interval), default=0.0)


def curve_panels(grid: Grid, measured: dict[str, Curve]) -> list[Panels]:
    """For every model and data: an AUC panel per attack, or for all where there is one cell; one of perplexity.

    All AUC panels of a report share their vertical axis.
    """
    y_range = _auc_range(grid, measured)
    return [
        Panels(title, _charts(grid, measured, cells, labels, y_range))
        for title, cells, labels in _sources(grid, measured)
    ]


def _sources(grid: Grid, measured: dict[str, Curve]) -> list[tuple[str, list[Cell], list[str]]]:
    """Title, cells and labels of the charts: one for each model and data, of as many methods as there are colours."""
    titles = sources(grid)
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in grid.cells:
        if measured.get(cell.run_id, Curve({})).last is not None:
            groups.setdefault(titles[cell.run_id], []).append(cell)
    found = []
    for source, cells in groups.items():
        labels = list(dict.fromkeys(words.clean(cell.label) for cell in cells))
        for start in range(0, len(labels), COLOURS):
            some = labels[start : start + COLOURS]
            part = [cell for cell in cells if words.clean(cell.label) in some]
            title = " on ".join(source) if len(groups) > 1 else ""
            if len(labels) > COLOURS:
                title = f"{title}, methods {start + 1} to {start + len(some)} of {len(labels)}".removeprefix(", ")
            found.append((title, part, some))
    return found


def _auc_range(grid: Grid, measured: dict[str, Curve]) -> tuple[float, float]:
    everything = [_series(curve, attack, "", 0) for curve in measured.values() for attack in grid.attacks]
    low, high = value_range(everything, log=False) if everything else (0.5, 0.5)
    return max(0.0, min(low, 0.45)), min(1.005, max(high, 0.6))


def _charts(
    grid: Grid, measured: dict[str, Curve], cells: Sequence[Cell], labels: list[str], y_range: tuple[float, float]
) -> list[str]:
    def series(attack: str) -> list[Series]:
        colour = {label: number for number, label in enumerate(labels)}
        named = [(measured[cell.run_id], words.clean(cell.label)) for cell in cells]
        return [_series(curve, attack, label, colour[label]) for curve, label in named]

    def aucs(heading: str, what: str, drawn: list[Series]) -> str:
        about = f"AUC of {what} by {called.point}, with 95% intervals. {_ends(drawn, words.share)}"
        return line_chart(heading, about, drawn, called.axis, "AUC", y_range=y_range, rule=0.5)

    called, attacks = terms(grid), attack_order(grid, measured)
    if len(grid.cells) == 1:  # nothing to compare it with: its attacks share a chart
        curve, leading = measured[cells[0].run_id], leading_attack(grid, measured.values())
        drawn = [_series(curve, attack, words.clean(attack), number) for number, attack in enumerate(attacks)]
        bare = [one if attack == leading else _bandless(one) for one, attack in zip(drawn, attacks, strict=True)]
        charts = [aucs("AUC by attack", "every attack", bare)]
    else:
        charts = [aucs(f"AUC of {attack}", f"the {attack} attack", series(attack)) for attack in attacks]
    lines = series("")
    values = [v for line in lines for v in line.y if math.isfinite(v)]
    log = bool(values) and max(values) > LOG_FROM * min(values)
    utility = called.utility.capitalize()
    about = f"{utility} by {called.point}, with 95% intervals. {_ends(lines, words.perplexity)}"
    name = "perplexity, log scale" if log else "perplexity"
    charts.insert(1, line_chart(utility, about, lines, called.axis, name, log=log))
    return charts


def _bandless(one: Series) -> Series:
    unknown = [math.nan] * len(one.x)
    return replace(one, low=unknown, high=unknown)


def about_curves(grid: Grid, measured: dict[str, Curve]) -> str:
    """What has to be known of the curves, in a sentence or two."""
    if len(grid.cells) > 1:
        return "All AUC panels share one axis. Where several seeds were run, those of a method share its colour."
    told = f"The table above says which {terms(grid).point} has which number"
    if len(grid.attacks) == 1:
        return f"{told}."
    return (
        f"{told}; it has the intervals of all attacks, of which only {_leading(grid, measured)} is drawn with a band."
    )


def _leading(grid: Grid, measured: dict[str, Curve]) -> str:
    return words.clean(leading_attack(grid, measured.values()))


def frontier_panels(grid: Grid, measured: dict[str, Curve]) -> list[Panels]:
    """For every model and data: leakage by the attack that found most, against validation perplexity."""
    whole = [attack for attack in grid.attacks if all(_everywhere(curve, attack) for curve in measured.values())]
    attack = max(whole or grid.attacks, key=lambda a: max((_highest(c, a) for c in measured.values()), default=0.0))
    called, panels = terms(grid), []
    for title, cells, labels in _sources(grid, measured):
        colour = {label: number for number, label in enumerate(labels)}
        series = [
            _frontier(measured[cell.run_id], attack, words.clean(cell.label), colour[words.clean(cell.label)])
            for cell in cells
        ]
        about = (
            f"AUC of the {attack} attack against {called.utility}, a mark for every {called.point} from the base on."
        )
        heading = f"Utility against leakage ({attack})"
        panels.append(Panels(title, [frontier_chart(heading, about, series, x_name=called.utility)]))
    return panels


def _everywhere(curve: Curve, attack: str) -> bool:
    """Whether an attack has a number wherever perplexity has one, from the base on."""
    return all(curve.get(e, attack).interval for e in curve.epochs if math.isfinite(curve.perplexity(e).value))


def _frontier(curve: Curve, attack: str, label: str, colour: int) -> Series:
    known = [e for e in curve.epochs if math.isfinite(curve.perplexity(e).value) and curve.get(e, attack).interval]
    return Series(
        label,
        [curve.perplexity(epoch).value for epoch in known],
        [curve.get(epoch, attack).value for epoch in known],
        [],
        [],
        colour,
    )


def _series(curve: Curve, attack: str, label: str, colour: int) -> Series:
    """Of an attack's AUC; of perplexity for the attack ""."""
    found = {epoch: curve.get(epoch, attack, "auc" if attack else "perplexity") for epoch in curve.epochs}
    bounds = {e: (r.interval.low, r.interval.high) if r.interval else (math.nan, math.nan) for e, r in found.items()}
    if needs_reference(attack) and 0 in found:  # by definition, so no uncertainty
        bounds[0] = (found[0].value, found[0].value)
    low, high = [b[0] for b in bounds.values()], [b[1] for b in bounds.values()]
    return Series(label, curve.epochs, [r.value for r in found.values()], low, high, colour)


def _ends(series: Sequence[Series], shown: Callable[[float], str]) -> str:
    """The last value of every line, in words."""
    finite = {one.label: [v for v in one.y if math.isfinite(v)] for one in series}
    return "Last values: " + ", ".join(f"{label} {shown(v[-1])}" for label, v in finite.items() if v) + "."


def density_panels(grid: Grid, measured: dict[str, Curve]) -> list[Panels]:
    """For every base: the losses of members and non-members, of the base and of every method at its last epoch."""
    of_place, called = places(grid), terms(grid)
    panels = []
    for cells in by_base(grid.cells):
        if not (cells[0].base / "stats.parquet").exists():
            continue
        found = [(called.base, cells[0].losses(0))]
        for cell in cells:
            epoch = measured.get(cell.run_id, Curve({})).last_finite
            if epoch:
                found.append((_short(cell.label, point_names(cell)[epoch]), cell.losses(epoch)))
        x_range = _loss_range([losses for _, pair in found for losses in pair])
        panels.append(Panels(of_place[cells[0].run_id], [_density(name, *pair, x_range) for name, pair in found]))
    return panels


def _short(label: str, point: str) -> str:
    """Both, the label cut where there is no room."""
    point = fit(point, WIDTH / 2)
    return f"{fit(label, WIDTH - 30 - CHARACTER * len(f', {point}'))}, {point}"


def _density(name: str, members: Floats, nonmembers: Floats, x_range: tuple[float, float]) -> str:
    about = (
        f"Densities of the loss of {len(members):,} members (mean {members.mean():.2f}) and {len(nonmembers):,} "
        f"non-members (mean {nonmembers.mean():.2f})."
    )
    return density_chart(name, about, members, nonmembers, x_range)


def _loss_range(losses: Sequence[Floats]) -> tuple[float, float]:
    """Nearly all of every panel's losses: a few extreme records would squeeze the rest."""
    low = min(float(np.quantile(one, 0.005)) for one in losses)
    high = max(float(np.quantile(one, 0.995)) for one in losses)
    pad = 0.05 * (high - low) or 0.5
    return max(0.0, low - pad), high + pad
