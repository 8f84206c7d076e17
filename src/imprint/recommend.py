"""Which checkpoint to ship: the best validation perplexity whose upper leakage bound keeps a budget.

Every method, option and epoch of a finished grid is a candidate; a candidate is judged over all training seeds of its
grid. Bounds are of the attack that the budget names or, where it names none, of every attack: all have to keep it.

The chance that anything over the budget passes for within it is at most `ERROR` / 2 for a whole place, as for a single
two-sided 95% interval. Variants (a method with its options) share it equally (Bonferroni). The epochs of a variant need
no further share: they are tried in the order of training and the first that fails ends its list (a fixed sequence,
Maurer et al. 1995). As a rule a run leaks more with every epoch, so little is lost: the later epochs of a variant that
leaks over the budget early and less later. That all limits and attacks have to hold asks for no correction either.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from imprint.errors import ImprintError, InvalidAudit, UsageError, unknown
from imprint.evidence import Evidence
from imprint.gates.judge import withheld
from imprint.measures.estimate import Effect, auc_over_seeds, over_seeds
from imprint.measures.frontier import Checkpoint
from imprint.paths import path_of
from imprint.rows import FALSE_POSITIVE_RATES, Cell, Grid
from imprint.spec import Budget, canonical_json, validated
from imprint.validity import gates_of

ERROR = 0.05
"""One less the level of the two-sided intervals of all variants together."""
LIMITS = tuple(name for name in Budget.model_fields if name != "attack")


@dataclass(frozen=True)
class Candidate:
    """A checkpoint of a variant, over the seeds of the grid.

    Attributes:
        label: method and options.
        seeds: of training; `checkpoints` has one for each.
        epoch: of the checkpoint.
        log_perplexity: nats per token, validation records.
        attack: of those held to the budget, the one whose upper bound is furthest over its limit, or least below it.
        auc: its AUC, at the level of the advice.
        excess: by how much that bound exceeds its limit; negative where all keep theirs.
    """

    label: str
    seeds: tuple[int, ...]
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
    """What to ship of one model on one set of records.

    Attributes:
        place: model and data, with whatever sets them apart from others of the same names.
        variants: how many were judged.
        chosen: best perplexity within the budget; None where nothing qualifies.
        runner_up: the next best of another variant within the budget.
        difference: log perplexity of the runner-up less that of the chosen, paired on the same records; None where
            seeds or records differ.
        unlimited: best perplexity of all, budget or not: what the budget costs is seen against it.
        unheld: attacks of the grid that have no number at some epoch, and are not held to the budget.
        closest: the first epoch that exceeds the budget by least: what came closest where nothing qualifies.
    """

    place: str
    budget: Budget
    variants: int
    chosen: Candidate | None
    runner_up: Candidate | None
    difference: Effect | None
    unlimited: Candidate
    closest: Candidate
    unheld: tuple[str, ...] = ()

    @property
    def level(self) -> float:
        """Confidence level of the two-sided intervals whose upper bounds are held to the budget."""
        return 1 - ERROR / self.variants


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
    done = [cell for cell in grid.cells if cell.outcome["status"] == "done"]
    if not done:
        raise ImprintError(f"no cell of {grid.path} has finished: there is nothing to recommend")
    return [_advice(place, cells, grid, limits) for place, cells in _places(done).items()]


def _places(cells: Iterable[Cell]) -> dict[str, list[Cell]]:
    """Cells by what they are measured on, the draw of the split apart: perplexities of a place are of like records."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(canonical_json(_measured_on(cell)), []).append(cell)
    firsts = [group[0] for group in groups.values()]
    return {_name(group[0], firsts): group for group in groups.values()}


def _measured_on(cell: Cell) -> dict[str, Any]:
    """Model and data by the keys of a recipe, without names and seeds."""
    identity = cell.spec.identity()
    keys = ((part, key) for part in ("model", "data") for key in identity[part])
    return {f"{part}.{key}": identity[part][key] for part, key in keys if key != "seed"}


def _name(cell: Cell, others: Iterable[Cell]) -> str:
    title, mine = _title(cell), _measured_on(cell)
    peers = [_measured_on(other) for other in others if _title(other) == title]
    differ = [key for key in mine if any(other.get(key) != mine[key] for other in peers)]
    shown = [f"{key}={str(mine[key])[:8] if key.endswith('fingerprint') else mine[key]}" for key in differ]
    return f"{title} ({', '.join(shown)})" if shown else title


