"""The verdict on a release: its code, and that every word of it is true."""

from __future__ import annotations

import math
import re
import shutil

import pandas as pd
import pytest

from imprint.errors import UsageError
from imprint.gates.judge import Gate, missing
from imprint.release import INVALID, LEAKS, PASS, UNABLE, Held, Judged, Release, release
from imprint.report import gate
from imprint.report.notes import Records
from imprint.report.readings import Reading
from imprint.rows import load_grid, write_results
from imprint.spec import Budget
from imprint.store import Store
from imprint.types import Interval
from tests.test_audit_report import NAMES, audit_spec, build_audit, gate_evidence
from tests.test_report import EVIL, build, spec

GREEN = tuple(Gate(f"gate {n}", "green", f"finding {n}.", "", {}) for n in range(5))
RED = Gate("blind baseline", "red", "Texts tell: length 0.700 [0.600, 0.800].", "Divide one pool at random.", {})
RECORDS = Records("", True, {"members": 500, "nonmembers": 95}, {}, {}, None)


def held(value, low, high, limit=0.55, attack="ref", metric="auc", status="ok"):
    return Held(attack, metric, Reading(None if value is None else Interval(value, low, high), status), limit)


def verdict(code, *cells, budget=None, gates=GREEN, unable=()):
    if budget is None and any(one.limit for cell in cells for one in cell.held):
        budget = Budget(attack="ref", auc=0.55)
    return Release(code, "lora audited against gpt2 on x.jsonl", budget, cells, (RECORDS,), tuple(gates), unable)


KEPT = Judged("lora, adapter", True, (held(0.501, 0.47, 0.532),))
OVER = Judged("lora, checkpoint-3", False, (held(0.71, 0.69, 0.733),), ("checkpoint-1",), 3)
RESTS = "All 5 validity gates are green; 500 members and 95 non-members were scored."


# ---- the words


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (
            verdict(PASS, KEPT),
            "PASS: The budget (AUC below .550, by ref) is kept by lora, adapter. AUC by ref is .501 [.470 .532]: the "
            f"upper bound .532 is below .550. {RESTS}",
        ),
        (
            verdict(LEAKS, OVER),
            "OVER BUDGET: The budget (AUC below .550, by ref) is not kept by lora, checkpoint-3. AUC by ref is .710 "
            "[.690 .733]: the upper bound .733 is not below .550. It is kept up to checkpoint-1, the first 1 of 3. "
            f"{RESTS}",
        ),
        (
            verdict(LEAKS, Judged("lora, b", False, (held(0.6, 0.5, 0.7),), (), 2)),
            "OVER BUDGET: The budget (AUC below .550, by ref) is not kept by lora, b. AUC by ref is .600 [.500 .700]: "
            f"the upper bound .700 is not below .550. The first checkpoint does not keep it either. {RESTS}",
        ),
        (
            verdict(PASS, Judged("lora, a", None, (held(0.7, 0.6, 0.8, None), held(0.9, 0.8, 1.0, None, "loss")))),
            "MEASURED: No budget was given. lora, a: the strongest attack is loss, AUC .900 [.800 1.000]. The interval "
            f"lies above .5: members can be told from non-members. {RESTS}",
        ),
        (
            verdict(PASS, Judged("lora, a", None, (held(0.51, 0.48, 0.54, None),))),
            "MEASURED: No budget was given. lora, a: the strongest attack is ref, AUC .510 [.480 .540]. The interval "
            "does not lie above .5: so many records show no leakage, which is no proof that there is none. "
            f"{RESTS}",
        ),
        (
            verdict(INVALID, OVER, gates=(*GREEN[1:], RED)),
            "INVALID: The audit proves nothing either way. Blind baseline is red: Texts tell: length 0.700 [0.600, "
            "0.800]. Divide one pool at random.",
        ),
        (
            verdict(
                UNABLE, KEPT, unable=("lora (out of memory)",), gates=[missing("power", "The base was never scored.")]
            ),
            "COULD NOT FINISH: The audit did not finish: lora (out of memory). The same command again continues where "
            "it ended.",
        ),
    ],
)
def test_a_paragraph_for_every_code(found, said):
    assert gate.paragraph(found) == said


