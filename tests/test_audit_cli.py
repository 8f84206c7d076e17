"""`imprint audit`, `gate`, `plan`, `doctor` as a shell sees them: codes, sentences, and nothing half-written."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from imprint import cli
from tests.conftest import save_model, sentence, write_jsonl
from tests.test_cli import Ended, one_sentence

PASS, LEAKS, INVALID, UNABLE, WRONG = 0, 1, 2, 3, 64


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an adapter with numbers that show, thirty members and non-members, and what is wrong with each."""
    folder, dice = tmp_path_factory.mktemp("shop"), random.Random(5)
    base = save_model(folder / "base", "llama", bos=True, max_position_embeddings=256)
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    )
    model.save_pretrained(folder / "adapter")
    shutil.copytree(folder / "adapter", folder / "run" / "checkpoint-2")
    shutil.copytree(folder / "adapter", folder / "run" / "checkpoint-10")
    shutil.copytree(base, folder / "mixed" / "checkpoint-1")
    shutil.copytree(folder / "adapter", folder / "mixed" / "checkpoint-2")
    rows = [{"id": f"r{n}", "text": sentence(dice)} for n in range(60)]
    write_jsonl(folder / "members.jsonl", rows[:30])
    write_jsonl(folder / "nonmembers.jsonl", rows[30:])
    write_jsonl(folder / "both.jsonl", [row | {"member": n < 30} for n, row in enumerate(rows)])
    write_jsonl(folder / "odd.jsonl", [row | {"member": "perhaps"} for row in rows])
    write_jsonl(folder / "plain.jsonl", rows)
    (folder / "short.key").write_text("abc")
    (folder / "binary.jinja").write_bytes(b"\xff\xfe\x00")
    (folder / "a file").write_text("something")
    (folder / "full").mkdir()
    (folder / "full" / "thesis.txt").write_text("mine")
    (folder / "empty").mkdir()
    return folder


