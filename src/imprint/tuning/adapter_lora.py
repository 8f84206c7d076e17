"""Where the matrices of a stranger's LoRA belong in a base model, and the weights that it brings whole."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from imprint.errors import ModelError
from imprint.tuning.adapter_config import CONFIG, MERGE, ranks_of
from imprint.tuning.adapter_patterns import alpha_of
from imprint.tuning.adapter_tensors import OTHER_BASE, PREFIX, Shapes, bare, misfit, pair_of, rank_of, split
from imprint.tuning.models import names_as_they_are

if TYPE_CHECKING:
    from imprint.tuning.adapters import Adapter


def with_lora(host: nn.Module, adapter: Adapter) -> PeftModel:
    """PEFT's layers around every matrix that the adapter has tensors for, yet to be filled."""
    settings = adapter.settings
    modules, parameters = _places(host, adapter)
    ranks = modules | parameters
    if wrong := [path for path, rank in ranks.items() if rank not in ranks_of(settings)]:
        raise ModelError(
            f"{adapter.weights}: {wrong[0]} has rank {ranks[wrong[0]]}, but {CONFIG} states "
            f"{' and '.join(map(str, sorted(ranks_of(settings))))}"
        )
    rank, rank_pattern = _with_exceptions(ranks)
    alpha, alpha_pattern = _with_exceptions({path: alpha_of(path, settings) for path in ranks})
    config = LoraConfig(
        task_type="CAUSAL_LM",
        inference_mode=True,
        init_lora_weights=False,
        target_modules=list(modules),
        r=rank,
        rank_pattern=rank_pattern,
        lora_alpha=alpha,
        alpha_pattern=alpha_pattern,
        use_rslora=settings["use_rslora"],
        use_dora=settings["use_dora"],
        lora_bias=settings["lora_bias"],
        fan_in_fan_out=any(isinstance(host.get_submodule(path), Conv1D) for path in modules),
        **({"target_parameters": list(parameters)} if parameters else {}),
    )
    with names_as_they_are(host):
        return get_peft_model(host, config)


