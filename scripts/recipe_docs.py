"""Write docs/recipe.md from the docstrings under the fields: options are documented once, where they are defined.

python scripts/recipe_docs.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel

from imprint.attacks import DEFAULT_ATTACKS
from imprint.passes.spec import EvidenceSpec
from imprint.recipe import Recipe
from imprint.spec import Budget, Columns, DataSpec, ModelSpec, Privacy, Source, Stop, TrainSpec
from imprint.tuning.methods import METHODS

OUT = Path(__file__).parent.parent / "docs" / "recipe.md"
HIDDEN = ("fingerprint", "sealed", "tokenizer")  # filled in by the plan

HEAD = """# The keys of a recipe

A recipe is YAML. Every list is an axis of the grid (`attacks` excepted): the cells are all combinations. Written by
`scripts/recipe_docs.py` from the docstrings in the code.

On the command line `--set KEY=VALUE` overrides a key, values being YAML: `--set train.epochs=3`,
`--set method=[head,lora]`.
"""

TAIL = f"""## attacks

A list of names, or of `module:function` for your own; [attacks.md](attacks.md) has all of them and what they need. By
default `{", ".join(DEFAULT_ATTACKS)}`: arithmetic on the scores that every run stores, so that adding one to a finished
recipe takes seconds. Others take passes of their own (`evidence`) over the weights that are kept, those of the last
epoch and of the best, records set apart (`data.auxiliary`), or `shadows`.
"""


def table(kind: type[BaseModel]) -> str:
    lines = ["| key | default | |", "|---|---|---|"]
    for name, field in kind.model_fields.items():
        if name in HIDDEN:
            continue
        default = "required" if field.is_required() else _default(field.get_default(call_default_factory=True))
        lines.append(f"| `{name}` | {default} | {' '.join((field.description or '').split())} |")
    return "\n".join(lines)


def _default(value: Any) -> str:
    return "" if value is None or isinstance(value, (BaseModel, dict)) else f"`{value}`"


def text() -> str:
    """The whole page."""
    parts = [HEAD, "## Top level\n", table(Recipe)]
    for title, kind in (
        ("model", ModelSpec),
        ("data", DataSpec),
        ("data.source", Source),
        ("data.format, as a mapping", Columns),
        ("train", TrainSpec),
        ("train.dp", Privacy),
        ("train.stop", Stop),
        ("evidence", EvidenceSpec),
        ("budget", Budget),
    ):
        parts += [f"\n## {title}\n", table(kind)]
    parts.append("\n## method: options by method\n")
    for name, method in METHODS.items():
        rate = f"{method.rate:g}" + (" × 96 / width of the model" if method.scaled else "")
        about = (method.options.__doc__ or "").strip().splitlines()[0]
        parts.append(f"### {name}\n\n{about} Default learning rate {rate}.\n\n{table(method.options)}\n")
    return "\n".join([*parts, TAIL])


if __name__ == "__main__":
    OUT.write_text(text(), encoding="utf-8")
