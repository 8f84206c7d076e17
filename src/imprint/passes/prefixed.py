"""Each record behind a few other texts: ReCaLL (Xie et al. 2024) and Con-ReCaLL (Wang et al. 2024).

The texts in front are the same for every record, and none of them is evaluated: those that nobody was tuned on come
from the validation records or, where there are none, the auxiliary ones; the tuned ones from the auxiliary ones. The
seed and their ids decide which; one that does not fit is passed over. Each is told in the tokens that a model would be
tuned on and followed by a line break; what a text begins with that is no part of it (a BOS) stands in front of
everything, once. The same tokens are scored as of the record alone: its first one, where nothing stood before it then,
is not scored now either. A record that is itself in front of all has no such evidence: NaN.

The texts in front are computed once, where the model's texts go packed and that is found to make no difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from imprint.errors import UsageError
from imprint.passes.bench import OUTSIDE, blanked, digest, kept_table
from imprint.passes.spec import EvidenceSpec

if TYPE_CHECKING:
    import torch

    from imprint.data.tokens import Encoded, Encoder
    from imprint.engine.forward import Forward, Hidden
    from imprint.engine.packed import PackedRuns
    from imprint.passes.bench import Bench

CROWDED = 4
"""How many times more tokens a pass may attend to than it computes: those in front stand there once for every text."""
Ids = NDArray[np.int32]


def settings(spec: EvidenceSpec, seed: int) -> dict[str, Any]:
    return {"shots": spec.shots, "seed": seed}


def measure_others(bench: Bench) -> pa.Table:
    """TokenStats of each record behind texts that nobody was tuned on.

    Raises:
        UsageError: there are none, or not even one fits in front of the longest record.
    """
    return _measure(bench, OUTSIDE, "nobody was tuned on: set data.validation or data.auxiliary")


def measure_members(bench: Bench) -> pa.Table:
    """The same behind texts that the model was tuned on.

    Raises:
        UsageError: as above.
    """
    return _measure(bench, ("auxiliary_in",), "are tuned on and not evaluated: set data.auxiliary")


def _measure(bench: Bench, roles: Sequence[str], lacking: str) -> pa.Table:
    role = next((role for role in roles if role in bench.audit.roles), None)
    if role is None:
        raise UsageError(f"no records are there to put in front of the others, which {lacking}")
    pool = [record for record, own in zip(bench.audit.scored, bench.audit.roles, strict=True) if own == role]
    shots = _shots(bench, pool)
    texts, way, budget = _behind(bench, _front(bench.encoder, shots))
    inside = {record.id for record in shots}
    stats = replace(bench, budget=budget).stats(texts, way)
    return kept_table(bench.audit, blanked(stats, [record.id in inside for record in bench.audit.scored]))


def _shots(bench: Bench, pool: Sequence[Encoded]) -> list[Encoded]:
    """As many of `pool` as are asked for and fit in front of the longest record, in an order by seed and id."""
    longest = max(len(record) for record in bench.audit.scored)
    found: list[Encoded] = []
    room = bench.context - longest
    for record in sorted(pool, key=lambda record: digest(bench.seed, record.id)):
        size = len(_front(bench.encoder, [record]))
        if size <= room and len(found) < bench.spec.shots:
            found.append(record)
            room -= size
    if not found:
        least = min(len(_front(bench.encoder, [record])) for record in pool)
        raise UsageError(
            f"no text fits in front of the longest record: it has {longest} tokens, the shortest text to put there "
            f"{least}, and the model takes {bench.context}: {longest + least - bench.context} too few; lower "
            "data.max_length"
        )
    return found


def _front(encoder: Encoder, shots: Sequence[Encoded]) -> Ids:
    """What stands in front of every record."""
    line = np.array(encoder._ids("\n"), np.int32)
    return np.concatenate([part for shot in shots for part in (shot.ids[_opening(encoder, shot) :], line)])


def _opening(encoder: Encoder, record: Encoded) -> int:
    """How many tokens a record begins with that are no part of its text; a chat's template may write the BOS."""
    start = encoder._opening
    if start and record.ids[: len(start)].tolist() == start:
        return len(start)
    return int(record.ids[0] == encoder.tokenizer.bos_token_id)