def _with_exceptions(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(the most frequent value, pattern of the paths that have another → that one)."""
    [(most, _)] = Counter(values.values()).most_common(1)
    others: dict[Any, list[str]] = {}
    for path, value in values.items():
        if value != most:
            others.setdefault(value, []).append(re.escape(path))
    return most, {"|".join(paths): value for value, paths in others.items()}


def _places(host: nn.Module, adapter: Adapter) -> tuple[dict[str, int], dict[str, int]]:
    """(path of a module → rank, path of a parameter outside any linear layer → rank).

    PEFT keeps the matrices for parameters, of experts and routers, under the name of the module: `experts.lora_A`, and
    further ones of the same module under `experts.base_layer.lora_A` …, the first parameter innermost.
    """
    adapted, _ = split(adapter.weights, adapter.shapes)
    found = dict(host.named_modules())
    modules: dict[str, int] = {}
    nested: dict[str, list[str]] = {}
    for path, parts in adapted.items():
        module = found.get(bare(path))
        if module is None:
            fused = " (its experts may be one matrix here)" if ".experts." in path else ""
            name = f"{type(host).__name__} does not have{fused}"
            raise ModelError(f"{adapter.weights} adapts {bare(path)}, which {name}: {OTHER_BASE}")
        if isinstance(module, nn.Linear | Conv1D | nn.Embedding):
            _check_ends(path, parts, _ends(module), host, adapter)
            modules[path] = rank_of(parts)
        else:
            nested.setdefault(bare(path), []).append(path)
    parameters = {}
    for owner, paths in nested.items():
        own = {f"{owner}.{name}": parameter for name, parameter in found[owner].named_parameters(recurse=False)}
        named = adapter.settings["target_parameters"]
        matrices = [name for name, parameter in own.items() if parameter.ndim in (2, 3)]
        chosen = [name for name in matrices if any(name == one or name.endswith(f".{one}") for one in named)]
        if len(chosen) != len(paths):
            raise ModelError(
                f"{adapter.weights} adapts {owner} {len(paths)} times, but target_parameters in {CONFIG} names "
                f"{len(chosen)} of its parameters: {OTHER_BASE}"
            )
        for name, path in zip(chosen, sorted(paths, key=len, reverse=True), strict=True):
            experts, *ends = own[name].shape if own[name].ndim == 3 else (1, *own[name].shape)
            _check_ends(path, adapted[path], ends, host, adapter)
            parameters[name] = rank_of(adapted[path]) // experts
    return modules, parameters


def _ends(module: nn.Module) -> tuple[int, int]:
    """Numbers that go into a layer, and that come out of it."""
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    return weight.shape[0], weight.shape[1]


def _check_ends(path: str, parts: Shapes, ends: Sequence[int], host: nn.Module, adapter: Adapter) -> None:
    """Before PEFT makes room: a small file must not ask for a large matrix. Experts lie one way or the other round."""
    a, b = pair_of(parts)
    into, out = ends if sorted(ends) != sorted((parts[a][1], parts[b][0])) else (parts[a][1], parts[b][0])
    for part, needed in ((a, (parts[a][0], into)), (b, (out, parts[a][0]))):
        if parts[part] != needed:
            raise misfit(adapter.weights, f"{PREFIX}{path}.{part}", parts[part], needed, host)


def put_whole_weights(host: Any, adapter: Adapter, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights that the adapter holds whole take the place of the copy's own; returns the tensors that are left.

    PEFT writes those of `modules_to_save`, and the embeddings where it thinks that they may have changed: what equals
    the base's is left alone.
    """
    whole = _whole_weights(adapter)
    given = {name: tensors[key] for key, name in whole.items()}
    own = dict(host.named_parameters(remove_duplicate=False))
    saved = _of_saved_modules(host, adapter)
    if lacking := sorted(saved - given.keys()):
        raise ModelError(
            f"{adapter.weights} lacks {lacking[0]}, which {CONFIG} names among modules_to_save: {OTHER_BASE}"
        )
    for name, tensor in given.items():
        _check_whole(name, tensor, own, host, adapter)
    changed = [name for name, tensor in given.items() if not torch.equal(tensor.float(), own[name].cpu().float())]
    tied = {name: [other for other in own if own[other] is own[name]] for name in changed}
    for name in set(changed) - saved:  # PEFT would copy it into the weight that all of these share
        if any(other not in given or not torch.equal(given[other], given[name]) for other in tied[name]):
            raise ModelError(
                f"{adapter.weights}: {name} would replace a weight that is in {len(tied[name])} places of the base: "
                f"{MERGE}"
            )
    for name in changed:
        owner, _, leaf = name.rpartition(".")
        new = given[name].to(own[name].device, own[name].dtype)  # as PEFT, which copies into modules of the base's type
        setattr(host.get_submodule(owner), leaf, nn.Parameter(new, requires_grad=False))
        if len(tied[name]) > 1:
            host.config.tie_word_embeddings = False
    return {name: tensor for name, tensor in tensors.items() if name not in whole}


def _whole_weights(adapter: Adapter) -> dict[str, str]:
    """Tensor → name in the model: PEFT puts `base_layer` in between where the layer is adapted as well."""
    adapted, whole = split(adapter.weights, adapter.shapes)
    names = {}
    for key in whole:
        owner, _, leaf = key.removeprefix(PREFIX).rpartition(".")
        if (bare(owner) in adapted) != (bare(owner) != owner):
            raise ModelError(f"{adapter.weights}: the tensor {key} has no place: {OTHER_BASE}")
        names[key] = f"{bare(owner)}.{leaf}"
    return names


def _of_saved_modules(host: nn.Module, adapter: Adapter) -> set[str]:
    """Weights of the modules that are meant by `modules_to_save`: PEFT matches the ends of their paths."""
    ends = tuple(adapter.settings["modules_to_save"])
    modules = host.named_modules(remove_duplicate=False)
    return {f"{path}.{leaf}" for path, module in modules if path.endswith(ends) for leaf in module.state_dict()}


def _check_whole(
    name: str, tensor: torch.Tensor, own: Mapping[str, torch.Tensor], host: nn.Module, adapter: Adapter
) -> None:
    there = own.get(name)
    if there is None or not there.is_floating_point():
        why = "does not have" if there is None else "holds in few bits only"
        raise ModelError(
            f"{adapter.weights} holds the weight {name} whole, which {type(host).__name__} {why}: {OTHER_BASE}"
        )
    if there.shape == tensor.shape:
        return
    rows = there.ndim == 2 == tensor.ndim and there.shape[1] == tensor.shape[1]
    if rows and there.shape[0] == host.config.get_text_config().vocab_size:  # type: ignore[union-attr, operator]
        raise ModelError(
            f"{adapter.weights}: {name} has {tensor.shape[0]:,} rows, the model {there.shape[0]:,}: it was tuned with "
            f"another vocabulary; {MERGE}"
        )
    raise misfit(adapter.weights, name, tensor.shape, there.shape, host)
