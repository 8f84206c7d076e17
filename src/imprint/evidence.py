"""What attacks are given: the pieces of evidence of a cell at an epoch, each read when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from imprint.attacks import evidence_needed, run_attack
from imprint.errors import ImprintError, InvalidAudit, UsageError, first_line
from imprint.halves import inside
from imprint.passes import PASSES
from imprint.passes.bench import OUTSIDE
from imprint.store import CellFolder, read_json, read_losses, read_table
from imprint.types import Floats, Shadows, TokenStats

if TYPE_CHECKING:
    from imprint.rows import Cell

_COMPARED = ("reference", "trace")
"""Evidence by which the untouched base is compared with itself."""
TUNED_ONLY = ("shadows", "gradient_norm")
"""Evidence that there is of tuned models alone."""


def says_nothing_of_base(attack: str) -> bool:
    """Whether an attack gives every record of the untouched base the same score, or none.

    One that is fitted on known records also reads what does not compare with the base.
    """
    needed = {*evidence_needed(attack)}
    return bool(needed & {*TUNED_ONLY}) or (bool(needed & {*_COMPARED}) and "known" not in needed)


@dataclass(frozen=True)
class Evidence:
    """The evidence of one cell at one epoch; 0 is the base."""

    cell: Cell
    epoch: int
    pieces: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        """A piece, in the order of the cell's records; None where it was not measured."""
        if name not in self.pieces:
            self.pieces[name] = _PIECES[name](self)
        return self.pieces[name]

    @property
    def target(self) -> TokenStats:
        stats: TokenStats = self["target"]
        return stats

    def available(self, attack: str) -> bool:
        """Whether everything that an attack needs has been measured."""
        return all(self[name] is not None for name in evidence_needed(attack))

    def file(self, name: str) -> Path | None:
        """Where a piece that takes passes of its own lies, if the recipe asks for it."""
        key = self.cell.passes.get(name)
        return None if key is None else pass_file(self.cell.folder, self.cell.base, name, key, self.epoch)

    def refusal(self, attack: str) -> str:
        """Why what an attack needs could not be measured here; empty where nobody tried, or nothing is missing."""
        for name in evidence_needed(attack):
            file = self.file(name)
            if file is not None and refusal_file(file).exists():
                return str(read_json(refusal_file(file)).get("reason", "not measured"))
        if self.epoch and "shadows" in evidence_needed(attack) and self.cell.shadows and self["shadows"] is None:
            return f"none of its {len(self.cell.shadows)} shadow models reached epoch {self.epoch}"
        return ""

    def scores(self, attacks: Iterable[str]) -> dict[str, Floats]:
        """attack → [N] score of every record, of those attacks whose evidence has been measured and is enough."""
        found = {}
        for name in [name for name in attacks if self.available(name)]:
            with suppress(InvalidAudit, UsageError):
                found[name] = self.score(name)
        return found

    def score(self, attack: str) -> Floats:
        """[N] scores; higher means more likely a member.

        Raises:
            UsageError: the evidence is not there.
            InvalidAudit: it is not enough for this attack.
        """
        return run_attack(attack, **{name: self[name] for name in evidence_needed(attack)})


def _target(of: Evidence) -> TokenStats:
    return of.cell.stats(of.epoch)


def _reference(of: Evidence) -> TokenStats:
    return of.cell.reference


def _zlib_bytes(of: Evidence) -> NDArray[np.int64]:
    sizes: NDArray[np.int64] = of.cell.records["zlib_bytes"].to_numpy()
    return sizes


def _trace(of: Evidence) -> Floats:
    return np.stack([of.cell.nll(epoch) for epoch in range(of.epoch + 1)], axis=1)


def _token_counts(of: Evidence) -> NDArray[np.int64] | None:
    """Of the records nobody tuned on and nobody is evaluated on: a corpus of the same kind of text."""
    vocabulary, outside = of.cell.base_meta.get("vocabulary"), of["population"]
    if vocabulary is None or outside is None:
        return None
    return np.bincount(of.cell.reference.select(outside).tokens, minlength=vocabulary)


def _known(of: Evidence) -> Floats | None:
    known = np.full(len(of.cell.records), np.nan)
    known[of.cell.role_in("auxiliary_in")] = 1.0
    known[of.cell.role_in("auxiliary_out")] = 0.0
    return None if np.isnan(known).all() else known


def _population(of: Evidence) -> NDArray[np.bool_] | None:
    outside = of.cell.role_in(*OUTSIDE)
    return outside if outside.any() else None


def _shadows(of: Evidence) -> Shadows | None:
    """Of the shadow models that reached this epoch; none at the base, which they all start from."""
    ready = [shadow for shadow in of.cell.shadows if of.epoch and shadow.folder.finished_epochs() >= of.epoch]
    if not ready:
        return None
    roles, groups = of.cell.records["role"].tolist(), of.cell.records["group"].tolist()
    seed = of.cell.spec.data.seed or 0
    ids = of.cell.records["id"].tolist()
    losses = [read_losses(shadow.folder.epoch(of.epoch) / "stats.parquet", ids) for shadow in ready]
    halves = [inside(roles, groups, seed, shadow.number) for shadow in ready]
    return Shadows(np.stack(losses, axis=1), np.stack(halves, axis=1))


def _measured(name: str) -> Callable[[Evidence], Any]:
    """A piece that took passes of its own."""

    def read(of: Evidence) -> Any:
        file = of.file(name)
        if file is None or not file.exists():
            return None
        table = read_table(file)
        try:
            if table.column("id").to_pylist() != of.cell.records["id"].tolist():
                raise ImprintError(f"{file} is of other records: delete it and run the same command again")
            return PASSES[name].read(table)
        except (KeyError, AttributeError, TypeError, ValueError, pa.ArrowException) as error:
            raise ImprintError(
                f"{file} is damaged ({first_line(error)}): delete it and run the same command again"
            ) from None

    return read


def pass_file(folder: CellFolder, base: Path, name: str, key: str, epoch: int) -> Path:
    """Where a piece of evidence lies that took passes of its own: with the scores of the same weights."""
    return (base if epoch == 0 else folder.epoch(epoch)) / "passes" / f"{name}-{key}.parquet"


def refusal_file(file: Path) -> Path:
    """Where it says why such a piece could not be measured."""
    return file.with_suffix(".refused.json")


_PIECES: dict[str, Callable[[Evidence], Any]] = {
    "target": _target,
    "reference": _reference,
    "zlib_bytes": _zlib_bytes,
    "trace": _trace,
    "token_counts": _token_counts,
    "known": _known,
    "population": _population,
    "shadows": _shadows,
    **{name: _measured(name) for name in PASSES},
}
