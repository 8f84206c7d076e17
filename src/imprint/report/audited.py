"""What was audited, against what and how: the heading, a few sentences, and the annex's table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import PureWindowsPath

from imprint.report import words
from imprint.report.annex import Table, pairs
from imprint.report.tables import sources
from imprint.report.terms import audited, point_names
from imprint.rows import Cell, Grid
from imprint.spec import AuditSpec, DataSpec, ModelSpec

SPANS = {
    "target": "the tokens that were learned, of a conversation the answers and of a plain text all",
    "all": "every token, those of prompts too",
}
BRIEF = 200
"""Characters of an adapter's options in a sentence; the annex has all of them."""
CUTS = {"keep_start": "at their end", "truncate": "at the start of the prompt first", "refuse": "never"}


def title(grid: Grid) -> str:
    """The heading: what was tuned on what, or what was audited against what on what."""
    models, data = (sorted(set(column)) for column in zip(*sources(grid).values(), strict=True))
    if not audited(grid):
        return f"{words.listed(models)} tuned on {words.listed(data)}"
    compared = dict.fromkeys(_last_part((_spec(cell).reference or cell.spec.model).name) for cell in grid.cells)
    tuned = words.listed([_tuned(cell) for cell in grid.cells])
    return f"{tuned} audited against {words.listed(list(compared))} on {words.listed(data)}"


def _last_part(name: str) -> str:
    """Of a folder on this machine its own name; a Hub id as it is.

    >>> _last_part("/models/gpt2/"), _last_part("org/gpt2")
    ('gpt2', 'org/gpt2')
    """
    local = name.startswith(("/", "~", ".")) or "\\" in name
    return words.clean((PureWindowsPath(name).name or name) if local else name)


def _spec(cell: Cell) -> AuditSpec:
    assert isinstance(cell.spec, AuditSpec)
    return cell.spec


def _tuned(cell: Cell) -> str:
    """Its checkpoints and its kind: `checkpoint-38 to checkpoint-190 (lora)`."""
    names, kind = list(point_names(cell).values()), _kind(cell)
    if not names:
        return kind
    return f"{names[0]}{f' to {names[-1]}' if len(names) > 1 else ''} ({kind})"


def _kind(cell: Cell) -> str:
    method = cell.spec.method.name
    return "whole model" if method == "full" else words.clean(method)


def about(grid: Grid) -> list[str]:
    """Sentences: what was audited, what it is compared with, which tokens are scored; none for a run."""
    return [sentence for cell in grid.cells if audited(grid) for sentence in _about(cell)]


def _about(cell: Cell) -> list[str]:
    checkpoints = words.plural(cell.epochs, "checkpoint")
    return [
        f"Audited: {_briefly(_method(cell))} {_origin(cell)}, {checkpoints}.",
        f"Compared with: {_compared(cell)}.",
        f"Scored: {SPANS[cell.spec.data.loss]}.",
    ]


def _origin(cell: Cell) -> str:
    word = "tuned from" if cell.spec.method.name == "full" else "on"
    return f"{word} {words.clean(cell.spec.model.name)}"


def _method(cell: Cell) -> str:
    """Its kind, with the options that say something."""
    options = pairs(
        {
            key: value
            for key, value in cell.spec.method.options.items()
            if value not in ([], None) and value is not False
        }
    )
    return f"{_kind(cell)} ({options})" if options else _kind(cell)


def _briefly(text: str) -> str:
    return text if len(text) <= BRIEF else f"{text[:BRIEF]}…"


def _compared(cell: Cell) -> str:
    spec = _spec(cell)
    if spec.reference:
        return words.clean(spec.reference.name)
    if spec.method.name == "full":
        return "the model that it was tuned from"
    return "the same weights with the adapter off"


def audited_table(grid: Grid) -> Table:
    """Everything that the numbers depend on, a row each, a column for each cell."""
    columns = [{name: shown(cell) for name, shown in _PARTS.items()} for cell in grid.cells]
    labels = [words.clean(cell.label) for cell in grid.cells]
    return ["", *labels], [[name, *(column[name] for column in columns)] for name in _PARTS]


def _model(spec: ModelSpec) -> str:
    return pairs(spec.model_dump())


def _records(data: DataSpec) -> str:
    document = data.model_dump(include={"source", "format", "id", "group", "subgroup", "fingerprint"})
    source = {key: value for key, value in document.pop("source").items() if value is not None}
    style = document.pop("format")
    shown = f"({pairs(style)})" if isinstance(style, dict) else style
    return pairs({**source, "format": shown, **document})


def _limits(data: DataSpec) -> str:
    shown = [f"{n:,} {side}" for side, n in (("members", data.members), ("non-members", data.nonmembers)) if n]
    return f"at most {words.listed(shown)}, drawn with seed {data.seed}" if shown else "all there are"


def _end(data: DataSpec) -> str:
    told = {True: "follows every text", False: "does not follow a text", None: "follows a completion, not a plain text"}
    return f"{told[data.eos]}; a conversation's template says it"


_PARTS: dict[str, Callable[[Cell], str]] = {
    "audited": _method,
    "base": lambda cell: _model(cell.spec.model),
    "compared with": lambda cell: _model(r) if (r := _spec(cell).reference) else _compared(cell),
    "records": lambda cell: _records(cell.spec.data),
    "drawn": lambda cell: _limits(cell.spec.data),
    "scored tokens": lambda cell: SPANS[cell.spec.data.loss],
    "end token": lambda cell: _end(cell.spec.data),
    "tokenizer and template": lambda cell: words.clean(cell.spec.data.tokenizer) or "the base's own",
    "texts are cut": lambda cell: f"{CUTS[cell.spec.data.overlong]}, to {cell.spec.data.max_length:,} tokens",
}


def checkpoints_table(grid: Grid) -> Table:
    """Every checkpoint of every cell, with the fingerprint of its weights."""
    header = ["no.", "checkpoint", "step", "trained numbers", "of", "scored in", "fingerprint"]
    return header, [_checkpoint(cell, n, name) for cell in grid.cells for n, name in point_names(cell).items()]


def _checkpoint(cell: Cell, number: int, name: str) -> list[str]:
    meta = cell.folder.meta(number)
    counts = [_count(meta.get(key)) for key in ("step", "trainable", "parameters")]
    seconds = words.clock(sum(meta["cost"]["seconds"].values()))
    return [str(number), name, *counts, seconds, words.clean(meta.get("fingerprint") or "")]


def _count(number: int | None) -> str:
    return "" if number is None else f"{number:,}"
