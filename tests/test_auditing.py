"""The parts of an audit by themselves: what a group is, what the loss was on, plans, the doctor, the network."""

from __future__ import annotations

import socket
import sys
from typing import Any

import numpy as np
import pytest

import imprint
from imprint import cli
from imprint.auditing import doctor
from imprint.auditing.groups import OTHERS, read_records
from imprint.auditing.identity import keep_key, pseudonym, read_key
from imprint.auditing.plan import needs
from imprint.auditing.span import judged, opening
from imprint.data.tokens import Encoded
from imprint.errors import UsageError
from imprint.spec import Budget, DataSpec, Runtime, Source
from tests.test_audit import audited, base, saved, sides  # noqa: F401  fixtures
from tests.test_cli import one_sentence

SPEC = DataSpec(source=Source(name="records"), split="given")


# ---- a column named group ----


def records(labels: list[list[str | None]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of members and of non-members with these values in the column `group`."""
    members, nonmembers = (
        [{"text": f"{side} number {n}", "group": g} for n, g in enumerate(own)]
        for side, own in zip(("member", "other"), labels, strict=True)
    )
    return members, nonmembers


def test_a_group_on_both_sides_is_compared():
    pool, spec = read_records(SPEC, *records([["de"] * 20 + ["fr"] * 2, ["de"] * 25 + [None]]))
    assert (spec.group, spec.subgroup) == (None, "group")
    assert {e.subgroup for e in pool.parts["member"]} == {"de", OTHERS}
    assert {e.group for part in pool.parts.values() for e in part} == {None}


def test_a_group_on_one_side_owns_its_records():
    pool, spec = read_records(SPEC, *records([["anna", "anna", "ben"], ["cleo", "cleo", "dan"]]))
    assert (spec.group, spec.subgroup) == ("group", None)
    assert [e.group for e in pool.parts["member"]] == ["anna", "anna", "ben"]


def test_too_few_on_both_sides_are_owners_whose_non_members_go():
    _, spec = read_records(SPEC, *records([["anna"] * 19 + ["ben"], ["anna"] * 30]))
    assert (spec.group, spec.subgroup) == ("group", None)


def test_a_column_that_was_named_is_taken_at_its_word():
    asked = SPEC.model_copy(update={"group": "group"})
    pool, spec = read_records(asked, *records([["de"] * 30, ["de"] * 30]))
    assert (spec.group, spec.subgroup) == ("group", None)
    assert {e.group for e in pool.parts["member"]} == {"de"}


# ---- what the loss was on ----


def record(*ids: int) -> Encoded:
    return Encoded("r", np.array(ids, np.int32), np.arange(len(ids)) > 0, 1)


def test_the_opening_is_what_all_share_and_none_learned():
    texts = [record(1, 2, 3, 4, 9), record(1, 2, 3, 5, 9, 9)]
    context = [np.array([0, 1, 1, 1, 0], bool), np.array([0, 1, 0, 1, 0, 0], bool)]
    assert opening(texts, context).tolist() == [False, True, False]  # 3 is learned in the second
    assert opening([record(1, 2), record(3, 2)], [np.ones(2, bool)] * 2).tolist() == []
    assert opening(texts[:1], context[:1]).tolist() == []  # one record shares nothing with others


@pytest.mark.parametrize(
    ("before", "after", "loss", "clear"),
    [
        (8.0, 0.5, "all", True),
        (8.0, 4.0, "all", True),
        (8.0, 7.9, "target", True),
        (8.0, 8.4, "target", True),
        (8.0, 5.0, "target", False),
        (0.3, 0.01, "target", False),  # the base knew it
    ],
)
def test_what_two_losses_say(before, after, loss, clear):
    found = judged(7, before, after)
    assert (found.loss, found.clear) == (loss, clear)
    assert ("safe choice" in str(found)) is not clear


# ---- keys ----


def test_a_key_is_kept_once(tmp_path):
    key = read_key(tmp_path / "k")
    assert not (tmp_path / "k").exists()
    keep_key(tmp_path / "k", key)
    keep_key(tmp_path / "k", key)
    assert read_key(tmp_path / "k") == key
    assert pseudonym(key, "a") != pseudonym(read_key(tmp_path / "other"), "a")


# ---- plan ----


def test_needs_agree_with_the_power_gate():
    """As many records as planned pass the gate; a tenth fewer do not."""
    from imprint.gates.judge import power

    [need, *_] = needs(Budget(auc=0.56), None, 0.8)
    rng = np.random.default_rng(0)

    def passes(n: int) -> float:
        scores = rng.normal(size=n), rng.normal(size=n)
        figures = power(scores, ([None] * n, [None] * n), 0.56).figures
        return float(figures["passes"])

    assert need.nonmembers is not None
    assert passes(need.nonmembers) >= 0.799
    assert passes(int(0.9 * need.nonmembers)) < 0.8


def test_a_claim_out_of_reach_is_told_and_the_others_stay():
    found = needs(Budget(auc=0.52), 50, 0.8)
    assert found[0].nonmembers is None
    assert "out of reach of 50 members" in found[0].why
    assert found[-1].nonmembers == 10_000
    with pytest.raises(UsageError, match="must lie above"):
        needs(Budget(tpr_at_1pct_fpr=0.005), None, 0.8)


# ---- the doctor ----


def test_the_doctor_finds_a_planted_leak_and_no_absent_one(monkeypatch):
    monkeypatch.setattr(doctor, "MEMBERS", 48)
    monkeypatch.setattr(doctor, "NONMEMBERS", 96)
    monkeypatch.setattr(doctor, "EPOCHS", 10)
    checks = list(doctor.controls(Runtime(device="cpu")))
    assert [check.good for check in checks] == [True, True], checks


def test_the_doctor_says_where_nothing_is_found(monkeypatch, capfd):
    """An installation on which training changes nothing."""
    monkeypatch.setattr(doctor, "MEMBERS", 24)
    monkeypatch.setattr(doctor, "NONMEMBERS", 48)
    monkeypatch.setattr("imprint.tuning.train.Trainer.update", lambda *rest: "")
    monkeypatch.setattr(doctor, "EPOCHS", 1)
    monkeypatch.setattr(sys, "argv", ["imprint", "doctor", "--device", "cpu"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 3
    assert "FAILED  an overfitted adapter is found" in capfd.readouterr().out


def test_the_doctor_has_no_such_device(monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["imprint", "doctor", "--device", "quantum"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    from tests.test_cli import Ended

    printed = capfd.readouterr()
    assert "quantum" in one_sentence(Ended(ended.value.code, printed.out, printed.err))


# ---- the network ----


def test_an_audit_with_the_network_cut(base, sides, tmp_path, monkeypatch):  # noqa: F811
    tried = []

    def refuse(self: socket.socket, address: Any) -> None:
        tried.append(address)
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    found = audited(base, sides, saved(tmp_path / "a", base, "lora"), tmp_path / "out")
    assert found.frame["value"].notna().any()
    assert not tried
    assert imprint.results(tmp_path / "out").equals(found.frame)
