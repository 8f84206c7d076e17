"""Before anything is tuned: how many records a claim needs, and what an audit of so many will cost here."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from imprint.controls import EPOCHS, MEMORIZED
from imprint.data import read_pool
from imprint.data.tokens import Encoded, Encoder, unusable
from imprint.errors import DataError, UsageError
from imprint.gates.judge import WORTH_FINDING
from imprint.measures import sizes
from imprint.recipe import default_length
from imprint.rows import FALSE_POSITIVE_RATES
from imprint.spec import Budget, DataSpec, MethodSpec, ModelSpec, Runtime, Source

FIRM = 10
"""Expected false positives from which on a true-positive rate is no longer merely indicative."""
SAMPLE = 32
"""Records that are scored to learn the speed."""


@dataclass(frozen=True)
class Need:
    """Non-members that a claim needs; `why` says what is in the way where no number suffices."""

    claim: str
    nonmembers: int | None
    why: str = ""


@dataclass(frozen=True)
class Cost:
    """Of an audit on this machine.

    Attributes:
        tokens: of one scoring pass.
        flops: of all passes, and of the positive control at its longest.
        seconds: at the speed of a sample that was scored and trained on.
        memory: bytes at most, after those.
        disk: bytes of the token statistics, by the sample's.
    """

    tokens: int
    flops: float
    seconds: float
    memory: int
    disk: int


def needs(budget: Budget | None, members: int | None, power: float, effect: float = 1.0) -> list[Need]:
    """What each claim needs: the limits of the budget, seeing a leak at all, and knowing a rate.

    Args:
        members: how many there are (default: as many as non-members).
        effect: by how much owners of several records inflate variances (`sizes.design_effect`).

    Raises:
        UsageError: a limit that no model can keep.
    """
    found = []
    limits = budget.model_dump(exclude={"attack"}, exclude_none=True) if budget else {}
    for metric, limit in limits.items():
        if metric == "auc":
            claim = f"AUC below {limit:g}, by a model that leaks nothing"
            found.append(_need(claim, lambda x=limit: sizes.for_auc_budget(x, power, members, effect)))  # type: ignore[misc]
        else:
            rate = FALSE_POSITIVE_RATES[metric]
            claim = f"TPR at {rate:.0%} FPR below {limit:g}, by a model that leaks nothing"
            found.append(
                _need(claim, lambda x=limit, q=rate: sizes.for_tpr_budget(x, q, power, members, effect))  # type: ignore[misc]
            )
    seen = f"an AUC of {WORTH_FINDING:g} is told from .5"
    found.append(_need(seen, lambda: sizes.for_auc(WORTH_FINDING, power, members, effect)))
    for rate in FALSE_POSITIVE_RATES.values():
        found.append(Need(f"TPR at {rate:.1%} FPR is measured", sizes.for_tpr(rate)))
        found.append(Need(f"TPR at {rate:.1%} FPR is firm", sizes.for_tpr(rate, FIRM)))
    return found


def _need(claim: str, count: Callable[[], int]) -> Need:
    try:
        return Need(claim, count())
    except UsageError as error:
        if "out of reach" not in str(error):
            raise
        return Need(claim, None, str(error))


def read_members(
    path: Path, model: ModelSpec, data: DataSpec, folder: Path | None = None, template: str | None = None
) -> tuple[list[Encoded], list[str | None]]:
    """The members encoded as an audit would, and the owner of each.

    Args:
        folder: has the tokenizer, if not the model's.
        template: the chat template, if not the tokenizer's own.

    Raises:
        UsageError: the file or the model cannot be used.
    """
    from imprint.data.templates import Templates
    from imprint.tuning.locate import locate
    from imprint.tuning.models import load_tokenizer

    located = locate(model)
    pool = read_pool(data.model_copy(update={"source": Source(name=str(path))}))
    tokenizer = load_tokenizer(located, folder)
    tokenizer.chat_template = tokenizer.chat_template if template is None else template
    length = data.max_length or default_length(located.context)
    with Templates(tokenizer, data.loss) as templates:
        encode = Encoder(tokenizer, length, data.overlong, data.loss, data.eos, templates)
        pairs = [(encode(example), example.group) for name in pool.part_names for example in pool.parts[name]]
    kept = [(record, group) for record, group in pairs if unusable(record) is None]
    if not kept:
        raise DataError(f"{path}: no record can be scored; give records of at least two tokens")
    return [record for record, _ in kept], [group for _, group in kept]


def cost(records: Sequence[Encoded], nonmembers: int, checkpoints: int, model: ModelSpec, runtime: Runtime) -> Cost:
    """Score and train on a few of the records, and multiply."""
    from imprint.engine.clock import Clock
    from imprint.engine.costs import costs_of, peak_memory
    from imprint.engine.forward import forward_of
    from imprint.scoring.score import token_stats
    from imprint.store import write_stats
    from imprint.tuning.base import Base
    from imprint.tuning.locate import locate
    from imprint.tuning.methods import resolve_method
    from imprint.tuning.models import resolve_device, resolve_dtype
    from imprint.tuning.train import backward

    located, device = locate(model), resolve_device(runtime.device)
    base = Base.of(located, model.model_copy(update={"dtype": resolve_dtype(model.dtype, device)}), runtime)
    few = sorted(records, key=len)[:: max(1, len(records) // SAMPLE)][:SAMPLE]
    tuned = base.tuned(resolve_method(MethodSpec(name="lora", options={"rank": 16}), located.hidden_size, 1e-3), 0)
    costs, forward = costs_of(tuned), forward_of(tuned)
    with tempfile.TemporaryDirectory(prefix="imprint-") as folder:
        scoring = _seconds(lambda: token_stats(tuned, few, base.budget, None, forward))
        write_stats(Path(folder) / "stats.parquet", token_stats(tuned, few, base.budget, None, forward))
        disk = (Path(folder) / "stats.parquet").stat().st_size
    training = _seconds(lambda: backward(forward, [few[:8]], base.budget, Clock(base.device)))
    share = (len(records) + nonmembers) * (1 + checkpoints) / len(few)
    steps = EPOCHS * min(MEMORIZED, len(records)) / len(few[:8])
    once, step = costs.scoring(few), costs.training(few[:8], 1)
    return Cost(
        tokens=round(sum(map(len, few)) / len(few) * (len(records) + nonmembers)),
        flops=share * once + steps * step,
        seconds=share * scoring + steps * training,
        memory=peak_memory(device),
        disk=round(share * disk),
    )


def _seconds(work: Callable[[], object]) -> float:
    """Of its second time."""
    work()
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
