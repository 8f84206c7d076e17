"""Extraction from a finished run: its kept weights write, and what came of it is kept beside their scores.

    <out>/cells/<run_id>/extraction/<key>/NN.parquet    one row per record, by the weights of epoch NN
    <out>/base/<key>/extraction/<key>/00.parquet        the same by the untouched base
    <out>/extraction.json                               the summary of the last call

`<key>` names the settings. A file that is there is not made again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from imprint.data.pool import read_pool
from imprint.data.tokens import Encoded
from imprint.errors import DataError, ImprintError, UsageError
from imprint.extraction.passages import Outcomes, outcomes, passage, stored
from imprint.extraction.spec import ExtractionSpec, Scheme
from imprint.extraction.summary import Cohort, Extracted, corrected, extracted
from imprint.progress import Progress
from imprint.recipe import PlannedCell
from imprint.records import prepare
from imprint.rows import Cell, load_grid
from imprint.spec import RunSpec, Runtime
from imprint.store import Store, read_table, write_json, write_table
from imprint.tuning.locate import locate

if TYPE_CHECKING:
    from torch import nn

    from imprint.tuning.base import Base

ROLES = {"member": "members", "nonmember": "non-members"}
CHECKED = 16
AGREE = 0.05
"""Passages, and nats per token by which weights may miss their stored scores in them: far beyond 16 bits' rounding."""


@dataclass(frozen=True)
class Extractions:
    """What comes out of the models of a folder.

    Attributes:
        curve: every epoch of every cell, the base first, from stored scores.
        rows: every checkpoint whose weights are kept.
        short: who → how many of them are too short.
        flips: records for which what was written and stored scores disagree, by rounding.
    """

    asked: ExtractionSpec
    curve: tuple[Extracted, ...]
    rows: tuple[Extracted, ...]
    short: dict[str, int]
    flips: int


def extract(path: Path, asked: ExtractionSpec, runtime: Runtime, progress: Progress | None = None) -> Extractions:
    """Do what is missing of an extraction from a finished run, and sum it up.

    Raises:
        UsageError: the folder holds no tuned weights, or its model or its data are no longer those that were measured.
        DataError: no member or no non-member is long enough.
        ImprintError: weights do not give the scores that are stored.
    """
    store, progress = Store.at(path), progress or Progress()
    cells = [cell for cell in load_grid(path).cells if isinstance(cell.spec, RunSpec) and kept_epochs(cell)]
    if not cells:
        raise UsageError(
            f"{path} holds no tuned weights: expected the folder of an `imprint run` with a finished epoch"
        )
    work = Work(asked, runtime, progress)
    curve: list[Extracted] = []
    rows: list[Extracted] = []
    short: dict[str, int] = {}
    flips = 0
    with store.alone():
        for base in dict.fromkeys(cell.base for cell in cells):
            same = [cell for cell in cells if cell.base == base]
            material = prepared(same[0], asked)
            for role, count in material.short.items():
                short[role] = short.get(role, 0) + count
            untouched = work.base_outcomes(same[0], material)
            for cell in same:
                seen = {epoch: material.stored(cell, epoch) for epoch in range(cell.epochs + 1)}
                names = [(cell.run_id, cell.label, epoch) for epoch in seen]
                curve += [extracted(name, seen[name[2]], seen[0], material.cohort, asked) for name in names]
                for epoch in kept_epochs(cell):
                    found = work.outcomes(cell, epoch, material)
                    rows.append(extracted(names[epoch], found, untouched, material.cohort, asked))
                    flips += int((found.exact != seen[epoch].exact).sum())
        result = Extractions(asked, tuple(curve), tuple(corrected(rows)), short, flips)
        write_json(path / "extraction.json", asdict(result) | {"asked": asked.model_dump(mode="json")})
    return result


def kept_epochs(cell: Cell) -> list[int]:
    """The finished epochs whose weights are there."""
    return [epoch for epoch in range(1, cell.epochs + 1) if (cell.folder.epoch(epoch) / "adapter").is_dir()]


@dataclass(frozen=True)
class Material:
    """The passages of the records of one split, for one model.

    Attributes:
        planned: the cell, with its model and its data found again.
        records: all scored records, in the order of the evidence.
        cuts: of each record its passage; None where it has none, or is neither a member nor a non-member.
        cohort: whose passages they are.
        short: who → how many of them are too short.
    """

    planned: PlannedCell
    records: tuple[Encoded, ...]
    cuts: tuple[Encoded | None, ...]
    cohort: Cohort
    short: dict[str, int]

    @property
    def passages(self) -> list[Encoded]:
        """Those that there are."""
        return [cut for cut in self.cuts if cut is not None]

    def stored(self, cell: Cell, epoch: int) -> Outcomes:
        """What the scores of an epoch say of them."""
        return stored(cell.stats(epoch), self.records, self.cuts)


