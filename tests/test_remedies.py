"""The study of remedies: what is a remedy, what it is compared with, and a whole table on a tiny model."""

from __future__ import annotations

from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest

from imprint.canaries import Canary, Manifest, read_manifest, write_manifest
from imprint.planted import planted
from imprint.recipe import plan
from imprint.report.words import share
from imprint.rows import load_grid, results
from imprint.spec import Privacy, Stop
from imprint.studies import parts
from imprint.studies import remedies as answer_module
from imprint.studies.judgement import NOT_SUPPORTED, SUPPORTED, UNDECIDED
from imprint.studies.parts import CANARIES
from imprint.studies.remedies import pairs_of, remedies, remedy
from imprint.studies.run import run_study
from imprint.studies.setting import PAPER_METHODS, setting
from imprint.studies.tables import title
from tests.test_studies import CURVE, made


def specs(**changes: Any) -> list[Any]:
    """The runs of the study at small scale, resolved and not run."""
    return [cell.spec for part in parts.remedies(setting(**changes)) for cell in plan(part.recipe).cells]


ALONE = [
    "rank 1",
    "attention only",
    "dropout 0.1",
    "weight decay 0.1",
    "Goldfish loss, k = 4",
    "early stopping at Ref .700",
    "members told 4 times",
]


def test_each_remedy_has_a_name_of_its_own():
    found = [(spec.method.name, remedy(spec), bool(spec.data.sealed)) for spec in specs()]
    assert len(set(found)) == len(found)
    runs, twins = ({(method, name) for method, name, sealed in found if sealed == told} for told in (False, True))
    both = {(method, "none") for method in PAPER_METHODS}
    if find_spec("opacus"):
        both |= {*((method, "DP-SGD, ε = 8") for method in PAPER_METHODS), ("lora", "DP-SGD, ε = 2")}
    assert twins == both
    assert runs == {*both, *(("lora", name) for name in ALONE)}


def test_remedies_that_are_taken_together_are_named_together(recipe):
    [cell] = plan(recipe(method={"lora": {"rank": 2}}, train={"epochs": 1, "goldfish": 3}, data__repeat=2)).cells
    assert remedy(cell.spec) == "rank 2, Goldfish loss, k = 3, members told 2 times"


def test_without_opacus_nothing_is_trained_privately(monkeypatch):
    monkeypatch.setattr(parts, "find_spec", lambda _: None)
    assert not any(spec.train.dp for spec in specs())
    assert len(specs()) == len(ALONE) + 2 * len(PAPER_METHODS)


def test_the_shipped_canaries_are_those_of_their_command():
    from imprint.canaries import make
    from imprint.spec import ModelSpec
    from imprint.tuning.locate import locate
    from imprint.tuning.models import load_tokenizer

    shipped = read_manifest(CANARIES)
    tokenizer = load_tokenizer(locate(ModelSpec(name=shipped.model)))
    again = make(200, ("digits", "names", "rare"), (1,), shipped.seed, tokenizer, model=shipped.model)
    assert shipped == again
    assert shipped.seed == 0


# ---- on paths made by hand ----


@pytest.fixture
def told(recipe):
    """A study's answer to paths of LoRA, each with what sets it apart; plain tuning is first, on `CURVE`."""
    [cell] = plan(recipe(method="lora")).cells

    def variant(points: list[tuple[float, float]], repeat: int = 1, **train: Any) -> Any:
        spec = cell.spec.model_copy(
            update={
                "data": cell.spec.data.model_copy(update={"repeat": repeat}),
                "train": cell.spec.train.model_copy(update=train),
            }
        )
        bare = SimpleNamespace(spec=spec, run_spec=spec, epochs=0, planned=3)  # without evidence: no canaries
        return made("lora", points, options={"learning_rate": 0.005}, cells=(bare,))

    def answered(*others: Any) -> Any:
        found = SimpleNamespace(variants=(variant(CURVE), *others))
        answer = remedies(found)
        return answer, {sheet.title: sheet for sheet in answer.sheets}

    return variant, answered


def test_a_remedy_is_worth_what_it_takes_off_at_equal_perplexity(told):
    """At log perplexity 1.5 plain tuning is at .7 and the remedy at .55: .15 less, and .25 less at the end."""
    variant, answered = told
    answer, sheets = answered(variant([(2.0, 0.5), (1.5, 0.55)], goldfish=4))
    [verdict] = answer.verdicts
    assert verdict.claim == "LoRA: Goldfish loss, k = 4 lowers the Ref AUC at equal validation perplexity"
    assert verdict.word == SUPPORTED
    plain, treated = sheets["Remedies"].rows
    assert (plain[1], plain[6].text, plain[7].text) == ("none", "", "")
    assert (treated[1], treated[6].text) == ("Goldfish loss, k = 4", ".150")
    assert treated[7].text == "<.001"
    [last] = sheets["Ref AUC without less with, at the last epoch"].rows
    assert last[1].text == ".250"


def test_telling_members_once_is_the_remedy_for_telling_them_often(told):
    """At log perplexity 1.5 told four times is at .85 and plain tuning at .7."""
    variant, answered = told
    answer, sheets = answered(variant([(2.0, 0.5), (1.5, 0.85)], repeat=4))
    assert answer.verdicts[0].claim.startswith("LoRA: deduplication (once, not 4 times) lowers the Ref AUC")
    assert answer.verdicts[0].word == SUPPORTED
    assert sheets["Remedies"].rows[1][6].text == ".150"


