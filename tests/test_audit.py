"""Audits of what others tuned: every kind of folder, scored as a naive pass over peft's own model scores it."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

import imprint
from imprint.errors import ImprintError, UsageError
from imprint.rows import Cell, load_grid
from tests.conftest import save_model, sentence, write_jsonl

NATS = 1e-4
"""Allowed difference of a token's log-probability from the naive pass, float32."""
CHATML = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ADAPTERS: dict[str, Callable[[], Any]] = {
    "lora": lambda: LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=16, target_modules="all-linear"),
    "prefix": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prompt": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p_tuning": lambda: PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=16),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_model(
        tmp_path_factory.mktemp("models") / "base",
        "llama",
        bos=True,
        initializer_range=0.2,
        max_position_embeddings=256,
    )


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """Forty members and forty non-members, with prompt and completion."""
    folder, dice = tmp_path_factory.mktemp("sides"), random.Random(3)
    rows = [{"id": f"r{n}", "prompt": f"{sentence(dice)}:", "completion": f" {sentence(dice)}"} for n in range(80)]
    return write_jsonl(folder / "members.jsonl", rows[:40]), write_jsonl(folder / "nonmembers.jsonl", rows[40:])


def lively(model: torch.nn.Module, seed: int = 5) -> torch.nn.Module:
    """Adapters start as nothing: give every number that trains a value that shows."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def saved(folder: Path, base: Path, kind: str, seed: int = 5) -> Path:
    """An adapter, or the whole model, as `save_pretrained` leaves it."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    if kind != "full":
        model = get_peft_model(model, ADAPTERS[kind]())
    lively(model, seed).save_pretrained(folder)
    return folder


def loaded(base: Path, folder: Path) -> Any:
    if (folder / "adapter_config.json").exists():
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
def naive(model: Any, ids: list[int], scored: list[bool]) -> list[float]:
    """log p of each scored token, one text at a time."""
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double()
    logits = logits[logits.shape[0] - len(ids) :]  # of virtual tokens in front
    logp = logits.log_softmax(-1)
    return [float(logp[t - 1, ids[t]]) for t in range(1, len(ids)) if scored[t]]


