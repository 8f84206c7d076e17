"""Imprint's lower bounds admit what other trainers pin; nothing here reaches the network."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from tests.pins import FLOOR, ROWS, TOO_OLD, TORCH, Row

ROOT = Path(__file__).parents[1]
tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on
OURS = {
    Requirement(line).name: Requirement(line).specifier
    for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
}
TORCHES = [f"2.{minor}.0" for minor in range(14)]
"""Releases of torch."""


def named(row: Row) -> str:
    return f"{row.tool} {row.version} transformers {row.installed['transformers']}"


def test_the_bounds_are_lower_ones_only():
    assert {part.operator for bounds in OURS.values() for part in bounds} == {">="}


@pytest.mark.parametrize("row", ROWS, ids=named)
def test_what_was_tested_is_what_the_tool_and_imprint_ask_for(row):
    for name, version in row.installed.items():
        assert version in SpecifierSet(row.declares.get(name, "")), name
        assert version in OURS.get(name, SpecifierSet()), name
    for name in ("transformers", "peft", "accelerate", "datasets"):
        assert name in row.installed


@pytest.mark.parametrize("row", ROWS, ids=named)
def test_there_is_a_torch_for_both(row):
    both = SpecifierSet(row.declares.get("torch", "")) & OURS["torch"]
    assert [version for version in TORCHES if version in both]
    assert TORCH in TORCHES


def test_every_lower_bound_has_been_tested():
    """A bound that nobody has run is a guess; torch is the exception that docs/environments.md names."""
    [floor] = [row for row in ROWS if row.tool == FLOOR]
    bounds = {name: str(part.version) for name, [part] in OURS.items() if name != "torch"}
    assert {name: Version(version) for name, version in floor.installed.items()} == {
        name: Version(version) for name, version in bounds.items()
    }


@pytest.mark.parametrize(("tool", "version"), TOO_OLD)
def test_what_is_too_old_would_be_refused(tool, version):
    wanted = Requirement(TOO_OLD[tool, version])
    [highest] = [part.version for part in wanted.specifier]
    assert Version(highest) not in OURS[wanted.name]


def test_the_page_tells_every_row():
    """docs/environments.md is written by hand: no environment is left out, none is made up."""
    page = (ROOT / "docs" / "environments.md").read_text()
    told = re.findall(r"^\| ([a-z ]+?) ?([\d.]*) \| ([\d.]+) \| ([\d.]+) \|", page, re.MULTILINE)
    assert sorted(told) == sorted(
        (row.tool, row.version, row.installed["transformers"], row.installed["peft"]) for row in ROWS
    )
    for tool, version in TOO_OLD:
        assert f"{tool} {version}" in page
