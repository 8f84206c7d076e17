"""Recipes: lists are axes, every option is resolved before anything is trained, and an id names all that counts."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from imprint.errors import UsageError
from imprint.recipe import KEYS, Plan, plan, read_recipe
from imprint.spec import DataSpec, MethodSpec, ModelSpec, RunSpec, TrainSpec
from imprint.tuning.methods import METHODS, resolve_method


def labels(planned: Plan) -> list[str]:
    return [cell.label for cell in planned.cells]


def refusal(document: Any, overrides: tuple[str, ...] = ()) -> str:
    with pytest.raises(UsageError) as caught:
        plan(read_recipe(document, overrides))
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def only(planned: Plan) -> RunSpec:
    [cell] = planned.cells
    return cell.spec


# ---- lists are axes ----


def test_lists_are_a_product(recipe):
    cells = plan(recipe(method=["head", {"lora": {"rank": [2, 4]}}], seed=[0, 1, 2])).cells
    found = [(c.spec.method.name, c.spec.method.options.get("rank"), c.spec.seed) for c in cells]
    assert found == [(m, r, s) for m, r in (("head", None), ("lora", 2), ("lora", 4)) for s in (0, 1, 2)]
    assert len({cell.spec.run_id for cell in cells}) == 9


def test_a_list_of_attacks_is_no_axis(recipe):
    planned = plan(recipe(attacks=["ref", "loss", "ref"]))
    assert len(planned.cells) == 1
    assert planned.attacks == ("ref", "loss")


def test_nested_lists_and_lists_of_options(recipe):
    """A list of settings, each a mapping, is an axis like any other."""
    trains = [{"epochs": 1}, {"epochs": [2, 3]}]
    assert [c.spec.train.epochs for c in plan(recipe(train=trains)).cells] == [1, 2, 3]


def test_equal_cells_are_one(recipe):
    """The default spelled out is the same cell."""
    assert len(plan(recipe(method=["lora", {"lora": None}, {"lora": {"rank": 8}}])).cells) == 1


def test_the_papers_methods_are_the_default(recipe):
    document = recipe()
    del document["method"]
    assert [c.spec.method.name for c in plan(document).cells] == ["head", "lora", "prefix", "prompt", "p_tuning"]


def test_an_empty_list_is_refused(recipe):
    assert "empty list" in refusal(recipe(seed=[]))


def test_cells_share_a_base_unless_model_data_or_seed_differ(recipe):
    cells = plan(recipe(method=["head", "full"], seed=[0, 1], data__members=[8, 9])).cells
    keys = {(c.spec.seed, c.spec.data.members): set() for c in cells}
    for cell in cells:
        keys[cell.spec.seed, cell.spec.data.members].add(cell.base)
    assert all(len(bases) == 1 for bases in keys.values())
    assert len({cell.base for cell in cells}) == 4


def test_a_split_of_its_own_seed_is_shared_by_all_seeds(recipe):
    cells = plan(recipe(seed=[0, 1, 2], data__seed=5)).cells
    assert len({cell.base for cell in cells}) == 1
    assert len({cell.spec.run_id for cell in cells}) == 3
    assert {cell.spec.data.seed for cell in cells} == {5}


def test_several_grids_are_taken_together(recipe):
    """A cell that two of them name is one cell; they share attacks and budget."""
    cells = plan([recipe(method="head", seed=[0, 1]), recipe(method=["head", "lora"])]).cells
    assert [(c.spec.method.name, c.spec.seed) for c in cells] == [("head", 0), ("head", 1), ("lora", 0)]
    with pytest.raises(UsageError, match="share their `attacks`"):
        plan([recipe(attacks=["loss"]), recipe()])
    both = read_recipe([recipe(), recipe()], ["train.epochs=7"])
    assert [grid["train"]["epochs"] for grid in both] == [7, 7]


# ---- overrides ----


def test_overrides_reach_nested_keys_and_take_yaml(recipe):
    document = read_recipe(recipe(), ["train.epochs=3", "method=[head, {lora: {rank: 2}}]", "data.split=random"])
    assert document["train"] == {"epochs": 3, "batch_size": 4}
    assert document["method"] == ["head", {"lora": {"rank": 2}}]


def test_overrides_open_short_forms(recipe, data, gpt2):
    short = {**recipe(), "model": str(gpt2), "data": str(data)}
    document = read_recipe(short, ["model.dtype=bfloat16", "data.members=9"])
    assert document["model"] == {"name": str(gpt2), "dtype": "bfloat16"}
    assert document["data"] == {"source": str(data), "members": 9}


def test_overrides_leave_the_given_mapping_alone(recipe):
    document = recipe()
    before = json.dumps(document)
    read_recipe(document, ["train.epochs=9", "data.members=1", "model.dtype=float32"])
    assert json.dumps(document) == before


def test_an_override_makes_a_missing_mapping(recipe):
    document = recipe()
    del document["train"]
    assert only(plan(read_recipe(document, ["train.epochs=2"]))).train.epochs == 2


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("train.epochs", "expected KEY=VALUE"),
        ("=3", "expected KEY=VALUE"),
        ("train.epochs=[", "--set train.epochs, line 1: not valid YAML"),
        ("train.epochs.x=1", "'epochs' is not a mapping"),
        ("train.epoch=1", "did you mean 'epochs'?"),
    ],
)
def test_a_wrong_override_is_refused(recipe, override, told):
    assert told in refusal(recipe(), (override,))


# ---- files ----


def test_a_file_reads_like_a_mapping(recipe, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps(recipe()), encoding="utf-8")  # JSON is YAML
    assert only(plan(read_recipe(path))).run_id == only(plan(recipe())).run_id


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("model: x\ndata: [\n", "line 3: not valid YAML"),
        ("- model\n", "a recipe is a mapping"),
        ("", "a recipe is a mapping"),
        ("model: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
        ("model: \x00\n", "not valid YAML"),
        ("seed: 2020-13-45\n", "not valid YAML"),
        ("seed: " + "[" * 5000, "not valid YAML"),
    ],
    ids=["broken", "list", "empty", "python tag", "control character", "no such date", "too deep"],
)
def test_a_broken_file_is_refused(tmp_path, text, told):
    path = tmp_path / "r.yaml"
    path.write_text(text, encoding="utf-8")
    assert told in refusal(path)


# ---- refusals ----


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"atacks": ["loss"]}, "did you mean 'attacks'?"),
        ({"attacks": ["los"]}, "unknown attack 'los': did you mean 'loss'?"),
        ({"attacks": [["loss"]]}, "attack"),
        ({"attacks": []}, "expected a list of names"),
        ({"method": "lorra"}, "unknown method 'lorra': did you mean 'lora'?"),
        ({"method": {"lorra": {"rank": 2}}}, "unknown method 'lorra': did you mean 'lora'?"),
        ({"method": {"lora": {"rnk": 2}}}, "did you mean 'rank'?"),
        ({"method": {"prefix": {"token": 2}}}, "did you mean 'tokens'?"),
        ({"method": {"head": {"rank": 2}}}, "method.head"),
        ({"method": {"lora": {}, "head": {}}}, "one name with its options"),
        ({"method": {"lora": 4}}, "one name with its options"),
        ({"train": {"epoch": 2}}, "did you mean 'epochs'?"),
        ({"train": {"warmpu": 0.1}}, "did you mean 'warmup'?"),
        ({"data__memberz": 2}, "did you mean 'members'?"),
        ({"data__grop": "owner"}, "did you mean 'group'?"),
        ({"data__source": {"name": "x.jsonl", "confg": "en"}}, "did you mean 'config'?"),
        ({"data__format": {"promt": "a", "target": "b"}}, "did you mean 'prompt'?"),
        ({"model": {"name": "x", "dtyp": "float32"}}, "did you mean 'dtype'?"),
        ({"budget": {"auk": 0.6}}, "did you mean 'auc'?"),
        ({"budget": {"auc": 0.6, "attack": "los"}}, "did you mean 'loss'?"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_unknown_names_are_refused_with_the_nearest_right_one(recipe, change, told):
    assert told in refusal(recipe(**change))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seed": -1}, "seed"),
        ({"seed": "one"}, "seed"),
        ({"train": {"epochs": 0}}, "train.epochs"),
        ({"train": {"batch_size": 1.5}}, "train.batch_size"),
        ({"train": {"learning_rate": float("nan")}}, "train.learning_rate"),
        ({"train": {"warmup": 1}}, "train.warmup"),
        ({"train": {"schedule": "step"}}, "train.schedule"),
        ({"train": None}, "train"),
        ({"data__members": 0}, "data.members"),
        ({"data__max_length": 1}, "data.max_length"),
        ({"data__overlong": "cut"}, "data.overlong"),
        ({"method": {"lora": {"rank": 0}}}, "method.lora.rank"),
        ({"method": {"lora": {"dropout": 1}}}, "method.lora.dropout"),
        ({"method": {"prefix": {"init": "zeros"}}}, "method.prefix.init"),
        ({"budget": {"auc": 0.5}}, "budget.auc"),
        ({"budget": {"auc": 1.01}}, "budget.auc"),
        ({"budget": {"auc": float("nan")}}, "budget.auc"),
        ({"budget": {"tpr_at_1pct_fpr": -0.1}}, "budget.tpr_at_1pct_fpr"),
        ({"budget": 0.6}, "budget"),
    ],
    ids=str,
)
def test_bad_values_are_refused_by_key(recipe, change, told):
    assert refusal(recipe(**change)).startswith(told)


def test_a_missing_key_is_named(recipe):
    document = recipe()
    del document["model"]
    assert "model" in refusal(document)
    assert "required" in refusal(document)


def test_a_budget_is_held_to_an_attack_that_is_run(recipe):
    assert plan(recipe(attacks=["ref"], budget={"attack": "ref", "auc": 0.6})).budget.attack == "ref"
    assert "loss" in refusal(recipe(attacks=["ref"], budget={"attack": "loss", "auc": 0.6}))


def test_a_budget_without_a_limit_is_refused(recipe):
    """It could never be kept, and the command would end with 1, leakage over budget, whatever was found."""
    assert "budget" in refusal(recipe(budget={"attack": "ref"}))
    assert "budget" in refusal(recipe(budget={}))


# ---- lengths ----


def test_virtual_tokens_must_fit_the_context(recipe):
    """The context is 96; the default length leaves 32 for virtual tokens."""
    assert only(plan(recipe(method={"prefix": {"tokens": 32}}))).data.max_length == 64
    assert "exceed the model's context of 96" in refusal(recipe(method={"prefix": {"tokens": 33}}))
    assert only(plan(recipe(method={"prompt": {"tokens": 10}}, data__max_length=86))).data.max_length == 86
    assert "at most 86" in refusal(recipe(method={"prompt": {"tokens": 10}}, data__max_length=87))
    assert only(plan(recipe(data__max_length=96))).data.max_length == 96
    assert "at most 96" in refusal(recipe(data__max_length=97))


def test_every_method_sees_the_same_texts(recipe):
    """One length for the whole grid, or methods would be compared on different texts."""
    cells = plan(recipe(method=["head", {"prefix": {"tokens": 5}}, {"prompt": {"tokens": 30}}])).cells
    assert {cell.spec.data.max_length for cell in cells} == {64}


# ---- resolved options ----


def test_learning_rates_come_from_option_then_recipe_then_method(recipe):
    def rate(method: Any, train: dict[str, Any]) -> float:
        return only(plan(recipe(method=method, train=train))).method.options["learning_rate"]

    assert rate({"lora": {"learning_rate": 0.3}}, {"learning_rate": 0.2}) == 0.3
    assert rate("lora", {"learning_rate": 0.2}) == 0.2
    assert rate("lora", {}) == METHODS["lora"].default_rate(32)  # the width of the tiny model


@pytest.mark.parametrize("name", list(METHODS))
def test_default_rates_fall_with_the_width_where_weights_train(name):
    """Methods that learn inputs keep their rate; the others have it at width 96 and a sixteenth of it at 1536."""
    narrow, wide = METHODS[name].default_rate(96), METHODS[name].default_rate(1536)
    assert narrow == METHODS[name].rate
    factor = 16 if name in ("full", "head", "lora") else 1
    assert wide == pytest.approx(narrow / factor, rel=0.05)


def test_where_the_rate_was_given_does_not_matter(recipe):
    of_method = only(plan(recipe(method={"head": {"learning_rate": 0.25}})))
    of_train = only(plan(recipe(train={"epochs": 1, "batch_size": 4, "learning_rate": 0.25})))
    assert of_method.run_id == of_train.run_id


def test_every_option_is_resolved(recipe):
    """What is written down needs no default of a later version to be understood."""
    for cell in plan(recipe(method=list(METHODS))).cells:
        assert None not in cell.spec.method.options.values()
        assert {cell.spec.data.members, cell.spec.data.tune_on} == {8}
        assert cell.spec.data.max_length == 64


def test_alpha_and_encoder_width_follow():
    assert resolve_method(MethodSpec(name="lora", options={"rank": 3}), 32, None).options["alpha"] == 6
    assert resolve_method(MethodSpec(name="lora", options={"rank": 3, "alpha": 1}), 32, None).options["alpha"] == 1
    assert resolve_method(MethodSpec(name="p_tuning"), 32, None).options["encoder_width"] == 32


# ---- labels ----


def test_labels_name_what_differs_and_nothing_else(recipe):
    assert labels(plan(recipe(method=["head", "lora"], seed=[0, 1]))) == ["head", "head", "lora", "lora"]
    ranks = plan(recipe(method=["head", {"lora": {"rank": [2, 4], "dropout": 0.1}}]))
    assert labels(ranks) == ["head", "lora rank=2", "lora rank=4"]
    epochs = plan(recipe(method=["head"], train=[{"epochs": 1}, {"epochs": 2}]))
    assert labels(epochs) == ["head epochs=1", "head epochs=2"]


def test_labels_of_one_model_data_and_seed_differ(recipe):
    """Two rows of a table must not bear the same name."""
    found = labels(plan(recipe(method={"lora": {"rank": [2, 4], "alpha": [8, 16]}})))
    assert len(set(found)) == 4


# ---- identity ----

FIXED = RunSpec(
    model=ModelSpec(name="here/gpt2", revision="main", dtype="float32", fingerprint="a" * 64),
    data=DataSpec(
        source={"name": "there.jsonl"},
        members=8,
        nonmembers=8,
        validation=4,
        tune_on=8,
        max_length=64,
        seed=0,
        fingerprint="b" * 64,
    ),
    method=MethodSpec(name="lora", options={"rank": 2, "alpha": 4.0, "learning_rate": 0.005}),
    train=TrainSpec(epochs=1),
    seed=0,
)
COUNTS = {
    "model.dtype": "bfloat16",
    "model.quantize": "4bit",
    "model.fingerprint": "c" * 64,
    "data.members": 7,
    "data.nonmembers": 7,
    "data.validation": 5,
    "data.tune_on": 9,
    "data.split": "official",
    "data.max_length": 63,
    "data.overlong": "refuse",
    "data.loss": "all",
    "data.eos": True,
    "data.tokenizer": "e" * 64,
    "data.seed": 1,
    "data.repeat": 2,
    "data.auxiliary": 3,
    "data.sealed": "f" * 64,
    "data.fingerprint": "d" * 64,
    "method.name": "head",
    "method.options.rank": 3,
    "method.options.alpha": 5.0,
    "method.options.learning_rate": 0.006,
    "train.epochs": 2,
    "train.batch_size": 8,
    "train.learning_rate": 0.1,
    "train.schedule": "cosine",
    "train.warmup": 0.1,
    "train.weight_decay": 0.1,
    "train.max_grad_norm": 2.0,
    "train.goldfish": 4,
    "train.dp": {"epsilon": 8},
    "train.stop": {"auc": 0.6},
    "shadow": 0,
    "seed": 1,
    "version": 999,
}
IS_A_PLACE = {  # the fingerprints say what lies there, columns applied
    "model.name": "elsewhere",
    "model.revision": "v2",
    "data.source.name": "elsewhere.jsonl",
    "data.source.path": "elsewhere",
    "data.source.config": "en",
    "data.source.split": "train",
    "data.source.revision": "v2",
    "data.group": "owner",
    "data.subgroup": "language",
    "data.id": "key",
    "data.format": "text",
    "data.canaries": "elsewhere.json",
}


def leaves(document: dict[str, Any], at: str = "") -> Iterator[str]:
    for key, value in document.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{at}{key}.")
        else:
            yield at + key


def changed(key: str, value: Any) -> RunSpec:
    document = FIXED.model_dump(mode="json")
    inner = document
    *path, last = key.split(".")
    for part in path:
        inner = inner[part]
    inner[last] = value
    return RunSpec.model_validate(document)


def test_every_field_of_a_run_is_either_in_its_id_or_a_place():
    """A field added later must be put on one of the two lists, with the test that goes with it."""
    assert {*COUNTS, *IS_A_PLACE} == {*leaves(FIXED.model_dump(mode="json"))}


@pytest.mark.parametrize("key", COUNTS)
def test_an_id_changes_with(key):
    assert changed(key, COUNTS[key]).run_id != FIXED.run_id


@pytest.mark.parametrize("key", IS_A_PLACE)
def test_an_id_does_not_change_with(key):
    assert changed(key, IS_A_PLACE[key]).run_id == FIXED.run_id


def test_an_identity_is_pinned():
    """If this fails, every cell on every disk is orphaned: raise MEASUREMENT_VERSION on purpose, or undo the change."""
    assert FIXED.run_id == "52868dce7d92f577"


def test_an_id_does_not_depend_on_where_files_lie(recipe, gpt2, data, tmp_path):
    model, text = shutil.copytree(gpt2, tmp_path / "other"), shutil.copy(data, tmp_path / "other.jsonl")
    (model / "README.md").write_text("not part of the model")
    [here], [there] = plan(recipe()).cells, plan(recipe(model=str(model), data__source=str(text))).cells
    assert (here.spec.run_id, here.base) == (there.spec.run_id, there.base)


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "adapter_config.json"]
)
def test_an_id_depends_on_every_file_a_model_is_loaded_from(recipe, damaged, name):
    """Transformers applies an adapter that lies beside a model without being asked."""
    before = _id_or_refusal(recipe(model=str(damaged)))
    file = damaged / name
    file.write_bytes((file.read_bytes() if file.exists() else b"{}") + b" ")
    after = _id_or_refusal(recipe(model=str(damaged)))
    assert after != before


def _id_or_refusal(document: dict[str, Any]) -> str:
    try:
        return only(plan(document)).run_id
    except UsageError as error:
        return str(error)


def test_an_id_depends_on_the_shard_index(recipe, damaged):
    """Which shard a weight comes from is written there."""
    index = damaged / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "model.safetensors"}}')
    before = only(plan(recipe(model=str(damaged)))).run_id
    index.write_text('{"weight_map": {"a": "other.safetensors"}}')
    assert only(plan(recipe(model=str(damaged)))).run_id != before


def test_an_id_depends_on_every_record(recipe, data, tmp_path):
    other = tmp_path / "letters.jsonl"
    rows = data.read_text().splitlines()
    ids = {only(plan(recipe())).run_id, only(plan(recipe(data__group="owner"))).run_id}
    for change in (rows[:-1], rows[::-1], [*rows[:-1], rows[-1].replace("r59", "r60")]):
        other.write_text("\n".join(change) + "\n")
        ids.add(only(plan(recipe(data__source=str(other)))).run_id)
    assert len(ids) == 5


def test_a_dtype_is_resolved_before_it_is_named(recipe):
    """`auto` is another precision on another machine, hence another run."""
    [cell] = plan(recipe(), lambda name: "bfloat16" if name == "auto" else name).cells
    assert cell.spec.model.dtype == "bfloat16"
    assert cell.spec.run_id == only(plan(recipe(model={"name": recipe()["model"], "dtype": "bfloat16"}))).run_id


def test_a_path_object_is_a_name(recipe, gpt2: Path, data: Path):
    """From Python, folders and files come as paths as often as strings."""
    assert only(plan(read_recipe(recipe(model=gpt2, data__source=data)))).run_id == only(plan(recipe())).run_id


def test_the_page_of_keys_is_what_the_code_says():
    """docs/recipe.md is written by scripts/recipe_docs.py from the docstrings under the fields."""
    root = Path(__file__).parent.parent
    spec = importlib.util.spec_from_file_location("recipe_docs", root / "scripts" / "recipe_docs.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert (root / "docs" / "recipe.md").read_text(encoding="utf-8") == script.text()


@pytest.mark.parametrize("file", sorted(p.name for p in (Path(__file__).parent.parent / "recipes").glob("*.yaml")))
def test_shipped_recipes_are_readable(file):
    """Those of the paper need the Hub, so only their keys and names are checked here; the demo is planned whole."""
    document = read_recipe(Path(__file__).parent.parent / "recipes" / file)
    assert set(document) <= set(KEYS)
    assert set(document["method"]) <= set(METHODS)
    if file == "demo.yaml":
        assert len(plan(document).cells) == 5
