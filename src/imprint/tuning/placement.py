"""Which weight matrices LoRA adapts: found by structure, so that no architecture needs a table.

`attention`: linear layers inside a module whose class is called `…Attention` (q, k, v and output, fused or not).
`projection`: the other linear layers of the decoder blocks (feed-forward up, gate and down; experts), routers
excepted. GPT-2 calls both outputs `c_proj`, so full paths are given to PEFT, never suffixes.

Of a mixture of experts, `experts` are the matrices among which a router chooses (a shared expert, which every token
meets, is a feed-forward layer like any other), and `router` what chooses or weighs them.

Transformers keeps the experts of a layer in one parameter [E, out, in], and most routers in one [E, in], outside any
linear layer. PEFT adds W + s B A there before the product: each expert has matrices A and B of its own, and the sum
is rounded to the precision of the frozen weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import nn

from imprint.errors import UsageError

_ATTENTION, _FEED_FORWARD, _EXPERTS, _ROUTER = "attention", "feed_forward", "experts", "router"
PLACEMENTS: dict[str, tuple[str, ...]] = {
    "attention": (_ATTENTION,),
    "projection": (_FEED_FORWARD, _EXPERTS),
    "experts": (_EXPERTS,),
    "router": (_ROUTER,),
    "both": (_ATTENTION, _FEED_FORWARD, _EXPERTS),
    "all": (_ATTENTION, _FEED_FORWARD, _EXPERTS, _ROUTER),
}
"""Placement → the kinds of matrices that it takes."""


@dataclass
class _Found:
    """Paths of one kind: modules, and parameters that lie outside any linear layer."""

    modules: list[str] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)


def targets(model: nn.Module, placement: str) -> tuple[list[str], list[str], bool]:
    """(module paths, paths of bare parameters, whether the weights are stored transposed as in GPT-2).

    Raises:
        UsageError: experts or a router of a model that has none; or an explicit name that matches nothing, and the
            sentence lists the names there are.
    """
    found = _matrices(model)
    if kinds := PLACEMENTS.get(placement):
        chosen = [found[kind] for kind in kinds]
        for kind in (_EXPERTS, placement):
            if placement in (_EXPERTS, _ROUTER) and not (found[kind].modules or found[kind].parameters):
                raise UsageError(
                    f"method.lora.placement: {placement!r} needs a mixture of experts, and {type(model).__name__} has "
                    f"no {kind} that LoRA can adapt: use attention, projection or both"
                )
        modules = [path for one in chosen for path in one.modules]
        parameters = [path for one in chosen for path in one.parameters]
    else:
        modules, parameters = _named(placement, list(found.values()))
    transposed = any(type(model.get_submodule(name)).__name__ == "Conv1D" for name in modules)
    return modules, parameters, transposed


def _matrices(model: nn.Module) -> dict[str, _Found]:
    """Every matrix of the decoder blocks, by kind."""
    classes = {name: type(module).__name__ for name, module in model.named_modules()}
    blocks = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    found = {kind: _Found() for kind in PLACEMENTS["all"]}
    for name, module in model.named_modules():
        if not name.startswith(blocks):
            continue  # the head and the embeddings lie outside the blocks
        parents = [classes[name.rsplit(".", n)[0]] for n in range(1, name.count(".") + 1)]
        own = dict(module.named_parameters(recurse=False))
        if "Experts" in classes[name]:  # all experts of a layer in one three-dimensional parameter
            found[_EXPERTS].parameters += [f"{name}.{p}" for p, value in own.items() if value.ndim == 3]
        elif "Router" in classes[name]:  # even a linear layer of that class returns more than its product
            found[_ROUTER].parameters += [f"{name}.{p}" for p, value in own.items() if value.ndim == 2]
        elif isinstance(module, nn.Linear) or classes[name] == "Conv1D":
            found[_kind(name, parents)].modules.append(name)
    return found


def _kind(name: str, parents: list[str]) -> str:
    """Of a linear layer."""
    if "Gating" in parents[0] or "Router" in parents[0]:
        return _ROUTER
    if any("Attention" in parent for parent in parents):
        return _ATTENTION
    if name.endswith(("gate", "router")):
        return _ROUTER
    return _EXPERTS if "experts" in name.split(".") else _FEED_FORWARD


def _named(placement: str, found: list[_Found]) -> tuple[list[str], list[str]]:
    modules = [path for one in found for path in one.modules]
    parameters = [path for one in found for path in one.parameters]
    wanted = [part.strip() for part in placement.split(",") if part.strip()]
    known = sorted({name.rsplit(".", 1)[-1] for name in modules + parameters})

    def match(paths: list[str], name: str) -> list[str]:
        return [path for path in paths if path == name or path.endswith(f".{name}")]

    for name in wanted or [placement]:
        if not match(modules + parameters, name):
            raise UsageError(
                f"method.lora.placement: {name!r} is neither one of {', '.join(PLACEMENTS)} nor a matrix of this model "
                f"({', '.join(known)})"
            )
    return (
        [path for name in wanted for path in match(modules, name)],
        [path for name in wanted for path in match(parameters, name)],
    )


def weights_per_rank(model: nn.Module, placement: str) -> int:
    """Trainable weights that each rank of LoRA adds at a placement: rows and columns of every matrix it adapts.

    Raises:
        UsageError: as `targets`.
    """
    modules, parameters, _ = targets(model, placement)
    shapes = [tuple(model.get_parameter(path).shape) for path in (*(f"{m}.weight" for m in modules), *parameters)]
    return sum(math.prod(shape[:-2]) * (shape[-2] + shape[-1]) for shape in shapes)


def expert_weights(model: nn.Module) -> int:
    """Weights of the matrices among which routers choose."""
    found = _matrices(model)[_EXPERTS]
    paths = (*(f"{module}.weight" for module in found.modules), *found.parameters)
    return sum(model.get_parameter(path).numel() for path in paths)


def distinct_names(model: nn.Module) -> list[str]:
    """A name for each kind of attention and feed-forward matrix, as `placement` takes it: attention first.

    The last part of its path, with the part before where another kind ends alike (GPT-2's two `c_proj`).
    """
    found = _matrices(model)
    paths = [path.split(".") for kind in (_ATTENTION, _FEED_FORWARD) for path in found[kind].modules]
    parents: dict[str, set[str]] = {}
    for path in paths:
        parents.setdefault(path[-1], set()).add(path[-2])
    return list(dict.fromkeys(path[-1] if len(parents[path[-1]]) == 1 else ".".join(path[-2:]) for path in paths))
