"""The command line: every expected mistake is one sentence on stderr and a documented exit code, never a traceback."""

from __future__ import annotations

import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from imprint import cli, store
from imprint.errors import ImprintError, InvalidAudit, UsageError
from tests.conftest import sentence, write_jsonl

LEAKS, FAILED, WRONG = 1, 3, 64
SMALL = 2
"""Eight records a side are fewer than the blind baseline and the power gate ask for: such an audit proves nothing."""
FOX = "the quick brown fox jumps over the lazy dog"


class Ended(NamedTuple):
    code: int
    out: str
    err: str


class Command:
    """`imprint …` in this process, and the files of one test."""

    def __init__(self, folder: Path, recipe: Callable[..., dict[str, Any]], monkeypatch: Any, capfd: Any) -> None:
        self.folder, self.recipe, self.monkeypatch, self.capfd = folder, recipe, monkeypatch, capfd
        self.out = folder / "out"

    def __call__(self, *arguments: object) -> Ended:
        self.monkeypatch.setattr(sys, "argv", ["imprint", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = self.capfd.readouterr()  # the file descriptors: libraries may print past Python
        return Ended(ended.value.code or 0, printed.out, printed.err)

    def file(self, document: Any = None, **changes: Any) -> Path:
        path = self.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(document or self.recipe(**changes)), encoding="utf-8")
        return path

    def run(self, *arguments: object, **changes: Any) -> Ended:
        return self("run", self.file(**changes), "--out", self.out, *arguments)

    def refused(self, *arguments: object, code: int = WRONG, **changes: Any) -> str:
        """The one sentence."""
        return one_sentence(self.run(*arguments, **changes), code)


def one_sentence(ended: Ended, code: int = WRONG) -> str:
    assert "Traceback" not in ended.err
    assert ended.err.count("\n") == 1, ended.err
    assert ended.err.startswith("imprint: ")
    assert ended.err.strip("\n").isprintable()
    assert ended.code == code
    return ended.err


@pytest.fixture
def imprint(tmp_path, recipe, monkeypatch, capfd):
    return Command(tmp_path, recipe, monkeypatch, capfd)


# ---- what goes well ----


def test_a_run_prints_progress_a_table_and_where_the_report_is(imprint):
    ended = imprint.run("--set", "method=[head, prompt]")
    assert (ended.code, ended.err) == (SMALL, "")
    assert "[1/2] head: epoch 1/1  perplexity" in ended.out
    assert "[2/2] prompt: epoch 1/1  perplexity" in ended.out
    assert f"Report: {imprint.out / 'report.html'}" in ended.out
    assert (imprint.out / "report.html").exists()


def test_the_second_time_nothing_is_left_to_do(imprint):
    imprint.run()
    ended = imprint.run()
    assert ended.code == SMALL
    assert "head: already done" in ended.out
    assert "epoch 1/1" not in ended.out


def test_a_dry_run_predicts_and_writes_nothing(imprint):
    ended = imprint.run("--dry-run", "--set", "method=[head, {lora: {rank: [2, 4]}}, full]")
    assert (ended.code, ended.err) == (0, "")
    assert not imprint.out.exists()
    lines = ended.out.splitlines()
    for label in ("head", "lora rank=2", "lora rank=4", "full", "in all"):
        [line] = [line for line in lines if line.startswith(f"{label} ")]
        assert "FLOP" in line
    assert "Nothing has been written" in ended.out


def test_a_dry_run_knows_what_is_done(imprint):
    imprint.run()
    before = sorted((p, p.stat().st_mtime_ns) for p in imprint.out.rglob("*"))
    ended = imprint.run("--dry-run", "--set", "method=[head, prompt]")
    assert [line.split()[:2] for line in ended.out.splitlines() if line.startswith(("head", "prompt"))] == [
        ["head", "done"],
        ["prompt", "1"],
    ]
    assert sorted((p, p.stat().st_mtime_ns) for p in imprint.out.rglob("*")) == before
    assert "nothing left to do" in " ".join(imprint.run("--dry-run").out.split())


def test_the_default_folder_is_named_after_the_recipe(imprint, monkeypatch):
    monkeypatch.chdir(imprint.folder)
    assert imprint("run", imprint.file()).code == SMALL
    assert (imprint.folder / "runs" / "recipe" / "results.parquet").exists()


def test_a_tokenizer_with_bos_and_without_padding_works(imprint, llama):
    assert imprint.run(model=str(llama)).code == SMALL


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Enough distinct texts for 150 a side: half an interval's width is .065."""
    dice = random.Random(7)
    rows = [{"id": f"r{n}", "text": sentence(dice)} for n in range(320)]
    return write_jsonl(tmp_path_factory.mktemp("many") / "letters.jsonl", rows)


def test_gates_and_budget_decide_the_exit_code(imprint, many):
    """One overfitted cell, whose AUC is about .60 [.54 .66] at its best epoch, judged four times.

    A budget of .52 is below what an audit of this size could confirm of a model that leaks nothing.
    """
    data = {"source": str(many), "members": 150, "nonmembers": 150, "validation": 20}
    asked = {"data": data, "method": {"full": {"learning_rate": 0.01}}, "attacks": ["loss", "ref"]}
    asked["train"] = {"epochs": 4, "batch_size": 8}
    imprint.monkeypatch.setattr("imprint.controls.EPOCHS", 30)
    ended = imprint.run(**asked)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.count(" green: ") == 5
    assert "Headline withheld" not in ended.out
    codes = {}
    for limit in (0.9, 0.6, 0.52):
        ended = imprint.run(**asked, budget={"attack": "loss", "auc": limit})
        codes[limit] = ended.code
        assert "full: already done" in ended.out
        assert ("power red" in ended.out) == (limit == 0.52)
        words = {0.9: "within", 0.6: "over", 0.52: "cannot tell"}
        assert [word for word in words.values() if re.search(rf"^full .* {word} *$", ended.out, re.M)] == [words[limit]]
    assert codes == {0.9: 0, 0.6: LEAKS, 0.52: 2}


def test_a_shifted_data_set_is_told_before_any_number(imprint):
    """Official parts of different words: what looks like memory is the texts' own difference."""
    dice, folder = random.Random(5), imprint.folder / "parts"
    folder.mkdir()
    for part, count in {"train": 24, "test": 24, "validation": 4}.items():
        texts = [sentence(dice) for _ in range(count)]
        if part == "test":
            texts = [text.translate(str.maketrans("aeiou", "ouaei")) for text in texts]
        write_jsonl(folder / f"{part}.jsonl", [{"id": f"{part}{n}", "text": t} for n, t in enumerate(texts)])
    data = {"source": str(folder), "split": "official", "members": 24, "nonmembers": 24, "validation": 4}
    ended = imprint.run(data=data, attacks=["loss"])
    assert (ended.code, ended.err) == (2, "")
    shown = ended.out[ended.out.index("Validity gates") :]
    assert "blind baseline red: " in shown
    tables = shown.index("What was trained")
    assert shown.index("blind baseline red") < shown.index("Headline withheld. Not green: ") < tables
    assert tables < shown.index("At the last epoch: AUC by each attack")
    frame = store.read_table(imprint.out / "results.parquet").to_pandas()
    found = frame[(frame.metric == "auc") & (frame.epoch == 1)].value.item()
    assert re.search(rf"^head .*{re.escape(f'{found:.3f}'.removeprefix('0'))}", shown[tables:], re.M)
    again = imprint("report", imprint.out)
    assert again.code == 0  # nothing is decided by looking
    assert "Headline withheld. Not green: " in again.out


def test_a_cell_that_fails_is_three_and_not_over_budget(imprint, monkeypatch):
    """1 means leakage; a run that broke down has found none."""
    from imprint.tuning.methods import METHODS

    def broken(model, options):
        raise ValueError("no cache")

    whole = METHODS["prompt"]
    monkeypatch.setitem(METHODS, "prompt", type(whole)(whole.options, broken, whole.rate, whole.scaled))
    ended = imprint.run(method=["prompt", "head"], budget={"auc": 0.501})
    assert ended.code == FAILED
    assert "no cache" in ended.out


def test_report_recomputes_what_run_wrote(imprint):
    imprint.run()
    before = (imprint.out / "results.parquet").read_bytes()
    (imprint.out / "results.parquet").unlink()
    assert imprint("report", imprint.out).code == 0
    assert (imprint.out / "results.parquet").read_bytes() == before
    ended = imprint("report", imprint.out, "--markdown")
    assert ended.out.startswith("**Validity gates**")
    assert ended.err == ""


def test_a_terminal_without_umlauts_costs_no_run(imprint, monkeypatch):
    """A log file of a cluster job may be ASCII; what it cannot show must not end the command with a traceback."""
    imprint.out = imprint.folder / "grün"
    assert imprint.run().code == SMALL
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", narrow)
    assert imprint("report", imprint.out).code == 0
    narrow.flush()
    assert b"gr?n" in narrow.buffer.getvalue() or b"gr\\xfcn" in narrow.buffer.getvalue()


# ---- the command itself ----


def test_no_command_gives_help_or_a_sentence(imprint):
    ended = imprint()
    assert ended.code == WRONG
    assert "run" in ended.out
    assert "Traceback" not in ended.err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["rnu"], "rnu"),
        (["run"], "recipe"),
        (["run", "r.yaml", "--ouut", "x"], "--ouut"),
        (["run", "r.yaml", "--token-budget", "0"], "--token-budget"),
        (["run", "r.yaml", "--token-budget", "many"], "--token-budget"),
    ],
    ids=str,
)
def test_wrong_arguments(imprint, arguments, told):
    assert told.lower() in one_sentence(imprint(*arguments)).lower()


