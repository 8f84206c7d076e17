"""The page of a study: gates first, then verdicts, tables and charts; one HTML file without network or script."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from markupsafe import Markup

from imprint.report.pages import page_table, style, template, write_page
from imprint.report.sheet import Sheet
from imprint.report.validity import Validity
from imprint.report.words import clean


def write_study_page(
    path: Path,
    title: str,
    intro: str,
    validity: Sequence[Validity],
    verdicts: Sequence[tuple[str, str, str]],
    sheets: Sequence[Sheet],
    charts: Sequence[tuple[str, list[str]]],
    notes: Sequence[str],
) -> Path:
    """Write the page of a study; the same input, the same bytes.

    Args:
        path: the file to write.
        title: its heading.
        intro: what was run, in a sentence or two.
        validity: the gates of every base. Where one of them withholds its numbers every table is marked.
        verdicts: (claim, verdict in a word or two, sentence with the numbers).
        sheets: the tables.
        charts: (heading, SVG of `imprint.report.figures`, which escape their own text). Nothing else goes unescaped.
        notes: sentences at the end.

    Returns:
        The file.
    """
    page = template("study.html.j2").render(
        **style(),
        title=clean(title),
        intro=clean(intro),
        validity=[_clean(one) for one in validity],
        withheld=any(one.withheld for one in validity),
        verdicts=[[clean(part) for part in verdict] for verdict in verdicts],
        sheets=[page_table(sheet) for sheet in sheets],
        charts=[(clean(heading), [Markup(chart) for chart in panels]) for heading, panels in charts],
        notes=[clean(note) for note in notes],
    )
    return write_page(path, page)


def _clean(one: Validity) -> Validity:
    gates = [
        replace(
            gate, name=clean(gate.name), state=clean(gate.state), finding=clean(gate.finding), advice=clean(gate.advice)
        )
        for gate in one.gates
    ]
    return Validity(one.base, clean(one.place), gates, clean(one.withheld))
