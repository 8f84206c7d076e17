"""Which checkpoint to ship: the best validation perplexity whose upper leakage bound keeps a budget.

Every method, option and epoch of a finished grid is a candidate; a candidate is judged over all training seeds of its
grid. The bound is of the attack that the budget names or, where it names none, of the strongest one at that checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from imprint.errors import ImprintError, InvalidAudit, UsageError, unknown
from imprint.gates.judge import withheld
from imprint.measures.estimate import Effect, auc_over_seeds, over_seeds
from imprint.measures.frontier import Checkpoint
from imprint.paths import path_of
from imprint.report.readings import LIMITS
from imprint.rows import FALSE_POSITIVE_RATES, Cell, Grid
from imprint.spec import Budget, canonical_json, validated
from imprint.validity import gates_of


@dataclass(frozen=True)
class Candidate:
    """A checkpoint of a variant, over the seeds of the grid.

    Attributes:
        label: method and options.
        epoch: of the checkpoint.
        log_perplexity: nats per token, validation records.
        attack: the one held to the budget.
        auc: its AUC.
        excess: by how much the upper bound furthest over its limit exceeds it; negative where all keep theirs.
    """

    label: str
    epoch: int
    checkpoints: tuple[Checkpoint, ...] = field(compare=False, repr=False)
    log_perplexity: Effect
    attack: str
    auc: Effect
    excess: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.log_perplexity.value)


@dataclass(frozen=True)
class Advice:
    """What to ship of one model and data set.

    Attributes:
        chosen: best perplexity within the budget; None where nothing qualifies.
        runner_up: the next best of another variant within the budget.
        difference: log perplexity of the runner-up less that of the chosen, paired on the same records.
        unlimited: best perplexity of all, budget or not: what the budget costs is seen against it.
        closest: where nothing qualifies, the one that misses by least.
    """

    place: str
    budget: Budget
    chosen: Candidate | None
    runner_up: Candidate | None
    difference: Effect | None
    unlimited: Candidate
    closest: Candidate


def recommend(grid: Grid, budget: Budget | None = None) -> list[Advice]:
    """Advice for every model and data set of a grid.

    Args:
        budget: instead of the grid's own.

    Raises:
        UsageError: there is no budget.
        InvalidAudit: a gate is not green: no checkpoint can be recommended on such numbers.
        ImprintError: no cell has finished.
    """
    if budget is None and not grid.budget:
        raise UsageError("recommend needs a budget, as in --budget auc=0.55: the recipe gives none")
    limits = budget or Budget.model_validate(grid.budget)
    by_place: dict[str, list[Cell]] = {}
    for cell in grid.cells:
        if cell.outcome["status"] == "done":
            by_place.setdefault(f"{cell.spec.model.name} on {cell.spec.data.source.name}", []).append(cell)
    if not by_place:
        raise ImprintError(f"no cell of {grid.path} has finished: there is nothing to recommend")
    return [_advice(place, cells, grid, limits) for place, cells in by_place.items()]


def parse_budget(given: Sequence[str], attacks: Sequence[str]) -> Budget | None:
    """`--budget auc=0.55 --budget attack=ref` as a budget; None where nothing is given.

    Raises:
        UsageError: not of that form, or not a limit.
    """
    if not given:
        return None
    document: dict[str, str] = {}
    for one in given:
        key, equals, value = one.partition("=")
        if not equals:
            raise UsageError(f"--budget {one!r}: expected LIMIT=NUMBER or attack=NAME, as in auc=0.55")
        document[key] = value
    budget = validated(Budget, document, "--budget")
    if budget.attack and budget.attack not in attacks:
        raise UsageError(f"--budget: {unknown('attack', budget.attack, attacks)}")
    if not any(getattr(budget, metric) is not None for metric in LIMITS):
        raise UsageError(f"--budget: it sets no limit; give one of {', '.join(LIMITS)}")
    return budget


def _advice(place: str, cells: list[Cell], grid: Grid, budget: Budget) -> Advice:
    for base in {cell.base.name: cell for cell in cells}.values():
        if why := withheld(gates_of(base, grid.attacks, budget.auc)):
            raise InvalidAudit(f"{place}: nothing can be recommended. {why}")
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        identity = cell.spec.identity()
        identity.pop("seed")
        identity["data"].pop("seed")
        groups.setdefault(canonical_json(identity), []).append(cell)
    candidates = [one for group in groups.values() for one in _candidates(group, grid, budget)]
    unlimited = min(candidates, key=_by_perplexity)
    kept = sorted((one for one in candidates if one.excess < 0), key=_by_perplexity)
    chosen = kept[0] if kept else None
    runner_up = next((one for one in kept if chosen and one.label != chosen.label), None)
    difference = _difference(runner_up, chosen) if chosen and runner_up else None
    return Advice(place, budget, chosen, runner_up, difference, unlimited, min(candidates, key=lambda c: c.excess))


def _by_perplexity(one: Candidate) -> tuple[float, int]:
    return one.log_perplexity.value, one.epoch


def _difference(worse: Candidate, better: Candidate) -> Effect | None:
    """None where the two were not run with the same seeds."""
    if len(worse.checkpoints) != len(better.checkpoints):
        return None
    pairs = zip(worse.checkpoints, better.checkpoints, strict=True)
    return over_seeds([a.log_perplexity - b.log_perplexity for a, b in pairs])


def _candidates(cells: list[Cell], grid: Grid, budget: Budget) -> list[Candidate]:
    """Every tuned epoch of a variant."""
    cells = sorted(cells, key=lambda cell: cell.spec.seed)
    attacks = [budget.attack] if budget.attack else list(grid.attacks)
    paths = [path_of(cell, attacks) for cell in cells]
    return [_candidate(cells, paths, epoch, attacks, budget) for epoch in range(1, min(map(len, paths)))]


def _candidate(
    cells: list[Cell], paths: list[list[Checkpoint]], epoch: int, attacks: Sequence[str], budget: Budget
) -> Candidate:
    points = tuple(path[epoch] for path in paths)
    aucs = {attack: auc_over_seeds([point.auc[attack] for point in points]) for attack in attacks}
    attack = max(aucs, key=lambda name: aucs[name].high)
    over = [aucs[attack].high - budget.auc] if budget.auc is not None else []
    over += [_highest_rate(cells, epoch, attack, metric) - limit for metric, limit in _rates(budget).items()]
    log_perplexity = over_seeds([point.log_perplexity for point in points])
    return Candidate(cells[0].label, epoch, points, log_perplexity, attack, aucs[attack], max(over))


def _rates(budget: Budget) -> dict[str, float]:
    limits = {metric: getattr(budget, metric, None) for metric in FALSE_POSITIVE_RATES}
    return {metric: limit for metric, limit in limits.items() if limit is not None}


def _highest_rate(cells: list[Cell], epoch: int, attack: str, metric: str) -> float:
    """The highest upper bound of any seed; a rate that would be refused cannot be promised and counts as 1."""
    from imprint.measures import tpr_at_fpr

    bounds = []
    for cell in cells:
        try:
            sides = cell.sides(cell.scores(epoch, [attack])[attack])
            bounds.append(tpr_at_fpr(*sides, FALSE_POSITIVE_RATES[metric]).high)
        except InvalidAudit:
            bounds.append(1.0)
    return max(bounds)
