"""Write docs/attacks.md from the attacks' docstrings, their parameters and what their evidence costs.

python scripts/attack_docs.py
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from imprint.attacks import ATTACKS, DEFAULT_ATTACKS, EVIDENCE, evidence_needed

OUT = Path(__file__).parent.parent / "docs" / "attacks.md"

HEAD = """# The attacks

Written by `scripts/attack_docs.py` from the code. An attack turns evidence into one score per record, and **a higher
score always means that the record is more likely a member**; it is never turned round where it does worse than chance.
Name attacks under `attacks` in a recipe. By default those are run that need no more than what every run measures
anyway: {default}.

x is a text of T scored tokens x_1 ... x_T, and L(x) its mean loss, −log p(x_t | x_\\<t), in nats. L_t and log p_t are
by the target, which is the tuned model; L_r and log p_r by the reference, by default the same weights before tuning.
μ_t and σ_t are the mean and standard deviation of log p over the vocabulary under p, at token t. Passes are over the
scored texts, besides the one per checkpoint that gives the target's log p.
"""

GROUPS = {
    "single": """## One pass of the target

These have no reference, so they also see what makes a text easy for any model. `loss` is the plainest. `zlib` and
`zlib_sum` divide by how much is left of the text when it is compressed: `zlib` the mean loss, as published, which
favours long texts; `zlib_sum` the total, which does not. `min_k` and `min_k_plus` look at the least expected tokens
only, `surp` at those of them where the model was sure of another. `dc_pdd` also asks how common each token is. It needs
the tokens, which a private audit keeps only with `--show-text`.""",
    "reference": """## Target and reference

The base says what a text costs a model that did not learn it, so these see what tuning added, and give every record
the same score on the untouched base. `ref` and `ratio` compare the mean losses. `wbc` counts the stretches of text in
which the target does better, not by how much, so that a few tokens cannot decide. `ez_mia` looks only where the target
would have said something else; short texts may tie at +∞. `ref_min_k_plus` is what Min-K%++ rose by.""",
    "trace": """## The epochs so far

Every run scores its records after each epoch, so this costs nothing. It was made to say which *members* are most at
risk, and tells them from other records only where those records' loss stays put.""",
    "perturbed": """## Changed texts, other contexts, gradients

These score every record again at every checkpoint: in lower case, with one word changed, behind other texts; and
`grad_norm` runs backward as well. `evidence` in a recipe sets how many neighbours and how many texts in front. Texts in
front are never evaluated themselves. `lowercase` says little of texts with few capitals.""",
    "fitted": """## Fitted on known records

These learn from records that are known to be members or not, and that are not evaluated: `auxiliary` under `data` keeps
them apart. `camia` reads the shape of the log p sequence, `ensemble` the scores of the attacks above. `quantile` needs
known non-members only, and asks how unusual a gain is among those like the record.""",
    "shadows": """## Shadow models

`shadows` in a recipe tunes so many more models on random halves of the records, at a training each. Every record is
then compared with itself: how models that saw it differ on it from models that did not.""",
}
"""Module under `imprint.attacks` → its section."""

EVIDENCE_HEAD = """
## The evidence

An attack names what it needs in its parameters. Evidence is measured once and kept; scores are recomputed from it.
"""


OWN = """
## Your own

An attack is a function. Its parameters without a default name the evidence that it wants; those with one are options.

```python
# my_attacks.py, in a folder that Python finds: installed, or named in PYTHONPATH
import numpy as np


def first_tokens(target, reference, count: int = 8):
    \"\"\"What tuning gained on the first tokens of a text. Higher = more likely a member.\"\"\"
    gain_R = target.logp - reference.logp  # all scored tokens of all N records, one record after the other
    starts, ends = target.offsets[:-1], target.offsets[1:]
    return np.array([gain_R[a : min(a + count, b)].mean() for a, b in zip(starts, ends)])  # [N]
```

`attacks: [loss, ref, "my_attacks:first_tokens"]` in a recipe, `--attacks ref,my_attacks:first_tokens` in an audit, and
`imprint.run` and `imprint.audit` alike: its AUC, intervals, gates, report and budget are those of any other. Whatever
extra passes its evidence takes are made; what a recipe does not provide is refused before anything is trained. A record
whose score is NaN is counted, and the attack refused. `imprint.attacks.run_attack(function, target=…, reference=…)`
tries it on evidence at hand (`imprint.attacks.worked` has two texts).
"""


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [_row(head), "|---" * len(list(head)) + "|"]
    return "\n".join([*lines, *(_row(row) for row in rows)])


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|").replace("<", r"\<") for cell in cells) + " |"


def told(attack: Callable[..., Any]) -> tuple[str, str, str]:
    """Title, formula and source, from the first paragraph `Title: formula[, words]. Source.` of a docstring."""
    paragraph = " ".join((inspect.getdoc(attack) or "").split("\n\n")[0].split())
    title, colon, rest = paragraph.partition(": ")
    if not colon:
        raise ValueError(f"the docstring of {attack.__name__} must begin with 'Title: formula. Source.'")
    formula, _, source = rest.partition(". ")
    return title, formula.removesuffix("."), source.removesuffix(".")


def cost(needed: Iterable[str]) -> str:
    """Passes besides the target's own; where several pieces cost some, each is named."""
    passes = {name: EVIDENCE[name].passes for name in needed if name != "target" and EVIDENCE[name].passes != "none"}
    if len(passes) < 2:
        return "".join(passes.values()) or "none"
    return "; ".join(f"{name}: {text}" for name, text in passes.items())


def attack_row(name: str) -> list[str]:
    title, formula, source = told(ATTACKS[name])
    needed = evidence_needed(name)
    return [f"`{name}`", title, formula, source, ", ".join(f"`{piece}`" for piece in needed), cost(needed)]


def text() -> str:
    """The whole page."""
    parts = [HEAD.format(default=", ".join(f"`{name}`" for name in DEFAULT_ATTACKS))]
    parts.append(table(["name", "attack", "score", "source", "evidence", "more passes"], map(attack_row, ATTACKS)))
    modules = dict.fromkeys(attack.__module__.rpartition(".")[2] for attack in ATTACKS.values())
    parts += [f"\n{GROUPS[module]}" for module in modules]
    rows = ([f"`{name}`", piece.what, piece.passes] for name, piece in EVIDENCE.items())
    parts += [EVIDENCE_HEAD, table(["evidence", "what an attack receives", "passes"], rows)]
    return "\n".join([*parts, OWN])


if __name__ == "__main__":
    OUT.write_text(text(), encoding="utf-8")
