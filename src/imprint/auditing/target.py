"""What is audited: a base, and one or more tuned versions of it, found out from folders without loading any.

A folder is told by what lies in it: `adapter_config.json` makes it a PEFT adapter, `config.json` with weights a whole
model, tuned fully or with its adapter merged. What the tuned model is compared with is the same weights with the
adapter off, or the model that was named: there is no other way to get one, and none is guessed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from imprint.errors import ModelError, UsageError
from imprint.report import words
from imprint.spec import MethodSpec, ModelSpec
from imprint.tuning.adapters import Adapter, is_adapter, read_adapter
from imprint.tuning.locate import Located, locate


@dataclass(frozen=True)
class Tuned:
    """A tuned model on disk: an adapter for the base, or a whole model of its own."""

    name: str
    what: Adapter | Located

    @property
    def fingerprint(self) -> str:
        """SHA-256 of its weights and configuration."""
        return self.what.fingerprint

    @property
    def path(self) -> Path:
        return self.what.path


@dataclass(frozen=True)
class Target:
    """What an audit compares.

    Attributes:
        model: the base as it was named; its revision, precision and quantisation.
        base: where it lies. Adapters are put on it.
        reference: what the tuned model is compared with: the base itself, or another model that was asked for.
        tuned: checkpoints in the order of training; one of them in most cases.
        method: how it was tuned, as far as its files say.
        tokenizer: a folder whose tokenizer goes before the base's; None where there is none.
    """

    model: ModelSpec
    base: Located
    reference: Located
    tuned: tuple[Tuned, ...]
    method: MethodSpec
    tokenizer: Path | None

    @property
    def virtual(self) -> int:
        """Virtual tokens in front of every text."""
        return int(self.method.options.get("tokens", 0))


def find_target(
    model: ModelSpec | None,
    adapters: Sequence[str],
    reference: str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Target:
    """Find out what is to be audited.

    Args:
        model: the base, or a whole tuned model where there is no adapter; None: what the adapter itself names.
        adapters: folders, or patterns such as `out/checkpoint-*`, whose matches are audited as epochs.
        reference: a model that is compared with instead of the base; needed where the tuned model is a whole one that
            `model` names.
        say: is told what is fetched that nobody here has named.

    Raises:
        UsageError: nothing matches, or what is given does not fit together.
        ModelError: a folder cannot be used, or not safely.
    """
    if not adapters:
        return _whole(model, reference)
    folders = _folders(adapters)
    tuned = tuple(tuned_at(folder) for folder in folders)
    kinds = {type(one.what) for one in tuned}
    if len(kinds) > 1:
        raise UsageError("--adapter: some folders hold adapters and some whole models; audit them one kind at a time")
    if model is None:
        model = _named_base(tuned)
        if not Path(model.name).expanduser().exists():
            say(
                words.clean(
                    f"The base is {model.name}, which the adapter names: fetched from the Hub if it is not here"
                )
            )
    base = locate(model)
    method = _method(tuned)
    compared = locate(ModelSpec(name=reference)) if reference else base
    return Target(model, base, compared, tuned, method, folders[-1] if has_tokenizer(folders[-1]) else None)


def _whole(model: ModelSpec | None, reference: str | None) -> Target:
    if model is None:
        raise UsageError("what is to be audited? give --model, and --adapter where the tuned model is one")
    if is_adapter(Path(model.name).expanduser()):
        raise UsageError(f"--model {model.name} holds a PEFT adapter: give it as --adapter, and its base as --model")
    located = locate(model)
    if reference is None:
        raise UsageError(
            f"{model.name} is a whole model, and no adapter can be turned off in it: name the model that it was tuned "
            "from, as in --reference BASE (or give the base as --model and this folder as --adapter)"
        )
    compared = ModelSpec(name=reference, dtype=model.dtype, quantize=model.quantize)
    base = locate(compared)
    tuned = Tuned(model.name.rstrip("/").rsplit("/", 1)[-1], located)
    return Target(compared, base, base, (tuned,), MethodSpec(name="full"), located.path)


def _folders(patterns: Sequence[str]) -> list[Path]:
    """The folders that the patterns stand for: as they were given, of one pattern by the number that a name ends in."""
    found: list[Path] = []
    for pattern in patterns:
        try:
            path = Path(pattern).expanduser()
            matches = [path] if path.is_dir() else [folder for folder in _matching(path) if folder.is_dir()]
        except (OSError, ValueError, RuntimeError, re.error):  # a NUL, too long a name, no such home
            matches = []
        if not matches:
            what = "matches no folder" if set(pattern) & set("*?[") else "no such folder"
            raise UsageError(f"--adapter {pattern!r}: {what}; expected one with adapter_config.json")
        found += sorted(matches, key=_place)
    return list({folder.resolve(): folder for folder in found}.values())


def _matching(pattern: Path) -> list[Path]:
    anchor = Path(pattern.anchor or ".")
    return list(anchor.glob(str(pattern.relative_to(pattern.anchor) if pattern.anchor else pattern)))


def _place(folder: Path) -> tuple[int, int, str]:
    """`checkpoint-90` before `checkpoint-100`; what has no number is what training ended with."""
    number = re.search(r"(\d{1,18})$", folder.name)
    return (0, int(number[1]), folder.name) if number else (1, 0, folder.name)


def tuned_at(folder: Path) -> Tuned:
    """
    Raises:
        ModelError: it holds nothing that was tuned, or nothing that can be used safely.
    """
    if is_adapter(folder):
        return Tuned(folder.resolve().name, read_adapter(folder))
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder} holds neither a PEFT adapter (adapter_config.json) nor a whole model (config.json): give "
            f"{_instead(folder)}"
        )
    return Tuned(folder.resolve().name, locate(ModelSpec(name=str(folder.resolve()))))


def _instead(folder: Path) -> str:
    if any(folder.glob("checkpoint-*")):
        return f"one of its checkpoints, or --adapter '{folder}/checkpoint-*' for all of them"
    return "the folder that `save_pretrained` or the trainer wrote"


def _named_base(tuned: Sequence[Tuned]) -> ModelSpec:
    named = {(one.what.base, one.what.revision) for one in tuned if isinstance(one.what, Adapter)}
    if len(named) > 1:
        shown = ", ".join(sorted(name for name, _ in named))
        raise UsageError(f"--adapter: the adapters name different bases ({shown}): give --model")
    [(name, revision)] = named or {("", None)}
    if not name:
        raise UsageError(f"{tuned[0].path} does not say what it was tuned from: name its base with --model")
    return ModelSpec(name=name, revision=revision)


def _method(tuned: Sequence[Tuned]) -> MethodSpec:
    """What all the checkpoints have in common."""
    first = tuned[0].what
    if isinstance(first, Located):
        return MethodSpec(name="full")
    for one in tuned[1:]:
        if isinstance(one.what, Adapter) and (one.what.kind, one.what.options) != (first.kind, first.options):
            raise UsageError(f"--adapter: {one.path} is not of the same run as {tuned[0].path}: audit them apart")
    return MethodSpec(name=first.kind, options=first.options)


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
