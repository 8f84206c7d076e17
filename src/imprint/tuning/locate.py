"""Where a model lies and what it is, without loading it: torch is not imported here.

Safetensors only, and no code from a model folder is ever run.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from imprint.errors import ModelError, first_line, unknown
from imprint.spec import ModelSpec
from imprint.store import checksum

TINY = Path(__file__).parent.parent / "tiny"
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model")
_HUB_FILES = ["config.json", "*.safetensors", "*.safetensors.index.json", *_TOKENIZER_FILES]
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


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
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ModelError(f"{config_file} cannot be read as JSON ({error})") from None
    if not isinstance(config, dict) or not isinstance(config.get("text_config", {}) or {}, dict):
        raise ModelError(f"{config_file} should hold a JSON object, and so should its text_config")
    if any("/" in str(config.get(key) or "") for key in ("_attn_implementation", "attn_implementation")):
        raise ModelError(f"{config_file} asks for an attention kernel from the Hub, which is code: remove that key")
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
    return Located(path, _fingerprint(path), config)


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
    names = {
        file.name
        for pattern in ("config.json", "*.safetensors", "*.safetensors.index.json", *_TOKENIZER_FILES)
        for file in path.glob(pattern)
        if file.is_file()
    }
    digest = hashlib.sha256()
    for name in sorted(names):
        stat = (path / name).stat()
        digest.update(f"{name}:{_checksum(path / name, stat.st_size, stat.st_mtime_ns)}\n".encode())
    return digest.hexdigest()


@lru_cache(maxsize=256)
def _checksum(path: Path, size: int, modified: int) -> str:
    """Cached for the life of the process, as long as the file's size and time stay the same."""
    return checksum(path)