def prepared(cell: Cell, asked: ExtractionSpec) -> Material:
    """Find a cell's model and data again, encode its records, and take their passages.

    Raises:
        UsageError: the model or the data are no longer those that were measured.
        DataError: no member or no non-member is long enough.
    """
    from imprint.tuning.models import load_tokenizer

    spec = cell.run_spec
    located, pool = locate(spec.model), read_pool(spec.data)
    again = "put back what was measured, or run the recipe again into another folder"
    if located.fingerprint != spec.model.fingerprint:
        raise UsageError(f"model {spec.model.name} is no longer the one that {cell.base} was measured with: {again}")
    if pool.fingerprint != spec.data.fingerprint:
        raise UsageError(
            f"{spec.data.source.name} no longer holds the records that {cell.base} was measured on: {again}"
        )
    records = prepare(pool, spec.data, load_tokenizer(located)).scored
    tokens = np.concatenate([record.ids[record.scored] for record in records])
    ids = [record.id for record in records]
    if ids != cell.reference.ids.tolist() or not np.array_equal(tokens, cell.reference.tokens):
        raise UsageError(
            f"the records of {spec.data.source.name} no longer become the tokens that {cell.base} was measured on "
            f"(another version of the tokenizer's library, or other canaries): {again}"
        )
    roles = cell.records["role"].to_numpy().astype(str)
    cuts = tuple(
        passage(record, asked.prefix, asked.suffix) if role in ROLES else None
        for record, role in zip(records, roles, strict=True)
    )
    there = np.array([cut is not None for cut in cuts])
    short = {name: int((~there & (roles == role)).sum()) for role, name in ROLES.items()}
    for role, name in ROLES.items():
        if not there[roles == role].any():
            raise DataError(
                f"none of the {short[name]} {name} has {asked.suffix} scored tokens in a row after {asked.prefix} "
                "others: give a smaller --prefix or --suffix"
            )
    cohort = Cohort(roles[there] == "member", cell.records["group"].to_numpy()[there])
    planned = PlannedCell(spec, cell.label, cell.base.name, located, pool)
    return Material(planned, records, cuts, cohort, short)


@dataclass
class Work:
    """Models at work; one base is kept in memory."""

    asked: ExtractionSpec
    runtime: Runtime
    progress: Progress
    _base: Base | None = field(default=None, init=False)

    def base_outcomes(self, cell: Cell, material: Material) -> Outcomes:
        """What the untouched base writes."""
        file = cell.base / "extraction" / self.asked.key / "00.parquet"
        return self._made(file, f"{cell.spec.model.name}, untouched", lambda: self._loaded(material).model, material)

    def outcomes(self, cell: Cell, epoch: int, material: Material) -> Outcomes:
        """What a cell's weights of an epoch write.

        Raises:
            ImprintError: they are not those whose scores are stored.
        """
        from imprint.checkpoint import load_trained

        def tuned() -> nn.Module:
            model = self._loaded(material).tuned(cell.run_spec.method, cell.run_spec.seed)
            load_trained(cell.folder.epoch(epoch) / "adapter", model)
            self._check(cell, epoch, model, material)
            return model

        file = cell.folder.path / "extraction" / self.asked.key / f"{epoch:02}.parquet"
        return self._made(file, f"{cell.label}, epoch {epoch}", tuned, material)

    def _made(self, file: Path, name: str, model: Callable[[], nn.Module], material: Material) -> Outcomes:
        """What lies in a file, written first if it is not there."""
        if not file.exists():
            from imprint.extraction.generate import measure_extraction

            budget = self._loaded(material).budget
            write_table(file, measure_extraction(model(), material.passages, self.asked, budget))
            self.progress.note(f"{name}: {len(material.passages):,} records continued")
        table = read_table(file)
        if table.column("id").to_pylist() != [cut.id for cut in material.passages]:
            raise ImprintError(f"{file} is of other records: delete it and run the same command again")
        return outcomes(table)

    def _loaded(self, material: Material) -> Base:
        from imprint.tuning.base import Base

        if self._base is None or not self._base.serves(material.planned):
            self._base = None  # free the old one first
            self._base = Base.of(material.planned.located, material.planned.spec.model, self.runtime)
        return self._base

    def _check(self, cell: Cell, epoch: int, model: nn.Module, material: Material) -> None:
        from imprint.extraction.generate import suffix_log_probability

        few = material.passages[:CHECKED]
        told = suffix_log_probability(model, few, Scheme(), self._loaded(material).budget)
        gap = np.abs(told - material.stored(cell, epoch).log_p[:CHECKED]).mean() / self.asked.suffix
        if not gap < AGREE:
            raise ImprintError(
                f"{cell.folder.epoch(epoch) / 'adapter'} does not give the scores that are stored beside it (off by "
                f"{gap:.2g} nats per token): delete {cell.folder.path} and run its recipe again"
            )
