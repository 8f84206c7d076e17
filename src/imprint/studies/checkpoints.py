"""Stored checkpoints back in memory, for what a study measures beyond the scores."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from imprint.recipe import Plan, PlannedCell
from imprint.records import Audit, prepare
from imprint.rows import Cell
from imprint.spec import Runtime

if TYPE_CHECKING:
    from torch import nn

    from imprint.data.tokens import Encoded
    from imprint.tuning.base import Base


@dataclass
class Checkpoints:
    """The models of a plan's cells; one base and one split are kept at a time."""

    planned: Plan
    runtime: Runtime
    _base: Base | None = field(default=None, init=False)
    _audit: tuple[str, Audit] | None = field(default=None, init=False)

    def _cell(self, cell: Cell) -> PlannedCell:
        return next(one for one in self.planned.cells if one.spec.run_id == cell.run_id)

    def base(self, cell: Cell) -> Base:
        """The untouched model."""
        from imprint.tuning.base import Base

        planned = self._cell(cell)
        if self._base is None or not self._base.serves(planned):
            self._base = Base.of(planned.located, planned.spec.model, self.runtime)
        return self._base

    def tuned(self, cell: Cell, epoch: int) -> nn.Module:
        """The model as it was after an epoch whose weights are kept: the last one, or the best.

        Raises:
            ImprintError: the weights are not there.
        """
        from imprint.checkpoint import load_trained

        model = self.base(cell).tuned(cell.spec.method, cell.spec.seed)
        load_trained(cell.folder.epoch(epoch) / "adapter", model)
        return model

    def records(self, cell: Cell) -> tuple[Encoded, ...]:
        """The scored records in the order of the evidence."""
        from imprint.tuning.models import load_tokenizer

        planned = self._cell(cell)
        if self._audit is None or self._audit[0] != planned.base:
            self._audit = planned.base, prepare(planned.pool, planned.spec.data, load_tokenizer(planned.located))
        return self._audit[1].scored