def _behind(bench: Bench, front: Ids) -> tuple[list[Encoded], Forward, int]:
    """The records behind `front`, the way to score them, and tokens per pass; without `front` where it goes once."""
    records = bench.audit.scored
    cuts = [_opening(bench.encoder, record) for record in records]
    whole = [_put(record, cut, record.ids[:cut], front) for record, cut in zip(records, cuts, strict=True)]
    openings = {record.ids[:cut].tobytes() for record, cut in zip(records, cuts, strict=True)}
    scored = any(record.scored[:cut].any() for record, cut in zip(records, cuts, strict=True))
    if bench.way.packed is None or len(front) < 2 or len(openings) > 1 or scored:
        return whole, bench.way, bench.budget
    # the last token in front predicts the first one behind: each text keeps its own
    rest = [_put(record, cut, front[:0], front[-1:]) for record, cut in zip(records, cuts, strict=True)]
    once = _once(bench.way, bench.way.packed, np.concatenate([records[0].ids[: cuts[0]], front[:-1]]))
    longest = max(range(len(records)), key=lambda n: len(whole[n]))
    if not _agree(once, rest[longest], bench.way, whole[longest]):
        return whole, bench.way, bench.budget
    share = sum(map(len, rest)) / sum(map(len, whole))
    return rest, once, max(1, min(bench.budget, int(CROWDED * bench.budget * share)))


def _put(record: Encoded, cut: int, opening: Ids, front: Ids) -> Encoded:
    """A record whose opening is replaced, and behind `front`."""
    ids = np.concatenate([opening, front, record.ids[cut:]])
    head = record.scored[:cut] if len(opening) else record.scored[:0]
    return replace(record, ids=ids, scored=np.concatenate([head, np.zeros(len(front), bool), record.scored[cut:]]))


def _once(way: Forward, runs: PackedRuns, front: Ids) -> Forward:
    """The way through the model for texts behind `front`, whose keys and values are computed once a checkpoint."""

    def checkpoint() -> Hidden:
        import torch

        from imprint.engine.layout import layout
        from imprint.engine.packed import Checkpoint

        ready, device = runs.checkpoint(), next(runs.host.parameters()).device
        row = layout([([len(front)], 0, ready.shared[0])], runs.host.config.get_text_config().hidden_size, device)
        row.kept = {}
        runs._states(row, [torch.from_numpy(front).long().to(device)], [None], ready.merged)
        own = {layer: (k[:, :, : len(front)], v[:, :, : len(front)]) for layer, (k, v) in row.kept.items()}
        if virtual := ready.shared[0]:
            own = {
                layer: (_joined(virtual[layer][0], k), _joined(virtual[layer][1], v)) for layer, (k, v) in own.items()
            }
        both = Checkpoint([own], ready.merged)
        return lambda asked: runs.hidden(asked, both)

    return replace(way, checkpoint=checkpoint)


def _joined(virtual: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.cat([virtual.to(own.dtype), own], 2)


def _agree(quick: Forward, short: Encoded, plain: Forward, long: Encoded) -> bool:
    """Whether a text comes out alike by both ways: rounding is a millionth, a wrong position or mask a tenth."""
    import torch

    with torch.inference_mode():
        wanted, _ = plain.checkpoint()([[long]])
        try:
            found, _ = quick.checkpoint()([[short]])
        except (AttributeError, KeyError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError):
            return False
        rounding = 5e-2 if wanted.dtype in (torch.float16, torch.bfloat16) else 1e-4
        return bool((found - wanted).abs().mean() <= rounding * wanted.abs().mean())