def test_a_budget_on_a_rate_tells_the_rate_and_what_was_refused():
    budget = Budget(auc=0.55, tpr_at_1pct_fpr=0.05)
    refused = held(None, 0, 0, 0.05, metric="tpr_at_1pct_fpr", status="too_few")
    rate = held(0.02, 0.01, 0.04, 0.05, metric="tpr_at_1pct_fpr", status="indicative")
    auc, loss = held(0.5, 0.47, 0.53), held(0.52, 0.5, 0.54, attack="loss")
    said = gate.paragraph(verdict(PASS, Judged("a", True, (auc, loss, rate)), budget=budget))
    assert "(AUC below .550 and TPR at 1% FPR below .050, by every attack)" in said
    assert "AUC is highest by loss, .520 [.500 .540]: the upper bound .540 is below .550." in said
    assert "TPR at 1% FPR is highest by ref, .020 [.010 .040] (indicative): the upper bound .040 is below .050." in said
    told = gate.paragraph(verdict(INVALID, Judged("a", None, (auc, refused)), budget=budget))
    assert told == (
        "INVALID: Whether the budget (AUC below .550 and TPR at 1% FPR below .050, by every attack) is kept nobody can "
        "say. TPR at 1% FPR was refused for a: it takes 100 non-members, and there are 95."
    )
    both = gate.paragraph(verdict(LEAKS, Judged("a", False, (held(0.7, 0.6, 0.8), refused)), budget=budget))
    assert "the upper bound .800 is not below .550. TPR at 1% FPR was refused for a: it takes 100" in both
    nothing = gate.paragraph(verdict(INVALID, Judged("a", None, ()), budget=budget))
    assert nothing.endswith("nobody can say. Nothing was measured.")


def test_several_cells_are_counted_and_the_furthest_below_is_told():
    near = Judged("near", True, (held(0.52, 0.5, 0.549),))
    far = Judged("far", True, (held(0.5, 0.48, 0.52),))
    over = [Judged(f"o{n}", False, (held(0.7 + n / 10, 0.6, 0.75 + n / 10),)) for n in range(2)]
    said = gate.paragraph(verdict(PASS, near, *over, far))
    assert "is kept by 2 of 4 cells: near and far. Furthest below it is far. AUC by ref is .500 [.480 .520]" in said
    assert "Each was judged alone; `imprint recommend` allows for the choice among them." in said
    assert "is kept by none of 2 cells. Closest is o0. AUC by ref is .700" in gate.paragraph(verdict(LEAKS, *over))
    left = verdict(UNABLE, *over, unable=tuple(f"c{n} (gone)" for n in range(5)))
    assert "5 of 2 cells" not in gate.paragraph(verdict(UNABLE, *over, unable=("c0 (gone)",)))
    assert "did not finish: c0 (gone), c1 (gone), c2 (gone) and 2 more." in gate.paragraph(left)


def test_a_bound_that_rounds_to_its_limit_is_told_in_full():
    one = Judged("a", True, (held(0.5, 0.48, 0.5499996),))
    assert "the upper bound .5499996 is below .550" in gate.paragraph(verdict(PASS, one))
    at = Judged("a", False, (held(0.5, 0.48, 0.55),))
    assert "the upper bound .550 is not below .550" in gate.paragraph(verdict(LEAKS, at))


def test_a_value_below_the_limit_with_its_bound_above_asks_for_more_records():
    one = Judged("a", False, (held(0.52, 0.48, 0.56),))
    assert "the upper bound .560 is not below .550, though the value is: more records would tell." in gate.paragraph(
        verdict(LEAKS, one)
    )


def test_markdown_has_the_table_where_the_numbers_count():
    text = gate.markdown(verdict(LEAKS, OVER))
    assert text.startswith("### Imprint: over budget\n\nlora audited against gpt2 on x.jsonl\n\nThe budget (AUC")
    assert "| attack | measure | value | 95% interval | limit | kept |" in text
    assert "| ref | AUC | .710 | \\[.690 .733\\] | .550 | no |" in text
    assert "<summary>Validity gates: all green</summary>" in text
    shut = gate.markdown(verdict(INVALID, OVER, gates=(*GREEN[1:], RED)))
    assert "| ref |" not in shut
    assert "1 of 5 not green" in shut
    free = gate.markdown(verdict(PASS, Judged("a", None, (held(0.7, 0.6, 0.8, None),))))
    assert "| ref | AUC | .700 | \\[.600 .800\\] |\n" in free
    several = gate.markdown(verdict(LEAKS, OVER, OVER))
    assert several.count("| lora, checkpoint-3 | ref | AUC |") == 2


