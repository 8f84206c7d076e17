"""A study, top to bottom: check, search, run, judge, write.

<out>/cells, base                 the runs of all studies; a cell that two of them name is run once
<out>/search/NAME/           learning rates tried (controlled protocol), as any run
<out>/NAME/                       the study's own runs, as any run, and beside them
           study.json             gates, verdicts, tables, in plain data
           study.html             the same to look at
           tables/*.md, .tex, .csv
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from imprint.errors import ImprintError, UsageError, unknown
from imprint.gates.judge import Gate
from imprint.measures.frontier import best
from imprint.progress import Progress
from imprint.recipe import Plan, read_recipe
from imprint.report.sheet import Entry, Sheet, to_csv, to_latex, to_markdown
from imprint.report.study import write_study_page
from imprint.report.validity import all_withheld, validity
from imprint.rows import Grid, load_grid
from imprint.runs import plan_for, run
from imprint.spec import Runtime
from imprint.store import write_json, write_text
from imprint.studies import tables
from imprint.studies.answers import Findings
from imprint.studies.catalogue import STUDIES, Study
from imprint.studies.checkpoints import Checkpoints
from imprint.studies.claims import Answer
from imprint.studies.evidence import Variant, variant_of, variants
from imprint.studies.paper import SOURCE
from imprint.studies.parts import Part, documents
from imprint.studies.search import Trial, document, search, trials
from imprint.studies.setting import ATTACKS, Setting


@dataclass(frozen=True)
class Outcome:
    """A finished study.

    Attributes:
        gates: (whose, gate) of every base; `withheld` says why no verdict is to be believed, or "".
        trials: the learning rates that were tried.
        page: the HTML file.
        failed: whether a run could not finish.
    """

    name: str
    study: Study
    gates: list[tuple[str, Gate]]
    withheld: str
    answer: Answer
    trials: list[Trial]
    page: Path
    failed: bool


OWN = {
    "model": "give --model",
    "data": "give --data",
    "data.source": "give --data",
    "data.seed": "all its seeds share one split",
    "method": "its methods are what it compares",
    "seed": "give --seeds",
}
"""Keys of a recipe that belong to the study."""


def study_named(name: str) -> Study:
    """The row of `STUDIES`. Raises UsageError for an unknown name."""
    if name not in STUDIES:
        raise UsageError(unknown("study", name, STUDIES))
    return STUDIES[name]


def run_study(
    name: str,
    setting: Setting,
    out: str | Path,
    overrides: tuple[str, ...] = (),
    runtime: Runtime | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Do what is missing of a study and say what it found.

    Args:
        name: of `STUDIES`.
        setting: models, data and protocol (`studies.setting`).
        out: folder that all studies share.
        overrides: `key.subkey=value`, applied to every recipe of the study.

    Raises:
        UsageError: a model, data set or option cannot be used, or a method does not fit a model: before any training.
        ImprintError: no run finished.
    """
    study, root = study_named(name), Path(out)
    folder = name if setting.controlled else f"{name}-{setting.protocol}"
    runtime, progress = runtime or Runtime(), progress or Progress()
    parts = [_overridden(part, overrides) for part in study.parts(setting)]
    wanted = plan_for([part.recipe for part in parts], runtime)
    check_methods(wanted, runtime)
    tried = _search(parts, root / "search" / folder, root, runtime, progress)
    recipes = [_seeded(recipe, setting.seeds) for recipe in documents(parts, searched=False)]
    recipes += [document(t.cell.run_spec, [t.rate], range(setting.seeds)) for t in tried if t.chosen]
    recipes = [{**recipe, "attacks": list(ATTACKS)} for recipe in recipes]
    run(recipes, root / folder, (), runtime, progress, root)
    grid = load_grid(root / folder)
    others = [one.cell for one in tried if not one.chosen and one.cell.outcome["status"] == "done"]
    searched = tuple(variant_of([cell], ATTACKS) for cell in others)
    kept = Checkpoints(plan_for(recipes, runtime), runtime)
    found = Findings(setting, grid, tuple(variants(grid)), searched, kept, progress)
    if not found.variants:
        raise ImprintError(f"{root / folder}: no seed has finished for every method, so there is nothing to compare")
    answer = study.answer(found)
    answer.sheets.append(tables.what_was_run(found.variants))
    if tried:
        answer.sheets.append(_search_sheet(tried))
    answer.notes.extend(_notes(study, setting, grid, found.variants))
    return _write(name, study, setting, grid, answer, tried)


def _overridden(part: Part, overrides: tuple[str, ...]) -> Part:
    for override in overrides:
        key = override.partition("=")[0]
        if key in OWN or key.split(".")[0] in ("seed", "budget", "attacks"):
            raise UsageError(f"--set {override}: a study sets this itself; {OWN.get(key, 'it cannot be changed')}")
    recipe = read_recipe(part.recipe, overrides)
    assert isinstance(recipe, dict)
    return replace(part, recipe=recipe)


