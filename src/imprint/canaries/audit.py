"""An audit by canaries, top to bottom: how they were told, what the models say of them, and what that proves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from imprint.canaries import report
from imprint.canaries.insert import check_inserted
from imprint.canaries.judge import CanaryAudit, audit_canaries
from imprint.canaries.manifest import Manifest
from imprint.canaries.telling import reading, telling_of
from imprint.data.formats import read_rows
from imprint.data.pool import local_path, missing
from imprint.errors import InvalidAudit
from imprint.measures.epsilon import epsilon_ceiling
from imprint.progress import Progress
from imprint.spec import ModelSpec, Runtime


def audit(
    manifest: Manifest,
    model: ModelSpec | str | None = None,
    adapter: str | Path | None = None,
    *,
    out: str | Path,
    reference: str | Path | None = None,
    data: str | Path | None = None,
    style: str | Mapping[str, str] = "auto",
    template: str | Path | None = None,
    max_length: int | None = None,
    guesses: int | None = None,
    delta: float = 0.0,
    runtime: Runtime | None = None,
    progress: Progress | None = None,
) -> CanaryAudit:
    """Score the canaries with a tuned model and its base, judge them, and write both; what is there is read.

    Args:
        model, adapter, reference: as for `imprint.audit`.
        out: output folder.
        data: the file that was tuned on, which says how canaries are told and is compared with the manifest; without it
            they are told as `style` says, by default as plain texts.
        style: form of the data, as a recipe's `data.format`.
        template: file with the chat template of the training.
        max_length: tokens kept of a record, as in training.
        guesses, delta: as for `audit_canaries`.

    Raises:
        UsageError: something cannot be used as asked.
        InvalidAudit: the coins fell all alike, the data are not those of the manifest, or a canary cannot have reached
            the model whole.
    """
    from imprint.auditing.api import read_template
    from imprint.auditing.target import find_target
    from imprint.canaries.score import score_canaries

    inside = len(manifest.included)
    if inside in (0, len(manifest.canaries)):
        raise InvalidAudit(
            f"{inside} of {len(manifest.canaries)} canaries are in the data: some must be and some must not; make more"
        )
    epsilon_ceiling(len(manifest.canaries), guesses, delta)  # which refuses numbers that cannot be
    spec = reading(style)
    telling = telling_of(spec)
    if data is not None:
        path = local_path(str(data))
        if path is None or path.is_dir():
            raise missing(str(data))
        telling = telling_of(spec, next(read_rows(path, path.name, Counter())))
        check_inserted(manifest, path, telling)
    told = (progress or Progress()).note
    named = ModelSpec(name=model) if isinstance(model, str) else model
    target = find_target(named, [str(adapter)] if adapter else [], str(reference) if reference else None, told)
    document: dict[str, Any] = {"canaries": manifest.seal, "model": target.model.name, "method": target.method.name}
    document |= {"tuned": target.tuned[-1].fingerprint, "form": telling.form}
    losses, check = score_canaries(
        manifest,
        telling,
        target,
        Path(out),
        runtime or Runtime(),
        max_length,
        None if template is None else read_template(template),
        document,
        progress,
    )
    told(f"{check}.")
    found = audit_canaries(manifest, losses.tuned, losses.base, losses.candidates, guesses, delta)
    report.write(found, Path(out), audited=document)
    return found