def test_a_remedy_that_makes_it_worse_is_said_to(told):
    variant, answered = told
    answer, sheets = answered(variant([(2.0, 0.5), (1.5, 0.85)], weight_decay=0.1))
    assert answer.verdicts[0].word == NOT_SUPPORTED
    assert sheets["Remedies"].rows[1][6].text == "-.150"


def test_stopping_early_changes_nothing_at_equal_perplexity(told):
    variant, answered = told
    answer, sheets = answered(variant(CURVE[:2], stop=Stop(auc=0.65)))
    assert answer.verdicts[0].word == NOT_SUPPORTED
    assert [entry.text for entry in sheets["Remedies"].rows[1][6:8]] == [".000", "1.000"]
    [last] = sheets["Ref AUC without less with, at the last epoch"].rows
    assert last[1].text == ".200"  # .8 - .6
    assert "LoRA: early stopping at Ref .650, 0 of 3 epochs with seed 0." in answer.notes


def test_what_never_learned_cannot_be_compared(told):
    variant, answered = told
    answer, sheets = answered(variant([(2.0, 0.5), (2.1, 0.5)], dp=Privacy(epsilon=1)), variant(CURVE, goldfish=4))
    assert [verdict.word for verdict in answer.verdicts] == [UNDECIDED, NOT_SUPPORTED]
    assert "Never came below the base's perplexity, with it or without: LoRA: DP-SGD, ε = 1." in answer.notes
    assert sheets["Remedies"].rows[1][6].text == ""


def test_without_plain_tuning_there_is_nothing_to_compare_with(told):
    variant, _ = told
    assert pairs_of([variant(CURVE, goldfish=4)]) == [None]


# ---- end to end ----

FEW = ("data.members=14", "data.nonmembers=14", "data.validation=6", "train.epochs=1", "data.max_length=48")


@pytest.fixture(scope="module")
def place(gpt2, tmp_path_factory):
    """A model, a folder, and fewer canaries than are shipped."""
    out = tmp_path_factory.mktemp("remedies")
    canaries = [Canary(f"c{n}", "digits", "code", f"{n:02}", 1, n % 2 == 0) for n in range(12)]
    write_manifest(out / "few.json", Manifest(tuple(canaries), {}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "CANARIES", out / "few.json")
        yield gpt2, out


def study(place, *overrides):
    model, out = place
    given = setting(models=[str(model)], data=["world/triples"], seeds=1)
    return run_study("remedies", given, out / "studies", (*FEW, *overrides))


def test_a_row_says_what_its_run_left_and_what_its_twin_proves(place):
    """Against the measurements of the folder, and the ledger of each cell."""
    outcome = study(place)
    assert not outcome.failed
    [table, proofs] = outcome.answer.sheets[:2]
    grid, measured = load_grid(outcome.page.parent), results(outcome.page.parent)
    twins = [cell for cell in grid.cells if cell.spec.data.sealed]
    assert len(table.rows) == len(grid.cells) - len(twins)
    assert len(proofs.rows) == len(twins)
    assert len(outcome.answer.verdicts) == len(table.rows) - len(PAPER_METHODS)
    assert outcome.trials == []  # rates are not searched
    rows = {(row[0], row[1]): row for row in table.rows}
    for cell in grid.cells:
        row, dp = rows[title(cell.spec.method.name), remedy(cell.run_spec)], cell.run_spec.train.dp
        if cell not in twins:
            own = measured[(measured.run_id == cell.run_id) & (measured.epoch == cell.epochs)]
            [value] = own[(own.attack == "ref") & (own.metric == "auc")].value
            assert row[5].text == share(value)
            continue
        [told_once] = planted(cell)
        assert row[9].text == f"{told_once.epsilon:.2f}"
        spent = cell.folder.meta(cell.epochs).get("privacy")
        assert bool(dp) == bool(spent)
        assert row[8].text == (f"{spent['epsilon']:.2f}" if spent else "")
        assert not dp or 0.97 * dp.epsilon < spent["epsilon"] <= dp.epsilon
    alone = [row for row in rows.values() if row[1] in ALONE]
    assert len(alone) == len(ALONE)
    assert not any(row[8].text or row[9].text for row in alone)  # they claim nothing and have no twin


def test_what_lacks_opacus_is_said(place, monkeypatch):
    for module in (parts, answer_module):
        monkeypatch.setattr(module, "find_spec", lambda _: None)
    outcome = study(place)
    assert any("Private training is left out" in note for note in outcome.answer.notes)
    assert len(outcome.answer.sheets[0].rows) == len(ALONE) + len(PAPER_METHODS)


def test_runs_that_all_have_canaries_are_their_own_twins(place, monkeypatch):
    """Canaries of one's own are planted in every run."""
    for module in (parts, answer_module):
        monkeypatch.setattr(module, "find_spec", lambda _: None)
    [table, proofs] = study(place, f"data.canaries={place[1] / 'few.json'}").answer.sheets[:2]
    assert [row[:2] for row in table.rows] == [row[:2] for row in proofs.rows]
    assert all(row[9].text for row in table.rows)