def check_methods(planned: Plan, runtime: Runtime) -> None:
    """Attach every method to its model once.

    Raises:
        UsageError: some do not fit; the sentence says which and why.
    """
    from imprint.tuning.base import Base

    base: Base | None = None
    seen: set[tuple[tuple[str, str, str], str, str]] = set()
    refused: dict[str, None] = {}
    for cell in sorted(planned.cells, key=lambda cell: cell.model_key):
        options = {key: value for key, value in cell.spec.method.options.items() if key != "learning_rate"}
        key = cell.model_key, cell.spec.method.name, repr(options)
        if key in seen:
            continue
        seen.add(key)
        base = base if base and base.serves(cell) else Base.of(cell.located, cell.spec.model, runtime)
        try:
            base.tuned(cell.spec.method, 0)
        except ImprintError as error:
            refused[f"{cell.spec.method.name} on {cell.spec.model.name}: {error}"] = None
    if refused:
        raise UsageError(f"this study cannot be run as asked, and nothing has been trained. {' '.join(refused)}")


def _search(parts: list[Part], folder: Path, root: Path, runtime: Runtime, progress: Progress) -> list[Trial]:
    """Try learning rates for the parts that ask for it."""
    asked = documents(parts, searched=True)
    if not asked:
        return []
    specs = [cell.spec for cell in plan_for(asked, runtime).cells]
    recipe = [{**one, "attacks": list(ATTACKS)} for one in search(specs)]
    run(recipe, folder, (), runtime, progress, root)
    return trials(load_grid(folder).cells)


def _seeded(recipe: dict[str, Any], seeds: int) -> dict[str, Any]:
    """The same split for every training seed."""
    data: dict[str, Any] = recipe["data"]
    return {**recipe, "data": data | {"seed": 0}, "seed": list(range(seeds))}


def _search_sheet(tried: list[Trial]) -> Sheet:
    rows = tuple(
        (
            one.cell.spec.model.name,
            one.cell.spec.data.source.name,
            tables.title(one.cell.spec.method.name),
            tables.options_text(one.cell.spec.method.options),
            Entry(f"{one.rate:g}"),
            Entry(f"{one.perplexity:.4f}"),
            Entry(str(one.epoch)),
            ("chosen, at the edge" if one.edge else "chosen") if one.chosen else "",
        )
        for one in tried
    )
    header = ("model", "data", "method", "options", "rate", "best PPL", "epoch", "")
    note = "The first seed. The rate of lowest validation perplexity is taken; leakage plays no part in it."
    return Sheet("Search for learning rates", header, rows, (note,), group=4)


def _notes(study: Study, setting: Setting, grid: Grid, found: Sequence[Variant]) -> list[str]:
    notes = [f"Protocol: {setting.protocol}. Scale: {setting.name}. Training seeds: {setting.seeds}, on one split."]
    if study.block:
        notes.append(f"The paper's figures: {SOURCE[study.block]}; shown where model and data are the paper's.")
    paths = [path for one in found for path in one.paths]
    if ended := sum(best(path).epoch == len(path) - 1 for path in paths):
        notes.append(f"In {ended} of {len(paths)} runs the best epoch is the last one: they were still learning.")
    lost = [f"{cell.label} ({cell.outcome['status']})" for cell in grid.cells if cell.outcome["status"] != "done"]
    if lost:
        notes.append(
            f"Left out, because not finished: {', '.join(lost)}. Seeds that one method lacks are left out of all."
        )
    return notes


def _write(name: str, study: Study, setting: Setting, grid: Grid, answer: Answer, tried: list[Trial]) -> Outcome:
    bases = validity(grid)
    gates = [(one.place, gate) for one in bases for gate in one.gates]
    shut = all_withheld(bases)
    if shut:
        answer.verdicts[:] = [replace(one, word="withheld") for one in answer.verdicts]
        answer.sheets[:] = [
            replace(sheet, notes=(f"Not valid as it stands. {shut}", *sheet.notes)) for sheet in answer.sheets
        ]
    shutil.rmtree(grid.path / "tables", ignore_errors=True)  # of an earlier version of the study
    for number, sheet in enumerate(answer.sheets, 1):
        stem = grid.path / "tables" / f"{number:02}-{re.sub(r'[^a-z0-9]+', '-', sheet.title.lower()).strip('-')[:60]}"
        for ending, text in ((".md", to_markdown(sheet)), (".tex", to_latex(sheet)), (".csv", to_csv(sheet))):
            write_text(stem.with_suffix(ending), text)
    write_json(grid.path / "study.json", _document(name, study, setting, gates, shut, answer))
    verdicts = [(one.claim, one.word, one.sentence) for one in answer.verdicts]
    page = write_study_page(
        grid.path / "study.html",
        study.title,
        study.claim,
        bases,
        verdicts,
        answer.sheets,
        answer.charts,
        answer.notes,
    )
    failed = any(cell.outcome["status"] in ("failed", "unfinished") for cell in grid.cells)
    return Outcome(name, study, gates, shut, answer, tried, page, failed)


def _document(
    name: str, study: Study, setting: Setting, gates: list[tuple[str, Gate]], shut: str, answer: Answer
) -> dict[str, Any]:
    return {
        "study": name,
        "title": study.title,
        "claim": study.claim,
        "setting": asdict(setting),
        "gates": [{"of": place, **asdict(gate)} for place, gate in gates],
        "withheld": shut,
        "verdicts": [asdict(verdict) for verdict in answer.verdicts],
        "tables": [asdict(sheet) for sheet in answer.sheets],
        "notes": answer.notes,
    }
