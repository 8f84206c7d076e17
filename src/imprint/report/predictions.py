"""The table of `imprint run --dry-run`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from imprint.report import words
from imprint.report.text import print_table

if TYPE_CHECKING:
    from imprint.predict import Prediction


def print_predictions(predictions: Sequence[Prediction], console: Console) -> None:
    """A row per cell and the sum."""
    header = ["method", "epochs left", "tokens", "operations", "time", "peak memory", "share of peak"]
    rows = [_row(one) for one in predictions]
    left = [one for one in predictions if one.epochs]
    whole = words.clock(sum(one.seconds for one in left)) if left else "nothing left to do"
    flops = words.operations(sum(one.flops for one in left)) if left else ""
    rows.append(["in all", "", f"{sum(one.tokens for one in left):,}", flops, whole, "", ""])
    print_table("What is left, and what it will cost on this machine", header, rows, console)
    console.print(
        "Operations are counted, times follow from a measured training step and scoring pass of each cell, one cell "
        "after the other; scoring the base once and writing come on top. Nothing has been written.",
        highlight=False,
    )


def _row(one: Prediction) -> list[str]:
    label = words.clean(one.label)
    if not one.epochs:
        return [label, "done", "", "", "", "", ""]
    numbers = [f"{one.epochs}", f"{one.tokens:,}", words.operations(one.flops), words.clock(one.seconds)]
    return [label, *numbers, words.size(one.peak_memory), f"{one.share_of_peak:.0%}"]
