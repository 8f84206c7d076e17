"""Charts as SVG text: lines by epoch with their intervals, and densities of losses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from imprint.report import svg
from imprint.report.words import clean
from imprint.types import Floats

COLOURS = 7
"""Colours and marks of `report.css`, told apart under every common colour blindness; a chart of more lines is split."""
MARKS = ("h0", "h0", "m-4 3l4-7 4 7z", "m0-4l4 4-4 4-4-4z", "m-4-3l4 7 4-7z", "m-3-3l6 6m0-6l-6 6", "m-4 0h8m-4-4v8")
"""Continuations of a path at a point; the first is round and the second square by its line cap."""
_DIRECT = 14
"""Labels up to this many characters stand beside their lines; longer ones in a legend below."""
_ROW = 17
LOG_FROM = 4.0
"""Perplexities that span more than this factor are drawn on a logarithmic axis."""


@dataclass(frozen=True)
class Series:
    """A line: values by epoch, with bounds (NaN where unknown), a label and the number of its colour from 0."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    colour: int = 0


def line_chart(
    heading: str,
    description: str,
    series: Sequence[Series],
    x_name: str,
    y_name: str,
    y_range: tuple[float, float] | None = None,
    log: bool = False,
    rule: float | None = None,
) -> str:
    """Lines with interval bands; a gap where a value is not finite.

    Args:
        heading: shown above the plot and read out as its name.
        description: the chart in a sentence, for those who do not see it.
        series: the lines; several of one label (seeds) share a colour and are labelled once.
        x_name: what the horizontal axis measures, in whole numbers.
        y_name: what the vertical axis measures.
        y_range: limits of the vertical axis (default: the data and their bands).
        log: logarithmic vertical axis.
        rule: a value to mark with a dashed line.
    """
    labels = list(dict.fromkeys(one.label for one in series))
    direct = max((len(clean(label)) for label in labels), default=0) <= _DIRECT
    margin = 34 + svg.CHARACTER * max((len(clean(label)) for label in labels), default=0) if direct else 14
    right = max((x for one in series for x in one.x), default=1) or 1
    x = svg.Scale(0, right, svg.LEFT, svg.WIDTH - margin)
    y = svg.Scale(*(y_range or value_range(series, log)), svg.BOTTOM, svg.TOP, log)
    parts = svg.names(heading, x_name, y_name, x, y)
    parts += svg.axes(x, y, svg.epoch_ticks(right, 9), y.ticks(9))
    if rule is not None:
        parts.append(f'<path class="rule" d="M{x.start:g} {y(rule):.1f}H{x.end:g}"/>')
    parts += [_band(one, x, y) for one in series] + [_line(one, x, y) for one in series]
    parts += _end_labels(series, labels, x, y) if direct else _legend(series, labels)
    return svg.figure(heading, description, parts, svg.HEIGHT if direct else svg.HEIGHT + _ROW * len(labels))


def frontier_chart(
    heading: str,
    description: str,
    series: Sequence[Series],
    y_name: str = "AUC",
    x_name: str = "validation perplexity",
) -> str:
    """Leakage against utility: a mark for every checkpoint, joined in the order of training, from the base on.

    Low and left is good. Perplexity far above the base's is cut off at the edge; perplexities that span more than
    `LOG_FROM` are drawn on a logarithmic axis.

    Args:
        heading, description: as in `line_chart`.
        series: x is perplexity, y leakage; the first point is the base.
        y_name, x_name: what the axes measure.
    """
    labels = list(dict.fromkeys(one.label for one in series))
    finite = [v for one in series for v in one.x if math.isfinite(v)] or [1.0]
    base = max((one.x[0] for one in series if one.x and math.isfinite(one.x[0])), default=max(finite))
    left, right = min(finite), min(max(finite), 1.3 * base)
    pad, log = 0.03 * (right - left) or 0.05 * right, right > LOG_FROM * left
    limits = (left / 1.05, right * 1.05) if log else (left - pad, right + pad)
    x = svg.Scale(*limits, svg.LEFT, svg.WIDTH - 14, log)
    y = svg.Scale(*value_range(series, log=False), svg.BOTTOM, svg.TOP)
    drawn = [replace(one, x=[min(v, right) for v in one.x]) for one in series]
    axis = f"{x_name} (lower is better{', log scale' if log else ''})"
    parts = svg.names(heading, axis, y_name, x, y)
    parts += svg.axes(x, y, x.ticks(7), y.ticks(9))
    if y.low <= 0.5 <= y.high:
        parts.append(f'<path class="rule" d="M{x.start:g} {y(0.5):.1f}H{x.end:g}"/>')
    parts += [_line(one, x, y) for one in drawn] + _legend(series, labels)
    return svg.figure(heading, description, parts, svg.HEIGHT + _ROW * len(labels))


