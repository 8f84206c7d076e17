"""An audit of canaries as a table, in words, and as files."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from imprint.canaries.judge import CanaryAudit, Group
from imprint.measures.exposure import FEWEST
from imprint.report import words
from imprint.report.sheet import Entry, Sheet, to_markdown
from imprint.store import write_json, write_text

JSON, MARKDOWN = "canary_audit.json", "canary_audit.md"
HEADER = (
    "canaries",
    "copies",
    "in",
    "out",
    "AUC",
    "exposure",
    "highest",
    "left out",
    "at most",
    "ε above",
    "ceiling",
    "per record",
)
NOTES = (
    "AUC: of the gain over the base, canaries in the data against canaries left out.",
    "Exposure: median bits of those in the data, the highest among them, the median of those left out (1 where nothing "
    "is remembered), and what it could be at most; of rare and sample it is extrapolated from those left out.",
    "ε above: the training is not ε-differentially private for this or any smaller ε; ceiling: what so many canaries "
    "could have shown; per record: of a canary with k copies the bound is on k records together, on one it is ε/k.",
)


def sheet(found: CanaryAudit) -> Sheet:
    """One row for each group."""
    title = f"Canaries: {words.plural(len(found.manifest.canaries), 'coin')} flipped"
    notes = [note for note in NOTES if "per record" not in note or any(group.proof for group in found.groups)]
    if any(group.exposed is None for group in found.groups):
        notes.append(f"A dash for exposure: fewer than {FEWEST} of the family were left out, or none was put in.")
    for why in dict.fromkeys(group.why for group in found.groups if group.why):
        notes.append(f"A dash for ε: {why}")
    return Sheet(title, HEADER, tuple(_row(group) for group in found.groups), tuple(notes), group=2)


def _row(group: Group) -> tuple[Entry | str, ...]:
    area, exposed, proof = group.auc, group.exposed, group.proof
    bits = (exposed.median, exposed.highest, exposed.left_out, exposed.most) if exposed else (None,) * 4
    copies = f"up to {group.repetitions}" if group.mixed else str(group.repetitions)
    return (
        group.family or "all",
        copies,
        Entry(f"{group.included:,}"),
        Entry(f"{group.left_out:,}"),
        Entry(words.share(area.value), words.share(area.low), words.share(area.high)) if area else Entry(""),
        *(_bits(x) for x in bits),
        *(_epsilon(x) for x in (*((proof.epsilon, proof.ceiling) if proof else (None, None)), group.record_epsilon)),
    )


def _bits(bits: float | None) -> Entry:
    return Entry("" if bits is None else f"{bits:.1f}" if bits < 1000 else f"{bits:.2g}")


def _epsilon(epsilon: float | None) -> Entry:
    return Entry("" if epsilon is None else f"{epsilon:.2f}")


def sentence(found: CanaryAudit) -> str:
    """What this proves, and what it does not."""
    proofs = [group for group in found.groups if group.proof is not None and group.family == found.whole.family]
    single = next((group for group in proofs if group.repetitions == 1), None)
    told = [_claim(group) for group in dict.fromkeys((single or found.whole, found.whole)) if group.proof]
    if not told:
        return f"Nothing is proven about ε: {found.whole.why}"
    seeded = found.manifest.seed is not None
    coins = (
        "the coins were drawn from a seed, and prove nothing to whoever suspects that it was chosen"
        if seeded
        else "the coins were flipped one by one before the training, by the operating system's randomness"
    )
    return (
        f"{' '.join(told)} These are lower bounds, each at {_level(found)} confidence by itself: another attack may "
        "show more, and a bound of 0 is no proof of privacy. They hold if "
        f"the file with the seal {found.manifest.seal[:16]} was made before the training, which saw the canaries "
        f"that it says and no others; {coins}."
    )


def _claim(group: Group) -> str:
    proof = group.proof
    assert proof is not None
    up_to = "up to " if group.mixed else ""
    about = "a single record" if group.repetitions == 1 else f"{up_to}{group.repetitions} copies of a record together"
    per = "" if group.repetitions == 1 or proof.delta else f" (of one record: at least {group.record_epsilon:.2f})"
    right = f"{proof.correct} of {proof.guesses} guesses about {proof.canaries} canaries were right"
    delta = f", δ = {proof.delta:g}" if proof.delta else ""
    if proof.epsilon == 0:
        return f"Nothing is shown about {about}: {right}, and all right would show ε = {proof.ceiling:.2f}{delta}."
    return (
        f"For {about} the training is not ε-differentially private below ε = {proof.epsilon:.2f}{delta}{per}: {right}, "
        f"and so many could have shown {proof.ceiling:.2f} at most."
    )


def _level(found: CanaryAudit) -> str:
    [significance, *_] = {group.proof.significance for group in found.groups if group.proof}
    return f"{100 * (1 - significance):g}%"


def document(found: CanaryAudit) -> dict[str, Any]:
    """Everything as plain data; no canary's text."""
    groups = [asdict(group) | {"record_epsilon": group.record_epsilon} for group in found.groups]
    canaries = [
        {
            "id": canary.id,
            "family": canary.family,
            "repetitions": canary.repetitions,
            "included": canary.included,
            "score": float(score),
            "exposure": float(bits) if math.isfinite(bits) else None,
        }
        for canary, score, bits in zip(found.manifest.canaries, found.scores, found.exposures, strict=True)
    ]
    made = {"seal": found.manifest.seal, "seed": found.manifest.seed, "model": found.manifest.model}
    return {"manifest": made, "groups": groups, "canaries": canaries, "sentence": sentence(found)}


def write(found: CanaryAudit, out: Path, **about: Any) -> None:
    """`canary_audit.json` and `canary_audit.md` in the folder."""
    write_json(out / JSON, {**document(found), **about})
    write_text(out / MARKDOWN, f"{to_markdown(sheet(found))}\n{words.clean(sentence(found))}\n")
