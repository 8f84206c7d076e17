"""Verdicts on paths made by hand; studies end to end on a model of a few thousand weights."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from imprint.errors import ImprintError, UsageError
from imprint.measures.estimate import Estimate, Stratum
from imprint.measures.frontier import Checkpoint
from imprint.recipe import plan, read_recipe
from imprint.studies import claims
from imprint.studies.catalogue import STUDIES
from imprint.studies.evidence import Variant, matched_contrast
from imprint.studies.judgement import NOT_SUPPORTED, SUPPORTED, UNDECIDED, Contrast, family, overall, verdict
from imprint.studies.parts import THREE, equal_ranks, matrices
from imprint.studies.run import run_study
from imprint.studies.search import RATES, document, search, trials
from imprint.studies.setting import SCALES, setting

RECORDS = 400


def noisy(value: float, error: float, name: str, seed: int) -> Estimate:
    """A statistic with that standard error; other seeds are independent."""
    raw = np.random.default_rng(seed).normal(size=RECORDS)
    raw -= raw.mean()
    factor = error / math.sqrt(RECORDS / (RECORDS - 1) * float(raw @ raw))
    return Estimate(value, {name: Stratum(factor * raw, np.arange(RECORDS))})


def made(
    method: str, points: list[tuple[float, float]], data: str = "world/articles", error: float = 0.005, **more: Any
):
    """A variant whose path is (log perplexity, AUC) by epoch from the base on, two seeds."""
    name = more.pop("model", "m")
    one = Variant(name, data, method, more.pop("options", {}), (), ("loss", "ref"))
    paths = []
    for seed in (0, 1):
        path = []
        for epoch, (H, A) in enumerate(points):
            auc = noisy(A + 0.001 * seed, error, f"member/{data}", hash_of(method, epoch, data))
            path.append(Checkpoint(epoch, noisy(H, 1e-4, f"validation/{data}", 7), {"loss": auc, "ref": auc}))
        paths.append(path)
    one.__dict__.update(paths=paths, **more)
    return one


def hash_of(*parts: object) -> int:
    return sum(ord(c) * (n + 1) for n, c in enumerate(repr(parts)))


CURVE = [(2.0, 0.5), (1.7, 0.6), (1.5, 0.7), (1.4, 0.8)]
"""What utility costs, the same for every method that moves along it."""


def test_equal_utility_takes_the_speed_out():
    """Two methods on one curve, one twice as quick: apart at the last epoch, alike at equal perplexity."""
    quick, slow = made("lora", CURVE), made("prompt", [CURVE[0], (1.85, 0.55), CURVE[1], (1.6, 0.65)])
    at_last = claims.observation1([quick, slow], controlled=True).verdicts
    words = {one.claim: one.word for one in at_last}
    assert words[f"{CLAIM}, at the last epoch (loss)"] == SUPPORTED
    assert words[f"{CLAIM}, at equal validation perplexity (loss)"] == NOT_SUPPORTED
    compared = matched_contrast(quick, slow, "loss")
    assert compared is not None
    assert abs(compared.estimates[0].value) < 1e-9


CLAIM = "Parameter-based tuning memorizes more than prompt-based tuning"


def test_a_method_that_never_learned_cannot_be_matched():
    idle = made("prompt", [(2.0, 0.5), (2.1, 0.5)])
    assert matched_contrast(made("lora", CURVE), idle, "loss") is None
    answer = claims.observation1([made("lora", CURVE), made("prefix", [(2.0, 0.5), (1.7, 0.5)]), idle], controlled=True)
    assert answer.verdicts[0].word == UNDECIDED
    assert "Not comparable, because a method never came below the base's perplexity: world/articles: lora - prompt" in (
        answer.verdicts[0].sentence
    )


def test_a_straight_line_between_checkpoints_cannot_carry_a_claim():
    """Within its first epoch LoRA is read on a chord from the base to .8; the checkpoint before knows of no leak."""
    steep, slow = made("lora", [(2.0, 0.5), (1.0, 0.8)]), made("prompt", [(2.0, 0.5), (1.5, 0.5)])
    [loss, *_] = claims.observation1([steep, slow], controlled=True).verdicts
    assert "+.150" in loss.sentence
    assert "at least .000 between checkpoints" in loss.sentence
    assert loss.word == UNDECIDED
    reached = made("lora", [(2.0, 0.5), (1.5, 0.65), (1.0, 0.8)])  # the same curve with a checkpoint where it is read
    assert claims.observation1([reached, slow], controlled=True).verdicts[0].word == SUPPORTED


@pytest.mark.parametrize(
    ("effect", "error", "word"),
    [(0.1, 0.005, SUPPORTED), (-0.1, 0.005, NOT_SUPPORTED), (0.0, 0.005, NOT_SUPPORTED), (0.03, 0.05, UNDECIDED)],
)
def test_a_verdict_is_the_size_and_the_error(effect, error, word):
    compared = family([Contrast("a - b", [noisy(effect, error, "r", 1)])])
    assert verdict("claim", compared, "about").word == word


def test_one_refuted_part_refutes_the_claim():
    assert overall([SUPPORTED, SUPPORTED]) == SUPPORTED
    assert overall([SUPPORTED, UNDECIDED]) == UNDECIDED
    assert overall([SUPPORTED, UNDECIDED, NOT_SUPPORTED]) == NOT_SUPPORTED
    assert verdict("claim", [], "about").word == UNDECIDED


def test_tests_of_a_family_are_corrected_together():
    one = [Contrast("x", [noisy(0.024, 0.01, "r", 1)])]
    assert family(one)[0].word == SUPPORTED
    assert {c.word for c in family(one * 5)} == {UNDECIDED}
    near = [Contrast("x", [noisy(0.0, 0.009, "r", 1)])]
    assert family(near)[0].word == NOT_SUPPORTED  # surely below the smallest effect worth a claim
    assert {c.word for c in family(near * 20)} == {UNDECIDED}  # but not twenty times over
    assert family([Contrast("x", [noisy(0.01, 0.0001, "r", 1)])])[0].word == NOT_SUPPORTED  # significant and too small


def test_growth_and_staying_low():
    low = [(2.0, 0.5), (1.9, 0.5), (1.8, 0.51)]
    found = [made("lora", CURVE), made("head", CURVE), made("prefix", low), made("prompt", low)]
    assert claims.observation2(found, controlled=True).verdicts[0].word == SUPPORTED
    leaking = [made("lora", CURVE), made("prefix", CURVE)]
    assert claims.observation2(leaking, controlled=True).verdicts[0].word == NOT_SUPPORTED
    unsure = made("prefix", [(2.0, 0.5), (1.9, 0.53), (1.8, 0.525)])
    unsure.paths[0][2].auc["loss"] = unsure.paths[1][2].auc["loss"] = noisy(0.525, 0.03, "member/world/articles", 3)
    assert claims.observation2([made("lora", CURVE), unsure], controlled=True).verdicts[0].word == UNDECIDED


@pytest.fixture
def parameters(monkeypatch):
    monkeypatch.setattr(Variant, "parameters", property(lambda one: one.__dict__["size"]))


@pytest.mark.usefixtures("parameters")
@pytest.mark.parametrize(
    ("lora", "prompt", "word"),
    [
        ([0.6, 0.7, 0.8], [0.5, 0.5, 0.5], SUPPORTED),
        ([0.6, 0.6, 0.6], [0.5, 0.5, 0.5], NOT_SUPPORTED),
        ([0.6, 0.7, 0.8], [0.5, 0.6, 0.7], NOT_SUPPORTED),  # both grow
        ([0.99, 0.995, 1.0], [0.5, 0.5, 0.5], UNDECIDED),  # no room to grow
    ],
)
def test_growth_with_size(lora, prompt, word):
    found = []
    for method, aucs in (("lora", lora), ("prompt", prompt)):
        for n, A in enumerate(aucs):
            one = made(method, [(2.0, 0.5), (1.5, A)], model=f"m{n}", error=0.002)
            one.__dict__["size"] = 10 * 2**n
            found.append(one)
    verdicts = claims.observation3(found, controlled=True).verdicts
    assert {one.word for one in verdicts} == {word}


def test_slope_by_hand():
    found = [made("full", [(2.0, 0.5), (1.5, 0.5 + 0.1 * n)]) for n in range(3)]
    assert claims.slope(found, [3.0, 4.0, 5.0], "loss", claims.last)[0].value == pytest.approx(0.1)


def test_structured_data_is_compared_without_the_bases_shift():
    """Members that the base tells apart already are no memory: what tuning adds is compared."""
    shifted, plain = [(2.0, 0.7), (1.5, 0.71)], [(2.0, 0.5), (1.5, 0.51)]
    found = [made("prefix", shifted, "world/triples"), made("prefix", plain, "world/news")]
    answer = claims.observation4(found, controlled=True)
    assert {one.word for one in answer.verdicts} == {NOT_SUPPORTED}
    lacking = [*found, made("prompt", [(2.0, 0.5), (1.5, 0.9)], "world/triples")]  # only on one side: not compared
    assert {one.word for one in claims.observation4(lacking, controlled=True).verdicts} == {NOT_SUPPORTED}
    long = [made("prefix", [(2.0, 0.7)] * 6, "world/triples")]
    long += [made("prefix", [(2.0, 0.5)] * 6, "world/news")]
    assert claims.observation4(long, controlled=False).verdicts[0].word == SUPPORTED  # as published: shift and all


# ---- grids ----


@pytest.mark.parametrize("model", ["tiny/gpt2-medium", "tiny/llama-medium"])
def test_equal_ranks_train_equal_numbers(model, tmp_path):
    """Counted on the attached adapters, not by the formula."""
    import torch

    from imprint.spec import MethodSpec, ModelSpec
    from imprint.tuning.base import Base
    from imprint.tuning.locate import locate
    from imprint.tuning.methods import resolve_method
    from imprint.tuning.models import count_parameters

    base = Base(locate(ModelSpec(name=model)), "float32", torch.device("cpu"), 512)
    for names in (THREE, matrices(model)):
        counts = []
        for place, rank in equal_ranks(model, names).items():
            options = {"placement": place, "rank": rank}
            method = resolve_method(MethodSpec(name="lora", options=options), 96, None)
            counts.append(count_parameters(base.tuned(method, 0))[0])
        assert max(counts) / min(counts) < 1.06, counts


def test_matrices_have_names_of_their_own():
    assert matrices("tiny/gpt2-medium") == ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"]
    assert matrices("tiny/llama-medium")[:4] == ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("protocol", ["controlled", "published"])
def test_every_study_is_a_valid_recipe_at_small_scale(name, protocol):
    for part in STUDIES[name].parts(setting("small", protocol)):
        read_recipe(part.recipe)
        assert part.search == (protocol == "controlled" and part.search)
        assert set(part.recipe) == {"model", "data", "method", "train"}


def test_published_means_the_benchmarks_own_parts(tmp_path):
    found = setting("small", "published", data=[f"webnlg={tmp_path}", "world/news"])
    assert found.data[0]["split"] == "official"
    assert "split" not in found.data[1]
    assert found.seeds == 1
    assert setting("paper", "published").data[0]["split"] == "official"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"scale": "smal"}, "did you mean 'small'"),
        ({"protocol": "publish"}, "did you mean 'published'"),
        ({"data": ["webnlg=/no/such/folder"]}, "no such folder"),
        ({"data": ["letters.jsonl=/tmp"]}, "only a benchmark has a folder"),
    ],
)
def test_a_wrong_setting_is_told(arguments, said):
    with pytest.raises(UsageError, match=said):
        setting(**arguments)


def test_several_models_are_the_family():
    found = setting(models=["a", "b", "c"])
    assert (found.model, found.family, found.dense, found.sparse) == ("a", ("a", "b", "c"), "a", "c")
    assert SCALES["small"].model == "tiny/gpt2-medium"


# ---- the search ----


def test_a_run_is_found_again_in_its_recipe(recipe):
    [cell] = plan(recipe(method={"lora": {"rank": 2}}, seed=3)).cells
    again = document(cell.spec, [cell.spec.method.options["learning_rate"]], [3])
    assert [one.spec.run_id for one in plan(again).cells] == [cell.spec.run_id]


def test_rates_are_tried_about_the_default(recipe):
    [cell] = plan(recipe()).cells
    rate = cell.spec.method.options["learning_rate"]
    tried = plan(search([cell.spec])).cells
    assert [one.spec.method.options["learning_rate"] for one in tried] == pytest.approx(
        [rate * r for r in RATES], rel=0.05
    )


def test_the_lowest_perplexity_is_chosen_whatever_it_leaks(recipe, tmp_path):
    import imprint
    from imprint.measures import perplexity
    from imprint.rows import load_grid

    imprint.run(
        recipe(method={"head": {"learning_rate": [1e-5, 1e-2, 5.0]}}, train={"epochs": 2, "batch_size": 4}), tmp_path
    )
    found = trials(load_grid(tmp_path).cells)
    assert [one.rate for one in found] == [1e-5, 1e-2, 5.0]
    lowest = min(found, key=lambda one: one.perplexity)
    assert [one.chosen for one in found] == [one is lowest for one in found]
    assert lowest.edge == (lowest.rate != 1e-2)
    stats = lowest.cell.stats(lowest.epoch).select(lowest.cell.rows("validation"))
    assert lowest.perplexity == perplexity(stats).value


def test_a_seed_that_one_method_lacks_is_left_out_of_all(recipe, tmp_path):
    import imprint
    from imprint.rows import load_grid
    from imprint.studies.evidence import variants

    imprint.run(recipe(method=["head", "lora"], seed=[0, 1, 2], data__seed=0), tmp_path)
    lost = next(c for c in load_grid(tmp_path).cells if (c.spec.method.name, c.spec.seed) == ("lora", 1))
    (lost.folder.path / "done.json").unlink()
    found = variants(load_grid(tmp_path))
    assert [[cell.spec.seed for cell in one.cells] for one in found] == [[0, 2], [0, 2]]


# ---- misreading ----


def test_misread_scores_are_those_of_the_neighbours(tmp_path):
    """Against the plainest loop: output t - 1 of T + P instead of P + t - 1."""
    import torch

    from imprint.data.tokens import Encoded
    from imprint.scoring.score import token_stats
    from imprint.spec import MethodSpec
    from imprint.studies.alignment import read_twice
    from imprint.tuning.methods import METHODS, resolve_method
    from tests.tiny_models import VOCABULARY, build

    method = resolve_method(MethodSpec(name="prompt", options={"tokens": 3}), 32, None)
    model = METHODS["prompt"].attach(build("gpt2"), method.options)
    dice = np.random.default_rng(0)
    records = []
    for n in range(4):
        ids = dice.integers(3, VOCABULARY, 6 + n).astype(np.int32)
        records.append(Encoded(str(n), ids, np.arange(len(ids)) >= 2, 10))
    evidence = token_stats(model, records, 64)
    wrong = read_twice(model, records, evidence)
    for n, record in enumerate(records):
        with torch.no_grad():
            logp = model(input_ids=torch.tensor(record.ids[None]).long()).logits[0].log_softmax(-1)
        assert len(logp) == len(record) + 3
        wanted = [float(logp[t - 1, record.ids[t]]) for t in range(2, len(record))]
        np.testing.assert_allclose(wrong.logp[wrong.offsets[n] : wrong.offsets[n + 1]], wanted, atol=1e-5)
    assert not np.allclose(wrong.logp, evidence.logp, atol=0.1)
    with pytest.raises(ImprintError, match="does not give the scores"):
        read_twice(model, records, wrong)
    with pytest.raises(ImprintError, match="nothing to misread"):
        read_twice(build("gpt2"), records, evidence)


# ---- end to end ----


@pytest.fixture(scope="module")
def place(gpt2, tmp_path_factory):
    return gpt2, tmp_path_factory.mktemp("studies")


SMALL = ("data.members=14", "data.nonmembers=14", "data.validation=6", "train.epochs=2", "data.max_length=24")


def study(place, name, **more):
    model, out = place
    given = {"models": [str(model)], "data": ["world/triples", "world/news"], "seeds": 2, **more}
    return run_study(name, setting(**given), out, SMALL)


def test_a_study_leaves_tables_verdicts_and_a_page(place):
    outcome = study(place, "observation1")
    assert {gate.name for _, gate in outcome.gates} == {
        "base control",
        "blind baseline",
        "overlap",
        "power",
        "positive control",
    }
    assert "power (red)" in outcome.withheld  # fourteen records
    document = json.loads((outcome.page.parent / "study.json").read_text())
    assert document["verdicts"]
    assert document["withheld"] == outcome.withheld
    for ending in ("md", "tex", "csv"):
        assert len(list((outcome.page.parent / "tables").glob(f"*.{ending}"))) == len(outcome.answer.sheets)
    page = outcome.page.read_text()
    assert "withheld" in page
    assert "supported</span>" not in page
    chosen = [one for one in outcome.trials if one.chosen]
    assert len(chosen) == 2 * 5
    assert len(outcome.trials) == 2 * 5 * len(RATES)
    seeds = {cell.spec.seed for cell in outcome_cells(outcome)}
    assert seeds == {0, 1}
    assert {cell.spec.data.seed for cell in outcome_cells(outcome)} == {0}


def outcome_cells(outcome):
    from imprint.rows import load_grid

    return load_grid(outcome.page.parent).cells


def test_studies_share_their_runs(place, monkeypatch):
    """After the first study on these grids nothing is trained again."""
    study(place, "observation1")
    from imprint import cells

    def never(*_: object) -> None:
        raise AssertionError("a run that was done is done again")

    monkeypatch.setattr(cells, "run_crew", never)
    for name in ("table2", "observation2", "observation4", "figure1", "figure2", "figure3", "mechanism"):
        outcome = study(place, name)
        assert outcome.answer.sheets, name
        assert outcome.page.exists()


def test_misreading_is_measured_on_stored_checkpoints(place, monkeypatch):
    outcome = study(place, "alignment", seeds=1)
    [sheet] = [one for one in outcome.answer.sheets if one.title == "The same checkpoints read twice"]
    assert len(sheet.rows) == 3 * 2 * 4  # two data sets and the leaky one, two methods, four attacks
    assert len(list((outcome.page.parent / "misread").glob("*.parquet"))) == 3 * 2
    from imprint.studies import alignment

    monkeypatch.setattr(alignment, "read_twice", None)  # kept: not read again
    assert study(place, "alignment", seeds=1).answer.sheets[0] == outcome.answer.sheets[0]


def test_published_is_one_rate_and_no_search(place):
    outcome = study(place, "table2", protocol="published", seeds=None)
    assert outcome.trials == []
    assert outcome.page.parent.name == "table2-published"
    titles = [sheet.title for sheet in outcome.answer.sheets]
    assert "AUC at the last epoch" in titles
    assert "AUC after 5 epochs" not in titles  # two epochs are not five


def test_the_papers_numbers_stand_beside_only_where_the_set_up_is_the_papers(place):
    outcome = study(place, "table2")
    entries = [cell for sheet in outcome.answer.sheets for row in sheet.rows for cell in row]
    assert not any(getattr(cell, "paper", "") for cell in entries)


@pytest.mark.parametrize(
    ("name", "more", "said"),
    [
        ("observation5", {}, "did you mean 'observation"),
        ("observation1", {"models": ["no/such-model"]}, "neither a local folder"),
        ("observation4", {"data": ["world/news"]}, "structured data"),
        ("observation3", {}, "two or more times"),
        ("moe", {}, "experts"),
    ],
)
def test_what_cannot_be_done_is_refused(place, tmp_path, name, more, said):
    with pytest.raises(UsageError, match=said):
        study((place[0], tmp_path / "out"), name, **more)
    assert not list((tmp_path / "out").rglob("stats.parquet"))


@pytest.mark.parametrize("given", ["seed=[0,1]", "data.seed=3", "method=lora", "budget.auc=0.6", "data=world/news"])
def test_what_a_study_sets_itself_cannot_be_set(place, tmp_path, given):
    with pytest.raises(UsageError, match="a study sets this itself"):
        run_study("observation1", setting(models=[str(place[0])]), tmp_path, (given,))


def test_a_method_that_does_not_fit_is_told_before_any_training(place, tmp_path, monkeypatch):
    from dataclasses import replace

    from imprint.tuning.methods import METHODS

    def refuse(*_: object) -> None:
        raise ValueError("this architecture takes no cache")

    monkeypatch.setitem(METHODS, "prefix", replace(METHODS["prefix"], attach=refuse))
    with pytest.raises(UsageError, match=r"nothing has been trained.*prefix on .*takes no cache"):
        study((place[0], tmp_path / "out"), "observation1", data=["world/news"])
    assert not (tmp_path / "out").exists()
