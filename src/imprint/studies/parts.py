"""The grids that studies are made of. Studies that name the same cell share it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from imprint.errors import UsageError
from imprint.spec import ModelSpec
from imprint.studies.setting import PAPER_METHODS, STRUCTURED, Setting

Method = str | dict[str, Any]
RANK = 8
"""LoRA's default, where ranks are equal and parameters are not."""


@dataclass(frozen=True)
class Part:
    """A recipe, and whether its learning rates are to be searched for."""

    recipe: dict[str, Any]
    search: bool = True


def _part(setting: Setting, model: str, data: Mapping[str, Any], methods: Sequence[Method], **train: Any) -> Part:
    recipe = {"model": model, "data": dict(data), "method": list(methods), "train": {**setting.train, **train}}
    return Part(recipe, search=setting.controlled)


def main(setting: Setting, methods: Sequence[Method] = PAPER_METHODS) -> list[Part]:
    """The five methods on every data set: Table 2, Figures 1 to 3, observations 1, 2 and 4."""
    return [_part(setting, setting.model, data, methods) for data in setting.data]


def pair(setting: Setting) -> list[Part]:
    """LoRA and prefix tuning on every data set: Figure 2."""
    return main(setting, ("lora", "prefix"))


def first(setting: Setting) -> list[Part]:
    """The five methods on the first data set."""
    return main(setting)[:1]


def family(setting: Setting) -> list[Part]:
    """Six methods on models of growing size, the first data set: Table 3 and observation 3."""
    methods = ("full", *PAPER_METHODS)
    return [_part(setting, model, setting.data[0], methods, epochs=half(setting)) for model in setting.family]


def sizes(setting: Setting) -> list[Part]:
    """`family`, for a claim about size.

    Raises:
        UsageError: fewer than two models.
    """
    if len(set(setting.family)) < 2:
        raise UsageError("a claim about model size needs models of different sizes: give --model two or more times")
    return family(setting)


def structured(setting: Setting) -> list[Part]:
    """`main`, for a claim about structured data.

    Raises:
        UsageError: no structured data among those given, or nothing else.
    """
    given = [data["source"]["name"] for data in setting.data]
    if not 0 < sum(name in STRUCTURED for name in given) < len(given):
        raise UsageError(
            f"a claim about structured data needs some ({' or '.join(STRUCTURED)}) and some that is not: --data gives "
            f"{', '.join(given)}"
        )
    return main(setting)


def half(setting: Setting) -> int:
    """The paper's tables are of its fifth epoch: half of the fifteen are enough to see the best one.

    As published, all of them: with a decaying rate the fifth of eight epochs is another than the fifth of fifteen.
    """
    epochs: int = setting.train["epochs"]
    return math.ceil(epochs / 2) if setting.controlled else epochs


def placement(setting: Setting) -> list[Part]:
    """LoRA by placement: at equal rank as in Table 4, and, controlled, at equal trainable parameters.

    Single matrices, each at the same number of parameters, on the first data set alone.
    """
    data, model, epochs = setting.data[:2], setting.placements, half(setting)
    parts = [_part(setting, model, one, [_lora(p, RANK) for p in THREE], epochs=epochs) for one in data]
    if setting.controlled:
        equal, single = equal_ranks(model, THREE), equal_ranks(model, matrices(model))
        parts += [_part(setting, model, one, [_lora(p, equal[p]) for p in THREE], epochs=epochs) for one in data]
        parts.append(_part(setting, model, data[0], [_lora(p, rank) for p, rank in single.items()], epochs=epochs))
    return parts


THREE = ("attention", "projection", "both")


def experts(setting: Setting) -> list[Part]:
    """LoRA on a dense model and on one with experts, of equal active parameters, at equal trainable parameters.

    A router has so few weights that it cannot have as many: it is adapted at full rank.
    """
    dense, sparse = equal_ranks(setting.dense, THREE), equal_ranks(setting.sparse, ("attention", "experts", "both"))
    router = _lora("router", _router_rank(setting.sparse))
    of_dense: list[Method] = ["head", "prefix", *(_lora(p, r) for p, r in dense.items())]
    of_sparse: list[Method] = ["head", "prefix", *(_lora(p, r) for p, r in sparse.items()), router]
    return [
        _part(setting, model, setting.data[0], methods, epochs=half(setting))
        for model, methods in ((setting.dense, of_dense), (setting.sparse, of_sparse))
    ]