def test_an_unknown_device(imprint):
    assert "'gpu0'" in imprint.refused("--device", "gpu0")
    assert "cuda:99" in imprint.refused("--device", "cuda:99")


def test_ctrl_c_says_how_to_go_on(imprint, monkeypatch):
    from imprint.tuning import train

    def interrupted(self, number):
        raise KeyboardInterrupt

    monkeypatch.setattr(train.Trainer, "batches", interrupted)
    ended = imprint.run()
    assert ended.code == 130
    assert "the same command goes on" in ended.err
    assert "Traceback" not in ended.err


def test_a_fault_of_ours_is_not_taken_for_leakage(imprint, monkeypatch):
    """Python ends with 1 after a traceback, which here means: over budget."""

    def faulty(*_):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("imprint.rows.write_results", faulty)
    monkeypatch.setattr("imprint.runs.write_results", faulty)
    try:
        code = imprint.run().code
    except ZeroDivisionError:
        code = 1  # what the interpreter makes of it
    assert code == FAILED


def test_exit_codes_are_those_documented():
    assert (ImprintError.exit_code, UsageError.exit_code, InvalidAudit.exit_code) == (3, 64, 2)


# ---- recipes ----


def test_missing_recipe(imprint):
    assert "nowhere.yaml does not exist" in one_sentence(imprint("run", imprint.folder / "nowhere.yaml"))


