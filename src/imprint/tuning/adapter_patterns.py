"""Which matrices the keys of `alpha_pattern` mean: PEFT runs them as regular expressions, a stranger's are not run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

MOST_NAMES = 4096
"""Names or patterns in one list: each is compared with each matrix of a model."""
NAMED = re.compile(r"(?:\^|\.\*\\\.)?((?:\w|-|\\?\.)+)\$?", re.ASCII)
"""Keys that are read: the end of a path, or a whole one, in the ways in which people and PEFT itself write them."""


def alpha_of(path: str, settings: Mapping[str, Any]) -> float:
    """Alpha of the matrix at `path`, as PEFT finds it: the first key that the path ends in, or is.

    A dot without a backslash stands for any character, as it does there.

    >>> alpha_of("model.layers.0.mlp.up_proj", {"lora_alpha": 16.0, "alpha_pattern": {"up_proj": 4.0}})
    4.0
    >>> alpha_of("model.layers.0.mlp.up_proj", {"lora_alpha": 16.0, "alpha_pattern": {"p_proj": 4.0}})
    16.0
    """
    own = (alpha for key, alpha in settings["alpha_pattern"].items() if _ends_in(path, key))
    return float(next(own, settings["lora_alpha"]))


def _ends_in(path: str, key: str) -> bool:
    """Whether `(.*\\.)?(key)$` matches, for a key of the form `NAMED`."""
    tail = _characters(key)
    start = len(path) - len(tail)
    if start < 0 or any(wanted not in (one, None) for one, wanted in zip(reversed(path), reversed(tail), strict=False)):
        return False
    if start == 0:
        return not key.startswith(".*")
    return path[start - 1] == "." and not key.startswith("^")


@lru_cache(maxsize=2 * MOST_NAMES)
def _characters(key: str) -> tuple[str | None, ...]:
    """What a path must end in; None: any character."""
    match = NAMED.fullmatch(key)
    assert match is not None
    return tuple(None if one == "." else one[-1] for one in re.findall(r"\\?.", match[1]))
