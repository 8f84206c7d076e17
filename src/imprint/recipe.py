"""A recipe: YAML in which every list is an axis. `plan` turns it into cells whose every option is resolved."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationInfo, field_validator

from imprint.attacks import ATTACKS, DEFAULT_ATTACKS, allow, evidence_needed, one_pass, resolve
from imprint.attacks.evidence import LEAST_SHADOWS
from imprint.canaries.manifest import read_manifest
from imprint.data import Pool, read_pool, resolve_sizes
from imprint.errors import UsageError, unknown
from imprint.passes.spec import EvidenceSpec
from imprint.spec import (
    VIRTUAL_TOKEN_ROOM,
    Budget,
    CellSpec,
    DataSpec,
    MethodSpec,
    ModelSpec,
    RunSpec,
    Strict,
    TrainSpec,
    content_key,
    validated,
)
from imprint.tuning.locate import Located, locate
from imprint.tuning.methods import method_named, resolve_method
from imprint.tuning.quantised import require

PAPER_METHODS = ("head", "lora", "prefix", "prompt", "p_tuning")
LONGEST_DEFAULT = 1024
_SHORT = {"model": "name", "data": "source", "source": "name"}
"""What a plain string stands for where a mapping may stand."""


class Recipe(Strict):
    """The keys of a recipe. Any list, `attacks` excepted, is an axis of the grid."""

    model: ModelSpec
    """Hub id, folder, shipped model, or a mapping with `name`, `revision`, `dtype`, `quantize`."""
    data: DataSpec
    """What is tuned on and scored."""
    method: MethodSpec
    """Method names, or mappings of a name to its options (default: the paper's five)."""
    train: TrainSpec = Field(default_factory=TrainSpec)
    """How to train."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Draws the initial values, the order and, unless `data.seed` is given, the split."""
    shadows: int = Field(default=0, ge=0)
    """Models tuned besides like each cell, on random halves of members and non-members, 4 or more: for `lira`,
    `lira_offline`, `rmia`, and how much each record is remembered; to rank records by these attacks too, 8 or more."""

    @field_validator("model", "data", mode="before")
    @classmethod
    def _short_form(cls, value: Any, info: ValidationInfo) -> Any:
        return {_SHORT[str(info.field_name)]: value} if isinstance(value, str) else value

    @field_validator("method", mode="before")
    @classmethod
    def _method(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, Mapping) and len(value) == 1:
            [(name, options)] = value.items()
            if options is None or isinstance(options, Mapping):
                return {"name": str(name), "options": dict(options or {})}
        raise UsageError(
            f"method: expected a name or one name with its options, as in {{lora: {{rank: 4}}}}, not {value!r}"
        )


SHARED = ("attacks", "budget", "evidence")
"""Keys that are no axis and are the same for all grids of a recipe."""
KEYS = (*Recipe.model_fields, *SHARED)
SHADOW_SEED = 0x5AD0
"""Shadow models start and shuffle by seeds of their own, from here on; those of two cells on one split are the same."""
Document = dict[str, Any] | list[dict[str, Any]]
"""A recipe as plain data: a grid, or a list of grids whose cells are taken together."""
RecipeLike = str | Path | Mapping[str, Any] | Sequence[Mapping[str, Any]]
"""A YAML file, or the same as plain data."""


@dataclass(frozen=True)
class AnyCell:
    """A cell with what it needs at hand."""

    spec: CellSpec
    label: str
    base: str
    """Key of the (model, data) whose untouched scores it shares."""
    located: Located
    pool: Pool

    @property
    def model_key(self) -> tuple[str, str, str]:
        """What is loaded: cells that agree in it share one model in memory."""
        return self.located.fingerprint, self.spec.model.dtype, self.spec.model.quantize or ""


@dataclass(frozen=True)
class PlannedCell(AnyCell):
    """A cell that is to be tuned."""

    spec: RunSpec


@dataclass(frozen=True)
class AnyPlan:
    """What is to be measured in one output folder.

    Attributes:
        passes: what makes the evidence that needs more passes.
    """

    recipe: Document
    cells: tuple[AnyCell, ...]
    attacks: tuple[str, ...]
    budget: Budget | None
    passes: EvidenceSpec = dataclasses.field(default_factory=EvidenceSpec)

    def shadows_of(self, cell: AnyCell) -> tuple[AnyCell, ...]:
        """The shadow models of a cell."""
        return ()


@dataclass(frozen=True)
class Plan(AnyPlan):
    """What a recipe stands for.

    Attributes:
        shadows: run id → the shadow models of that cell.
    """

    cells: tuple[PlannedCell, ...]
    shadows: Mapping[str, tuple[PlannedCell, ...]] = dataclasses.field(default_factory=dict)

    def shadows_of(self, cell: AnyCell) -> tuple[PlannedCell, ...]:
        return self.shadows.get(cell.spec.run_id, ())

    @property
    def trained(self) -> tuple[PlannedCell, ...]:
        """Everything that is tuned: the cells, then their shadow models, each once."""
        shadows = {one.spec.run_id: one for some in self.shadows.values() for one in some}
        return (*self.cells, *shadows.values())


def read_recipe(recipe: RecipeLike, overrides: Iterable[str] = ()) -> Document:
    """The recipe as plain data, `overrides` (`key.subkey=value`, values in YAML) applied to each of its grids.

    Raises:
        UsageError: no such file, not YAML, neither a mapping nor a list of them, or an override without `=`.
    """
    plain = isinstance(recipe, str | Path)
    document = read_yaml(_text(Path(recipe)), str(recipe)) if plain else _copy(recipe)  # type: ignore[arg-type]
    grids = document if isinstance(document, list) and document else [document]
    if not all(isinstance(grid, dict) for grid in grids):
        where = recipe if plain else "recipe"
        raise UsageError(f"{where}: a recipe is a mapping with the keys {', '.join(KEYS)}, or a list of such mappings")
    for path, value in key_values(overrides, "--set").items():
        for grid in grids:
            _put(grid, path.split("."), copy.deepcopy(value), path)
    return document  # type: ignore[no-any-return]


def key_values(given: Iterable[str], option: str, example: str = "train.epochs=3") -> dict[str, Any]:
    """What `KEY=VALUE` says, values in YAML.

    Raises:
        UsageError: one has no `=`, or a value is not YAML.
    """
    found = {}
    for one in given:
        key, equals, value = one.partition("=")
        if not equals or not key:
            raise UsageError(f"{option} {one!r}: expected KEY=VALUE, as in {example}")
        found[key] = read_yaml(value, f"{option} {key}")
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"recipe {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"recipe {path} cannot be read: {error}") from None


def read_yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        reason = " ".join(str(getattr(error, "problem", None) or error).split())
        raise UsageError(f"{where}{line}: not valid YAML ({reason})") from None


def _copy(node: Any) -> Any:
    if isinstance(node, Mapping):
        return {str(key): _copy(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [_copy(value) for value in node]
    return str(node) if isinstance(node, Path) else node


def _put(document: dict[str, Any], path: list[str], value: Any, override: str) -> None:
    for key in path[:-1]:
        inner = document.setdefault(key, {})
        if isinstance(inner, str) and key in _SHORT:
            inner = document[key] = {_SHORT[key]: inner}
        if not isinstance(inner, dict):
            raise UsageError(f"--set {override!r}: {key!r} is not a mapping in this recipe")
        document = inner
    document[path[-1]] = value


def plan(document: Mapping[str, Any] | Sequence[Mapping[str, Any]], dtype_of: Any = None) -> Plan:
    """Every cell of a recipe, validated and resolved before anything is trained.

    Args:
        document: what `read_recipe` returns. Of several grids all have the same attacks and budget.
        dtype_of: turns a dtype option into the one to use on this machine (`auto` is not part of an identity).

    Raises:
        UsageError: names the key that is wrong, what was expected and the nearest right name.
    """
    grids = [document] if isinstance(document, Mapping) else list(document)
    for grid in grids:
        for key in grid:
            if key not in KEYS:
                raise UsageError(f"recipe: {unknown('key', str(key), KEYS)}")
        for key in SHARED:
            if grid.get(key) != grids[0].get(key):
                raise UsageError(f"recipe: the grids of one recipe share their `{key}`: give the same in each")
    attacks = attack_names(grids[0].get("attacks"))
    budget = checked_budget(grids[0]["budget"], attacks) if grids[0].get("budget") is not None else None
    passes = validated(EvidenceSpec, grids[0].get("evidence") or {}, "evidence")
    cells: dict[str, PlannedCell] = {}
    counts: dict[str, int] = {}
    pools: dict[str, Pool] = {}
    for grid in grids:
        axes = {key: value for key, value in grid.items() if key not in SHARED}
        axes.setdefault("method", list(PAPER_METHODS))
        for point in _expand(axes):
            recipe = validated(Recipe, point, "")
            cell = _resolve(recipe, pools, dtype_of or (lambda name: name))
            cells.setdefault(cell.spec.run_id, cell)
            counts[cell.spec.run_id] = max(counts.get(cell.spec.run_id, 0), recipe.shadows)
            check_attacks(attacks, cell.spec.data, recipe.shadows)
    labelled = _labelled(list(cells.values()))
    shadows = {c.spec.run_id: tuple(_shadows(c, counts[c.spec.run_id])) for c in labelled}
    return Plan(_copy(document), labelled, attacks, budget, passes, shadows)


def _shadows(cell: PlannedCell, count: int) -> Iterator[PlannedCell]:
    """Cells like this one, each tuned on a half of the records; without what would end it early."""
    for number in range(count):
        train = cell.spec.train.model_copy(update={"stop": None})
        update = {"shadow": number, "seed": SHADOW_SEED + number, "train": train}
        yield dataclasses.replace(cell, spec=cell.spec.model_copy(update=update), label=f"{cell.label} shadow {number}")


def check_attacks(attacks: Sequence[str], data: DataSpec, shadows: int | None = None) -> None:
    """
    Args:
        shadows: how many shadow models there are; None where there can be none.

    Raises:
        UsageError: an attack needs what the recipe does not provide.
    """
    outside = data.validation or data.auxiliary
    apart = "set data.auxiliary" if shadows is not None else "set some apart with auxiliary (--auxiliary 200)"
    nobodys = "" if outside else f"records that nobody tuned on and nobody evaluates: {apart}"
    missing = {
        "known": "" if data.auxiliary else f"records to learn from: {apart}",
        "prefixed_members": "" if data.auxiliary else f"tuned records outside the evaluated ones: {apart}",
        "population": nobodys,
        "prefixed": nobodys,
        "token_counts": nobodys,
        "shadows": "models tuned on halves of the records, which only `imprint run` makes",
    }
    if shadows is not None:
        enough = shadows >= LEAST_SHADOWS
        missing["shadows"] = "" if enough else f"shadow models: set `shadows` to {LEAST_SHADOWS} or more"
    for attack in attacks:
        for name in evidence_needed(attack):
            if lacking := missing.get(name):
                raise UsageError(f"attacks: {attack} needs {lacking}")


def checked_budget(given: Any, attacks: tuple[str, ...]) -> Budget:
    budget = validated(Budget, given, "budget")
    limits = budget.model_dump(exclude={"attack"})
    if not any(limit is not None for limit in limits.values()):
        raise UsageError(f"budget: it sets no limit; give one of {', '.join(limits)}")
    if budget.attack and budget.attack not in attacks:
        raise UsageError(f"budget.attack: {unknown('attack', budget.attack, attacks)}")
    return budget


def attack_names(given: Any) -> tuple[str, ...]:
    """Names of attacks, or `module:function` for one's own; by default those that need no more than one pass.

    Raises:
        UsageError: one is unknown, cannot be imported, or asks for what is no evidence.
    """
    names = list(DEFAULT_ATTACKS) if given is None else [given] if isinstance(given, str) else given
    if not isinstance(names, list) or not names:
        raise UsageError(f"attacks: expected a list of names ({', '.join(ATTACKS)}) or module:function")
    allow(names)
    for name in names:
        try:
            evidence_needed(resolve(str(name)))
        except UsageError as error:
            raise UsageError(f"attacks: {error}") from None
    return tuple(dict.fromkeys(names))


def _expand(node: Any) -> list[Any]:
    """Every way to take one item of each list.

    >>> _expand({"a": [1, 2], "b": {"c": [3, 4]}})
    [{'a': 1, 'b': {'c': 3}}, {'a': 1, 'b': {'c': 4}}, {'a': 2, 'b': {'c': 3}}, {'a': 2, 'b': {'c': 4}}]
    """
    if isinstance(node, list):
        if not node:
            raise UsageError("recipe: an empty list is an axis without values")
        return [choice for item in node for choice in _expand(item)]
    if isinstance(node, Mapping):
        values = [_expand(value) for value in node.values()]
        return [dict(zip(node, combination, strict=True)) for combination in itertools.product(*values)]
    return [node]


def _resolve(recipe: Recipe, pools: dict[str, Pool], dtype_of: Any) -> PlannedCell:
    leaves_base = method_named(recipe.method.name).leaves_base  # before a model is fetched for it
    if recipe.model.quantize:
        if not leaves_base:
            raise UsageError(
                f"model.quantize: {recipe.method.name} trains the model's own weights, which cannot be trained in "
                f"{recipe.model.quantize}: leave quantize out, or use another method"
            )
        require(recipe.model.quantize)
    if recipe.train.stop:
        if recipe.train.stop.attack not in ATTACKS:
            raise UsageError(f"train.stop.attack: {unknown('attack', recipe.train.stop.attack, ATTACKS)}")
        if not one_pass([recipe.train.stop.attack]):
            raise UsageError(f"train.stop.attack: {recipe.train.stop.attack} needs more than the scores of an epoch")
    if 0 < recipe.shadows < LEAST_SHADOWS:
        raise UsageError(f"shadows: {recipe.shadows} say nothing of a record: set 0, or {LEAST_SHADOWS} or more")
    if recipe.train.dp and recipe.data.repeat > 1:
        raise UsageError("data.repeat: `train.dp` protects what is told once: leave one of them out")
    if recipe.train.dp and recipe.train.stop:
        raise UsageError(
            "train: `stop` looks at the members, which the ε of `dp` does not cover: leave one of them out"
        )
    if recipe.train.dp:
        from imprint.tuning.private import require as require_opacus

        require_opacus()
    planted = read_manifest(recipe.data.canaries) if recipe.data.canaries else None
    if planted and recipe.train.dp and any(canary.repetitions > 1 for canary in planted.canaries):
        raise UsageError(
            f"data.canaries: `train.dp` protects what is told once, and some of {recipe.data.canaries} are told more "
            "often: make others with --repetitions 1"
        )
    located = locate(recipe.model)
    method = resolve_method(recipe.method, located.hidden_size, recipe.train.learning_rate)
    key = content_key(recipe.data.model_dump(include={"source", "format", "id", "group", "subgroup", "split", "loss"}))
    pool = pools.get(key) or pools.setdefault(key, read_pool(recipe.data))
    data = resolve_sizes(recipe.data, pool)
    data = data.model_copy(
        update={
            "fingerprint": pool.fingerprint,
            "max_length": _max_length(data.max_length, method, located),
            "seed": recipe.seed if data.seed is None else data.seed,
            "sealed": planted.seal if planted else "",
        }
    )
    dtype = dtype_of(recipe.model.dtype)
    model = recipe.model.model_copy(update={"fingerprint": located.fingerprint, "dtype": dtype})
    train = recipe.train.model_copy(update={"learning_rate": None})  # now an option of the method
    spec = RunSpec(model=model, data=data, method=method, train=train, seed=recipe.seed)
    identity = spec.identity()
    base = content_key({key: identity[key] for key in ("model", "data", "version")})
    return PlannedCell(spec, method.name, base, located, pool)


def default_length(room: int) -> int:
    """Tokens kept of a text where nobody says: what fits, at most `LONGEST_DEFAULT`."""
    return max(2, min(room, LONGEST_DEFAULT))


def _max_length(given: int | None, method: MethodSpec, located: Located) -> int:
    """Tokens kept of a text: the same for every method, so that all are compared on the same texts."""
    length = given or default_length(located.context - VIRTUAL_TOKEN_ROOM)
    virtual = int(method.options.get("tokens", 0))
    if length + virtual > located.context:
        raise UsageError(
            f"data.max_length {length} and {virtual} virtual tokens of {method.name} exceed the model's context of "
            f"{located.context} tokens: set data.max_length to at most {located.context - virtual}"
        )
    return length


def _labelled(cells: list[PlannedCell]) -> tuple[PlannedCell, ...]:
    """Labels that name the method and those of its settings that differ within the grid."""

    def settings(cell: PlannedCell) -> dict[str, Any]:
        spec = cell.spec.train
        train = {key: getattr(spec, key) for key in TrainSpec.model_fields if key != "learning_rate"}
        options = dict(cell.spec.method.options)
        if options.get("alpha") == 2 * options.get("rank", 0):
            options.pop("alpha")  # the default, which follows the rank
        return {**options, **train}

    def label(cell: PlannedCell) -> str:
        # a learning rate that follows the model's width is no axis, so cells are compared within one model
        peers = [
            settings(other)
            for other in cells
            if (other.spec.model, other.spec.method.name) == (cell.spec.model, cell.spec.method.name)
        ]
        own = settings(cell)
        varying = [key for key in own if own[key] is not None and any(peer.get(key) != own[key] for peer in peers)]
        return " ".join([cell.spec.method.name, *(f"{key}={_short(own[key])}" for key in varying)])

    return tuple(dataclasses.replace(cell, label=label(cell)) for cell in cells)


def _short(value: Any) -> str:
    if isinstance(value, Strict):
        return "/".join(_short(part) for part in value.model_dump(exclude_defaults=True).values())
    return f"{value:g}" if isinstance(value, float) and math.isfinite(value) else str(value)
