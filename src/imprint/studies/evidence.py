"""The runs of a study, read as variants: one method on one model and data, with a path for each training seed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from imprint.measures.estimate import Effect, Estimate, auc_over_seeds, over_seeds
from imprint.measures.frontier import Checkpoint, Stop, at_perplexity, best
from imprint.paths import path_of
from imprint.rows import Cell, Grid
from imprint.studies.judgement import Contrast
from imprint.studies.search import variant

Place = Callable[[Sequence[Checkpoint]], Checkpoint]
"""Which checkpoint of a path is meant."""


def last(path: Sequence[Checkpoint]) -> Checkpoint:
    """The last epoch."""
    return path[-1]


def after(epoch: int) -> Place:
    """The checkpoint after so many epochs, or the last one of a shorter run."""
    return lambda path: path[min(epoch, len(path) - 1)]


@dataclass(frozen=True)
class Variant:
    """A method with its options on one model and data, over training seeds.

    Attributes:
        model, data, method: names.
        options: of the method, the learning rate included.
        cells: finished ones, by seed.
    """

    model: str
    data: str
    method: str
    options: dict[str, Any]
    cells: tuple[Cell, ...]
    attacks: tuple[str, ...]

    @cached_property
    def paths(self) -> list[list[Checkpoint]]:
        """A path per seed."""
        return [path_of(cell, self.attacks) for cell in self.cells]

    @property
    def trainable(self) -> int:
        return int(self.cells[0].outcome["trainable"])

    @property
    def parameters(self) -> int:
        return int(self.cells[0].outcome["parameters"])

    def aucs(self, attack: str, place: Place) -> list[Estimate]:
        """A seed's AUC each, at a place of its own path."""
        return [place(path).auc[attack] for path in self.paths]

    def auc(self, attack: str, place: Place) -> Effect:
        """Averaged over seeds."""
        return auc_over_seeds(self.aucs(attack, place))

    def log_perplexity(self, place: Place) -> Effect:
        """Averaged over seeds, nats per token."""
        return over_seeds([place(path).log_perplexity for path in self.paths])


def variants(grid: Grid) -> list[Variant]:
    """Every variant of a grid that has a finished run, in the grid's order, with the seeds that all of them have.

    Seeds are compared one by one, so a seed that is missing from one variant is left out of all.
    """
    groups: dict[str, list[Cell]] = {}
    for cell in grid.cells:
        if cell.outcome["status"] == "done":
            groups.setdefault(variant(cell.spec), []).append(cell)
    common = set.intersection(*({cell.spec.seed for cell in cells} for cells in groups.values())) if groups else set()
    kept = [[cell for cell in cells if cell.spec.seed in common] for cells in groups.values()]
    return [variant_of(sorted(cells, key=lambda cell: cell.spec.seed), grid.attacks) for cells in kept if cells]


def variant_of(cells: Sequence[Cell], attacks: tuple[str, ...]) -> Variant:
    """Cells that differ in their seed alone."""
    spec = cells[0].spec
    return Variant(spec.model.name, spec.data.source.name, spec.method.name, spec.method.options, tuple(cells), attacks)


def contrast(a: Variant, b: Variant, attack: str, place: Place) -> Contrast:
    """AUC of a less that of b, both at that place of their own paths."""
    pairs = zip(a.paths, b.paths, strict=True)
    return Contrast("", [place(one).auc[attack] - place(other).auc[attack] for one, other in pairs])


def matched(found: Sequence[Variant], attack: str) -> list[list[Stop]] | None:
    """Each of them where its validation perplexity is that of the weakest one's best epoch: a list for every seed.

    None where one of them never came below the base: there is no utility to match.
    """
    rows = []
    for paths in zip(*(one.paths for one in found), strict=True):
        target = max((best(path).log_perplexity for path in paths), key=lambda estimate: estimate.value)
        stops = [at_perplexity(path, target, attack) for path in paths]
        if None in stops:
            return None
        rows.append([stop for stop in stops if stop])
    return rows


def matched_contrast(a: Variant, b: Variant, attack: str) -> Contrast | None:
    """AUC of a less that of b at equal validation perplexity; its name says in which epochs they are read."""
    rows = matched([a, b], attack)
    if rows is None:
        return None
    least = [
        min((x - y for x in (one.before, one.after) for y in (other.before, other.after)), key=lambda e: e.value)
        for one, other in rows
    ]
    epochs = ["/".join(str(epoch) for epoch in sorted({row[n].epoch for row in rows})) for n in (0, 1)]
    where = f"read in epochs {epochs[0]} and {epochs[1]}"
    return Contrast(where, [one.auc - other.auc for one, other in rows], least)


def pick(found: Iterable[Variant], **wanted: Any) -> list[Variant]:
    """The variants whose attributes are these."""
    return [v for v in found if all(getattr(v, key) == value for key, value in wanted.items())]