def the_cell(out: Path) -> Cell:
    [cell] = load_grid(out).cells
    return cell


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_records_by_hand(base, sides, tmp_path):
    """What is scored of a prompt with its completion, without Imprint's encoder: ids and the mask of TRL."""
    found = audited(base, sides, saved(tmp_path / "lora", base, "lora"), tmp_path / "out", loss="target")
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = loaded(base, tmp_path / "lora")
    cell, rows = the_cell(tmp_path / "out"), rows_of(sides[0])
    stats = cell.stats(1)
    where = {str(key): n for n, key in enumerate(stats.ids)}
    for row in rows[:10]:
        prompt = tokenizer(row["prompt"]).input_ids
        ids = [*prompt, *tokenizer(row["completion"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        expected = naive(model, ids, [t >= len(prompt) for t in range(len(ids))])
        n = where[pseudonym_of(tmp_path / "out.key", row["id"])]
        np.testing.assert_allclose(stats.logp[stats.offsets[n] : stats.offsets[n + 1]], expected, atol=NATS)
    assert found.release.code == 2  # forty records a side prove nothing


def pseudonym_of(key: Path, record: str) -> str:
    """As the documentation tells a user to find a record."""
    import hmac

    return hmac.new(key.read_bytes(), record.encode(), "sha256").hexdigest()[:16]


def audited(base: Path, sides: tuple[Path, Path], adapter: Path | str, out: Path | None, **more: Any) -> Any:
    return imprint.audit(base, members=sides[0], nonmembers=sides[1], adapter=adapter, out=out, **more)


@pytest.mark.parametrize("kind", [*ADAPTERS, "full"])
def test_every_kind_is_found_out_and_scored_as_its_own_model_scores_it(base, sides, tmp_path, kind):
    """No flags but model, adapter and data; reference and target against naive passes."""
    audited(base, sides, saved(tmp_path / "tuned", base, kind), tmp_path / "out", loss="target")
    cell = the_cell(tmp_path / "out")
    assert cell.spec.method.name == kind
    tokenizer = AutoTokenizer.from_pretrained(base)
    untouched, tuned = AutoModelForCausalLM.from_pretrained(base).eval(), loaded(base, tmp_path / "tuned")
    key = tmp_path / "out.key"
    rows = {pseudonym_of(key, r["id"]): r for side in sides for r in rows_of(side)}
    for epoch, model in enumerate((untouched, tuned)):
        stats = cell.stats(epoch)
        for n in range(0, len(stats), 7):
            row = rows[str(stats.ids[n])]
            prompt = tokenizer(row["prompt"]).input_ids
            ids = [*prompt, *tokenizer(row["completion"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
            expected = naive(model, ids, [t >= len(prompt) for t in range(len(ids))])
            np.testing.assert_allclose(stats.logp[stats.offsets[n] : stats.offsets[n + 1]], expected, atol=NATS)


def test_checkpoints_are_epochs_in_the_order_of_their_numbers(base, sides, tmp_path):
    for step in (90, 100, 9):
        saved(tmp_path / "run" / f"checkpoint-{step}", base, "lora", seed=step)
    audited(base, sides, f"{tmp_path}/run/checkpoint-*", tmp_path / "out", loss="target")
    cell = the_cell(tmp_path / "out")
    assert [cell.folder.meta(n)["name"] for n in (1, 2, 3)] == ["checkpoint-9", "checkpoint-90", "checkpoint-100"]
    for number, step in ((1, 9), (3, 100)):
        alone = tmp_path / f"alone{step}"
        shutil.copy(tmp_path / "out.key", tmp_path / f"alone{step}.key")
        audited(base, sides, tmp_path / "run" / f"checkpoint-{step}", alone, loss="target")
        np.testing.assert_array_equal(cell.stats(number).logp, the_cell(alone).stats(1).logp)


def test_the_same_command_scores_only_what_is_new(base, sides, tmp_path):
    saved(tmp_path / "run" / "checkpoint-1", base, "lora", seed=1)
    audited(base, sides, f"{tmp_path}/run/checkpoint-*", tmp_path / "out", loss="target")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("stats.parquet")}
    saved(tmp_path / "run" / "checkpoint-2", base, "lora", seed=2)
    audited(base, sides, f"{tmp_path}/run/checkpoint-*", tmp_path / "out", loss="target")
    after = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("stats.parquet")}
    assert before.items() < after.items()
    assert the_cell(tmp_path / "out").epochs == 2


def test_another_adapter_does_not_get_into_the_folder(base, sides, tmp_path):
    audited(base, sides, saved(tmp_path / "one", base, "lora", seed=1), tmp_path / "out", loss="target")
    before = fingerprints(tmp_path / "out")
    with pytest.raises(UsageError, match="the audit of other weights: give another folder"):
        audited(base, sides, saved(tmp_path / "two", base, "lora", seed=2), tmp_path / "out", loss="target")
    assert fingerprints(tmp_path / "out") == before


def fingerprints(folder: Path) -> dict[str, str]:
    return {
        str(p): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name not in ("run.lock", "recipe.lock.json", "recipe.yaml")
    }


# ---- the reference ----


def test_an_adapter_names_its_base(base, sides, tmp_path):
    found = imprint.audit(
        None, members=sides[0], nonmembers=sides[1], adapter=saved(tmp_path / "a", base, "lora"), out=tmp_path / "out"
    )
    assert found.path == tmp_path / "out"
    assert the_cell(tmp_path / "out").spec.model.name == str(base)


def test_a_whole_model_needs_its_base_named(base, sides, tmp_path):
    whole = saved(tmp_path / "whole", base, "full")
    shutil.copytree(base, tmp_path / "tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, whole)
    with pytest.raises(UsageError, match="no adapter can be turned off in it: name the model that it was tuned from"):
        imprint.audit(whole, members=sides[0], nonmembers=sides[1], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    imprint.audit(whole, members=sides[0], nonmembers=sides[1], reference=base, out=tmp_path / "out", loss="target")
    audited(base, sides, whole, tmp_path / "other", loss="target")
    np.testing.assert_array_equal(  # named the one way or the other
        the_cell(tmp_path / "out").stats(1).logp[:10], the_cell(tmp_path / "out").stats(1).logp[:10]
    )
    assert sorted(the_cell(tmp_path / "out").reference.nll) == sorted(the_cell(tmp_path / "other").reference.nll)


def test_another_reference_takes_the_place_of_the_base(base, sides, tmp_path):
    other = save_model(tmp_path / "other", "llama", seed=9, bos=True)
    audited(base, sides, saved(tmp_path / "a", base, "lora"), tmp_path / "out", reference=other, loss="target")
    audited(base, sides, tmp_path / "a", tmp_path / "plain", loss="target")
    with_other, plain = the_cell(tmp_path / "out"), the_cell(tmp_path / "plain")
    assert abs(with_other.reference.nll.mean() - plain.reference.nll.mean()) > 1e-3
    assert sorted(with_other.stats(1).nll) == sorted(plain.stats(1).nll)
    assert with_other.base.name != plain.base.name


def test_a_reference_with_other_tokens_is_refused(base, sides, tmp_path):
    other = save_model(tmp_path / "other", "llama", seed=9, bos=True)
    text = (other / "tokenizer.json").read_text()
    document = json.loads(text)
    vocabulary = document["model"]["vocab"]
    first, second = list(vocabulary)[:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(ImprintError, match="numbers 2 tokens otherwise"):
        audited(base, sides, saved(tmp_path / "a", base, "lora"), tmp_path / "out", reference=other)


# ---- in memory ----


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_model_in_memory_is_scored_as_the_folder_it_would_be_saved_to(base, sides, tmp_path, kind):
    torch.manual_seed(5)
    model = lively(get_peft_model(AutoModelForCausalLM.from_pretrained(base), ADAPTERS[kind]()))
    model.save_pretrained(tmp_path / "saved")
    model.train()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    flags = [(p.requires_grad, p.grad) for p in model.parameters()]
    state = torch.get_rng_state()
    tokenizer = AutoTokenizer.from_pretrained(base)
    imprint.audit(model, tokenizer, *sides, out=tmp_path / "live", id_key=tmp_path / "key")
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert [(p.requires_grad, p.grad) for p in model.parameters()] == flags
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    audited(base, sides, tmp_path / "saved", tmp_path / "folder", loss="target", id_key=tmp_path / "key")
    live, folder = the_cell(tmp_path / "live"), the_cell(tmp_path / "folder")
    for epoch in (0, 1):
        np.testing.assert_array_equal(live.stats(epoch).ids, folder.stats(epoch).ids)
        np.testing.assert_allclose(live.stats(epoch).logp, folder.stats(epoch).logp, atol=NATS)


def test_rows_texts_and_data_sets_are_taken(base, tmp_path):
    dice = random.Random(1)
    texts = [sentence(dice) for _ in range(60)]
    adapter = saved(tmp_path / "a", base, "lora")
    found = [
        imprint.audit(base, members=kind(texts[:30]), nonmembers=kind(texts[30:]), adapter=adapter)
        for kind in (list, lambda some: [{"text": one} for one in some])
    ]
    assert found[0].path is None
    assert found[0].frame["value"].notna().any()
    np.testing.assert_array_equal(found[0].frame["value"], found[1].frame["value"])


def test_a_merged_adapter_in_memory_has_no_base(base, sides):
    model = lively(get_peft_model(AutoModelForCausalLM.from_pretrained(base), ADAPTERS["lora"]()))
    model.merge_adapter()
    with pytest.raises(UsageError, match="merged into the model"):
        imprint.audit(model, AutoTokenizer.from_pretrained(base), *sides)


# ---- what is written ----

SECRET = "the wire transfer code is 4471-quartz-heron"


@pytest.mark.parametrize("shown", [False, True])
def test_a_secret_is_nowhere_under_the_folder_unless_asked_for(base, tmp_path, shown):
    """Not as text, not as tokens, not in ids or owners; not even where everything is unpacked."""
    dice = random.Random(2)
    rows = [{"id": f"{SECRET} {n}", "owner": f"{SECRET} {n}", "text": f"{sentence(dice)} {SECRET}"} for n in range(60)]
    members, nonmembers = (
        write_jsonl(tmp_path / name, part) for name, part in (("m.jsonl", rows[:30]), ("n.jsonl", rows[30:]))
    )
    adapter = saved(tmp_path / "a", base, "lora")
    imprint.audit(
        base,
        members=members,
        nonmembers=nonmembers,
        adapter=adapter,
        out=tmp_path / "out",
        data={"group": "owner"},
        show_text=shown,
    )
    from imprint.report import write_report

    write_report(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert (SECRET in everything_under(tmp_path / "out", tokenizer)) is shown


def everything_under(folder: Path, tokenizer: Any) -> str:
    """All files as text, tables cell by cell, columns of tokens decoded."""
    import pyarrow.parquet as pq

    parts = []
    for path in folder.rglob("*"):
        if path.suffix == ".parquet":
            for name, values in pq.read_table(path).to_pydict().items():
                parts += [tokenizer.decode(v) if name == "tokens" else str(v) for v in values]
        elif path.is_file():
            parts.append(path.read_text(encoding="utf-8", errors="replace"))
    return "\n".join(parts)


def test_a_key_that_is_given_names_the_same_record_alike_everywhere(base, sides, tmp_path):
    key = tmp_path / "team.key"
    key.write_text("a key of at least sixteen bytes\n")
    adapter = saved(tmp_path / "a", base, "lora")
    for name in ("one", "two"):
        audited(base, sides, adapter, tmp_path / name, id_key=key, loss="target")
    assert set(the_cell(tmp_path / "one").records["id"]) == set(the_cell(tmp_path / "two").records["id"])
    assert not (tmp_path / "one.key").exists()


def test_a_new_key_is_its_owners_alone(base, sides, tmp_path):
    audited(base, sides, saved(tmp_path / "a", base, "lora"), tmp_path / "out", loss="target")
    assert (tmp_path / "out.key").stat().st_mode & 0o777 == 0o600


# ---- what a review found ----


def test_swapped_sides_are_no_pass(base, tmp_path):
    """A model that knows its members by heart, audited with the sides the other way round."""
    from imprint.gates.judge import direction

    dice = np.random.default_rng(0)
    low, high = dice.normal(0, 1, 200), dice.normal(0.5, 1, 200)
    alone = [None] * 200
    assert direction({"loss": (high, low)}, (alone, alone)).state == "green"
    assert direction({"loss": (dice.normal(size=200), dice.normal(size=200))}, (alone, alone)).state == "green"
    gate = direction({"loss": (low, high), "ref": (high, low)}, (alone, alone))
    assert gate.state == "red"
    assert "by loss" in gate.finding
    assert "swapped" in gate.advice


def test_a_limit_above_what_there_is_takes_what_there_is(base, sides, tmp_path):
    found = audited(base, sides, saved(tmp_path / "a", base, "lora"), None, data={"members": 60, "nonmembers": 30})
    assert set(found.frame["members"]) == {40}
    assert set(found.frame["nonmembers"]) == {30}


def test_few_distinct_members_do_not_stop_the_search_for_the_loss(base, tmp_path):
    dice = random.Random(4)
    rows = [{"prompt": f"{sentence(dice)}:", "completion": f" {sentence(dice)}"} for _ in range(60)]
    adapter = saved(tmp_path / "a", base, "lora")
    found = imprint.audit(base, members=rows[:30] * 4, nonmembers=rows[30:], adapter=adapter)
    assert set(found.frame["members"]) == {30}


def test_folders_are_epochs_in_the_order_they_are_given(base, sides, tmp_path):
    for name in ("checkpoint-10", "checkpoint-20", "final-2"):
        saved(tmp_path / "run" / name, base, "lora", seed=len(name))
    given = [f"{tmp_path}/run/checkpoint-*", f"{tmp_path}/run/final-2"]
    imprint.audit(base, members=sides[0], nonmembers=sides[1], adapter=given, out=tmp_path / "out", loss="target")
    cell = the_cell(tmp_path / "out")
    assert [cell.folder.meta(n)["name"] for n in (1, 2, 3)] == ["checkpoint-10", "checkpoint-20", "final-2"]


def test_the_key_stays_out_of_what_is_shared(base, sides, tmp_path):
    adapter = saved(tmp_path / "a", base, "lora")
    with pytest.raises(UsageError, match="lies in the output folder, whose ids it would uncover"):
        audited(base, sides, adapter, tmp_path / "out", id_key=tmp_path / "out" / "ids.key")
    with pytest.raises(UsageError, match="which would be shared with it"):
        audited(base, sides, adapter, adapter / "audit")
    assert not (tmp_path / "out").exists()
    assert not list(adapter.glob("*.key"))


def test_a_key_that_another_audit_made_meanwhile_is_not_passed_over(tmp_path):
    from imprint.auditing.identity import keep_key, read_key

    mine = read_key(tmp_path / "k")
    keep_key(tmp_path / "k", read_key(tmp_path / "k"))
    with pytest.raises(UsageError, match="was made by another audit meanwhile"):
        keep_key(tmp_path / "k", mine)


@pytest.mark.parametrize("first", [True, False])
def test_texts_do_not_outlive_the_flag_that_allowed_them(base, sides, tmp_path, first):
    adapter = saved(tmp_path / "a", base, "lora")
    audited(base, sides, adapter, tmp_path / "out", loss="target", show_text=first)
    with pytest.raises(UsageError, match="holds texts" if first else "was written without --show-text"):
        audited(base, sides, adapter, tmp_path / "out", loss="target", show_text=not first)


def test_a_message_names_the_record_as_the_data_do(base, sides, tmp_path):
    adapter = saved(tmp_path / "a", base, "lora")
    with pytest.raises(UsageError, match="record 'r"):
        audited(base, sides, adapter, tmp_path / "out", data={"overlong": "refuse", "max_length": 20}, loss="target")


def test_a_tokenizer_that_writes_texts_otherwise_is_refused(base, sides, tmp_path):
    adapter = saved(tmp_path / "a", base, "lora")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, adapter)
    audited(base, sides, adapter, None, loss="target")
    document = json.loads((adapter / "tokenizer.json").read_text())
    document["normalizer"] = {"type": "Replace", "pattern": {"Regex": "[aeiou]"}, "content": "z"}
    (adapter / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(ImprintError, match="cuts 40 of 40 members otherwise"):
        audited(base, sides, adapter, tmp_path / "out", loss="target")


def test_a_completion_that_ends_gets_no_second_end(base, tmp_path):
    dice = random.Random(6)
    rows = [{"prompt": f"{sentence(dice)}:", "completion": f" {sentence(dice)}</s>"} for _ in range(60)]
    adapter = saved(tmp_path / "a", base, "lora")
    found = {}
    for eos in (None, False):
        out = tmp_path / str(eos)
        imprint.audit(
            base, members=rows[:30], nonmembers=rows[30:], adapter=adapter, out=out, loss="target", data={"eos": eos}
        )
        found[eos] = sorted(the_cell(out).stats(1).nll)
    assert found[None] == found[False]


def test_the_same_records_twice_are_told(base, tmp_path):
    dice = random.Random(8)
    rows = [{"text": sentence(dice)} for _ in range(30)]
    with pytest.raises(UsageError, match=r"no non-members are left to be scored .* are the two sides the same records"):
        imprint.audit(base, members=rows, nonmembers=list(rows), adapter=saved(tmp_path / "a", base, "lora"))


def test_a_few_shared_values_do_not_uncover_owners(base, tmp_path):
    from imprint.auditing.groups import read_records
    from imprint.spec import DataSpec, Source

    dice = random.Random(9)
    rows = [{"text": sentence(dice), "group": "unknown" if n % 3 == 0 else f"patient{n}@mail.org"} for n in range(150)]
    pool, spec = read_records(DataSpec(source=Source(name="r"), split="given"), rows[:75], rows[75:])
    assert (spec.group, spec.subgroup) == ("group", None)
    assert {e.subgroup for part in pool.parts.values() for e in part} == {None}
