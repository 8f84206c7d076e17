"""An audit, top to bottom: find out, prepare, score, judge."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from imprint.attacks import evidence_needed
from imprint.auditing.groups import read_records
from imprint.auditing.identity import keep_key, key_beside, read_key
from imprint.claim import check_folder
from imprint.data.given import Records
from imprint.data.pool import local_path
from imprint.errors import UsageError
from imprint.passes.spec import EvidenceSpec
from imprint.progress import Progress
from imprint.recipe import attack_names, check_attacks, checked_budget
from imprint.release import Release, release
from imprint.rows import load_grid
from imprint.runs import finish
from imprint.spec import DataSpec, ModelSpec, Runtime, Source, validated
from imprint.store import Store

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

    from imprint.auditing.folders import Prepared
    from imprint.auditing.memory import Live

    Ready: TypeAlias = "Prepared | Live"

LOSSES = ("auto", "target", "all")
MAX_TEMPLATE = 1_000_000
"""Characters."""


@dataclass(frozen=True)
class Audited:
    """What an audit found.

    Attributes:
        frame: one row per measurement, as in `results.parquet`.
        release: the gates, and the verdict on the budget; `str()` of an audit is its paragraph.
        path: the output folder; None where none was asked for.
    """

    frame: pd.DataFrame
    release: Release
    path: Path | None

    def __str__(self) -> str:
        from imprint.report.gate import paragraph

        return paragraph(self.release)


def audit(
    model: nn.Module | ModelSpec | str | Path | None,
    tokenizer: Any = None,
    members: Records | None = None,
    nonmembers: Records | None = None,
    *,
    adapter: str | Path | Sequence[str | Path] = (),
    reference: nn.Module | str | Path | None = None,
    data: Mapping[str, Any] | None = None,
    loss: str = "auto",
    template: str | Path | None = None,
    attacks: Sequence[str] | None = None,
    evidence: Mapping[str, Any] | None = None,
    budget: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    id_key: str | Path | None = None,
    show_text: bool = False,
    runtime: Runtime | None = None,
    progress: Progress | None = None,
    preflight: Callable[[Ready], None] | None = None,
) -> Audited:
    """Audit a tuned model: one in memory with its tokenizer, or folders.

    Args:
        model: a model in memory (with an adapter, or whole); or the base's name or folder, None for the one that the
            adapter names.
        tokenizer: that of the training; for a model in memory.
        members: records that it was tuned on: a file, rows, texts or a `datasets.Dataset`.
        nonmembers: records that it was not; None where a column `member` or `split` of `members` says who was.
        adapter: folders, or patterns such as `out/checkpoint-*`; each may hold an adapter or a whole model.
        reference: what the tuned model is compared with (default: the same weights with the adapter off).
        data: keys of a recipe's `data`: `format`, `loss`, `eos`, `max_length`, `overlong`, `group`, `subgroup`, `id`,
            `members`, `nonmembers` (at most so many, default 2,000 each), `auxiliary`, `seed`.
        loss: which tokens it was trained on: `target`, `all`, or `auto`: found out from what tuning changed.
        template: file with the chat template of the training, where the tokenizer has none or another one.
        attacks: names, or `module:function` for one's own (default: all that need no more than one pass).
        evidence: keys of a recipe's `evidence`, for attacks that need more passes.
        budget: `{"auc": 0.55}`, as in a recipe.
        out: output folder (default: none is kept).
        id_key: file with the key that hides ids (default: beside the folder, `<out>.key`; made where there is none).
        show_text: whether what is written may tell the texts.
        runtime: device and memory.
        progress: where to report; silent by default.
        preflight: is shown what is about to be scored, before anything is written.

    Raises:
        UsageError: something cannot be used as asked; nothing has been written.
        ImprintError: the audit could not finish; the same call continues it.
    """
    from torch import nn

    if members is None:
        raise UsageError("members are missing: give the records that the model was tuned on")
    if loss not in LOSSES:
        raise UsageError(f"loss: expected {', '.join(LOSSES)}, not {loss!r}")
    if not isinstance(members, str | os.PathLike) and not hasattr(members, "column_names"):
        members = list(members)  # looked at twice
    names, runtime = attack_names(None if attacks is None else list(attacks)), runtime or Runtime()
    passes = validated(EvidenceSpec, dict(evidence or {}), "evidence")
    limits = checked_budget(budget, names) if budget else None
    asked = {**(data or {}), **({} if loss == "auto" else {"loss": loss})}
    pool, spec = read_records(_data_spec(asked, members), members, nonmembers)
    check_attacks(names, spec, shadows=None)
    if (blind := [name for name in names if "token_counts" in evidence_needed(name)]) and not show_text:
        raise UsageError(f"attacks: {blind[0]} needs the tokens, which are not written: allow it with --show-text")
    with _folder(out) as folder:
        check_folder(Store(folder))
        key_file = Path(id_key).expanduser() if id_key else key_beside(folder)
        _check_apart(folder, key_file, adapter, model)
        key = read_key(key_file)
        ready: Ready
        how = loss
        write: Callable[..., None]
        if isinstance(model, nn.Module):
            from imprint.auditing.live import load_beside
            from imprint.auditing.memory import audit_live, prepare_live

            below = (
                reference if reference is None or isinstance(reference, nn.Module) else load_beside(reference, model)
            )
            ready = prepare_live(model, tokenizer, pool, spec, key, below, runtime.token_budget, show_text, loss=loss)
            write = partial(audit_live, model, ready, tokenizer=tokenizer, progress=progress or Progress())
        else:
            from imprint.auditing.folders import audit_folders, prepare_folders
            from imprint.auditing.target import find_target

            told_of = (progress or Progress()).note
            target = find_target(_model_spec(model), _names(adapter), _named(reference), told_of)
            told = None if template is None else read_template(Path(template))
            ready = prepare_folders(target, pool, spec, loss, key, show_text, runtime, told)
            write = partial(audit_folders, ready, progress=progress or Progress())
            how = "; ".join([how, *ready.doubts])
        if preflight:
            preflight(ready)
        keep_key(key_file, key)
        document: dict[str, Any] = {"audit": _named(model), "adapter": _names(adapter), "reference": _named(reference)}
        document |= {"members": _named(members), "nonmembers": _named(nonmembers), "data": dict(data or {})}
        document |= {"loss": f"on {ready.span}" if ready.span else how, "attacks": list(names)}
        write(folder, attacks=names, budget=limits, document=document, passes=passes)
        grid = load_grid(folder)
        frame = finish(grid)
        return Audited(frame, release(grid, frame), Path(out) if out else None)


def _data_spec(given: Mapping[str, Any], members: Records) -> DataSpec:
    """How the records are read; cut as most trainers cut unless something else is asked for."""
    for key in ("source", "split", "validation", "tune_on", "repeat", "canaries", "sealed", "tokenizer", "fingerprint"):
        if key in given:
            raise UsageError(f"data.{key}: an audit has its records from `members` and `nonmembers`; leave it out")
    name = Path(members).name if isinstance(members, str | os.PathLike) else "records"
    source = Source(name=name)
    return validated(DataSpec, {"source": source, "split": "given", "overlong": "keep_start", **given}, "data")


def _model_spec(model: Any) -> ModelSpec | None:
    return model if model is None or isinstance(model, ModelSpec) else ModelSpec(name=str(model))


def _check_apart(out: Path, key: Path, adapter: str | Path | Sequence[str | Path], model: Any) -> None:
    """What is shared with others must not take along what is not meant for them.

    Raises:
        UsageError: the key lies in the output folder, or that in the folder of a model.
    """
    folder = out.expanduser().resolve()
    if key.resolve().is_relative_to(folder):
        raise UsageError(f"--id-key {key} lies in the output folder, whose ids it would uncover: keep it elsewhere")
    models = [*_names(adapter), *([str(model)] if isinstance(model, str | Path) else [])]
    for name in models:
        where = local_path(name)
        if where is not None and folder.is_relative_to(where.resolve()):
            raise UsageError(f"--out {out} lies in {name}, which would be shared with it: give another folder")


def read_template(path: str | Path) -> str:
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"template {path} cannot be read ({error}): give a file in Jinja, as UTF-8") from None
    if len(text) > MAX_TEMPLATE:
        raise UsageError(f"template {path} has {len(text):,} characters: a chat template has at most {MAX_TEMPLATE:,}")
    return text


def _names(adapter: str | Path | Sequence[str | Path]) -> list[str]:
    return [str(adapter)] if isinstance(adapter, (str, Path)) else [str(one) for one in adapter]


def _named(thing: Any) -> str | None:
    """How something is told in the annex of a report."""
    if thing is None or isinstance(thing, (str, Path)):
        return None if thing is None else str(thing)
    return thing.name if isinstance(thing, ModelSpec) else f"in memory ({type(thing).__name__})"


@contextmanager
def _folder(out: str | Path | None) -> Iterator[Path]:
    """The output folder; a temporary one, in a folder of its own, where none is asked for."""
    if out is not None:
        yield Path(out)
        return
    with tempfile.TemporaryDirectory(prefix="imprint-") as temporary:
        yield Path(temporary) / "audit"
