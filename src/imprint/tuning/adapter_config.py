"""What a stranger's adapter_config.json says, key by key; torch and peft are not imported here.

PEFT acts on much that this file can say: it imports modules that are named there, runs regular expressions, fetches
models, changes base weights. None of this is needed to score a trained adapter. So every key belongs to one of three
kinds: it is read and checked here (`_CHECKS`), it says how training went and changes no score of what came out
(`_INERT`), or it must be empty. Keys that a newer PEFT may add are of the third kind: empty, or refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sized
from pathlib import Path
from typing import Any

from imprint.errors import ModelError
from imprint.tuning.adapter_patterns import MOST_NAMES, NAMED
from imprint.tuning.locate import json_object

CONFIG = "adapter_config.json"
KINDS = {"LORA": "lora", "PREFIX_TUNING": "prefix", "PROMPT_TUNING": "prompt", "P_TUNING": "p_tuning"}
"""PEFT's name of a method → ours."""
MERGE = "merge it into its base where you trust it (merge_and_unload), and audit the merged folder with --reference"
_LARGEST = 1 << 20
"""Bytes of adapter_config.json: a rank for each of a thousand matrices takes a tenth."""
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")

_TRAINING = {"inference_mode", "peft_version"}
_INERT = {
    "lora": _TRAINING
    | {
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),  # the tensors' names tell
        *("fan_in_fan_out", "lora_dropout", "qalora_group_size", "runtime_config"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # how it began, see `_start`
    },
    "prefix": _TRAINING | {"encoder_hidden_size", "prefix_projection", "init_weights"},  # what came out is saved
    "prompt": _TRAINING | {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path"},
    "p_tuning": _TRAINING
    | {"encoder_hidden_size", "encoder_num_layers", "encoder_dropout", "encoder_reparameterization_type"},
}
STARTS = ("gaussian", "eva", "orthogonal", "mica")
"""Starts of LoRA that leave the base as it is. PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA take theirs out of its weights,
and some do so again when the adapter is loaded."""


class _Wrong(Exception):
    """What is wrong with a value."""


def read_config(file: Path) -> tuple[str, dict[str, Any]]:
    """(method, the settings that decide what the adapter computes, defaults filled in).

    Raises:
        ModelError: no JSON object, a method that cannot be scored, or a key with a value that is not understood.
    """
    document = json_object(file, _LARGEST, finite=True)
    given = document.pop("peft_type", None)
    kind = KINDS.get(given) if isinstance(given, str) else None
    if kind is None:
        raise ModelError(
            f"{file}: peft_type is {_shown(given)}: expected one of {', '.join(KINDS)}; another method's adapter can "
            f"be audited whole: {MERGE}"
        )
    checks = _CHECKS["all"] | _CHECKS["lora" if kind == "lora" else "virtual"]
    settings: dict[str, Any] = {}
    for key, check in checks.items():
        try:
            settings[key] = check(document.pop(key, None))
        except _Wrong as wrong:
            raise ModelError(f"{file}: {key} {wrong}") from None
    for key, value in document.items():
        if key not in _INERT[kind] and not _empty(value):
            raise ModelError(
                f"{file}: {_shown(key)} is {_shown(value)}: this key may change what the adapter computes, and is not "
                f"supported{f'; {MERGE}' if kind == 'lora' else ''}"
            )
    return kind, settings


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _empty(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)


def _flag(value: Any) -> bool:
    if value is not None and not isinstance(value, bool):
        raise _Wrong(f"is {_shown(value)}: expected true or false")
    return bool(value)


def _or(default: Any, check: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """PEFT's default where there is no value."""
    return lambda value: default if value is None else check(value)


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1 << 20:
        raise _Wrong(f"is {_shown(value)}: expected a whole number from 1 to {1 << 20:,}")
    return value


def _alpha(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
        raise _Wrong(f"is {_shown(value)}: expected a number above 0")
    return float(value)


def _names(value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(one, str) and _NAME.fullmatch(one) for one in value):
        raise _Wrong(f"is {_shown(value)}: expected a list of names")
    _few(value)
    return value


def _few(value: Sized) -> None:
    """Each is compared with each matrix of the model."""
    if len(value) > MOST_NAMES:
        raise _Wrong(f"has {len(value):,} entries: expected at most {MOST_NAMES:,}")


def _pattern(value: Any, check: Callable[[Any], Any]) -> dict[str, Any]:
    """A mapping whose keys are names or patterns, whose values pass a check."""
    if not isinstance(value, dict):
        raise _Wrong(f"is {_shown(value)}: expected a mapping from names to numbers")
    _few(value)
    return {key: check(one) for key, one in value.items()}


def _rank_pattern(value: Any) -> dict[str, int]:
    """Whatever the keys: which matrix has which rank is told by its shape."""
    return _pattern(value, _count)


def _alpha_pattern(value: Any) -> dict[str, float]:
    """No pattern of a stranger is ever run: only names, in the few ways in which PEFT itself writes them."""
    found = _pattern(value, _alpha)
    if wrong := [key for key in found if not NAMED.fullmatch(key)]:
        raise _Wrong(
            f"has the key {_shown(wrong[0])}, a regular expression, which would have to be run: expected names such as "
            f"q_proj or model.layers.0.self_attn.q_proj; {MERGE}"
        )
    return found


def ranks_of(settings: Mapping[str, Any]) -> set[int]:
    """Every rank that the settings state."""
    return {settings["r"], *settings["rank_pattern"].values()}


def _start(value: Any) -> None:
    if value is None or isinstance(value, bool) or (isinstance(value, str) and value in STARTS):
        return
    raise _Wrong(
        f"is {_shown(value)}, a start that may take a part out of the base's weights: save it as a plain LoRA "
        f"(save_pretrained with path_initial_model_for_weight_conversion), or {MERGE}"
    )


def _one_of(*allowed: Any) -> Callable[[Any], Any]:
    def checked(value: Any) -> Any:
        if not any(value is one or (isinstance(value, str) and value == one) for one in (None, *allowed)):
            raise _Wrong(f"is {_shown(value)}: only {' or '.join(map(_shown, allowed))} can be scored")
        return value

    return checked


def _megatron(value: Any) -> None:
    if value not in (None, "megatron.core"):
        raise _Wrong(f"is {_shown(value)}, a module that would be imported: it must be megatron.core or null")


def _auto_mapping(value: Any) -> None:
    """PEFT writes the class of the base and the module it comes from, and imports that module; it is not used here."""
    if value is None:
        return
    told = dict(value) if isinstance(value, dict) else {}
    names = [told.pop(key, None) for key in ("parent_library", "base_model_class")]
    library, name = (one if isinstance(one, str) and one.isascii() else "" for one in names)
    flags = all(isinstance(one, bool) for one in told.values())  # those of other libraries
    if not (re.fullmatch(r"transformers(\.[A-Za-z_]\w*)+", library) and name.isidentifier() and flags):
        raise _Wrong(
            f"is {_shown(value)}, code that would be imported: it must be null, or name a class of Transformers as "
            "base_model_class and its module as parent_library"
        )


def _submodules(value: Any) -> None:
    if value not in (None, 1) or isinstance(value, bool):
        raise _Wrong(f"is {_shown(value)}: a causal language model has 1")


def _base(value: Any) -> str:
    """The base's name; empty where there is none that could be looked up, on this machine or on the Hub."""
    if value is not None and not isinstance(value, str):
        raise _Wrong(f"is {_shown(value)}: expected the name of a model")
    name = value or ""
    usable = name.isprintable() and len(name) <= 500 and ".." not in re.split(r"[/\\]", name)
    return name if usable and not name.startswith("-") else ""


def _revision(value: Any) -> str | None:
    if not value:
        return None
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_./-]{0,199}", value):
        raise _Wrong(f"is {_shown(value)}: expected a revision of the base model")
    return value


_CHECKS: dict[str, dict[str, Callable[[Any], Any]]] = {
    "all": {
        "task_type": _one_of("CAUSAL_LM"),
        "auto_mapping": _auto_mapping,
        "base_model_name_or_path": _base,
        "revision": _revision,
    },
    "lora": {
        "r": _or(8, _count),
        "rank_pattern": _or({}, _rank_pattern),
        "lora_alpha": _or(8.0, _alpha),
        "alpha_pattern": _or({}, _alpha_pattern),
        "use_rslora": _flag,
        "use_dora": _flag,
        "lora_bias": _flag,
        "bias": _one_of("none"),
        "init_lora_weights": _start,
        "modules_to_save": _or([], _names),
        "target_parameters": _or([], _names),
        "megatron_core": _megatron,
    },
    "virtual": {
        "num_virtual_tokens": _count,
        "token_dim": _or(None, _count),
        "num_layers": _or(None, _count),
        "num_attention_heads": _or(None, _count),
        "num_transformer_submodules": _submodules,
    },
}
