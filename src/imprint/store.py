"""The evidence on disk: Parquet, JSON and safetensors only; nothing is pickled.

    <out>/recipe.yaml                       the recipe as given
    <out>/recipe.lock.json                  the cells it stands for: run ids and specs
    <out>/base/<key>/                       records.parquet, stats.parquet, meta.json: the untouched model, once
    <out>/base/<key>/passes/, cells/<run_id>/epochs/03/passes/    evidence that took passes of its own
    <out>/base/<key>/gates/                 what the validity gates need besides (`controls.py`)
    <out>/cells/<run_id>/spec.json
    <out>/cells/<run_id>/epochs/03/         stats.parquet, meta.json; adapter/ (last epoch, and the one of best
                                            validation perplexity); state.safetensors (newest epoch, until done)
    <out>/cells/<run_id>/done.json          written last, with checksums: its existence means the cell is complete
    <out>/results.parquet, scores.parquet, gates.json    recomputed from the evidence

Several recipes may keep `base` and `cells` in one folder that they share; a cell that two of them ask for is then
measured once.

Folders appear whole or not at all: they are filled under a temporary name, synced, and renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from imprint.errors import ImprintError, UsageError
from imprint.types import TokenStats

LOCK = "run.lock"
"""Held while a run is at work in the folder."""
PART = ".part"
"""Ending of what is still being written."""
_ROW_FIELDS = ("tokens", "logp", "mean", "std", "top")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is synced and takes the name, on failure it is gone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=PART, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Like `atomic_file` for a folder; an existing incomplete folder of that name is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=PART, dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        for file in temporary.rglob("*"):
            _sync(file)
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
        _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, document: Any) -> None:
    write_text(path, json.dumps(document, indent=1, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Raises ImprintError naming the file when it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ImprintError(f"{path} is damaged ({error}): delete its folder and run the same command again") from None


def write_table(path: Path, table: pa.Table) -> None:
    with atomic_file(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def read_table(path: Path) -> pa.Table:
    """Raises ImprintError naming the file when it is not Parquet."""
    try:
        return pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ImprintError(
            f"{path} cannot be read ({error}): delete its folder and run the same command again"
        ) from None


def stats_table(stats: TokenStats) -> pa.Table:
    """One row per record; the per-token columns are lists."""
    offsets = pa.array(stats.offsets.astype(np.int32))
    columns = {name: pa.ListArray.from_arrays(offsets, pa.array(getattr(stats, name))) for name in _ROW_FIELDS}
    return pa.table({"id": pa.array(stats.ids.tolist(), pa.string()), **columns})


def write_stats(path: Path, stats: TokenStats) -> None:
    write_table(path, stats_table(stats))


def read_stats(path: Path) -> TokenStats:
    """The inverse of `write_stats`."""
    return table_stats(read_table(path))


def table_stats(table: pa.Table) -> TokenStats:
    """The inverse of `stats_table`."""
    table = table.combine_chunks()
    lists = {name: table.column(name).combine_chunks() for name in _ROW_FIELDS}
    offsets = np.asarray(lists["tokens"].offsets, dtype=np.int64)
    rows = {name: column.values.to_numpy(zero_copy_only=False) for name, column in lists.items()}
    return TokenStats(ids=np.array(table.column("id").to_pylist(), dtype=np.str_), offsets=offsets, **rows)


def read_losses(path: Path, ids: Sequence[str] | None = None) -> NDArray[np.float64]:
    """[N] mean negative log-likelihood of the records of a file of `write_stats`, without reading the rest of it.

    Args:
        ids: of the records that are expected, in their order.

    Raises:
        ImprintError: it cannot be read, or is of other records.
    """
    try:
        table = pq.read_table(path, columns=["id", "logp"])
        column = table.column("logp").combine_chunks()
        if ids is not None and table.column("id").to_pylist() != list(ids):
            raise ImprintError(f"{path} is of other records: delete its folder and run the same command again")
    except (pa.ArrowInvalid, OSError) as error:
        raise ImprintError(
            f"{path} cannot be read ({error}): delete its folder and run the same command again"
        ) from None
    offsets = np.asarray(column.offsets, dtype=np.int64)
    logp = column.values.to_numpy(zero_copy_only=False).astype(np.float64)
    return np.asarray(-np.add.reduceat(logp, offsets[:-1]) / np.diff(offsets))


def checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class CellFolder:
    """The folder of one cell."""

    path: Path

    @property
    def done(self) -> bool:
        return (self.path / "done.json").exists()

    @property
    def measured(self) -> bool:
        """Whether there is evidence in it."""
        return self.done or self.epoch(1).is_dir()

    def outcome(self) -> dict[str, Any]:
        """What `finish` or `fail` wrote: status, reason, trainable and total parameters, last epoch."""
        for name in ("done.json", "failed.json"):
            if (self.path / name).exists():
                return dict(read_json(self.path / name))
        return {"status": "unfinished"}

    def epoch(self, number: int) -> Path:
        return self.path / "epochs" / f"{number:02}"

    def finished_epochs(self) -> int:
        """The last epoch e such that epochs 1..e are all complete."""
        number = 0
        while self.epoch(number + 1).is_dir():
            number += 1
        return number

    def meta(self, epoch: int) -> dict[str, Any]:
        return dict(read_json(self.epoch(epoch) / "meta.json"))

    def stats(self, epoch: int) -> TokenStats:
        return read_stats(self.epoch(epoch) / "stats.parquet")

    def finish(self, **outcome: Any) -> None:
        """Mark the cell complete, with a checksum of each piece of evidence; the resume state goes after that."""
        evidence = sorted(self.path.glob("epochs/*/stats.parquet"))
        sums = {str(file.relative_to(self.path)): checksum(file) for file in evidence}
        write_json(self.path / "done.json", {**outcome, "sha256": sums})
        (self.path / "failed.json").unlink(missing_ok=True)
        self.drop_states(keep=0)

    def verify(self) -> None:
        """Compare the evidence of a complete cell with its checksums.

        Raises:
            ImprintError: a file is missing or not what was measured.
        """
        for name, digest in self.outcome().get("sha256", {}).items():
            file = self.path / name
            if not file.exists() or checksum(file) != digest:
                raise ImprintError(
                    f"{file} is not what was measured: delete {self.path} and run the same command again"
                )

    def best_epoch(self) -> int:
        """The finished epoch of lowest validation perplexity, the earliest where several are; 0 where none is."""
        epochs = range(1, self.finished_epochs() + 1)
        return min(epochs, key=lambda epoch: self.meta(epoch)["validation_perplexity"], default=0)

    def drop_adapters(self, keep: set[int]) -> None:
        """Delete the trained weights of every epoch but those in `keep`."""
        for folder in self.path.glob("epochs/*/adapter"):
            if folder.parent not in {self.epoch(number) for number in keep}:
                shutil.rmtree(folder)

    def fail(self, reason: str, traceback: str = "") -> None:
        write_json(self.path / "failed.json", {"status": "failed", "reason": reason, "traceback": traceback})

    def drop_states(self, keep: int) -> None:
        """Delete the resume state of every epoch but `keep`."""
        for file in self.path.glob("epochs/*/state.safetensors"):
            if file.parent != self.epoch(keep):
                file.unlink()


@dataclass(frozen=True)
class Store:
    """The output folder of one recipe.

    Attributes:
        path: where its lock, its results and its report lie.
        shared: where `base` and `cells` lie, if not there; a folder above.
    """

    path: Path
    shared: Path | None = None

    @classmethod
    def at(cls, path: Path) -> Store:
        """The store of a finished or unfinished run.

        Raises:
            ImprintError: there is none.
        """
        shared = cls(path).lock().get("evidence")
        return cls(path, path / shared if shared else None)

    @property
    def evidence(self) -> Path:
        return self.shared or self.path

    def cell(self, run_id: str) -> CellFolder:
        return CellFolder(self.evidence / "cells" / run_id)

    def base(self, key: str) -> Path:
        return self.evidence / "base" / key

    def gates(self, key: str) -> Path:
        return self.base(key) / "gates"

    def sweep(self) -> None:
        """Delete what a killed run left half-written."""
        for path in [*self.evidence.rglob(f".*{PART}")]:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def lock(self) -> dict[str, Any]:
        """The cells of the recipe that owns this folder.

        Raises:
            ImprintError: there is none.
        """
        file = self.path / "recipe.lock.json"
        if not file.exists():
            raise UsageError(f"{self.path} holds no run and no audit: expected {file.name}, which both write there")
        keys = {"run_id", "base", "label", "spec"}
        try:
            lock = json.loads(file.read_text(encoding="utf-8"))
            whole = all(keys <= set(cell) for cell in lock["cells"]) and {"recipe", "attacks", "budget"} <= set(lock)
        except (ValueError, KeyError, TypeError, RecursionError):
            whole = False
        if not whole:
            raise ImprintError(
                f"{file} is damaged: the cells beside it are whole; give another folder, or remove this file and the "
                "folders `cells` and `base`"
            )
        return dict(lock)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the folder for one process at a time; the lock ends with the process, however that ends.

        Raises:
            UsageError: another process holds it.
        """
        try:
            import fcntl
        except ImportError:  # Windows: no such locks, no such protection
            yield
            return
        self.evidence.mkdir(parents=True, exist_ok=True)
        with (self.evidence / LOCK).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UsageError(
                    f"another Imprint is at work in {self.evidence}: wait for it or give another folder"
                ) from None
            yield
