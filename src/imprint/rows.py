"""Evidence in, rows out: every number of a finished or unfinished grid, recomputed without torch in seconds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from imprint.attacks import run_attack
from imprint.errors import ImprintError, InvalidAudit, UsageError
from imprint.evidence import Evidence
from imprint.measures import auc, perplexity, tpr_at_fpr
from imprint.measures.auc import codes
from imprint.spec import AuditSpec, CellSpec, RunSpec, canonical_json
from imprint.store import (
    CellFolder,
    Store,
    atomic_file,
    read_json,
    read_losses,
    read_stats,
    read_table,
    write_json,
    write_table,
)
from imprint.types import Floats, Interval, Measurement, TokenStats

STATS = "stats.parquet"
_NOBODY = np.zeros(0, np.intp)
FALSE_POSITIVE_RATES = {"tpr_at_10pct_fpr": 0.1, "tpr_at_1pct_fpr": 0.01, "tpr_at_0.1pct_fpr": 0.001}
_SCORES = pa.schema(
    [
        ("run_id", pa.string()),
        ("epoch", pa.int32()),
        ("record_id", pa.string()),
        ("member", pa.bool_()),
        ("attack", pa.string()),
        ("score", pa.float64()),
    ]
)
_RESULTS = pa.schema(
    [
        *((name, pa.string()) for name in ("run_id", "model", "data", "method", "options")),
        ("seed", pa.int64()),
        ("epoch", pa.int32()),
        ("attack", pa.string()),
        ("metric", pa.string()),
        *((name, pa.float64()) for name in ("value", "low", "high")),
        ("members", pa.int64()),
        ("nonmembers", pa.int64()),
        ("status", pa.string()),
    ]
)


@dataclass(frozen=True)
class Shadow:
    """A shadow model of a cell: its number says which half of the records it was tuned on."""

    number: int
    folder: CellFolder


@dataclass(frozen=True)
class Cell:
    """One cell of a grid as it lies in the store, finished or not."""

    spec: CellSpec
    label: str
    """The method and those of its options that differ within the grid, for people to read."""
    folder: CellFolder
    base: Path
    shadows: tuple[Shadow, ...] = ()
    passes: Mapping[str, str] = field(default_factory=dict)
    """Evidence that takes passes of its own → the key under which it lies."""

    @property
    def run_id(self) -> str:
        return self.folder.path.name

    @property
    def run_spec(self) -> RunSpec:
        """The spec of a cell that was tuned here.

        Raises:
            ImprintError: it was not.
        """
        if not isinstance(self.spec, RunSpec):
            raise ImprintError(f"{self.label} was tuned elsewhere: how is not known")
        return self.spec

    @property
    def training(self) -> dict[str, Any] | None:
        """How it was trained; None where that was elsewhere."""
        return self.spec.train.model_dump() if isinstance(self.spec, RunSpec) else None

    @property
    def planned(self) -> int:
        """Epochs asked for; of an audit, the checkpoints that there are."""
        return self.spec.train.epochs if isinstance(self.spec, RunSpec) else self.epochs

    @cached_property
    def outcome(self) -> dict[str, Any]:
        """`status` (`done`, `diverged`, `failed`, `unfinished`), `reason`, `trainable`, `parameters`."""
        return self.folder.outcome()

    @cached_property
    def epochs(self) -> int:
        """Finished epochs."""
        return self.folder.finished_epochs()

    @cached_property
    def seconds(self) -> float:
        """Training and scoring time of the finished epochs."""
        return float(sum(sum(cost["seconds"].values()) for cost in self.costs))

    @cached_property
    def costs(self) -> list[dict[str, Any]]:
        """What each finished epoch cost: `seconds` by part, `flops`, `peak_memory`, `peak_flops`."""
        return [dict(self.folder.meta(epoch)["cost"]) for epoch in range(1, self.epochs + 1)]

    @cached_property
    def tokens(self) -> int:
        """Tokens trained on and scored in the finished epochs."""
        metas = [self.folder.meta(epoch) for epoch in range(1, self.epochs + 1)]
        return sum(meta["tokens_trained"] + meta["tokens_scored"] for meta in metas)

    @cached_property
    def base_meta(self) -> dict[str, Any]:
        """Counts of the split, what was dropped and truncated, and why."""
        return dict(read_json(self.base / "meta.json"))

    @cached_property
    def records(self) -> pd.DataFrame:
        """One row per scored record: `id, role, group, scored_tokens, zlib_bytes, cut`."""
        frame: pd.DataFrame = read_table(self.base / "records.parquet").to_pandas()
        return frame

    @cached_property
    def reference(self) -> TokenStats:
        """The untouched base on the same records."""
        return read_stats(self.base / "stats.parquet")

    def stats(self, epoch: int) -> TokenStats:
        """Scores of an epoch; 0 is the base."""
        found = self.reference if epoch == 0 else self.folder.stats(epoch)
        self._losses[epoch] = found.nll
        return found

    @cached_property
    def _losses(self) -> dict[int, Floats]:
        return {}

    def nll(self, epoch: int) -> Floats:
        """[N] mean negative log-likelihood of every record at an epoch, nats per token."""
        if epoch not in self._losses:
            self._losses[epoch] = self.reference.nll if epoch == 0 else read_losses(self.folder.epoch(epoch) / STATS)
        return self._losses[epoch]

    @cached_property
    def held_out(self) -> str:
        """The role whose perplexity is utility: `validation`, or `nonmember` in an audit that has no such records."""
        return "validation" if len(self.rows("validation")) else "nonmember"

    def rows(self, role: str) -> NDArray[np.intp]:
        """Positions of the records of a role within the evidence (`member`, `nonmember`, `validation`, …)."""
        return self._of_role.get(role, _NOBODY)

    def role_in(self, *roles: str) -> NDArray[np.bool_]:
        """[N] whether a record has one of these roles."""
        return np.isin(np.arange(len(self.records)), np.concatenate([self.rows(role) for role in roles]))

    @cached_property
    def _of_role(self) -> dict[str, NDArray[np.intp]]:
        roles = self.records["role"].to_numpy().astype(str)
        return {role: np.flatnonzero(roles == role) for role in np.unique(roles).tolist()}

    def groups(self, role: str) -> NDArray[Any]:
        return self._groups[self.rows(role)]

    @cached_property
    def _groups(self) -> NDArray[Any]:
        groups: NDArray[Any] = self.records["group"].to_numpy()
        return groups

    def losses(self, epoch: int) -> tuple[Floats, Floats]:
        """Mean negative log-likelihood of members and of non-members, nats per token."""
        nll = self.nll(epoch)
        return nll[self.rows("member")], nll[self.rows("nonmember")]

    def scores(self, epoch: int, attacks: Iterable[str]) -> dict[str, Floats]:
        """attack -> [N] score of every record, of the attacks whose evidence there is; higher: more likely a member."""
        return Evidence(self, epoch).scores(attacks)

    def scored(
        self, target: TokenStats, attacks: Iterable[str], rows: NDArray[np.intp] | None = None
    ) -> dict[str, Floats]:
        """The same of any pass over the same records, or over those at `rows`, by attacks that need one pass."""
        zlib_bytes, reference = self.records["zlib_bytes"].to_numpy(), self.reference
        if rows is not None:
            zlib_bytes, reference = zlib_bytes[rows], reference.select(rows)
        evidence = {"target": target, "reference": reference, "zlib_bytes": zlib_bytes}
        return {name: run_attack(name, **evidence) for name in attacks}

    def sides(self, scores: Floats) -> tuple[Floats, Floats]:
        """The scores of members and of non-members."""
        return scores[self.rows("member")], scores[self.rows("nonmember")]


@dataclass(frozen=True)
class Grid:
    """Everything a table or a report needs of one output folder."""

    path: Path
    recipe: dict[str, Any] | list[dict[str, Any]]
    attacks: tuple[str, ...]
    budget: dict[str, Any] | None
    cells: tuple[Cell, ...]


def load_grid(path: str | Path) -> Grid:
    """The cells of an output folder.

    Raises:
        ImprintError: the folder holds no run.
    """
    if (Path(path) / "canary_audit.md").exists():
        raise UsageError(f"{path} holds an audit by canaries: its table is in canary_audit.md")
    store = Store.at(Path(path))
    lock = store.lock()
    cells = tuple(_cell(store, entry) for entry in lock["cells"])
    return Grid(Path(path), lock["recipe"], tuple(lock["attacks"]), lock["budget"], cells)


def _cell(store: Store, entry: dict[str, Any]) -> Cell:
    shadows = tuple(Shadow(number, store.cell(run_id)) for number, run_id in enumerate(entry.get("shadows", ())))
    folder, base = store.cell(entry["run_id"]), store.base(entry["base"])
    return Cell(_spec(entry["spec"]), entry["label"], folder, base, shadows, entry.get("passes", {}))


def _spec(document: dict[str, Any]) -> CellSpec:
    return RunSpec.model_validate(document) if "train" in document else AuditSpec.model_validate(document)


def results(path: str | Path) -> pd.DataFrame:
    """The measurements of an output folder, one row each (see `imprint.types.Measurement`).

    Raises:
        ImprintError: the folder holds no results yet.
    """
    file = Path(path) / "results.parquet"
    if not file.exists():
        raise ImprintError(f"{file} does not exist: run `imprint run RECIPE --out {path}` first")
    frame: pd.DataFrame = read_table(file).to_pandas()
    return frame


def write_results(grid: Grid) -> pd.DataFrame:
    """Recompute `results.parquet` and `scores.parquet` from the evidence of every cell that has any."""
    measurements: list[Measurement] = []
    refused: dict[str, str] = {}
    with atomic_file(grid.path / "scores.parquet") as temporary, pq.ParquetWriter(temporary, _SCORES) as scores:
        for cell in grid.cells:
            if not (cell.base / "stats.parquet").exists():
                continue
            cell.folder.verify()
            for epoch in range(cell.epochs + 1):
                evidence = Evidence(cell, epoch)
                found: dict[str, Floats] = {}
                measurements += _measure(evidence, grid.attacks, found, refused)
                scores.write_table(_score_table(cell, epoch, found))
            if cell.outcome["status"] == "diverged":
                measurements += _diverged(cell, grid.attacks)
    table = pa.Table.from_pylist([asdict(m) for m in measurements], schema=_RESULTS)
    write_table(grid.path / "results.parquet", table)
    write_json(grid.path / "refused.json", refused)
    return results(grid.path)


def _score_table(cell: Cell, epoch: int, scores: dict[str, Floats]) -> pa.Table:
    if not scores:
        return _SCORES.empty_table()
    audited = np.concatenate([cell.rows("member"), cell.rows("nonmember")])
    ids, member = cell.records["id"].to_numpy()[audited], np.isin(audited, cell.rows("member"))
    n, count = len(scores), len(audited)
    columns = {
        "run_id": [cell.run_id] * (n * count),
        "epoch": np.full(n * count, epoch, np.int32),
        "record_id": np.tile(ids, n),
        "member": np.tile(member, n),
        "attack": np.repeat(list(scores), count),
        "score": np.concatenate([s[audited] for s in scores.values()]),
    }
    return pa.table(columns, schema=_SCORES)


def _measure(
    evidence: Evidence, attacks: Iterable[str], scores: dict[str, Floats], refused: dict[str, str]
) -> Iterator[Measurement]:
    """Perplexity and every attack whose evidence there is.

    Args:
        scores: receives the scores of each attack.
        refused: receives why an attack has none, the first reason of each.
    """
    cell, epoch = evidence.cell, evidence.epoch
    held_out = evidence.target.select(cell.rows(cell.held_out))
    ppl = perplexity(held_out, groups=cell.groups(cell.held_out))
    yield _row(cell, epoch, "", "perplexity", ppl, "ok")
    of_members, of_nonmembers = cell.groups("member"), cell.groups("nonmember")
    subjects = codes(of_members), codes(of_nonmembers)
    for attack in attacks:
        if not evidence.available(attack):
            if reason := evidence.refusal(attack):
                refused.setdefault(attack, reason)
                yield _row(cell, epoch, attack, "auc", None, "refused")
            continue
        try:
            score = evidence.score(attack)
            ins, outs = cell.sides(score)
            interval = auc(ins, outs, member_groups=of_members, nonmember_groups=of_nonmembers)
        except (UsageError, InvalidAudit) as error:
            refused.setdefault(attack, str(error))
            yield _row(cell, epoch, attack, "auc", None, "refused")
            continue
        scores[attack] = score
        yield _row(cell, epoch, attack, "auc", interval, "ok")
        for metric, fpr in FALSE_POSITIVE_RATES.items():
            try:
                tpr = tpr_at_fpr(ins, outs, fpr, member_groups=subjects[0], nonmember_groups=subjects[1])
            except InvalidAudit:
                yield _row(cell, epoch, attack, metric, None, "too_few")
            else:
                interval = Interval(tpr.value, tpr.low, tpr.high)
                yield _row(cell, epoch, attack, metric, interval, "indicative" if tpr.indicative else "ok")


def _diverged(cell: Cell, attacks: tuple[str, ...]) -> Iterator[Measurement]:
    """The epoch in which the loss stopped being finite: rows without values, so that the cell stays in sight."""
    epoch = cell.epochs + 1
    yield _row(cell, epoch, "", "perplexity", None, "diverged")
    for attack in attacks:
        yield _row(cell, epoch, attack, "auc", None, "diverged")


def _row(cell: Cell, epoch: int, attack: str, metric: str, x: Interval | None, status: str) -> Measurement:
    spec = cell.spec
    return Measurement(
        run_id=cell.run_id,
        model=spec.model.name,
        data=spec.data.source.name,
        method=spec.method.name,
        options=canonical_json(spec.method.options),
        seed=spec.seed,
        epoch=epoch,
        attack=attack,
        metric=metric,
        value=x.value if x else None,
        low=_finite(x.low) if x else None,
        high=_finite(x.high) if x else None,
        members=len(cell.rows("member")),
        nonmembers=len(cell.rows("nonmember")),
        status=status,
    )


def _finite(x: float) -> float | None:
    """A bound that could not be computed is absent, not NaN."""
    return x if np.isfinite(x) else None
