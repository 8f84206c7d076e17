"""docs/attacks.md: written from the code, and up to date."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from imprint.attacks import ATTACKS
from tests.test_attacks_oracles import FUNCTIONS

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("attack_docs", ROOT / "scripts" / "attack_docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_attacks_is_what_the_code_says(script):
    """docs/attacks.md is written by scripts/attack_docs.py."""
    assert (ROOT / "docs" / "attacks.md").read_text(encoding="utf-8") == script.text()


def test_there_is_a_row_for_every_attack(script):
    rows = [line for line in script.text().splitlines() if line.startswith("| `")]
    assert [f"`{name}`" for name in ATTACKS] == [
        line.split(" | ")[0].removeprefix("| ") for line in rows[: len(ATTACKS)]
    ]


@pytest.mark.parametrize("name", {**ATTACKS, **FUNCTIONS})
def test_a_docstring_begins_with_title_formula_and_source(script, name):
    title, formula, source = script.told({**ATTACKS, **FUNCTIONS}[name])
    assert title
    assert formula
    assert source


def test_a_row_joins_docstring_signature_and_cost(script, monkeypatch):
    monkeypatch.setitem(ATTACKS, "con_recall", FUNCTIONS["con_recall"])
    row = script.attack_row("con_recall")
    assert row[1:4] == [
        "Con-ReCall",
        "(LL(x | P) − γ·LL(x | M)) / LL(x), P texts nobody tuned on and M tuned ones",
        "Wang et al. 2024",
    ]
    assert row[4] == "`target`, `prefixed`, `prefixed_members`"
    assert row[5].startswith("prefixed: ")
    assert "; prefixed_members: " in row[5]
    assert script.cost(["target", "zlib_bytes"]) == "none"
    assert script.table(["a"], [["x | y"]]) == "| a |\n|---|\n| x \\| y |"


def test_a_docstring_of_another_shape_is_named(script):
    def odd(target):
        """Whatever."""

    with pytest.raises(ValueError, match="docstring of odd must begin"):
        script.told(odd)
