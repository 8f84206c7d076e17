"""Where a model lies and what it is, without loading it: torch is not imported here.

Safetensors only, and no code from a model folder is ever run.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from imprint.errors import ModelError, first_line, unknown
from imprint.spec import ModelSpec
from imprint.store import checksum

TINY = Path(__file__).parent.parent / "tiny"
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model")
_TEMPLATE_FILES = ("chat_template*", "additional_chat_templates/*.jinja")
_HUB_FILES = ["config.json", "*.safetensors", "*.safetensors.index.json", *_TOKENIZER_FILES, *_TEMPLATE_FILES]
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_LARGEST_JSON, _LARGEST_INDEX, _LARGEST_TEMPLATE = 1 << 24, 1 << 26, 1 << 20
"""Bytes. Tokenizers list their added tokens in a configuration; an index names every tensor; templates are a page."""
_COUNTS = {"num_hidden_layers", "n_layer", "num_layers", "num_local_experts", "num_experts", "n_routed_experts"}
_MOST_MODULES = 4096
"""Layers, or experts of one, that are built before the first weight is read."""
_OLD_PATHS = {"special_tokens_map_file"}
"""Where it lay for whoever saved it: never opened."""
_TOKENIZER_CLASS = re.compile(r"\w{0,80}(Tokenizer|TokenizerFast|Backend)", re.ASCII)


@dataclass(frozen=True)
class Located:
    """A model folder on this machine."""

    path: Path
    fingerprint: str
    config: dict[str, Any]

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return self._number("hidden_size", "n_embd", "d_model")

    @property
    def context(self) -> int:
        """The longest text in tokens, virtual ones included."""
        return self._number("max_position_embeddings", "n_positions", "max_sequence_length")

    def _number(self, *names: str) -> int:
        config = {**self.config, **(self.config.get("text_config") or {})}
        for name in names:
            if isinstance(config.get(name), int) and config[name] > 0:
                return int(config[name])
        raise ModelError(
            f"{self.path / 'config.json'} states none of {', '.join(names)}: expected a causal language model"
        )


def shipped() -> list[str]:
    """Names of the tiny models that come with the package."""
    return sorted(f"tiny/{folder.name}" for folder in TINY.iterdir() if (folder / "config.json").exists())


def locate(spec: ModelSpec) -> Located:
    """Find the folder of a model, fetching it from the Hub where it is not local, and fingerprint it.

    Raises:
        ModelError: no such model, no safetensors, or an unreadable configuration; the sentence says which.
    """
    path = _folder(spec)
    config_file = path / "config.json"
    if not config_file.is_file():
        raise ModelError(f"{path} is no Transformers model folder: config.json is missing")
    config = json_object(config_file)
    if not isinstance(config.get("text_config", {}) or {}, dict):
        raise ModelError(f"{config_file} should hold a JSON object, and so should its text_config")
    if (path / "adapter_config.json").exists():
        raise ModelError(
            f"{path} holds a PEFT adapter (adapter_config.json), which would be applied unasked: "
            "give the base model's folder"
        )
    if not any(path.glob("*.safetensors")):
        pickled = sorted(file.name for pattern in _PICKLED for file in path.glob(pattern))
        found = (
            f"only pickled ones ({', '.join(pickled)}), which can run code when loaded" if pickled else "none at all"
        )
        raise ModelError(
            f"{path} holds no safetensors weights, {found}: load it where you trust it and `save_pretrained` it again"
        )
    _check_config(config_file, config)
    for index in sorted(path.glob("*.safetensors.index.json")):
        _check_index(index)
    return Located(path, _fingerprint(path), config)


def json_object(file: Path, limit: int = _LARGEST_JSON, finite: bool = False) -> dict[str, Any]:
    """The JSON object in a file that somebody else wrote.

    Args:
        limit: the most bytes that it may have.
        finite: refuse NaN and Infinity, which Python reads and JSON does not know.

    Raises:
        ModelError: it is too large, or no JSON object.
    """
    try:
        with file.open("rb") as opened:
            data = opened.read(limit + 1)
        if len(data) > limit:
            raise ModelError(f"{file} is larger than {limit:,} bytes: it is no configuration")
        document = json.loads(data.decode("utf-8"), parse_constant=_not_finite if finite else None)
    except (ValueError, OSError, RecursionError) as error:
        raise ModelError(f"{file} cannot be read as JSON ({error})") from None
    if not isinstance(document, dict):
        raise ModelError(f"{file} should hold a JSON object")
    return document


def _not_finite(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _check_config(file: Path, config: dict[str, Any]) -> None:
    """What Transformers would fetch, import or build for a configuration that it is given."""
    for key, value in _everywhere(config):
        if "_implementation" in f"_{key}" and "/" in str(value or ""):
            raise ModelError(f"{file} asks for a kernel from the Hub ({key}), which is code: remove that key")
        if key in _COUNTS and isinstance(value, int) and value > _MOST_MODULES:
            raise ModelError(f"{file}: {key} is {value:,}: expected at most {_MOST_MODULES:,}")
        if key in ("quantization_config", "compression_config") and value:
            _check_quantisation(file, key, value)


def _check_quantisation(file: Path, key: str, value: Any) -> None:
    """Whoever quantised a model names the library that unpacks it: kernels that are compiled or fetched on the way.

    Only bitsandbytes is known here (`quantised.py`): its four bits, and its eight without a threshold, above which a
    token's score would depend on the texts beside it.
    """
    told: dict[str, Any] = value if isinstance(value, dict) else {}
    bits = told.get("quant_method") == "bitsandbytes"
    if not (bits and (told.get("load_in_4bit") is True or told.get("llm_int8_threshold") == 0)):
        raise ModelError(
            f"{file}: {key} asks for quant_method {ascii(told.get('quant_method'))[:40]}: only weights that are not "
            "quantised, or by bitsandbytes in 4 bits, can be loaded; give the model in 16 or 32 bits"
        )


def _everywhere(document: Any) -> Iterator[tuple[str, Any]]:
    """Keys and values of an object and of all within it."""
    waiting = [document]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            yield from one.items()
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one


def _check_index(file: Path) -> None:
    """A shard is a file in the same folder."""
    shards = json_object(file, _LARGEST_INDEX).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ModelError(f"{file}: weight_map should say for each tensor which file holds it")
    used = not (file.parent / file.name.removesuffix(".index.json")).exists()
    for name in sorted(set(shards.values())):
        if not _is_plain(name) or not name.endswith(".safetensors"):
            raise ModelError(f"{file}: weight_map names {ascii(name)[:80]}: expected safetensors files in this folder")
        if used and not (file.parent / name).is_file():
            raise ModelError(f"{file}: weight_map names {ascii(name)[:80]}, which is missing: fetch the folder again")


def _is_plain(name: str) -> bool:
    """Whether a name is one of a file in the same folder, on any system."""
    return Path(name).name == name and not set("\\:\0") & set(name)


def _folder(spec: ModelSpec) -> Path:
    name = spec.name
    if name.startswith("tiny/"):
        if name not in shipped():
            raise ModelError(unknown("shipped model", name, shipped()))
        return TINY / name.removeprefix("tiny/")
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            return path
        exists = path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long, no such home, a NUL
        raise ModelError(f"model {name[:80]!r} is no path and no Hub id ({type(error).__name__})") from None
    if exists:
        raise ModelError(f"model {name!r} is a file: expected a folder with config.json and safetensors weights")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"model folder {name!r} does not exist")
    return _snapshot(spec)


def _snapshot(spec: ModelSpec) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(spec.name, revision=spec.revision, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ModelError(
            f"model {spec.name!r} is neither a local folder nor a shipped model ({', '.join(shipped())}), "
            f"and the Hub did not give it: {first_line(error)}"
        ) from None


def _fingerprint(path: Path) -> str:
    return _digest(path, ("config.json", "*.safetensors", "*.safetensors.index.json", *_TOKENIZER_FILES))


def tokenizer_fingerprint(folder: Path) -> str:
    """SHA-256 over the files of a tokenizer, the chat template among them."""
    return _digest(folder, (*_TOKENIZER_FILES, *_TEMPLATE_FILES))


def _digest(path: Path, patterns: Sequence[str]) -> str:
    files = {file for pattern in patterns for file in path.glob(pattern) if file.is_file()}
    digest = hashlib.sha256()
    for name, file in sorted((file.relative_to(path).as_posix(), file) for file in files):
        stat = file.stat()
        digest.update(f"{name}:{_checksum(file, stat.st_size, stat.st_mtime_ns)}\n".encode())
    return digest.hexdigest()


def check_tokenizer(folder: Path) -> None:
    """Whether a tokenizer can be loaded without more than its own files, and without a template too large to read.

    Raises:
        ModelError: names the file and the key.
    """
    for name in ("config.json", "tokenizer_config.json"):
        document = json_object(folder / name) if (folder / name).is_file() else {}
        kind = document.get("tokenizer_class")
        if kind is not None and not (isinstance(kind, str) and _TOKENIZER_CLASS.fullmatch(kind)):
            raise ModelError(
                f"{folder / name}: tokenizer_class is {ascii(kind)[:60]}: expected a tokenizer of Transformers"
            )
        for key, value in document.items():
            names = value if isinstance(value, list) else [value]
            if key in _OLD_PATHS or not key.endswith(("_file", "_files")):
                continue
            if foreign := [one for one in names if isinstance(one, str) and not _is_plain(one)]:
                raise ModelError(
                    f"{folder / name}: {key} names {ascii(foreign[0])[:80]}: a tokenizer's files lie in its own folder"
                )
        template = document.get("chat_template")
        if template and len(str(template)) > _LARGEST_TEMPLATE:
            raise ModelError(f"{folder / name}: chat_template is longer than {_LARGEST_TEMPLATE:,} characters")
    for file in sorted(file for pattern in _TEMPLATE_FILES for file in folder.glob(pattern)):
        if file.stat().st_size > _LARGEST_TEMPLATE:
            raise ModelError(f"{file} is larger than {_LARGEST_TEMPLATE:,} bytes: it is no chat template")


def own_code(folder: Path) -> str:
    """What to say of a folder that names code of its own; nothing where it names none."""
    for name in ("config.json", "tokenizer_config.json"):
        if (folder / name).is_file() and json_object(folder / name).get("auto_map"):
            return f"{name} names code of its own (auto_map), which is never run: use what Transformers has itself"
    return ""


@lru_cache(maxsize=256)
def _checksum(path: Path, size: int, modified: int) -> str:
    """Cached for the life of the process, as long as the file's size and time stay the same."""
    return checksum(path)