def test_a_folder_for_a_recipe(imprint):
    assert str(imprint.folder) in one_sentence(imprint("run", imprint.folder))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"model: tiny/gpt2-small\ndata: [\n", "line 3"),
        (b"model: a: b\n", "line 1"),
        (b"model: \x00\n", "not valid YAML"),
        (b"model: \xff\xfe\n", "cannot be read"),
        (b"42", "mapping"),
    ],
    ids=str,
)
def test_broken_recipes(imprint, text, told):
    path = imprint.folder / "r.yaml"
    path.write_bytes(text)
    found = one_sentence(imprint("run", path))
    assert told in found
    assert "r.yaml" in found


@pytest.mark.parametrize(
    ("changes", "near"),
    [
        ({"methd": "head"}, "'method'"),
        ({"method": "prefx"}, "'prefix'"),
        ({"method": {"lora": {"rnk": 4}}}, "'rank'"),
        ({"attacks": ["min_kk"]}, "'min_k'"),
        ({"train": {"epoch": 3}}, "'epochs'"),
        ({"data__membres": 3}, "'members'"),
    ],
    ids=str,
)
def test_unknown_names(imprint, changes, near):
    assert f"did you mean {near}?" in imprint.refused(**changes)


def test_set_is_checked_like_the_recipe(imprint):
    assert "did you mean 'epochs'?" in imprint.refused("--set", "train.epoch=3")
    assert "KEY=VALUE" in imprint.refused("--set", "train.epochs")


# ---- data ----


def test_missing_data(imprint):
    assert "nowhere.jsonl" in imprint.refused(data__source="nowhere.jsonl")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "no records"),
        (b'{"text": "one"}\n{"text": \n', "line 2"),
        (b'{"text": "one"}\n["two"]\n', "line 2"),
        (b'{"text": "one"}\n{"text": "\xff\xfe"}\n', "line 2"),
        (b'{"body": "one", "title": "t"}\n', "body, title"),
        (b'{"text": ""}\n{"text": "  "}\n', "empty text: 2"),
        (b'{"text": 5}\n', "line 1"),
        (b'{"text": "one", "id": 1}\n{"text": "two", "id": 1}\n', "line 2"),
        (b'{"text": "\\ud800"}\n', "surrogate"),
        (b"[" * 100_000, "line 1"),
    ],
    ids=["empty", "broken", "array", "not UTF-8", "columns", "blank", "number", "same id", "surrogate", "deep"],
)
def test_unusable_data(imprint, content, told):
    path = imprint.folder / "letters.jsonl"
    path.write_bytes(content)
    found = imprint.refused(data__source=str(path))
    assert told in found
    assert "letters" in found
    assert not imprint.out.exists()