class Shell:
    """`imprint …` in the shop, with an output folder of its own."""

    def __init__(self, shop: Path, out: Path, monkeypatch: Any, capfd: Any) -> None:
        self.shop, self.out, self.monkeypatch, self.capfd = shop, out, monkeypatch, capfd

    def __call__(self, *arguments: object) -> Ended:
        self.monkeypatch.chdir(self.shop)
        self.monkeypatch.setattr(sys, "argv", ["imprint", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = self.capfd.readouterr()
        return Ended(ended.value.code or 0, printed.out, printed.err)

    def audit(self, *arguments: object, **changes: object) -> Ended:
        flags = {"model": "base", "adapter": "adapter", "members": "members.jsonl", "nonmembers": "nonmembers.jsonl"}
        flags |= {
            "out": str(self.out),
            **{key.replace("_", "-"): str(v) for key, v in changes.items() if v is not None},
        }
        for key, value in changes.items():
            if value is None:
                flags.pop(key.replace("_", "-"), None)
        return self("audit", *(part for key, value in flags.items() for part in (f"--{key}", value)), *arguments)


@pytest.fixture
def shell(shop, tmp_path, monkeypatch, capfd):
    return Shell(shop, tmp_path / "out", monkeypatch, capfd)


WRONG_FLAGS = {
    "no members": ({"members": None}, "--members is missing"),
    "no non-members": ({"nonmembers": None}, "--nonmembers is missing: give --members FILE and --nonmembers FILE, or"),
    "both ways": ({"data": "both.jsonl"}, "--data holds both sides: leave out --members and --nonmembers"),
    "no such members": ({"members": "none.jsonl"}, "none.jsonl: no such file or folder"),
    "members of another kind": ({"members": "base/model.safetensors"}, "not a kind of file that can be read"),
    "same file twice": ({"nonmembers": "members.jsonl"}, "id 'r0'"),
    "no column member": ({"members": None, "nonmembers": None, "data": "plain.jsonl"}, "column"),
    "odd column member": ({"members": None, "nonmembers": None, "data": "odd.jsonl"}, "'perhaps'"),
    "unknown attack": ({"attacks": "loss,reff"}, "unknown attack 'reff': did you mean 'ref'?"),
    "budget of nothing": ({"budget": "auc"}, "expected LIMIT=NUMBER"),
    "budget below chance": ({"budget": "auc=0.4"}, "greater than 0.5"),
    "budget unknown": ({"budget": "auk=0.6"}, "did you mean 'auc'?"),
    "budget of no attack": ({"budget": "attack=ref"}, "it sets no limit"),
    "unknown format": ({"format": "chatml"}, "format"),
    "format not YAML": ({"format": "{prompt: "}, "--format"),
    "columns that are not there": ({"format": "{text: body}"}, "no column 'body'"),
    "unknown loss": ({"loss": "some"}, "loss: expected auto, target, all"),
    "too long": ({"max_length": 5000}, "exceed the model's context of 256 tokens: give at most 256"),
    "no such adapter": ({"adapter": "adaptor"}, "--adapter 'adaptor': no such folder"),
    "no such checkpoints": ({"adapter": "run/step-*"}, "--adapter 'run/step-*': matches no folder"),
    "the folder of a run": ({"adapter": "run"}, "--adapter 'run/checkpoint-*' for all of them"),
    "here": ({"out": "."}, "--out . holds files that are not Imprint's"),
    "a folder of nothing": ({"adapter": "empty"}, "neither a PEFT adapter (adapter_config.json) nor a whole model"),
    "adapters and models": ({"adapter": "mixed/checkpoint-*"}, "audit them one kind at a time"),
    "nothing to audit": ({"model": None, "adapter": None}, "what is to be audited?"),
    "an adapter as the model": ({"model": "adapter", "adapter": None}, "give it as --adapter"),
    "a whole model alone": ({"adapter": None}, "as in --reference BASE"),
    "a base that is not there": ({"model": "./elsewhere"}, "does not exist"),
    "revision of nothing": ({"model": None, "revision": "main"}, "--revision is about the base"),
    "unknown precision": ({"dtype": "float8"}, "--model.dtype"),
    "out is a file": ({"out": "a file"}, "is a file: expected a folder"),
    "out is somebody's": ({"out": "full"}, "holds files that are not Imprint's"),
    "a key of three letters": ({"id_key": "short.key"}, "a key has at least 16"),
    "a key that is a folder": ({"id_key": "full"}, "cannot be read"),
    "no such template": ({"template": "none.jinja"}, "template none.jinja cannot be read"),
    "a template of bytes": ({"template": "binary.jinja"}, "template binary.jinja cannot be read"),
    "no such device": ({"device": "quantum"}, "device 'quantum'"),
    "no such column of owners": ({"group": "owner"}, "no column 'owner'"),
    "no such column of subgroups": ({"subgroup": "language"}, "no column 'language'"),
    "NUL in a name": ({"adapter": "ad\0apter"}, "no such folder"),
}


@pytest.mark.parametrize("case", WRONG_FLAGS)
def test_a_wrong_request_is_one_sentence_and_leaves_nothing(shell, shop, case):
    changes, said = WRONG_FLAGS[case]
    before = sorted(os.walk(shop))
    assert said in one_sentence(shell.audit(**changes), WRONG)
    assert sorted(os.walk(shop)) == before
    assert not shell.out.exists()
    assert not list(shell.out.parent.glob("*.key"))


def test_a_dry_run_shows_members_and_writes_nothing(shell):
    ended = shell.audit("--dry-run")
    assert (ended.code, ended.err) == (PASS, "")
    assert "Audited: lora (rank=2" in ended.out
    assert "Compared with: the same weights with the adapter off; float32" in ended.out
    assert ended.out.count("⟦") == 1 + 3  # the legend and three members
    assert not shell.out.exists()
    assert not list(shell.out.parent.glob("*"))


def test_texts_stay_out_of_a_log(shell, shop):
    """Off a terminal the members are not shown, and nothing of them is anywhere in the output."""
    ended = shell.audit()
    assert ended.code == INVALID  # thirty records a side prove nothing
    texts = [json.loads(line)["text"] for line in (shop / "members.jsonl").read_text().splitlines()]
    assert not [text for text in texts if text in ended.out]
    assert "3 members as they are scored: see --dry-run or --show-text" in " ".join(ended.out.split())
    assert "INVALID: The audit proves nothing either way." in " ".join(ended.out.split())


def test_the_same_command_again_has_nothing_to_do(shell):
    first = shell.audit()
    again = shell.audit()
    assert again.code == first.code
    assert "already done" in again.out
    assert "adapter  perplexity" not in again.out


def test_checkpoints_of_one_file(shell):
    ended = shell.audit(
        adapter="run/checkpoint-*", members=None, nonmembers=None, data="both.jsonl", attacks="loss,ref"
    )
    assert ended.code == INVALID
    assert ended.out.index("checkpoint-2  perplexity") < ended.out.index("checkpoint-10  perplexity")


# ---- the gate ----


def test_the_gate_of_an_audit(shell):
    shell.audit("--attacks", "loss")
    assert "gate needs a budget" in one_sentence(shell("gate", shell.out), WRONG)
    ended = shell("gate", shell.out, "--budget", "auc=0.55")
    assert (ended.code, ended.err) == (INVALID, "")
    assert ended.out.startswith("INVALID: ")
    assert ended.out.count("\n") == 1  # one paragraph
    ended = shell("gate", shell.out, "--budget", "auc=0.55", "--markdown")
    assert ended.out.startswith("### Imprint")
    assert "checkpoint" in one_sentence(shell("gate", shell.out, "--budget", "auc=0.6", "--checkpoint", "last"), WRONG)


def test_the_gate_of_an_audit_that_was_killed(shell):
    """Killed between the base and the adapter: it could not finish, and the same command goes on."""
    shell.audit("--attacks", "loss")
    [cell] = (shell.out / "cells").iterdir()
    (cell / "done.json").unlink()
    shutil.rmtree(cell / "epochs")
    ended = shell("gate", shell.out, "--budget", "auc=0.55")
    assert ended.code == UNABLE
    assert ended.out.startswith("COULD NOT FINISH")
    assert shell.audit("--attacks", "loss").code == INVALID


def test_the_gate_of_nothing(shell):
    assert "holds no run" in one_sentence(shell("gate", shell.shop, "--budget", "auc=0.55"), WRONG)


# ---- before ----


def test_a_plan_says_how_many(shell):
    ended = shell("plan", "--budget", "auc=0.55", "--budget", "tpr_at_1pct_fpr=0.05")
    assert (ended.code, ended.err) == (PASS, "")
    from imprint.measures.sizes import for_auc_budget, for_tpr_budget

    for number in (for_auc_budget(0.55), for_tpr_budget(0.05, 0.01)):
        assert f" {number:,} " in ended.out


def test_a_plan_of_a_file_says_what_it_costs(shell):
    ended = shell("plan", "--members", "members.jsonl", "--model", "base")
    assert (ended.code, ended.err) == (PASS, "")
    assert "beside 30 members" in ended.out
    assert "of memory" in " ".join(ended.out.split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--budget", "auc=0.5"], "greater than 0.5"),
        (["--budget", "tpr_at_1pct_fpr=0.01"], "must lie above the false positive rate"),
        (["--power", "2"], "power must lie strictly between 0 and 1"),
        (["--members", "members.jsonl"], "--model is missing"),
        (["--members", "none.jsonl", "--model", "base"], "no such file"),
        (["--members", "0"], "members must be at least 1"),
    ],
)
def test_a_plan_that_cannot_be_made(shell, arguments, said):
    assert said in one_sentence(shell("plan", *arguments), WRONG)


def test_a_plan_that_no_number_fulfils_says_so(shell):
    ended = shell("plan", "--budget", "auc=0.55", "--members", "20")
    assert ended.code == PASS
    assert "out of reach of 20 members" in " ".join(ended.out.split())
