"""Which weight matrices LoRA adapts: found by structure, so that no architecture needs a table.

`attention`: linear layers inside a module whose class is called `…Attention` (q, k, v and output, fused or not).
`projection`: the other linear layers of the decoder blocks (feed-forward up, gate and down; experts), routers
excepted. GPT-2 calls both outputs `c_proj`, so full paths are given to PEFT, never suffixes.
"""

from __future__ import annotations

from torch import nn

from imprint.errors import UsageError

PLACEMENTS = ("attention", "projection", "both")


def targets(model: nn.Module, placement: str) -> tuple[list[str], list[str], bool]:
    """(module paths, parameter paths of fused experts, whether the weights are stored transposed as in GPT-2).

    Raises:
        UsageError: an explicit name matches nothing; the sentence lists the names there are.
    """
    attention, projection, experts = _matrices(model)
    if placement == "attention":
        modules, parameters = attention, []
    elif placement == "projection":
        modules, parameters = projection, experts
    elif placement == "both":
        modules, parameters = attention + projection, experts
    else:
        modules, parameters = _named(placement, attention + projection, experts)
    transposed = any(type(model.get_submodule(name)).__name__ == "Conv1D" for name in modules)
    return modules, parameters, transposed


def _matrices(model: nn.Module) -> tuple[list[str], list[str], list[str]]:
    """Paths of attention matrices, of feed-forward matrices, and of fused expert parameters."""
    classes = {name: type(module).__name__ for name, module in model.named_modules()}
    blocks = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    attention, projection, experts = [], [], []
    for name, module in model.named_modules():
        if not name.startswith(blocks):
            continue  # the head and the embeddings lie outside the blocks
        parents = [classes[name.rsplit(".", n)[0]] for n in range(1, name.count(".") + 1)]
        if isinstance(module, nn.Linear) or classes[name] == "Conv1D":
            if any("Attention" in parent for parent in parents):
                attention.append(name)
            elif not name.endswith(("gate", "router")):
                projection.append(name)
        elif "Experts" in classes[name]:  # all experts of a layer in one three-dimensional parameter
            experts += [f"{name}.{p}" for p, value in module.named_parameters(recurse=False) if value.ndim == 3]
    return attention, projection, experts


def _named(placement: str, modules: list[str], experts: list[str]) -> tuple[list[str], list[str]]:
    wanted = [part.strip() for part in placement.split(",") if part.strip()]
    known = sorted({name.rsplit(".", 1)[-1] for name in modules + experts})

    def match(paths: list[str], name: str) -> list[str]:
        return [path for path in paths if path == name or path.endswith(f".{name}")]

    for name in wanted or [placement]:
        if not match(modules + experts, name):
            raise UsageError(
                f"method.lora.placement: {name!r} is neither one of {', '.join(PLACEMENTS)} nor a matrix of this model "
                f"({', '.join(known)})"
            )
    return (
        [path for name in wanted for path in match(modules, name)],
        [path for name in wanted for path in match(experts, name)],
    )
