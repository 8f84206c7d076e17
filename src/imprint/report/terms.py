"""What things are called. A run has epochs, utility on validation records and a base before tuning; an audit of a model
that was tuned elsewhere has checkpoints, utility on the non-members and a model that it is compared with.

Whatever else differs between the two follows from what was measured.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from imprint.report import words
from imprint.rows import Cell, Grid


@dataclass(frozen=True)
class Terms:
    """Words for what lies on the horizontal axis, for utility and for where it begins.

    Attributes:
        point: what a cell has several of.
        key: the column that says which row of a table it is.
        number: the column with the number of a point.
        base: point 0, as a row or a panel.
        axis: the horizontal axis of a curve.
        utility: what is low where a model is useful; `short` where there is little room.
        judged: where a budget applies.
        cost: the title of the table of costs, and how it was counted.
        asked: the heading of the recipe.
        whole: what is unfinished where that is not a cell among others.
        planned: whether it is known how many points were asked for.
        counts: the records that there are, by the keys of a base's `meta.json`.
        reading: two sentences for who reads a number for the first time: what utility means, and what point 0 is.
        compare: what the frontier is good for, where there is more than one cell.
        shown: which points the densities of losses are of.
        done: the heading of what the annex tells in full.
    """

    point: str
    key: str
    number: str
    base: str
    axis: str
    utility: str
    short: str
    judged: str
    cost: tuple[str, str]
    asked: str
    whole: str
    planned: bool
    counts: tuple[str, ...]
    reading: tuple[str, str]
    compare: str
    shown: str
    done: str


_OPERATIONS = "Operations by the formulas of docs/engine.md, twice for every multiply and add;"
_PEAK = (
    "The share of peak compares operations per second with a plain matrix product on the same machine at the beginning."
)
RUN = Terms(
    point="epoch",
    key="method",
    number="epoch",
    base="base (epoch 0)",
    axis="epoch (0 = the base, untouched)",
    utility="validation perplexity",
    short="val. ppl",
    judged="at the epoch of best validation perplexity",
    cost=(
        "Cost of the finished epochs",
        f"{_OPERATIONS} seconds by part of the work; output is the output layer of a training step with its gradient. "
        f"{_PEAK}",
    ),
    asked="Recipe",
    whole="",
    planned=True,
    counts=("members", "tuned", "nonmembers", "validation"),
    reading=(
        "Validation perplexity says how well the model learned; lower is better. A method that learned less often "
        "remembers less too, so compare methods at similar perplexity.",
        "The base is the model before tuning: nothing of the records can be in it through tuning, so its AUC should be "
        "about .5.",
    ),
    compare="; methods are best compared where they are equally useful",
    shown="Each tuned model is shown at its last epoch",
    done="What was run",
)
AUDIT = Terms(
    point="checkpoint",
    key="checkpoint",
    number="no.",
    base="base",
    axis="checkpoint (0 = the model it is compared with)",
    utility="perplexity of the non-members",
    short="ppl",
    judged="at each checkpoint; the verdict is on the last",
    cost=("Cost of scoring the checkpoints", f"{_OPERATIONS} seconds of the scoring passes. {_PEAK}"),
    asked="What was asked for",
    whole="The audit",
    planned=False,
    counts=("members", "nonmembers"),
    reading=(
        "Perplexity is that of the non-members, texts of the same kind that the model was not tuned on; it says how "
        "well the model learned what they have in common, and lower is better.",
        "The base, number 0, is the model that it is compared with: nothing of the records can be in it through this "
        "tuning, so its AUC should be about .5.",
    ),
    compare="",
    shown="The tuned model is shown at its last checkpoint",
    done="What was audited",
)


def terms(grid: Grid) -> Terms:
    """The words for a grid."""
    return AUDIT if audited(grid) else RUN


def audited(grid: Grid) -> bool:
    """Whether its cells were tuned elsewhere."""
    return all(cell.training is None for cell in grid.cells)


def point_names(cell: Cell) -> dict[int, str]:
    """Number of a finished point → its name: that of the folder that was audited, else `epoch 3`; no two are alike."""
    found = {n: words.clean(cell.folder.meta(n).get("name") or f"epoch {n}") for n in range(1, cell.epochs + 1)}
    seen: Counter[str] = Counter()
    for n, name in found.items():
        seen[name] += 1
        if seen[name] > 1:
            found[n] = f"{name} ({seen[name]})"
    return found
