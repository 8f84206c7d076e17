"""What will be scored, shown before it is: who, against what, and three members with their scored tokens marked."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from imprint.data.tokens import Encoded
from imprint.records import Audit
from imprint.report import words
from imprint.report.annex import pairs
from imprint.spec import AuditSpec

SHOWN = 3
"""Members that are shown."""
LONGEST = 600
"""Characters of one."""
OPEN, CLOSE = "⟦", "⟧"


def lines(ready: Any, texts: bool) -> list[str]:
    """Everything that is shown.

    Args:
        ready: what is about to be scored (`folders.Prepared`).
        texts: whether members may be shown as they are.
    """
    names = [one.name for one in ready.target.tuned]
    told = [*about_target(ready.cell.spec, names), *about_records(ready.audit, ready.cell.spec)]
    if ready.span:
        told.append(f"Loss was on {ready.span}")
    told += [words.clean(f"Note: {doubt}") for doubt in ready.doubts]
    if not texts:
        return [*told, f"{SHOWN} members as they are scored: see --dry-run or --show-text"]
    shown = examples(ready.audit, ready.tokenizer)
    return [*told, f"The first members, what is scored between {OPEN} and {CLOSE}:", *(f"  {one}" for one in shown)]


def about_target(spec: AuditSpec, names: list[str]) -> list[str]:
    """What is audited, and what it is compared with."""
    options = f" ({pairs(spec.method.options)})" if spec.method.options else ""
    what = "a whole model" if spec.method.name == "full" else f"{spec.method.name}{options}"
    several = f", {len(names)} checkpoints: {', '.join(names)}" if len(names) > 1 else f": {names[0]}"
    other = spec.reference.name if spec.reference else None
    off = "the model it was tuned from" if spec.method.name == "full" else "the same weights with the adapter off"
    return [
        words.clean(f"Audited: {what} on {spec.model.name}{several}"),
        words.clean(f"Compared with: {other or off}; {spec.model.dtype}{_quantised(spec)}"),
    ]


def _quantised(spec: AuditSpec) -> str:
    return f", {spec.model.quantize}" if spec.model.quantize else ""


def about_records(audit: Audit, spec: AuditSpec) -> list[str]:
    """Who is scored, what was left out, and how much of the texts is scored."""
    found = audit.summary()
    counts, cut = found["counts"], found["truncated"]
    left = ", ".join(f"{n:,} {reason}" for reason, n in found["dropped"].items() if n) or "none"
    lost = ", ".join(words.plural(n, part) for part, n in cut.items() if n) or "none"
    members = [record for record, role in zip(audit.scored, audit.roles, strict=True) if role == "member"]
    scored, tokens = sum(int(r.scored.sum()) for r in members), sum(len(r) for r in members)
    told = []
    if spec.data.group:
        told.append(words.clean(f"Column {spec.data.group}: owners, whose records are taken together"))
    if spec.data.subgroup:
        values = len({example.subgroup for example in audit.examples if example.subgroup})
        told.append(words.clean(f"Column {spec.data.subgroup}: a property, {words.plural(values, 'value')} compared"))
    return [
        f"Records: {counts['members']:,} members, {counts['nonmembers']:,} non-members; left out: {words.clean(left)}",
        f"Truncated at {spec.data.max_length:,} tokens: {lost}",
        f"Of the members' {tokens:,} tokens {scored:,} are scored, {tokens - scored:,} are context",
        *told,
    ]


def examples(audit: Audit, tokenizer: Any) -> list[str]:
    """The first members as text, on a line each; scored tokens stand between ⟦ and ⟧."""
    members = [record for record, role in zip(audit.scored, audit.roles, strict=True) if role == "member"]
    return [_short("".join(marked(record, tokenizer))) for record in members[:SHOWN]]


def marked(record: Encoded, tokenizer: Any) -> Iterator[str]:
    """The record decoded, run by run of scored and other tokens."""
    pairs_T = zip(record.scored.tolist(), record.ids.tolist(), strict=True)
    for scored, run in groupby(pairs_T, key=lambda pair: pair[0]):
        text = tokenizer.decode([token for _, token in run], clean_up_tokenization_spaces=False)
        shown = text.replace("\r\n", "\n").replace("\n", "⏎")
        yield f"{OPEN}{shown}{CLOSE}" if scored else shown


def _short(text: str) -> str:
    half = LONGEST // 2
    return words.clean(text if len(text) <= LONGEST else f"{text[:half]} … {text[-half:]}")
