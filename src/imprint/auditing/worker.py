"""A checkpoint of a training that goes on elsewhere, in a process of its own: `python -m imprint.auditing.worker JOB`.

A job is a file with everything that is asked for; beside it lie the records in tokens, as the training has them.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from imprint.auditing.identity import read_key
from imprint.auditing.training import check_next, take_up
from imprint.errors import ImprintError, first_line
from imprint.spec import Budget, DataSpec, MethodSpec, ModelSpec, Runtime

SAID = "said.json"
"""Beside the job: what went wrong."""


def work(job: dict[str, Any]) -> None:
    """Score the base if nobody has, and the checkpoint if there is one.

    Args:
        job: `model`, `reference`, `method`, `tokenizer`, `members`, `nonmembers`, `data`, `id_key`, `out`, `attacks`,
            `budget`, `document`, `device`, `token_budget`; `begin`, the step where training goes on, or None;
            `checkpoint` with `folder`, `name`, `step` and `epoch`, or None.

    Raises:
        ImprintError: something cannot be used as asked, or not be scored.
    """
    from imprint.auditing.folders import prepare_folders, score_tuned
    from imprint.auditing.ledger import open_ledger
    from imprint.auditing.target import Target, tuned_at
    from imprint.data.given import read_sides
    from imprint.progress import Progress
    from imprint.tuning.locate import locate

    model, spec = ModelSpec.model_validate(job["model"]), DataSpec.model_validate(job["data"])
    base = locate(model)
    reference = locate(ModelSpec(name=job["reference"])) if job["reference"] else base
    method = MethodSpec.model_validate(job["method"])
    target = Target(model, base, reference, (), method, Path(job["tokenizer"]))
    pool = replace(read_sides(spec, job["members"], job["nonmembers"]), name=spec.source.name)
    runtime = Runtime(device=job["device"], token_budget=job["token_budget"])
    ready = prepare_folders(target, pool, spec, spec.loss, read_key(Path(job["id_key"])), False, runtime)
    budget = Budget.model_validate(job["budget"]) if job["budget"] else None
    with open_ledger(Path(job["out"]), ready.cell, ready.audit, job["attacks"], budget, job["document"]) as ledger:
        if job["begin"] is not None:
            take_up(ledger, job["begin"])
        ledger.measure_base(ready.compared)
        if (asked := job["checkpoint"]) is None:
            return
        check_next(ledger, asked["step"])
        one = replace(tuned_at(Path(asked["folder"])), name=asked["name"])
        stats, cost, sizes = score_tuned(one, ready.base, ready.audit, Progress())
        steps = {"step": asked["step"], "trained_epochs": asked["epoch"]}
        ledger.write(stats, one.name, cost, fingerprint=one.fingerprint, **steps, **sizes)


def main(file: str) -> int:
    """What went wrong is left beside the job; the exit code says whether anything did."""
    from imprint.cli import quiet_libraries

    quiet_libraries()
    try:
        work(json.loads(Path(file).read_text(encoding="utf-8")))
    except Exception as error:  # out of memory, for one
        said = str(error) if isinstance(error, ImprintError) else f"{type(error).__name__}: {first_line(error)}"
        Path(file).with_name(SAID).write_text(json.dumps(said), encoding="utf-8")
        return getattr(error, "exit_code", 3)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