def test_a_missing_group_column_names_those_there_are(imprint):
    found = imprint.refused(data__group="ownr")
    assert "did you mean 'owner'?" in found
    assert "id, text, owner" in found


def test_too_few_records(imprint):
    found = imprint.refused(data__members=40, data__nonmembers=40)
    assert "members" in found
    assert "60" in found


def test_one_token_texts_are_counted_out(imprint):
    path = write_jsonl(imprint.folder / "letters.jsonl", [{"text": c} for c in "!?abcdefghijklmnopqrstuvwxyz"])
    assert "0 usable" in imprint.refused(data__source=str(path))


def test_a_few_one_token_texts_are_passed_over(imprint, data):
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    rows += [{"id": f"s{n}", "text": c, "owner": f"s{n}"} for n, c in enumerate("!?abcdef")]
    path = write_jsonl(imprint.folder / "letters.jsonl", rows)
    assert imprint.run(data__source=str(path)).code == SMALL


def test_long_texts_are_refused_where_asked(imprint):
    found = imprint.refused(data__overlong="refuse", data__max_length=5)
    assert "more than max_length 5" in found
    assert "record 'r" in found
    assert imprint.run(data__max_length=5).code == SMALL


def test_names_of_records_cannot_forge_lines(imprint):
    """An id is text from a file: no line breaks or terminal codes of it reach the screen."""
    rows = [{"id": f"{n}\n\x1b[31mimprint: all is well", "text": f"{FOX} {n} {FOX}"} for n in range(40)]
    path = write_jsonl(imprint.folder / "letters.jsonl", rows)
    imprint.refused(data__source=str(path), data__overlong="refuse", data__max_length=5)


# ---- models ----


def corrupt(folder: Path, **changes: Any) -> str:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return str(folder)


@pytest.mark.parametrize("name", ["nowhere/at/all", "./nowhere", "tiny/gpt3", "~nobody-here/model", "x" * 5000, "a\tb"])
def test_models_that_are_nowhere(imprint, name):
    imprint.refused(model=name)
    assert not imprint.out.exists()


def test_no_configuration(imprint, damaged):
    (damaged / "config.json").unlink()
    assert "config.json" in imprint.refused(model=str(damaged))


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xff", b"[" * 100_000], ids=["cut", "list", "bytes", "deep"])
def test_an_unreadable_configuration(imprint, damaged, content):
    (damaged / "config.json").write_bytes(content)
    assert "config.json" in imprint.refused(model=str(damaged))


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "no_such_type"},
        {"n_positions": None},
        {"n_positions": "many"},
        {"vocab_size": 100},
        {"n_layer": 3},  # weights of the third are missing
        {"n_embd": 48},  # shapes do not fit
        {"text_config": "x"},
        {"dtype": "no_such_dtype"},
    ],
    ids=str,
)
def test_a_configuration_that_does_not_fit_the_weights(imprint, damaged, changes):
    assert str(damaged) in imprint.refused(model=corrupt(damaged, **changes))


def test_truncated_weights(imprint, damaged):
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert str(damaged) in imprint.refused(model=str(damaged))


def test_no_weights(imprint, damaged):
    (damaged / "model.safetensors").unlink()
    assert "safetensors" in imprint.refused(model=str(damaged))


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("beside", [False, True])
def test_pickled_weights_are_never_read(imprint, damaged, beside):
    """Neither alone, nor beside weights in safetensors that are not the model's."""
    import torch
    from safetensors.torch import save_file

    marker = imprint.folder / "executed"
    (damaged / "model.safetensors").unlink()
    torch.save({"transformer.wte.weight": Bomb(marker)}, damaged / "pytorch_model.bin")
    if beside:
        save_file({"x": torch.zeros(1)}, damaged / "other.safetensors")
    found = imprint.refused(model=str(damaged))
    assert beside or "pytorch_model.bin" in found
    assert not marker.exists()


