"""A finished study in a terminal, or in the format of another program."""

from __future__ import annotations

from rich.console import Console

from imprint.report import words
from imprint.report.sheet import print_sheet, to_csv, to_latex, to_markdown
from imprint.report.text import printable
from imprint.studies.run import Outcome

FORMATS = ("text", "markdown", "latex", "csv")
_RENDER = {"markdown": to_markdown, "latex": to_latex, "csv": to_csv}


def show(outcome: Outcome, style: str, console: Console) -> None:
    """Gates first, then verdicts, tables, notes and where the page is; in another format the tables alone."""
    if style != "text":
        print("\n".join(_RENDER[style](sheet) for sheet in outcome.answer.sheets), end="")
        return

    def say(text: str, kind: str = "") -> None:
        console.print(printable(words.clean(text), console, kind), highlight=False)

    say(outcome.study.title, "bold")
    say(outcome.study.claim)
    console.print()
    for place, gate in outcome.gates:
        if gate.state != "green":
            say(f"{f'{place}: ' if place else ''}{gate.name} {gate.state}: {gate.finding} {gate.advice}")
    green = sum(gate.state == "green" for _, gate in outcome.gates)
    say(f"Validity gates: {green} of {len(outcome.gates)} are green.")
    if outcome.withheld:
        say(f"Verdicts withheld. {outcome.withheld}", "bold")
    console.print()
    for verdict in outcome.answer.verdicts:
        say(f"{verdict.claim}: {verdict.word}", "bold")
        say(verdict.sentence)
        console.print()
    for sheet in outcome.answer.sheets:
        print_sheet(sheet, console)
        console.print()
    for note in outcome.answer.notes:
        say(note)
    console.print(f"Page: {outcome.page}", markup=False, highlight=False, soft_wrap=True)