def value_range(series: Sequence[Series], log: bool) -> tuple[float, float]:
    """Limits that hold every finite value and, unless they would stretch it beyond use, the bands."""
    values = [v for one in series for v in one.y if math.isfinite(v)] or [1.0]
    bounds = [v for one in series for v in (*one.low, *one.high) if math.isfinite(v)]
    low, high = min(values), max(values)
    if log:
        pad = max(1.05, (high / low) ** 0.3)
        limits = max(low / pad, min([low, *bounds])), min(high * pad, max([high, *bounds]))
        return limits[0] / 1.03, limits[1] * 1.03
    pad = 0.3 * (high - low) or 0.05 * abs(high) or 1.0
    bottom, top = max(low - pad, min([low, *bounds])), min(high + pad, max([high, *bounds]))
    edge = 0.03 * (top - bottom) or 0.05 * abs(high) or 1.0
    return bottom - edge, top + edge


def _inside(value: float, y: svg.Scale) -> float:
    return y(min(max(value, y.low), y.high))


def _runs(one: Series) -> list[list[int]]:
    """Positions of the finite values, cut where one is missing."""
    runs: list[list[int]] = [[]]
    for n, value in enumerate(one.y):
        if math.isfinite(value):
            runs[-1].append(n)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _band(one: Series, x: svg.Scale, y: svg.Scale) -> str:
    shapes = ""
    for run in _runs(one):
        known = [n for n in run if math.isfinite(one.low[n]) and math.isfinite(one.high[n])]
        above = [(x(one.x[n]), _inside(one.high[n], y)) for n in known]
        below = [(x(one.x[n]), _inside(one.low[n], y)) for n in reversed(known)]
        shapes += svg.path([*above, *below], close=True)
    return f'<path class="band c{one.colour % COLOURS}" d="{shapes}"/>' if shapes else ""


def _line(one: Series, x: svg.Scale, y: svg.Scale) -> str:
    points = [[(x(one.x[n]), _inside(one.y[n], y)) for n in run] for run in _runs(one)]
    kind = one.colour % COLOURS
    marks = "".join(svg.path([point]) + MARKS[kind] for run in points for point in run)
    line = "".join(svg.path(run) for run in points)
    return f'<path class="line c{kind}" d="{line}"/><path class="mark c{kind} m{kind}" d="{marks}"/>' if line else ""


def _end_labels(series: Sequence[Series], labels: Sequence[str], x: svg.Scale, y: svg.Scale) -> list[str]:
    """Labels at the right, pushed apart, each with its mark and a dotted line to the end of the line it names."""
    ends: dict[str, tuple[float, float, int]] = {}
    for one in series:
        if runs := _runs(one):
            n = runs[-1][-1]
            ends.setdefault(one.label, (x(one.x[n]), _inside(one.y[n], y), one.colour % COLOURS))
    named = [label for label in labels if label in ends]
    heights = svg.apart([ends[label][1] for label in named], 15, svg.TOP + 2, svg.BOTTOM - 2)
    parts = []
    for label, height in zip(named, heights, strict=True):
        end, level, kind = ends[label]
        leader = f"M{end + 6:.1f} {level:.1f}L{x.end + 13:.1f} {height:.1f}"
        mark = f"M{x.end + 19:.1f} {height:.1f}{MARKS[kind]}"
        parts.append(f'<path class="leader c{kind}" d="{leader}"/><path class="mark c{kind} m{kind}" d="{mark}"/>')
        parts.append(svg.text(x.end + 27, height + 4, clean(label), "label"))
    return parts