def amount(setting: Setting) -> list[Part]:
    """More records to tune on beside the same members, and members that occur more often among them."""
    data = setting.data[0]
    members = max(1, data.get("members", 1000) // 2)
    sizes = [members * factor for factor in (1, 2, 4)]
    methods = ["head", "lora", "prefix"]
    grown = [{**data, "members": members, "tune_on": size} for size in sizes]
    repeated = [{**data, "members": members, "tune_on": sizes[1], "repeat": times} for times in (2, 4, 8)]
    return [
        replace(_part(setting, setting.model, one, methods, epochs=half(setting)), search=False)
        for one in grown + repeated
    ]


def misread(setting: Setting) -> list[Part]:
    """The methods whose outputs are longer than their inputs: where they leak little, and where they leak a lot.

    Few records for many epochs make virtual tokens remember, so that there is something to lose by misreading.
    """
    few = {**setting.data[0], "members": FEW}
    few.pop("tune_on", None)
    epochs = 4 * setting.train["epochs"]
    leaky = _part(setting, setting.model, few, LONGER, epochs=epochs, batch_size=4, schedule="constant")
    return [*main(setting, LONGER), replace(leaky, search=False)]


LONGER = ("prompt", "p_tuning")
FEW = 96  # enough for the power gate beside 300 non-members


def remedies(setting: Setting) -> list[Part]:
    """LoRA on the first data set as it is and with one remedy at a time, then every method with and without privacy.

    The latter once more with canaries, so that what private training promises stands beside what it shows: apart,
    because canaries are none of the data, and a method that follows them learns less of the rest. Without Opacus
    nothing is trained privately.
    """
    data = setting.data[0]
    planted = {**data, "canaries": str(CANARIES)}

    def part(methods: Sequence[Method], data: Mapping[str, Any] = data, **train: Any) -> Part:
        return replace(_part(setting, setting.model, data, methods, epochs=half(setting), **train), search=False)

    smaller = [{"lora": options} for options in ({"rank": 1}, {"placement": "attention"}, {"dropout": 0.1})]
    trained = ({"weight_decay": 0.1}, {"goldfish": 4}, {"stop": {"attack": "ref", "auc": 0.7}})
    parts = [part([*PAPER_METHODS, *smaller]), *(part(["lora"], **differently) for differently in trained)]
    parts += [part(["lora"], {**data, "repeat": 4}), part(PAPER_METHODS, planted)]
    if find_spec("opacus"):
        strong, weak = ({"epsilon": epsilon, **PRIVATE} for epsilon in (2, 8))
        for records in (data, planted):
            parts += [part(PAPER_METHODS, records, dp=weak), part(["lora"], records, dp=strong)]
    return parts


CANARIES = Path(__file__).parent / "canaries.json"
"""`imprint canaries make --model tiny/gpt2-medium --count 200 --family digits --family names --family rare
--repetitions 1 --seed 0`."""
PRIVATE = {"clip": 0.01, "delta": 1e-5}
"""Below the norm of nearly every record's gradient, so that all weigh alike and no noise is added for the sake of a few
large ones; AdamW makes up for the scale. Default learning rates then suit private training as well (docs/remedies.md).
A δ that is small beside one over the number of canaries, or these could prove next to nothing."""


def _lora(place: str, rank: int) -> dict[str, Any]:
    return {"lora": {"placement": place, "rank": rank}}


def _structure(model: str) -> Any:
    """The modules of a model without their weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from imprint.tuning.locate import locate

    config = AutoConfig.from_pretrained(locate(ModelSpec(name=model)).path, trust_remote_code=False)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def equal_ranks(model: str, placements: Sequence[str]) -> dict[str, int]:
    """A rank for each placement such that all train nearly the same number of parameters.

    The largest placement has a rank between 2 and 8; among these the numbers are as equal as whole ranks allow.

    Raises:
        UsageError: a placement fits nothing in this model.
    """
    from imprint.tuning.placement import weights_per_rank

    structure = _structure(model)
    unit = {place: weights_per_rank(structure, place) for place in placements}
    largest = max(unit.values())

    def ranks(total: int) -> dict[str, int]:
        return {place: max(1, round(total / size)) for place, size in unit.items()}

    def mismatch(total: int) -> float:
        counts = [rank * unit[place] for place, rank in ranks(total).items()]
        return max(counts) / min(counts)

    totals = sorted({rank * size for size in unit.values() for rank in range(1, 8 * largest // size + 1)})
    return ranks(min((total for total in totals if total >= 2 * largest), key=lambda total: (mismatch(total), total)))


def active_parameters(model: str) -> int:
    """Parameters that a token meets: of the experts of a layer those that are chosen."""
    from imprint.tuning.models import expert_share
    from imprint.tuning.placement import expert_weights

    structure = _structure(model)
    whole: int = sum(parameter.numel() for parameter in structure.parameters())
    return whole - round(expert_weights(structure) * (1 - expert_share(structure.config)))


def matrices(model: str) -> list[str]:
    """The names that tell a model's adaptable matrices apart, attention first: q, k, v and so on."""
    from imprint.tuning.placement import distinct_names

    return distinct_names(_structure(model))


def _router_rank(model: str) -> int:
    """The number of experts: a router's rank is at most that."""
    from imprint.tuning.models import experts_of

    if count := experts_of(_structure(model).config):
        return count
    raise UsageError(
        f"{model} has no experts: give a mixture-of-experts model last, as in --model DENSE --model SPARSE"
    )


def documents(parts: Sequence[Part], searched: bool) -> list[dict[str, Any]]:
    """The recipes of the parts that are searched, or that are not."""
    return [part.recipe for part in parts if part.search == searched]