def test_a_hostile_name_is_text_calls_nobody_and_breaks_no_table():
    name = f"{EVIL}|@everyone https://evil.example www.evil.example"
    one = Judged(name, False, (held(0.7, 0.6, 0.8, attack=name), held(0.6, 0.5, 0.7)))
    text = gate.markdown(verdict(LEAKS, one, one))
    assert not re.search(r"<(?!/?(details|summary)>)", text)
    assert not re.search(r"@\w|://|www\.", text)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 4
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in rows} == {8}


# ---- the code


@pytest.fixture(scope="module")
def audit(tmp_path_factory):
    return build_audit(tmp_path_factory.mktemp("release") / "audit", gains=(0.0, 0.3, 0.6), sizes=(500, 500))


def with_aucs(frame, attack, *intervals):
    """The results with other AUCs of an attack at checkpoints 1, 2, …"""
    frame = frame.copy()
    for epoch, (value, low, high) in enumerate(intervals, 1):
        at = (frame["epoch"] == epoch) & (frame["attack"] == attack) & (frame["metric"] == "auc")
        assert at.sum() == 1
        frame.loc[at, ["value", "low", "high"]] = value, low, high
    return frame


LOW, HIGH = (0.5, 0.48, 0.52), (0.7, 0.68, 0.72)


def test_the_last_checkpoint_is_judged_or_the_one_that_is_named(audit):
    grid, frame = audit[0], with_aucs(audit[1], "ref", LOW, HIGH, HIGH)
    budget = Budget(attack="ref", auc=0.58)
    last = release(grid, frame, budget)
    assert (last.code, last.cells[0].name) == (LEAKS, f"lora, {NAMES[2]}")
    assert last.cells[0].held[0].reading.interval == Interval(*HIGH)
    named = release(grid, frame, budget, NAMES[0])
    assert (named.code, named.cells[0].name) == (PASS, f"lora, {NAMES[0]}")
    with pytest.raises(
        UsageError, match=r"--checkpoint: unknown checkpoint 'checkpoint-37': did you mean 'checkpoint-"
    ):
        release(grid, frame, budget, "checkpoint-37")


def test_checkpoints_are_kept_up_to_the_first_that_is_not(audit):
    """The third keeps the budget again, but nobody may choose it because it does."""
    grid, budget = audit[0], Budget(attack="ref", auc=0.58)
    assert release(grid, with_aucs(audit[1], "ref", LOW, HIGH, LOW), budget).cells[0].keeping == (NAMES[0],)
    assert release(grid, with_aucs(audit[1], "ref", HIGH, LOW, LOW), budget).cells[0].keeping == ()
    assert release(grid, with_aucs(audit[1], "ref", LOW, LOW, LOW), budget).cells[0].keeping == NAMES


def test_every_attack_is_held_to_a_budget_that_names_none(audit):
    low = with_aucs(audit[1], "ref", LOW, LOW, LOW)
    for attack in ("zlib", "min_k"):
        low = with_aucs(low, attack, LOW, LOW, LOW)
    assert release(audit[0], low, Budget(auc=0.58)).code == LEAKS  # loss is over
    assert release(audit[0], with_aucs(low, "loss", LOW, LOW, LOW), Budget(auc=0.58)).code == PASS


def test_without_a_budget_nothing_is_over(audit):
    found = release(*audit)
    assert (found.code, found.budget, gate.word(found)) == (PASS, None, "measured")
    assert {one.metric for one in found.cells[0].held} == {"auc"}
    ref = audit[1].query("epoch == 3 and attack == 'ref' and metric == 'auc'").iloc[0]
    assert f"AUC {ref.value:.3f}".replace("0.", ".") in gate.paragraph(found)