@pytest.mark.parametrize("known", [False, True])
def test_code_of_a_model_folder_is_never_run(imprint, damaged, known):
    """`auto_map` names classes in the folder's own Python files; with a known model type it is ignored."""
    marker = imprint.folder / "executed"
    (damaged / "evil.py").write_text(f"import os\nos.mkdir({str(marker)!r})\nclass C: pass\nclass M: pass\n")
    tokenizer = json.loads((damaged / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": ["evil.M", "evil.M"]}
    (damaged / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    changes: dict[str, Any] = {"auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    corrupt(damaged, **changes | ({} if known else {"model_type": "evil"}))
    ended = imprint.run(model=str(damaged))
    assert not marker.exists()
    assert ended.code == SMALL if known else one_sentence(ended)


def test_code_for_attention_is_never_fetched(imprint, damaged):
    """`owner/name` as attention means: download a compiled kernel from the Hub and run it."""
    found = imprint.refused(model=corrupt(damaged, _attn_implementation="someone/kernel"))
    assert "kernel" in found


def test_no_tokenizer(imprint, damaged):
    for file in damaged.glob("tokenizer*"):
        file.unlink()
    assert "tokenizer" in imprint.refused(model=str(damaged))


def test_an_adapter_beside_a_model_is_refused(imprint, damaged):
    (damaged / "adapter_config.json").write_text("{}")
    assert "adapter" in imprint.refused(model=str(damaged))


# ---- the output folder ----


def test_out_is_a_file(imprint):
    imprint.out.write_text("mine")
    assert "is a file" in imprint.refused()
    assert imprint.out.read_text() == "mine"


@pytest.mark.parametrize("place", ["file/below", "/proc/nowhere/out"])
def test_out_cannot_be_written(imprint, place):
    (imprint.folder / "file").write_text("mine")
    imprint.out = imprint.folder / place  # an absolute path stays as it is
    assert "cannot be written" in imprint.refused()


def test_out_holds_something_else(imprint):
    imprint.out.mkdir()
    (imprint.out / "notes.txt").write_text("mine")
    assert "not Imprint's" in imprint.refused()
    assert [file.name for file in imprint.out.iterdir()] == ["notes.txt"]


def test_out_belongs_to_another_recipe(imprint):
    imprint.run()
    found = imprint.refused(train={"epochs": 2, "batch_size": 4})
    assert "train.epochs" in found
    assert "another folder" in found


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b'{"cells": [{}]}', b"\xff"])
def test_a_damaged_lock(imprint, content):
    imprint.out.mkdir()
    (imprint.out / "recipe.lock.json").write_bytes(content)
    found = imprint.run()
    assert "recipe.lock.json" in one_sentence(found, found.code)
    assert found.code in (FAILED, WRONG)
    assert (imprint.out / "recipe.lock.json").read_bytes() == content


def test_a_full_disk(imprint, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(store, "_sync", full)
    assert "No space left" in one_sentence(imprint.run(), imprint.run().code)


def test_reports_of_nothing(imprint):
    missing = imprint("report", imprint.folder / "nowhere")
    assert "nowhere" in one_sentence(missing, missing.code)
    assert missing.code in (FAILED, WRONG)
    imprint.run()
    shutil.rmtree(imprint.out / "base")
    assert imprint("report", imprint.out).code in (0, FAILED)


def test_damaged_evidence(imprint):
    imprint.run()
    [stats] = (imprint.out / "cells").rglob("stats.parquet")
    stats.write_bytes(b"PAR1" + os.urandom(100))
    found = one_sentence(imprint("report", imprint.out), FAILED)
    assert str(stats.parent.parent.parent) in found


# ---- start ----


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["--version"], ["report", "--help"]])
def test_help_is_instant_and_loads_no_torch(arguments):
    code = (
        "import sys, imprint.cli\n"
        "try:\n    imprint.cli.main()\n"
        "finally:\n    assert not {'torch', 'transformers', 'peft', 'datasets', 'pandas'} & set(sys.modules)\n"
    )
    started = time.perf_counter()
    found = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout.startswith("imprint 0.") if "--version" in arguments else "Usage" in found.stdout
    assert time.perf_counter() - started < 5  # .3 s on an idle machine; this one may be busy


def test_the_installed_command_fails_like_the_one_in_process(tmp_path):
    command = Path(sys.executable).parent / "imprint"
    found = subprocess.run([command, "run", tmp_path / "nowhere.yaml"], capture_output=True, text=True)
    assert one_sentence(Ended(found.returncode, found.stdout, found.stderr))
