"""Figures of Hou et al. 2025, "Impact of Fine-Tuning Methods on Memorization in Large Language Models".

Read from `paper.json`, where every block names its source and whether it is exact, digitised or judged by eye.
Methods, attacks, placements and data go by the names of a recipe. A lookup gives None where the paper has no figure.

The paper counts epochs from 0 and its tables are of epoch index 4, that is after five epochs: epoch 5 of Imprint, whose
epoch 0 is the untouched base. All blocks but Table 3 are of one model, `MODEL`; `comparable` says whether a measurement
may stand beside them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from types import MappingProxyType
from typing import Any

_PAPER: dict[str, Any] = json.loads(files("imprint.studies").joinpath("paper.json").read_text(encoding="utf-8"))
_ALIASES = {
    **{name.casefold(): name for name in _PAPER["table3"]["models"]},
    **{name.casefold(): alias["model"] for name, alias in _PAPER["aliases"].items()},
}

BLOCKS = tuple(name for name in _PAPER if name != "aliases")
"""`setup`, `table2` and so on: what `SOURCE` and `comparable` go by."""
SOURCE: Mapping[str, str] = MappingProxyType({name: _PAPER[name]["source"] for name in BLOCKS})
"""Block -> where its figures stand in the paper, and how exactly they were read."""
MODEL: str = _PAPER["setup"]["models"][0]
"""Hub id of the paper's main model."""
EPOCHS: int = _PAPER["setup"]["epochs"]
TABLE_EPOCH: int = _PAPER["setup"]["table_epoch"]
"""Epoch index of the tables, counted from 0."""


@dataclass(frozen=True)
class Records:
    """How many texts the paper tunes on, and how many of each side it scores."""

    tuned: int
    members: int
    nonmembers: int


@dataclass(frozen=True)
class Range:
    """All that is known of a curve from epoch index `first` to `last`: it stays within `low` and `high`."""

    first: int
    last: int
    low: float
    high: float


def model_id(name: str) -> str | None:
    """Hub id under which the paper's figures of a model are kept; None for any other model. Case does not matter.

    >>> model_id("GPT2-XL"), model_id("some-folder/gpt2")
    ('openai-community/gpt2-xl', None)
    """
    return _ALIASES.get(name.casefold())


def comparable(model_name: str, data_name: str, block: str) -> bool:
    """Whether a block of the paper is of this model on these data, so that its figures may stand beside one's own.

    The block matters: the paper has GPT-2 on WikiText, but in Table 3 alone, and Table 2 beside it would be another
    model's. Copies of a model under another owner count only if `paper.json` lists them with a reason.

    Args:
        model_name: Hub id or one of its aliases.
        data_name: name of the benchmark.
        block: one of `BLOCKS`.

    Raises:
        KeyError: no such block.

    >>> comparable("gpt2", "wikitext-2", "table3"), comparable("gpt2", "wikitext-2", "table2")
    (True, False)
    """
    return model_id(model_name) in _PAPER[block]["models"] and data_name in _PAPER[block]["data"]


def records(data: str) -> Records | None:
    """Numbers of records of a data set."""
    found = _PAPER["setup"]["records"].get(data)
    return Records(**found) if found else None


def table2(data: str, method: str, attack: str) -> float | None:
    """AUC of an attack on `MODEL` after five epochs.

    >>> table2("webnlg", "lora", "zlib"), table2("webnlg", "full", "zlib")
    (0.8383, None)
    """
    return _number("table2", "auc", data, method, attack)


def table2_perplexity(data: str, method: str) -> float | None:
    """Validation perplexity of `MODEL` after five epochs."""
    return _number("table2", "perplexity", data, method)


def table3(model: str, method: str) -> float | None:
    """AUC of LOSS on WikiText-2 after five epochs; `model` is a Hub id or one of its aliases."""
    return _number("table3", "auc", model_id(model) or model, method)


def table4(data: str, placement: str, attack: str) -> float | None:
    """AUC of an attack on `MODEL` with LoRA on `attention`, `projection` or `both`; at which epoch it does not say."""
    return _number("table4", "auc", data, placement, attack)


def figure1(data: str, method: str) -> list[float] | None:
    """[E] AUC of LOSS on `MODEL` by epoch index, NaN where only a range is known; None where nothing else is."""
    return _curve("figure1", data, method)


def figure1_range(data: str, method: str) -> Range | None:
    """What is known of the AUC where the curves lie too close to be read apart.

    On WikiText-2 one range holds the three prompt-based methods together.
    """
    return _range("figure1", data, method)


def figure2(data: str, method: str) -> tuple[float, float] | None:
    """Modes of the loss, nats per token, of members and of non-members; `method` is `base`, `lora` or `prefix`."""
    found = _PAPER["figure2"]["modes"].get(data, {}).get(method)
    return (found[0], found[1]) if found else None


def figure3(data: str, method: str) -> list[float] | None:
    """[E] validation perplexity of `MODEL` by epoch index, NaN where only a range is known."""
    return _curve("figure3", data, method)


def figure3_range(data: str, method: str) -> Range | None:
    """What is known of the validation perplexity where single epochs cannot be read."""
    return _range("figure3", data, method)


def _number(*keys: str) -> float | None:
    found: Any = _PAPER
    for key in keys:
        found = found.get(key, {})
    return found if isinstance(found, float) else None


def _series(figure: str, data: str, method: str) -> dict[str, Any]:
    found: dict[str, Any] = _PAPER[figure]["series"].get(data, {}).get(method, {"points": []})
    return found


def _curve(figure: str, data: str, method: str) -> list[float] | None:
    points = _series(figure, data, method)["points"]
    return [*points, *[math.nan] * (EPOCHS - len(points))] if points else None


def _range(figure: str, data: str, method: str) -> Range | None:
    found = _series(figure, data, method).get("range")
    return Range(**found) if found else None
