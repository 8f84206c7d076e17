"""What is told of subgroups, records and canaries, for other programs: a table each, beside the results."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa

from imprint.exposed import Exposure, exposed
from imprint.planted import Planted, all_planted
from imprint.ranking import Ranking, ranking
from imprint.rows import Cell, Grid
from imprint.store import write_table
from imprint.subgroups import SubgroupRow, subgroups
from imprint.types import Interval

_CELL = [("run_id", pa.string()), ("epoch", pa.int32()), ("attack", pa.string())]
_SUBGROUPS = pa.schema(
    [
        *_CELL,
        ("subgroup", pa.string()),
        ("metric", pa.string()),
        *((name, pa.float64()) for name in ("value", "low", "high", "p")),
        *((name, pa.int64()) for name in ("members", "nonmembers", "member_subjects", "nonmember_subjects")),
        ("status", pa.string()),
        ("reason", pa.string()),
    ]
)
_EXPOSED = pa.schema(
    [
        *_CELL,
        ("rank", pa.int64()),
        ("record_id", pa.string()),
        ("subject", pa.string()),
        ("score", pa.float64()),
        ("tokens", pa.int64()),
        *((name, pa.float64()) for name in ("p", "chance", "q")),
        ("first", pa.int32()),
    ]
)
_COUNTS = pa.schema(
    [
        *_CELL,
        ("rate", pa.float64()),
        *((name, pa.int64()) for name in ("members", "nonmembers", "exposed")),
        *((name, pa.float64()) for name in ("expected", "p")),
    ]
)


_RISK = pa.schema(
    [
        ("run_id", pa.string()),
        ("epoch", pa.int32()),
        ("record_id", pa.string()),
        ("shadows", pa.int64()),
        *((name, pa.float64()) for name in ("memorization", "low", "high")),
    ]
)
_RANKINGS = pa.schema(
    [
        *_CELL,
        ("metric", pa.string()),
        *((name, pa.float64()) for name in ("value", "low", "high", "ceiling")),
        *((name, pa.int64()) for name in ("records", "shadows")),
        ("reason", pa.string()),
    ]
)
_CANARIES = pa.schema(
    [
        ("run_id", pa.string()),
        ("epoch", pa.int32()),
        *((name, pa.int64()) for name in ("copies", "canaries", "guesses", "correct")),
        *((name, pa.float64()) for name in ("auc", "auc_low", "auc_high", "epsilon", "ceiling", "delta", "claimed")),
        ("reason", pa.string()),
    ]
)


def write_details(grid: Grid) -> None:
    """Recompute the tables from the evidence of every cell that has any; without rows where nothing can be said.

    Those of risks and canaries are written where there are shadow models and canaries.
    Subgroups and records are those of the last finished epoch; records are all members, the most exposed first.
    """
    cells = [cell for cell in grid.cells if cell.epochs and (cell.base / "stats.parquet").exists()]
    found = [(cell, exposed(cell, most=len(cell.rows("member")))) for cell in cells]
    tables = {
        "subgroups": (_SUBGROUPS, [row for cell in cells for row in _subgroup_rows(cell, grid.attacks)]),
        "exposed": (_EXPOSED, [row for cell, exposure in found for row in _record_rows(cell, exposure)]),
        "exposed_counts": (_COUNTS, [row for cell, exposure in found for row in _count_rows(cell, exposure)]),
    }
    ranked = [(cell, one) for cell in cells if (one := ranking(cell, grid.attacks))]
    if ranked:
        tables["risk"] = _RISK, [row for cell, one in ranked for row in _risk_rows(cell, one)]
        tables["rankings"] = _RANKINGS, [row for cell, one in ranked for row in _ranking_rows(cell, one)]
    canaries = all_planted(cells)
    if canaries:
        tables["canaries"] = _CANARIES, [_canary_row(cell, row) for cell, row in canaries]
    for name, (schema, rows) in tables.items():
        write_table(grid.path / f"{name}.parquet", pa.Table.from_pylist(rows, schema=schema))


def _subgroup_rows(cell: Cell, attacks: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    for row in subgroups(cell, cell.epochs, attacks):
        common = {
            "run_id": cell.run_id,
            "epoch": cell.epochs,
            "attack": row.attack,
            "subgroup": row.label,
            "members": row.members,
            "nonmembers": row.nonmembers,
            "member_subjects": row.subjects[0],
            "nonmember_subjects": row.subjects[1],
            "reason": row.reason,
        }
        for metric, x, status in _measures(row):
            bounds = {"value": x.value, "low": x.low, "high": x.high} if x else {}
            p = row.p if metric == "auc_difference" else None
            yield {**common, "metric": metric, **bounds, "p": p, "status": status}


def _measures(row: SubgroupRow) -> Iterator[tuple[str, Interval | None, str]]:
    yield "auc", row.auc, row.status
    for metric, rate in row.tpr.items():
        yield metric, rate.interval, rate.status
    yield "auc_difference", row.difference, "ok" if row.difference else "too_few"


def _record_rows(cell: Cell, found: Exposure) -> Iterator[dict[str, Any]]:
    for row in found.rows:
        document = asdict(row)
        common = {"run_id": cell.run_id, "epoch": cell.epochs, "attack": found.attack, "record_id": document.pop("id")}
        yield {**common, **document}


def _count_rows(cell: Cell, found: Exposure) -> Iterator[dict[str, Any]]:
    common = {"run_id": cell.run_id, "attack": found.attack, "rate": found.rate}
    common |= {"members": found.members, "nonmembers": found.nonmembers}
    for one in found.epochs:
        yield {**common, **asdict(one)}


def _risk_rows(cell: Cell, found: Ranking) -> Iterator[dict[str, Any]]:
    ids, truth = cell.records["id"].to_numpy()[cell.rows("member")].tolist(), found.truth
    for n, record in enumerate(ids):
        numbers = {"memorization": truth.values[n], "low": truth.low[n], "high": truth.high[n]}
        known = {name: float(x) if np.isfinite(x) else None for name, x in numbers.items()}
        yield {"run_id": cell.run_id, "epoch": found.epoch, "record_id": record, "shadows": found.shadows, **known}


def _ranking_rows(cell: Cell, found: Ranking) -> Iterator[dict[str, Any]]:
    for attack, one in found.agreements.items():
        common = {"run_id": cell.run_id, "epoch": found.epoch, "attack": attack, "shadows": found.shadows}
        if isinstance(one, str):
            yield {**common, "metric": "spearman", "reason": one}
            continue
        common |= {"records": one.records, "reason": ""}
        spearman, top = one.spearman, one.precision
        ceiling = found.truth.ceiling if np.isfinite(found.truth.ceiling) else None
        yield {**common, "metric": "spearman", **_bounds(spearman), "ceiling": ceiling}
        yield {**common, "metric": "top_tenth", **_bounds(top)}


def _bounds(x: Interval) -> dict[str, float]:
    return {"value": x.value, "low": x.low, "high": x.high}


def _canary_row(cell: Cell, row: Planted) -> dict[str, Any]:
    document: dict[str, Any] = {"run_id": cell.run_id, "epoch": row.epoch, "copies": row.copies}
    document |= {"canaries": row.canaries, "claimed": row.claimed, "reason": row.reason}
    if row.auc:
        document |= {"auc": row.auc.value, "auc_low": row.auc.low, "auc_high": row.auc.high}
    if row.found:
        document |= {key: getattr(row.found, key) for key in ("guesses", "correct", "epsilon", "ceiling", "delta")}
    return document