def test_checkpoints_of_one_name_are_told_apart(tmp_path):
    grid, frame = build_audit(tmp_path / "a", gains=(0.1, 0.2), names=("adapter", "adapter"))
    assert release(grid, frame, checkpoint="adapter (2)").cells[0].name == "lora, adapter (2)"
    assert release(grid, frame, checkpoint="adapter").cells[0].name == "lora, adapter"


def test_3_before_2_before_1(tmp_path):
    """Unfinished and a red gate and over budget: 3; finished: 2; with green gates: 1; with a wider budget: 0."""
    grid, _ = build_audit(tmp_path / "a", finished=False, sizes=(500, 500), gains=(0.6,), names=("adapter",))
    store, cell = Store(grid.path), grid.cells[0]
    ids, budget = cell.records["id"].tolist(), Budget(attack="ref", auc=0.58)
    shutil.rmtree(store.base("b0") / "gates")
    gate_evidence(store, ids, (500, 500), tell=1.0)

    def judged(limits=budget):
        grid = load_grid(tmp_path / "a")
        return release(grid, write_results(grid), limits)

    found = judged()
    assert (found.code, found.unable) == (UNABLE, ("lora (it stopped after 1 checkpoint)",))
    cell.folder.finish(status="done", reason=None)
    found = judged()
    assert (found.code, [one.name for one in found.doubts]) == (INVALID, ["blind baseline"])
    shutil.rmtree(store.base("b0") / "gates")
    gate_evidence(store, ids, (500, 500))
    assert judged().code == LEAKS
    assert judged(Budget(attack="ref", auc=1.0)).code == PASS


def test_too_few_records_for_a_rate_is_an_invalid_audit(tmp_path):
    budget = {"attack": "ref", "tpr_at_1pct_fpr": 0.05}
    grid, frame = build_audit(tmp_path / "a", sizes=(500, 95), gains=(0.3,), names=("adapter",), budget=budget)
    found = release(grid, frame)
    assert (found.code, found.cells[0].kept, found.doubts) == (INVALID, None, ())
    assert math.isnan(found.cells[0].held[0].excess)
    assert "it takes 100 non-members, and there are 95" in gate.paragraph(found)


def test_a_grid_of_runs(tmp_path):
    """Three cells are done, one has diverged, two have not finished."""
    grid, frame = build(tmp_path / "grid", budget={"attack": "loss", "auc": 0.9})
    found = release(grid, frame)
    assert found.code == UNABLE
    assert found.title == "gpt2 tuned on world/customers"
    assert found.unable == ("prefix (out of memory & <i>sorry</i>)", "p_tuning (it stopped after 1 epoch)")
    kept = {one.name: one.kept for one in found.cells}
    assert kept == {
        "full, epoch 2": False,
        "lora, epoch 3": True,
        "prompt, the base itself": True,
        "head, epoch 2": False,
        "prefix": None,
        "p_tuning": None,
    }


def test_on_the_base_itself_an_attack_that_compares_with_it_has_no_uncertainty(tmp_path):
    grid, frame = build(tmp_path / "grid", budget={"attack": "ref", "auc": 0.52})
    prompt = next(one for one in release(grid, frame).cells if one.name.startswith("prompt"))
    assert prompt.held[0].reading.interval == Interval(0.5, 0.5, 0.5)
    assert prompt.kept is True


def test_gates_of_several_bases_say_of_which(tmp_path):
    from tests.test_report import two_bases

    found = release(*two_bases(tmp_path))
    assert len(found.gates) == 10
    assert {one.name for one in found.doubts} == {
        "blind baseline (split 1)",
        "overlap (split 1)",
        "positive control (split 1)",
    }
    assert found.code == INVALID


def test_audits_against_another_reference_say_so(tmp_path):
    grid, frame = build_audit(tmp_path / "a", one=audit_spec(reference="org/older"), gains=(0.1,), names=("adapter",))
    assert release(grid, frame).title == "adapter (lora) audited against org/older on tickets.jsonl"
    whole = build_audit(tmp_path / "b", one=audit_spec("full", model="org/base"), gains=(0.1,), names=("tuned",))
    assert release(*whole).title == "tuned (whole model) audited against org/base on tickets.jsonl"
    assert isinstance(whole[1], pd.DataFrame)
    assert spec().train.epochs == 4
