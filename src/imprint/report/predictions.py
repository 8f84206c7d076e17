"""The tables of `imprint run --dry-run` and `imprint plan`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from imprint.report import words
from imprint.report.text import print_table, printable

if TYPE_CHECKING:
    from imprint.auditing.plan import Cost, Need
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


def print_needs(needs: Sequence[Need], members: int | None, effect: float, power: float, console: Console) -> None:
    """The table of `imprint plan`: what each claim needs."""
    beside = "as many members" if members is None else f"{members:,} members"
    title = f"Non-members needed beside {beside}, to hold with a probability of {power:.0%}"
    rows = [[need.claim, "-" if need.nonmembers is None else f"{need.nonmembers:,}"] for need in needs]
    print_table(title, ["claim", "non-members"], rows, console)
    console.print("For one attack; where several are held to a budget, somewhat more are needed.", highlight=False)
    for need in needs:
        if need.why:
            console.print(printable(need.why, console), highlight=False)
    if effect > 1:
        console.print(
            f"Owners have several records: counted as {effect:.2f} times fewer, the safe bound.", highlight=False
        )


def print_cost(cost: Cost, nonmembers: int, console: Console) -> None:
    """What an audit with so many non-members will cost."""
    console.print(
        f"With {nonmembers:,} non-members an audit takes about {words.clock(cost.seconds)} here "
        f"({words.operations(cost.flops)}, {cost.tokens:,} tokens a pass, the positive control at its longest "
        f"included), {words.size(cost.memory)} of memory and {words.size(cost.disk)} of disk.",
        highlight=False,
    )
