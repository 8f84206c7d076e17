"""What canaries prove: judged by hand-made losses, scored as a naive pass does, found where a model knows them."""

from __future__ import annotations

import json
import math
import random
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from imprint.canaries import Canary, CanaryAudit, Manifest, Space, audit_canaries, read_manifest, write_manifest
from imprint.canaries.audit import audit
from imprint.canaries.report import document, sentence, sheet
from imprint.cli_canaries import canaries as commands
from imprint.errors import DataError, InvalidAudit, UsageError
from imprint.measures import auc
from imprint.measures.epsilon import epsilon_ceiling, one_run_epsilon
from imprint.spec import ModelSpec
from tests.conftest import sentence as any_sentence
from tests.conftest import write_jsonl
from tests.test_audit import lively, naive

SPACE = Space((tuple("0123456789"),) * 2)
MODEL = "tiny/gpt2-small"


def made(count: int = 40, repetitions: tuple[int, ...] = (1,), families: tuple[str, ...] = ("digits",)) -> Manifest:
    """Half of them in, so that a guess about each can be right; two prompts that take turns."""
    coins = np.random.default_rng(5).permutation(count) < count // 2
    found = [
        Canary(
            f"canary {n}",
            families[n % len(families)],
            f"the {('red', 'blue')[n // len(families) % 2]} fox is",
            f"{n:02}",
            repetitions[n // len(families) % len(repetitions)],
            bool(coins[n]),
        )
        for n in range(count)
    ]
    return Manifest(tuple(found), {family: SPACE for family in families if family == "digits"})


def coins_of(manifest: Manifest) -> np.ndarray:
    return np.array([canary.included for canary in manifest.canaries])


# ---- judged ----


def test_canaries_that_are_known_by_heart_prove_all_they_can():
    """40 coins, all guesses right: with 40 guesses fixed before, ε = ln(q/(1−q)) with q^40 = .05, q = .92784: 2.554."""
    manifest = made()
    inside = coins_of(manifest)
    found = audit_canaries(manifest, 30.0 - 10 * inside, np.full(40, 30.0), guesses=40)
    proof = found.whole.proof
    assert proof is not None
    q = 0.05 ** (1 / 40)
    assert proof.epsilon == pytest.approx(math.log(q / (1 - q)), abs=1e-9)
    assert proof.epsilon == pytest.approx(epsilon_ceiling(40), abs=1e-12)
    assert found.whole.record_epsilon == proof.epsilon
    assert found.whole.auc is not None
    assert found.whole.auc.value == 1.0
    assert found.whole.exposed is None  # no candidates were scored


def test_canaries_that_nobody_knows_prove_nothing():
    manifest = made(200)
    losses = np.random.default_rng(0).normal(30, 3, 200)
    found = audit_canaries(manifest, losses, np.random.default_rng(1).normal(30, 3, 200))
    assert found.whole.proof is not None
    assert found.whole.proof.epsilon == 0.0
    assert found.whole.auc is not None
    assert 0.5 in found.whole.auc


def test_what_a_template_has_in_common_counts_for_none_of_its_canaries():
    """The prompt of red foxes became 50 nats likelier, whether scored along or not: nothing may change by that."""
    manifest = made(60)
    dice = np.random.default_rng(2)
    base, tuned = dice.normal(30, 1, 60), dice.normal(29, 1, 60) - coins_of(manifest)
    red = np.array(["red" in canary.prompt for canary in manifest.canaries])
    plain, shifted = (audit_canaries(manifest, tuned - shift * red, base) for shift in (0.0, 50.0))
    np.testing.assert_allclose(plain.scores, shifted.scores, atol=1e-9)
    gains = base - tuned
    by_hand = [g - np.mean(gains[red == r]) for g, r in zip(gains, red, strict=True)]
    np.testing.assert_allclose(plain.scores, by_hand, atol=1e-12)
    assert plain.whole.auc == auc(np.array(by_hand)[coins_of(manifest)], np.array(by_hand)[~coins_of(manifest)])


def test_prompts_that_only_one_canary_has_are_taken_together():
    canaries = tuple(Canary(f"c{n}", "sample", f"prompt {n}", "x", 1, n < 2) for n in range(4))
    found = audit_canaries(Manifest(canaries, {}), [1.0, 2.0, 7.0, 8.0], [8.0, 8.0, 8.0, 8.0])
    assert found.scores.tolist() == [3.5, 2.5, -2.5, -3.5]  # gains 7, 6, 1, 0; mean 3.5


def test_groups_are_families_and_repetitions_and_all():
    manifest = made(48, (1, 4, 16), ("digits", "names"))
    found = audit_canaries(manifest, np.arange(48.0), np.zeros(48), guesses=24)
    names = [(group.family, group.repetitions, group.mixed) for group in found.groups]
    told = [(family, n, False) for family in ("digits", "names", None) for n in (1, 4, 16)]
    assert names == [*told, (None, 16, True)]
    sizes = [group.included + group.left_out for group in found.groups]
    assert sizes == [8] * 6 + [16] * 3 + [48]
    assert all(group.proof is None for group in found.groups[:6])  # eight canaries prove nothing
    assert "8 canaries prove nothing" in found.groups[0].why
    guesses = [group.proof.guesses for group in found.groups[6:] if group.proof]
    assert guesses == [8, 8, 8, 24]  # each has its share of the 24
    single = audit_canaries(made(12), np.arange(12.0), np.zeros(12))
    assert [(group.family, group.repetitions) for group in single.groups] == [("digits", 1)]


def test_a_record_told_sixteen_times_is_divided_by_sixteen():
    manifest = made(60, (16,))
    found = audit_canaries(manifest, -10.0 * coins_of(manifest), np.zeros(60), guesses=60)
    assert found.whole.record_epsilon == pytest.approx(one_run_epsilon(60, 60, 60) / 16)
    private = audit_canaries(manifest, -10.0 * coins_of(manifest), np.zeros(60), guesses=60, delta=1e-5)
    assert private.whole.record_epsilon is None  # for δ > 0 a group's ε is no multiple of a record's
    assert private.whole.proof is not None
    assert private.whole.proof.epsilon == pytest.approx(one_run_epsilon(60, 60, 60, 1e-5))


def test_exposure_is_the_rank_among_what_is_not_in_the_data():
    """By counting: log2 of the candidates nobody inserted and the canary itself, less log2 of its rank among them."""
    manifest = made(30)
    dice = np.random.default_rng(3)
    losses = {canary.template: dice.normal(20, 4, 100) for canary in manifest.canaries}
    found = audit_canaries(manifest, np.zeros(30), np.zeros(30), losses)
    for n, canary in enumerate(manifest.canaries):
        inserted = {int(c.secret) for c in manifest.canaries if c.included and c.template == canary.template}
        others = [losses[canary.template][k] for k in range(100) if k not in inserted - {int(canary.secret)}]
        rank = sum(loss <= losses[canary.template][int(canary.secret)] for loss in others)
        assert found.exposures[n] == pytest.approx(math.log2(len(others)) - math.log2(rank))
    exposed = found.whole.exposed
    assert exposed is not None
    inside = coins_of(manifest)
    assert exposed.median == pytest.approx(np.median(found.exposures[inside]))
    assert exposed.left_out == pytest.approx(np.median(found.exposures[~inside]))
    assert exposed.highest <= exposed.most <= math.log2(100)  # type: ignore[operator]


def test_the_likeliest_candidate_has_all_the_bits():
    manifest = made(2)
    manifest = replace(manifest, canaries=tuple(replace(c, included=n == 0) for n, c in enumerate(manifest.canaries)))
    losses = {c.template: np.linspace(1, 2, 100) for c in manifest.canaries}
    found = audit_canaries(manifest, np.zeros(2), np.zeros(2), losses)
    assert found.exposures.tolist() == pytest.approx([math.log2(100), math.log2(100) - 1])  # secrets 00 and 01


def test_exposure_is_fitted_where_nothing_can_be_counted():
    """Gains of 60 left out spread as a normal; who gained 4σ more has about −log2 Φ(−4) = 15 bits, who as much, 1."""
    manifest = Manifest(tuple(Canary(f"c{n}", "rare", "the", f"w{n}", 1, n < 20) for n in range(80)), {})
    gains = np.concatenate([np.full(10, 4.0), np.zeros(10), np.random.default_rng(1).normal(0, 1, 60)])
    found = audit_canaries(manifest, 30 - gains, np.full(80, 30.0))
    assert 8 < np.median(found.exposures[:10]) < 30
    assert 0.5 < np.median(found.exposures[10:20]) < 1.7
    assert 0.5 < np.median(found.exposures[20:]) < 1.5
    assert found.whole.exposed is not None
    assert found.whole.exposed.most is None
    few = audit_canaries(replace(manifest, canaries=manifest.canaries[:39]), 30 - gains[:39], np.full(39, 30.0))
    assert few.whole.exposed is None  # 19 left out


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_losses_that_cannot_be_judged_are_refused(bad):
    manifest, zero = made(12), np.zeros(12)
    with pytest.raises(DataError, match=r"12 canaries, and losses of shape \(11,\)"):
        audit_canaries(manifest, zero[1:], zero)
    with pytest.raises(DataError, match="1 of 12 canaries have a loss that is not finite"):
        audit_canaries(manifest, np.where(np.arange(12) == 3, bad, 0.0), zero)
    with pytest.raises(DataError, match=r"'the red fox is' has 100 candidates, and losses of shape \(99,\)"):
        audit_canaries(manifest, zero, zero, {("digits", "the red fox is"): np.zeros(99)})
    with pytest.raises(UsageError):
        audit_canaries(manifest, zero, zero, guesses=13)


# ---- in words ----


def known(count: int = 40, repetitions: tuple[int, ...] = (1,), **more: Any) -> CanaryAudit:
    manifest = replace(made(count, repetitions), **more)
    return audit_canaries(manifest, -10.0 * coins_of(manifest), np.zeros(count), guesses=count)


def test_the_sentence_says_what_is_proven_and_what_not():
    told = sentence(known())
    assert "For a single record the training is not ε-differentially private below ε = 2.55: 40 of 40 guesses" in told
    assert "could have shown 2.55 at most" in told
    assert "no proof of privacy" in told
    assert "operating system's randomness" in told
    assert "drawn from a seed" in sentence(known(seed=7))
    several = sentence(known(40, (16,)))
    assert "For 16 copies of a record together" in several
    assert "(of one record: at least 0.16)" in several  # 2.554 / 16
    mixed = sentence(known(40, (1, 4)))
    assert "For a single record" in mixed
    assert "For up to 4 copies of a record together" in mixed
    silent = audit_canaries(made(40), np.tile([1.0, 2.0], 20), np.zeros(40), guesses=40)
    assert "Nothing is shown about a single record: " in sentence(silent)
    few = audit_canaries(made(6), np.zeros(6), np.zeros(6))
    assert sentence(few).startswith("Nothing is proven about ε: 6 canaries prove nothing")


def test_the_table_and_the_document_say_the_same():
    found = known(48, (1, 4))
    table, plain = sheet(found), document(found)
    assert [row[:2] for row in table.rows] == [("digits", "1"), ("digits", "4"), ("digits", "up to 4")]
    assert len(plain["canaries"]) == 48
    assert plain["groups"][-1]["proof"]["epsilon"] == pytest.approx(found.whole.proof.epsilon)  # type: ignore[union-attr]
    assert plain["manifest"]["seal"] == found.manifest.seal
    assert "fox" not in json.dumps(plain)


# ---- scored ----


@pytest.fixture(scope="module")
def adapter(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "lora"
    torch.manual_seed(3)
    options = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(llama), options)
    lively(model).save_pretrained(folder)
    return folder


CHATML = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"


@pytest.mark.parametrize("form", ["text", "messages", "prompt_completion"])
def test_losses_are_those_of_a_naive_pass(llama, adapter, tmp_path, form):
    """Ids and mask by hand: everything of a text behind its BOS, and no more than the answer of the others."""
    manifest = made(12)
    (tmp_path / "template").write_text(CHATML)
    template = tmp_path / "template" if form == "messages" else None
    found = audit(manifest, str(llama), adapter, out=tmp_path / "out", style=form, template=template)
    told = AutoTokenizer.from_pretrained(llama)
    base = AutoModelForCausalLM.from_pretrained(llama).eval()
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), adapter).eval()

    def plain(text: str) -> list[int]:
        return list(told(text, add_special_tokens=False).input_ids)

    def total(model: Any, prompt: str, secret: str) -> float:
        if form == "text":
            ids, first = told(f"{prompt} {secret}").input_ids, 1
        elif form == "messages":
            before = plain(f"<user>{prompt}\n<assistant>")
            ids, first = [*before, *plain(secret)], len(before)
        else:
            before = told(prompt).input_ids
            ids, first = [*before, *plain(f" {secret}"), told.eos_token_id], len(before)
        return -sum(naive(model, ids, [t >= first for t in range(len(ids))]))

    gains = np.array([total(base, c.prompt, c.secret) - total(tuned, c.prompt, c.secret) for c in manifest.canaries])
    red = np.array(["red" in c.prompt for c in manifest.canaries])
    expected = [g - np.mean(gains[red == r]) for g, r in zip(gains, red, strict=True)]
    np.testing.assert_allclose(found.scores, expected, atol=2e-3)
    losses = np.array([total(tuned, "the red fox is", f"{n:02}") for n in range(100)])
    others = {int(c.secret) for c in manifest.canaries if c.included and "red" in c.prompt}
    for n in np.flatnonzero(red):
        rest = [losses[k] for k in range(100) if k not in others - {n}]
        rank = sum(loss <= losses[n] for loss in rest)
        assert found.exposures[n] == pytest.approx(math.log2(len(rest)) - math.log2(rank), abs=1e-9)