def _title(cell: Cell) -> str:
    return f"{cell.spec.model.name} on {cell.spec.data.source.name}"


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
        if why := withheld(gates_of(base, grid.attacks, budget.auc, budget.attack)):
            raise InvalidAudit(f"{place}: nothing can be recommended. {why}")
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        identity = cell.spec.identity()
        identity.pop("seed")
        identity["data"].pop("seed")
        groups.setdefault(canonical_json(identity), []).append(cell)
    level, named = 1 - ERROR / len(groups), [budget.attack] if budget.attack else list(grid.attacks)
    variants = [_candidates(group, grid, budget, level) for group in groups.values()]
    kept = sorted((one for path in variants for one in takewhile(_keeps, path)), key=_by_perplexity)
    chosen = kept[0] if kept else None
    runner_up = next((one for one in kept if chosen and one.label != chosen.label), None)
    return Advice(
        place,
        budget,
        len(groups),
        chosen,
        runner_up,
        _difference(runner_up, chosen) if chosen and runner_up else None,
        unlimited=min((one for path in variants for one in path), key=_by_perplexity),
        closest=min((path[0] for path in variants), key=lambda one: one.excess),
        unheld=tuple(name for name in named if any(name not in path[0].checkpoints[0].auc for path in variants)),
    )


def _keeps(one: Candidate) -> bool:
    return one.excess < 0


def _by_perplexity(one: Candidate) -> tuple[float, int]:
    return one.log_perplexity.value, one.epoch


def _difference(worse: Candidate, better: Candidate) -> Effect | None:
    """None where the two were not run with the same seeds, or seeds of the two drew different records."""
    if worse.seeds != better.seeds:
        return None
    pairs = zip(worse.checkpoints, better.checkpoints, strict=True)
    both = [(a.log_perplexity, b.log_perplexity) for a, b in pairs]
    return over_seeds([a - b for a, b in both]) if all(a.strata.keys() == b.strata.keys() for a, b in both) else None


def _candidates(cells: list[Cell], grid: Grid, budget: Budget, level: float) -> list[Candidate]:
    """Every tuned epoch of a variant, in order."""
    cells = sorted(cells, key=lambda cell: (cell.spec.seed, cell.spec.data.seed or 0))
    attacks = held_to(cells, grid, budget)
    paths = [path_of(cell, attacks) for cell in cells]
    return [_candidate(cells, list(points), budget, level) for points in list(zip(*paths, strict=False))[1:]]


def held_to(cells: Sequence[Cell], grid: Grid, budget: Budget) -> list[str]:
    """The attacks that a variant is held to: the one that is named, or all that have a number at every epoch.

    Raises:
        UsageError: the one that is named has not.
    """
    named = [budget.attack] if budget.attack else list(grid.attacks)
    points = [Evidence(cell, epoch) for cell in cells for epoch in range(1, cell.epochs + 1)]
    everywhere = [attack for attack in named if all(attack in point.scores([attack]) for point in points)]
    if not everywhere:
        raise UsageError(
            f"recommend compares every epoch, and {', '.join(named)} has no number at some: hold another attack to the "
            "budget"
        )
    return everywhere


def _candidate(cells: list[Cell], points: list[Checkpoint], budget: Budget, level: float) -> Candidate:
    epoch, attacks = points[0].epoch, list(points[0].auc)
    aucs = {attack: auc_over_seeds([point.auc[attack] for point in points], level) for attack in attacks}
    excess = {attack: auc.high - budget.auc if budget.auc is not None else -math.inf for attack, auc in aucs.items()}
    for metric, limit in _rates(budget).items():
        for attack, bound in _highest_rates(cells, epoch, attacks, metric, level).items():
            excess[attack] = max(excess[attack], bound - limit)
    attack = max(excess, key=lambda name: excess[name])
    log_perplexity = over_seeds([point.log_perplexity for point in points])
    seeds = tuple(cell.spec.seed for cell in cells)
    return Candidate(cells[0].label, seeds, epoch, tuple(points), log_perplexity, attack, aucs[attack], excess[attack])


def _rates(budget: Budget) -> dict[str, float]:
    limits = {metric: getattr(budget, metric, None) for metric in FALSE_POSITIVE_RATES}
    return {metric: limit for metric, limit in limits.items() if limit is not None}


def _highest_rates(
    cells: list[Cell], epoch: int, attacks: Sequence[str], metric: str, level: float
) -> dict[str, float]:
    """Attack -> the highest upper bound of any seed; a rate that is refused cannot be promised and counts as 1."""
    from imprint.measures import tpr_at_fpr
    from imprint.measures.auc import codes

    highest = dict.fromkeys(attacks, 0.0)  # which all have scores: see `held_to`
    for cell in cells:
        groups = codes(cell.groups("member")), codes(cell.groups("nonmember"))
        for attack, scores in cell.scores(epoch, attacks).items():
            try:
                bound = tpr_at_fpr(*cell.sides(scores), FALSE_POSITIVE_RATES[metric], level, *groups).high
            except InvalidAudit:
                bound = 1.0
            highest[attack] = max(highest[attack], bound)
    return highest
