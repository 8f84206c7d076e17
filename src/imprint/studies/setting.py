"""On what a study is run: the paper's models and data, or small ones that two cores handle in minutes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from imprint.data.benchmarks import BENCHMARKS
from imprint.errors import UsageError, unknown

PROTOCOLS = ("controlled", "published")
PAPER_METHODS = ("head", "lora", "prefix", "prompt", "p_tuning")
PARAMETER_BASED, PROMPT_BASED = ("head", "lora"), ("prefix", "prompt", "p_tuning")
STRUCTURED = ("webnlg", "world/triples")
"""Data whose texts follow from a structure given in the prompt: the paper's fourth observation is about these."""
ATTACKS = ("loss", "ref", "zlib", "min_k")
"""The paper's four."""
RATES = (0.25, 1.0, 4.0)
"""The search: so many times a method's default learning rate."""


@dataclass(frozen=True)
class Setting:
    """Where a study is run.

    Attributes:
        name: `small` or `paper`.
        protocol: `controlled` or `published`.
        model: the main model.
        family: models of growing size.
        placements: the model whose matrices are told apart, q, k and v each by itself where it keeps them apart.
        dense, sparse: a model without and one with experts, of equal active parameters.
        data: `data` of a recipe for each data set.
        train: `train` of a recipe.
        seeds: training seeds.
    """

    name: str
    protocol: str
    model: str
    family: tuple[str, ...]
    placements: str
    dense: str
    sparse: str
    data: tuple[dict[str, Any], ...]
    train: dict[str, Any]
    seeds: int

    @property
    def controlled(self) -> bool:
        return self.protocol == "controlled"


_SMALL = {"members": 300, "nonmembers": 300, "validation": 200}
_PAPER: dict[str, dict[str, Any]] = {
    # what a random split leaves outside the groups of non-members and validation: fewer than the paper tuned on
    "wikitext-2": {"members": 2000, "nonmembers": 2000, "validation": 1000, "tune_on": 7500},
    "webnlg": {"members": 1779, "nonmembers": 1779, "validation": 1000, "tune_on": 30000},
    "xsum": {"members": 1000, "nonmembers": 1000, "validation": 1000, "tune_on": 5000},
}
SCALES: dict[str, Setting] = {
    "small": Setting(
        name="small",
        protocol="controlled",
        model="tiny/gpt2-medium",
        family=("tiny/gpt2-small", "tiny/gpt2-medium", "tiny/gpt2-large"),
        placements="tiny/llama-medium",
        dense="tiny/llama-medium",
        sparse="tiny/mixtral-medium",
        data=tuple({"source": {"name": f"world/{kind}"}, **_SMALL} for kind in ("articles", "triples", "news")),
        train={"epochs": 15},
        seeds=3,
    ),
    "paper": Setting(
        name="paper",
        protocol="controlled",
        model="meta-llama/Llama-2-7b-hf",
        family=(
            "openai-community/gpt2",
            "openai-community/gpt2-medium",
            "openai-community/gpt2-large",
            "openai-community/gpt2-xl",
            "meta-llama/Llama-3.2-1B",
            "meta-llama/Llama-2-7b-hf",
        ),
        placements="meta-llama/Llama-2-7b-hf",
        dense="mistralai/Mistral-7B-v0.1",
        sparse="mistralai/Mixtral-8x7B-v0.1",
        data=tuple({"source": {"name": name}, **sizes} for name, sizes in _PAPER.items()),
        train={"epochs": 15},
        seeds=3,
    ),
}


def setting(
    scale: str = "small",
    protocol: str = "controlled",
    models: Sequence[str] = (),
    data: Sequence[str] = (),
    seeds: int | None = None,
) -> Setting:
    """A scale with what was asked for in its place.

    Args:
        models: one replaces every model; several are the family, and the first of them is the main model.
        data: names, or `NAME=FOLDER` for a benchmark kept locally.
        seeds: training seeds.

    Raises:
        UsageError: no such scale, protocol or benchmark folder.
    """
    if scale not in SCALES:
        raise UsageError(f"--scale: {unknown('scale', scale, SCALES)}")
    if protocol not in PROTOCOLS:
        raise UsageError(f"--protocol: {unknown('protocol', protocol, PROTOCOLS)}")
    found = replace(SCALES[scale], protocol=protocol)
    if models:
        one = models[0]
        found = replace(found, model=one, family=tuple(models), placements=one, dense=one, sparse=models[-1])
    if data:
        found = replace(found, data=tuple(_data(one, found) for one in data))
    if protocol == "published":
        found = replace(found, data=tuple(_published(one) for one in found.data), seeds=1)
    return replace(found, seeds=seeds) if seeds else found


def _data(given: str, scale: Setting) -> dict[str, Any]:
    name, equals, folder = given.partition("=")
    if equals and name not in BENCHMARKS:
        raise UsageError(f"--data {given!r}: only a benchmark has a folder: {unknown('benchmark', name, BENCHMARKS)}")
    if equals and not Path(folder).expanduser().is_dir():
        raise UsageError(f"--data {given!r}: no such folder; expected one with a file for each part of {name}")
    sizes = _PAPER.get(name, _SMALL) if scale.name == "paper" else _SMALL
    return {"source": {"name": name, **({"path": folder} if equals else {})}, **sizes}


def _published(data: dict[str, Any]) -> dict[str, Any]:
    """The benchmark's own parts and the paper's numbers; the offline world has no parts but random ones."""
    if data["source"]["name"] not in BENCHMARKS:
        return data
    sizes = {} if data.get("tune_on") else {key: data[key] for key in ("members", "nonmembers", "validation")}
    return {"source": data["source"], **sizes, "split": "official"}