def _legend(series: Sequence[Series], labels: Sequence[str]) -> list[str]:
    """One row below the plot for each label."""
    colour = {one.label: one.colour % COLOURS for one in series}
    parts = []
    for row, label in enumerate(labels):
        kind, height = colour[label], svg.HEIGHT + 4 + _ROW * row
        at = f"M{svg.LEFT + 12} {height:g}"
        parts.append(f'<path class="line c{kind}" d="M{svg.LEFT} {height:g}h24"/>')
        parts.append(f'<path class="mark c{kind} m{kind}" d="{at}{MARKS[kind]}"/>')
        shown = svg.fit(label, svg.WIDTH - svg.LEFT - 40)
        parts.append(svg.text(svg.LEFT + 32, height + 4, shown, "label"))
    return parts


def density_chart(
    heading: str, description: str, members: Floats, nonmembers: Floats, x_range: tuple[float, float]
) -> str:
    """Gaussian-kernel densities of the losses of members and of non-members.

    Args:
        heading: shown above the plot and read out as its name.
        description: the chart in a sentence, for those who do not see it.
        members: [M] mean loss of each member, nats per token.
        nonmembers: [N] of each non-member.
        x_range: the horizontal axis, one for all panels that are to be compared.
    """
    x = svg.Scale(*x_range, svg.LEFT, svg.WIDTH - 14)
    grid = np.linspace(*x_range, 101)
    curves = [density(losses, grid) for losses in (members, nonmembers)]
    y = svg.Scale(0, 1.08 * max(float(curve.max()) for curve in curves), svg.BOTTOM, svg.TOP + 22)
    parts = svg.names(heading, "loss of a record (nats per token)", "density", x, y)
    parts += svg.axes(x, y, x.ticks(8), y.ticks(5))
    for kind, curve in enumerate(curves):
        area = [(x.start, y.start), *((x(a), y(b)) for a, b in zip(grid, curve, strict=True)), (x.end, y.start)]
        parts.append(f'<path class="line area c{kind} d{kind}" d="{svg.path(area)}"/>')
    for kind, (label, losses) in enumerate((("members", members), ("non-members", nonmembers))):
        left = svg.LEFT + 188 * kind
        parts.append(f'<path class="line c{kind} d{kind}" d="M{left} {svg.TOP + 6}h24"/>')
        parts.append(svg.text(left + 30, svg.TOP + 10, f"{label}, mean {np.mean(losses):.2f}", "label"))
    return svg.figure(heading, description, parts)


def density(values: Floats, grid: Floats) -> Floats:
    """[G] Gaussian-kernel density at the points of an even grid, bandwidth by Silverman's rule.

    Values are first counted in bins a quarter of a grid step wide, so that a million cost no more than a thousand.
    The bandwidth is never below a grid step: equal values are a peak, not a needle that falls between the points.

    >>> grid = np.linspace(-4, 4, 81)
    >>> peak = density(np.zeros(10), grid)
    >>> int(np.argmax(peak)), round(float(peak.sum() * 0.1), 3)
    (40, 1.0)
    """
    step = float(grid[1] - grid[0])
    quartiles = np.quantile(values, [0.25, 0.75])
    spread = [s for s in (float(np.std(values)), float(quartiles[1] - quartiles[0]) / 1.34) if s > 0]
    width = max(step, 0.9 * min(spread, default=0.0) * len(values) ** -0.2)
    edges = np.arange(grid[0] - 4 * width - step / 8, grid[-1] + 4 * width + step, step / 4)
    counts, _ = np.histogram(values, edges)
    centres = (edges[:-1] + edges[1:]) / 2
    kernel = np.exp(-0.5 * ((grid[:, None] - centres[None, :]) / width) ** 2)
    heights: Floats = kernel @ counts / (len(values) * width * math.sqrt(2 * math.pi))
    return heights
