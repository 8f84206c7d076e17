"""The little of SVG that the figures need: scales, ticks, axes, text that is escaped and fits.

Colours, fonts and widths are classes of `report.css`, so that one figure serves dark, light and paper.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from imprint.report.words import clean

WIDTH, HEIGHT = 460, 300
TOP, BOTTOM, LEFT = 34, 254, 52
CHARACTER = 7.4
"""Width to allow for a character of the 13-pixel labels."""


@dataclass(frozen=True)
class Scale:
    """Data to pixels, linear or logarithmic.

    >>> Scale(0, 10, 100, 200)(5), Scale(1, 100, 0, 10, log=True)(10)
    (150.0, 5.0)
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, x: float) -> float:
        if self.log:
            part = math.log(x / self.low) / math.log(self.high / self.low)
        else:
            part = (x - self.low) / (self.high - self.low)
        return self.start + part * (self.end - self.start)

    def ticks(self, most: int) -> list[float]:
        """At most `most` round values within the scale."""
        return log_ticks(self.low, self.high, most) if self.log else linear_ticks(self.low, self.high, most)


def linear_ticks(low: float, high: float, most: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten.

    >>> linear_ticks(0.43, 1.0, 7), linear_ticks(0, 15, 8)
    ([0.5, 0.6, 0.7, 0.8, 0.9, 1.0], [0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0])
    """
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    for factor in (1, 2, 5, 10, 20):
        step = factor * power
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < most:
            break
    digits = max(0, -math.floor(math.log10(step)))
    return [round(n * step, digits) for n in range(first, last + 1)]


def log_ticks(low: float, high: float, most: int) -> list[float]:
    """Powers of ten with their twos and fives, thinned; linear ones where fewer than three of those fit.

    >>> log_ticks(3, 60, 6), log_ticks(4, 18, 6)
    ([5.0, 10.0, 20.0, 50.0], [5.0, 10.0, 15.0])
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = [float(f"{k}e{p}") for p in powers for k in factors if low <= float(f"{k}e{p}") <= high]
        if 3 <= len(ticks) <= most:
            return ticks
    if len(ticks) > most:
        return ticks[:: math.ceil(len(ticks) / most)]
    return [t for t in linear_ticks(low, high, most) if t > 0]


def epoch_ticks(last: float, most: int) -> list[float]:
    """Whole numbers from 0, ending at the last epoch where a round step allows it.

    >>> epoch_ticks(15, 9), epoch_ticks(7, 9)
    ([0, 3, 6, 9, 12, 15], [0, 1, 2, 3, 4, 5, 6, 7])
    """
    steps = [k * 10**p for p in range(9) for k in (1, 2, 3, 4, 5) if last / (k * 10**p) < most]
    step = next((s for s in steps[:3] if last % s == 0), steps[0])
    return list(range(0, int(last) + 1, step))


def tick_text(x: float) -> str:
    """
    >>> tick_text(0.5), tick_text(10.0), tick_text(20000.0), tick_text(1e7)
    ('0.5', '10', '20,000', '1e+07')
    """
    return f"{x:,.0f}" if 1000 <= abs(x) < 1e6 else f"{x:g}"


def fit(text: str, pixels: float) -> str:
    """`text` cleaned, its middle left out where it would not fit.

    >>> fit("a long name of a cell", 70)
    'a lo…cell'
    """
    text, most = clean(text), max(3, int(pixels / CHARACTER))
    if len(text) <= most:
        return text
    tail = (most - 1) // 2
    return f"{text[: most - 1 - tail]}…{text[-tail:]}"


def figure(title: str, description: str, parts: Iterable[str], height: float = HEIGHT) -> str:
    """An image with a name and a description for those who do not see it."""
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img"><title>{escape(clean(title))}</title>'
        f"<desc>{escape(clean(description))}</desc>{''.join(parts)}</svg>"
    )


def text(x: float, y: float, content: str, kind: str, extra: str = "") -> str:
    """`content` escaped at a point; `kind` is a class."""
    return f'<text class="{kind}" x="{round(x, 1):g}" y="{round(y, 1):g}"{extra}>{escape(content)}</text>'


def axes(x: Scale, y: Scale, x_ticks: Sequence[float], y_ticks: Sequence[float]) -> list[str]:
    """Grid lines, ticks and their numbers."""
    grid = "".join(f"{path([(x.start, y(value))])}H{x.end:g}" for value in y_ticks)
    steps = "".join(f"{path([(x(value), y.start)])}v4" for value in x_ticks)
    frame = f"M{x.start:g} {y.start:g}H{x.end:g}"
    numbers = [text(x.start - 6, y(value) + 4, tick_text(value), "tick left") for value in y_ticks]
    numbers += [text(x(value), y.start + 17, tick_text(value), "tick middle") for value in x_ticks]
    return [f'<path class="grid" d="{grid}"/><path class="axis" d="{frame}{steps}"/>', *numbers]


def names(heading: str, x_name: str, y_name: str, x: Scale, y: Scale) -> list[str]:
    """The heading and what the axes measure."""
    middle = (y.start + y.end) / 2
    return [
        text(LEFT - 38, 18, fit(heading, WIDTH - 30), "heading"),
        text((x.start + x.end) / 2, y.start + 34, x_name, "name middle"),
        text(13, middle, y_name, "name middle", f' transform="rotate(-90 13 {middle:.1f})"'),
    ]


def path(points: Iterable[tuple[float, float]], close: bool = False) -> str:
    """Path data through points, to a tenth of a pixel; steps instead of positions, for half the bytes.

    >>> path([(10, 20), (12.5, 19.96), (14, 19)])
    'M10 20l2.5 0 1.5-1'
    """
    tenths = [(round(10 * x), round(10 * y)) for x, y in points]
    if not tenths:
        return ""
    steps = [(c - a, d - b) for (a, b), (c, d) in itertools.pairwise(tenths)]
    line = "l" + " ".join(_pair(dx, dy) for dx, dy in steps) if steps else ""
    return f"M{_pair(*tenths[0])}{line}{'Z' if close else ''}"


def _pair(x: int, y: int) -> str:
    first, second = (f"{n / 10:g}".replace("0.", ".", 1) if abs(n) < 10 else f"{n / 10:g}" for n in (x, y))
    return first + second if second.startswith("-") else f"{first} {second}"


def apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions nearest to the wanted ones such that neighbours are `gap` apart and none leaves [low, high].

    >>> apart([10, 12, 50], gap=10, low=0, high=52)
    [10, 20, 50]
    >>> apart([50, 50], gap=10, low=0, high=52)
    [42, 52]
    """
    order = sorted(range(len(wanted)), key=lambda n: wanted[n])
    placed = list(wanted)
    edge = low
    for n in order:
        placed[n] = edge = max(edge, placed[n])
        edge += gap
    edge = high
    for n in reversed(order):
        placed[n] = min(edge, placed[n])
        edge = placed[n] - gap
    return placed
