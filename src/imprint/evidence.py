"""What attacks are given: the pieces of evidence of a cell at an epoch, each read when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from imprint.attacks import evidence_needed, run_attack
from imprint.errors import InvalidAudit
from imprint.halves import inside
from imprint.passes import PASSES
from imprint.store import CellFolder, read_losses, read_table
from imprint.types import Floats, Shadows, TokenStats

if TYPE_CHECKING:
    from imprint.rows import Cell

BASE_KNOWS_NOTHING = ("reference", "trace")
"""Evidence by which the untouched base is compared with itself."""
TUNED_ONLY = (*BASE_KNOWS_NOTHING, "shadows", "gradient_norm")
"""Evidence that says nothing of the untouched base."""


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

    def scores(self, attacks: Iterable[str]) -> dict[str, Floats]:
        """attack → [N] score of every record, of those attacks whose evidence has been measured and is enough."""
        found = {}
        for name in [name for name in attacks if self.available(name)]:
            with suppress(InvalidAudit):
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
    vocabulary = of.cell.base_meta.get("vocabulary")
    if vocabulary is None or not of.cell.role_in("auxiliary_out", "validation").any():
        return None
    tokens = of.cell.reference.select(of.cell.role_in("auxiliary_out", "validation")).tokens
    return np.bincount(tokens, minlength=vocabulary)


def _known(of: Evidence) -> Floats | None:
    known = np.full(len(of.cell.records), np.nan)
    known[of.cell.role_in("auxiliary_in")] = 1.0
    known[of.cell.role_in("auxiliary_out")] = 0.0
    return None if np.isnan(known).all() else known


def _population(of: Evidence) -> NDArray[np.bool_] | None:
    outside = of.cell.role_in("auxiliary_out", "validation")
    return outside if outside.any() else None


def _shadows(of: Evidence) -> Shadows | None:
    """Of the shadow models that reached this epoch; none at the base, which they all start from."""
    ready = [shadow for shadow in of.cell.shadows if of.epoch and shadow.folder.finished_epochs() >= of.epoch]
    if not ready:
        return None
    roles, groups = of.cell.records["role"].tolist(), of.cell.records["group"].tolist()
    seed = of.cell.spec.data.seed or 0
    losses = [read_losses(shadow.folder.epoch(of.epoch) / "stats.parquet") for shadow in ready]
    halves = [inside(roles, groups, seed, shadow.number) for shadow in ready]
    return Shadows(np.stack(losses, axis=1), np.stack(halves, axis=1))


def _measured(name: str) -> Callable[[Evidence], Any]:
    """A piece that took passes of its own."""

    def read(of: Evidence) -> Any:
        key = of.cell.passes.get(name)
        file = None if key is None else pass_file(of.cell.folder, of.cell.base, name, key, of.epoch)
        return PASSES[name].read(read_table(file)) if file and file.exists() else None

    return read


def pass_file(folder: CellFolder, base: Any, name: str, key: str, epoch: int) -> Any:
    """Where a piece of evidence lies that took passes of its own; of epoch 0 beside the base's scores."""
    home = base if epoch == 0 else folder.path
    return home / "passes" / f"{name}-{key}" / f"{epoch:02}.parquet"


_PIECES: dict[str, Callable[[Evidence], Any]] = {
    "target": _target,
    "reference": _reference,
    "zlib_bytes": _zlib_bytes,
    "trace": _trace,
    "token_counts": _token_counts,
    "known": _known,
    "population": _population,
    "shadows": _shadows,
    **{name: _measured(name) for name in ("lowercase", "neighbours", "prefixed", "prefixed_members", "gradient_norm")},
}