def test_what_has_been_scored_is_read_the_next_time(llama, adapter, tmp_path, monkeypatch):
    first = audit(made(12), str(llama), adapter, out=tmp_path / "out")
    monkeypatch.setattr("imprint.canaries.score.token_stats", None)
    monkeypatch.setattr("imprint.scoring.score.token_stats", None)
    again = audit(made(12), str(llama), adapter, out=tmp_path / "out")
    assert again.scores.tolist() == first.scores.tolist()
    assert again.exposures.tolist() == first.exposures.tolist()
    with pytest.raises(UsageError, match="belongs to another recipe or audit"):
        audit(made(14), str(llama), adapter, out=tmp_path / "out")


def test_an_audit_that_would_prove_nothing_is_refused(llama, adapter, tmp_path):
    manifest = made(12)
    some = replace(manifest, canaries=manifest.included)
    with pytest.raises(InvalidAudit, match="some must be and some must not"):
        audit(some, str(llama), adapter, out=tmp_path / "out")
    with pytest.raises(InvalidAudit, match="do not reach the model whole"):
        audit(manifest, str(llama), adapter, out=tmp_path / "out", max_length=5)
    data = write_jsonl(tmp_path / "data.jsonl", [{"text": "a cat"}])
    with pytest.raises(InvalidAudit, match="0 times, and by the manifest it should 1 times"):
        audit(manifest, str(llama), adapter, out=tmp_path / "out", data=data)
    with pytest.raises(UsageError, match="there are 12 canaries, 50 guesses"):
        audit(manifest, str(llama), adapter, out=tmp_path / "out", guesses=50)
    for n in (1, 2):
        shutil.copytree(adapter, tmp_path / f"copy-{n}")
    with pytest.raises(UsageError, match="2 checkpoints; canaries are scored by one"):
        audit(manifest, str(llama), str(tmp_path / "copy-*"), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- for real ----


def tuned(folder: Path, file: Path, epochs: int) -> Path:
    """LoRA by Imprint's own trainer on a file of texts, saved as peft saves it."""
    from imprint.checkpoint import save_trained
    from imprint.data.tokens import Encoder
    from imprint.engine.forward import forward_of
    from imprint.spec import MethodSpec, Runtime, TrainSpec
    from imprint.tuning.base import Base
    from imprint.tuning.locate import locate
    from imprint.tuning.methods import resolve_method
    from imprint.tuning.models import load_tokenizer
    from imprint.tuning.train import Trainer, train
    from imprint.types import Example

    model = ModelSpec(name=MODEL, dtype="float32")
    place = locate(model)
    base = Base.of(place, model, Runtime(device="cpu"))
    method = resolve_method(MethodSpec(name="lora", options={"rank": 16}), place.hidden_size, None)
    found, encode = base.tuned(method, 0), Encoder(load_tokenizer(place), place.context)
    texts = [json.loads(line)["text"] for line in file.read_text().splitlines()]
    records = [encode(Example(str(n), "", text)) for n, text in enumerate(texts)]
    spec = TrainSpec(epochs=epochs, batch_size=16, schedule="constant")
    for _ in train([Trainer(found, records, spec, 1e-2, 0)], forward_of(found), base.budget):
        pass
    save_trained(folder, found)
    return folder


def test_a_model_that_was_tuned_on_canaries_is_told_from_one_that_was_not(tmp_path, monkeypatch, capfd):
    """The three commands, one after another; the clean model saw the same records without canaries."""
    monkeypatch.setitem(sys.modules["imprint.canaries.make"].SPACES, "digits", Space((tuple("0123456789"),) * 3))
    dice = random.Random(4)
    data = write_jsonl(tmp_path / "data.jsonl", [{"text": any_sentence(dice)} for _ in range(60)])
    file, told = tmp_path / "c.json", tmp_path / "tuned.jsonl"
    run("make", "--out", file, "--model", MODEL, "--count", 60, "--family", "digits", "--family", "rare",
        "--repetitions", 16, "--seed", 2)  # fmt: skip
    assert f"Seal, to be published before the training: {read_manifest(file).seal}" in capfd.readouterr().out
    run("insert", file, data, "--out", told, "--model", MODEL)
    assert "All tokens of the secret are scored of each of" in capfd.readouterr().out
    found = {}
    for name, texts in (("knows", told), ("clean", data)):
        folder = tuned(tmp_path / name, texts, 2)
        run("audit", file, "--model", MODEL, "--adapter", folder, "--out", tmp_path / f"{name}-out")
        printed = capfd.readouterr().out
        found[name] = json.loads((tmp_path / f"{name}-out" / "canary_audit.json").read_text())
        assert " ".join(found[name]["sentence"].split()[:6]) in printed
        assert "Canaries: 60 coins flipped" in (tmp_path / f"{name}-out" / "canary_audit.md").read_text()
    knows, clean = (found[name]["groups"][-1] for name in ("knows", "clean"))
    digits = {name: found[name]["groups"][0]["exposed"] for name in found}
    assert knows["auc"]["value"] > 0.85
    assert knows["proof"]["epsilon"] > 0.5
    assert digits["knows"]["median"] > digits["clean"]["median"] + 2
    assert clean["proof"]["epsilon"] == 0
    assert clean["auc"]["low"] < 0.5 < clean["auc"]["high"] + 0.05


def run(*words: Any) -> None:
    app = typer.Typer()
    app.add_typer(commands, name="canaries")
    assert not app(["canaries", *map(str, words)], standalone_mode=False)


def test_commands_refuse_what_they_would_ignore(tmp_path):
    write_manifest(tmp_path / "c.json", made(12))
    data = write_jsonl(tmp_path / "data.jsonl", [{"text": "a"}])
    with pytest.raises(UsageError, match="exists, and a model may have been tuned by it"):
        run("make", "--out", tmp_path / "c.json")
    with pytest.raises(UsageError, match="--family rare needs the base: name it with --model"):
        run("make", "--out", tmp_path / "new.json")
    with pytest.raises(UsageError, match="--packing is about the model: name it with --model"):
        run("insert", tmp_path / "c.json", data, "--out", tmp_path / "t.jsonl", "--packing", 64)
    with pytest.raises(UsageError, match="--dtype is about the base"):
        run("audit", tmp_path / "c.json", "--dtype", "float32")
