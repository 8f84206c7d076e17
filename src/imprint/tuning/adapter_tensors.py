"""What a stranger's adapter_model.safetensors holds: names, shapes and types of its tensors, from the header alone."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from imprint.errors import ModelError, first_line
from imprint.tuning.adapter_config import ranks_of

Shapes = dict[str, tuple[int, ...]]
"""Name → shape."""
PREFIX = "base_model.model."
"""What PEFT puts in front of the path of a module."""
PROMPT = "prompt_embeddings"
OTHER_BASE = "the adapter may be of another base, or of another version of it"
_LARGEST_HEADER = 1 << 24
"""Bytes: names and shapes of a hundred thousand tensors."""
_DTYPES = {"F64", "F32", "F16", "BF16"}
_TENSOR = re.compile(r"[A-Za-z0-9_.-]{1,400}")
_LORA = re.compile(r"(.+)\.(lora_[AB]\.(?:weight|bias)|lora_embedding_[AB]|lora_magnitude_vector(?:\.weight)?)")


def read_shapes(file: Path) -> Shapes:
    """Tensor → shape.

    Raises:
        ModelError: the file is damaged, empty, or holds what no adapter does.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with file.open("rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
        if length > min(_LARGEST_HEADER, file.stat().st_size):
            raise ValueError(f"its header claims to be {length:,} bytes long")
        with safe_open(file, framework="np") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
            found = {name: (tuple(one.get_shape()), one.get_dtype()) for name, one in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read as safetensors ({first_line(error)}): it is damaged") from None
    for name, (shape, dtype) in found.items():
        if not _TENSOR.fullmatch(name) or dtype not in _DTYPES or not math.prod(shape):
            raise ModelError(
                f"{file}: the tensor {ascii(name)[:100]} of {dtype} and shape {list(shape)} is none that an adapter "
                f"has: expected names of letters, digits, dots and dashes, of {', '.join(sorted(_DTYPES))}, not empty"
            )
    if not found:
        raise ModelError(f"{file} holds no tensor: the adapter is empty")
    return {name: shape for name, (shape, _) in found.items()}


def split(file: Path, shapes: Shapes) -> tuple[dict[str, Shapes], list[str]]:
    """(adapted path → part → shape, names of weights that are stored whole)."""
    adapted: dict[str, Shapes] = {}
    whole = []
    for name, shape in shapes.items():
        if not name.startswith(PREFIX):
            raise ModelError(f"{file}: the tensor {name} has no place in a LoRA: expected {PREFIX}…")
        if match := _LORA.fullmatch(name.removeprefix(PREFIX)):
            adapted.setdefault(match[1], {})[match[2]] = shape
        else:
            whole.append(name)
    return adapted, whole


def bare(path: str) -> str:
    """The path of a module in the model itself."""
    return re.sub(r"(\.base_layer)+$", "", path)


def pair_of(parts: Shapes) -> tuple[str, str]:
    """Names of A and B."""
    embeds = any(part.startswith("lora_embedding") for part in parts) and "lora_A.weight" not in parts
    return ("lora_embedding_A", "lora_embedding_B") if embeds else ("lora_A.weight", "lora_B.weight")


def rank_of(parts: Shapes) -> int:
    """Rows of A."""
    return parts[pair_of(parts)[0]][0]


def misfit(file: Path, name: str, found: Sequence[int], needed: Sequence[int], model: object) -> ModelError:
    return ModelError(
        f"{file}: the tensor {name} has shape {list(found)}, {type(model).__name__} needs {list(needed)}: {OTHER_BASE}"
    )


def lora_options(file: Path, shapes: Shapes, settings: dict[str, Any]) -> dict[str, Any]:
    """What to say of a LoRA.

    Raises:
        ModelError: it is none, or matrices are without their partners.
    """
    adapted, whole = split(file, shapes)
    if not adapted:
        raise ModelError(f"{file} holds no LoRA matrix (lora_A.weight, lora_B.weight), as its configuration says")
    for path, parts in adapted.items():
        a, b = pair_of(parts)
        if lacking := [part for part in (a, b) if part not in parts]:
            raise ModelError(f"{file}: {path} has {', '.join(sorted(parts))}, but no {lacking[0]}")
        if len(parts[a]) != 2 or len(parts[b]) != 2 or parts[a][0] != parts[b][1]:
            raise ModelError(f"{file}: {path} has {a} {list(parts[a])} and {b} {list(parts[b])}, which make no product")
    ranks = Counter(rank for rank in map(rank_of, adapted.values()) if rank in ranks_of(settings))
    return {
        "rank": max(ranks, key=lambda rank: (ranks[rank], rank)) if ranks else settings["r"],
        "alpha": settings["lora_alpha"],
        "rslora": settings["use_rslora"],
        "dora": settings["use_dora"],
        "targets": sorted({bare(path).rpartition(".")[2] for path in adapted}),
        "modules_to_save": sorted({bare(name.rpartition(".")[0]).rpartition(".")[2] for name in whole}),
    }


def token_options(file: Path, shapes: Shapes, settings: dict[str, Any]) -> dict[str, Any]:
    """What to say of virtual tokens.

    Raises:
        ModelError: the file holds anything but their embeddings.
    """
    count = settings["num_virtual_tokens"]
    for name, shape in shapes.items():
        if name != PROMPT or len(shape) != 2 or shape[0] != count:
            raise ModelError(
                f"{file}: the tensor {name} of shape {list(shape)} has no place: expected {PROMPT} alone, "
                f"[{count}, width], for num_virtual_tokens {count}"
            )
    return {"tokens": count}
