"""A table as a value, and its four renderings: terminal or pipe, Markdown, LaTeX and CSV.

For people a cell reads `measured (the paper's) [interval of the measured]`; for machines each is a column of its own.
Every text is taken for hostile, and each rendering escapes it in its own way.
"""

from __future__ import annotations

import csv
import io
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len
from rich.console import Console

from imprint.report import columns, text
from imprint.report.columns import Column
from imprint.report.words import clean

MISSING = "-"
"""Shown for a number that is not there."""
EMPTY = "No rows."
BESIDE = "In parentheses stands the paper's number; an interval is of the measured one."
_NUMBER = re.compile(r"[+-]?([0-9]{1,3}(,[0-9]{3})+|[0-9]*)(\.?[0-9]+|(?<=[0-9])\.?)(e[+-]?[0-9]+)?%?", re.I)
_FORMULA = ("=", "+", "-", "@")
_TEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "&": r"\&",
        "%": r"\%",
        "$": r"\$",
        "#": r"\#",
        "_": r"\_",
        "{": r"\{",
        "}": r"\}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        "`": r"\textasciigrave{}",
        '"': "''",
        "[": "{[}",  # after the end of a row a bare bracket or star would be an argument of that end
        "]": "{]}",
        "*": "{*}",
        "\ufffd": "?",  # what `clean` puts for a control character; pdfLaTeX stops at it
    }
)


@dataclass(frozen=True)
class Entry:
    """A number as shown, or the word in its place; empty where there is none."""

    text: str
    low: str = ""
    """The bounds of its interval as shown."""
    high: str = ""
    paper: str = ""
    """The paper's number, to stand beside it."""


@dataclass(frozen=True)
class Sheet:
    """A table.

    Attributes:
        title: what stands above it.
        header: a name for each column.
        rows: as many cells each as the header has; a plain string is a text, an `Entry` a number.
        notes: sentences below it.
        group: how many columns from the left say which row it is.

    Raises:
        ValueError: a row is longer or shorter than the header, or there are not `group` columns.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[Entry | str, ...], ...]
    notes: tuple[str, ...] = ()
    group: int = 1

    def __post_init__(self) -> None:
        if any(len(row) != len(self.header) for row in self.rows) or not 0 <= self.group <= len(self.header):
            raise ValueError(f"sheet {self.title!r}: rows and key columns must match the {len(self.header)} columns")

    @property
    def numeric(self) -> tuple[bool, ...]:
        """Which columns hold numbers: those after the key columns in which there is an `Entry`."""
        cells = [[isinstance(row[n], Entry) for row in self.rows] for n in range(len(self.header))]
        return tuple(n >= self.group and any(cells[n]) for n in range(len(self.header)))

    @property
    def remarks(self) -> tuple[str, ...]:
        """The notes, with how to read the paper's numbers where there are any, and that there are no rows."""
        beside = any(isinstance(cell, Entry) and cell.paper for row in self.rows for cell in row)
        added = [sentence for sentence, due in ((EMPTY, not self.rows), (BESIDE, beside)) if due]
        return tuple(clean(note) for note in (*added, *self.notes))


def print_sheet(sheet: Sheet, console: Console) -> None:
    """Print it within the width of the console; off a terminal as plain text.

    What is too wide first puts its intervals on a second line, then continues in another table with the same keys.
    """
    rows: Any = shown_rows(sheet)  # of another kind than text.py's, but only the columns look into a row
    keys, others = _columns(sheet)
    text.print_block(clean(sheet.title), keys, others, rows, console)
    for note in sheet.remarks:
        console.print(text.printable(note, console), highlight=False)


def to_markdown(sheet: Sheet) -> str:
    """A Markdown table below its title, the notes under it."""
    rows: Any = shown_rows(sheet)
    keys, others = _columns(sheet)
    blocks = [f"**{text.escaped(clean(sheet.title))}**", text.markdown([*keys, *others], rows)]
    notes = "\n".join(f"- {text.escaped(note)}" for note in sheet.remarks)
    return "\n\n".join([*blocks, *([notes] if notes else [])]) + "\n"


def to_latex(sheet: Sheet) -> str:
    """A `table` for the package booktabs, intervals on a second line of the row.

    Letters beyond those of pdfLaTeX's default fonts stay as they are: such a table needs XeLaTeX or LuaLaTeX.
    """
    alignment = "".join("r" if number else "l" for number in sheet.numeric)
    body = [_tex_row([_tex(name) for name in sheet.header]), r"\midrule"]
    for row in sheet.rows:
        body.append(_tex_row([_tex_number(cell) if isinstance(cell, Entry) else _tex(cell) for cell in row]))
        if any(isinstance(cell, Entry) and cell.low for cell in row):
            body.append(_tex_row([_tex_interval(cell) for cell in row]))
    lines = [
        r"% needs \usepackage{booktabs}",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_tex(sheet.title)}}}",
        rf"\begin{{tabular}}{{{alignment}}}",
        r"\toprule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
        *(rf"\par{{\footnotesize {_tex(note)}}}" for note in sheet.remarks),
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def to_csv(sheet: Sheet) -> str:
    """Comma-separated values, without title and notes.

    A column of numbers `x` becomes `x`, `x low`, `x high` and `x paper`, as shown but without thousands separators,
    empty where there is no number. A text that a spreadsheet would take for a formula gets an apostrophe before it.
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    header = zip(sheet.header, sheet.numeric, strict=True)
    parts = ("", " low", " high", " paper")
    writer.writerow([_harmless(name + part) for name, number in header for part in (parts if number else ("",))])
    for row in sheet.rows:
        cells = zip(row, sheet.numeric, strict=True)
        writer.writerow([value for cell, number in cells for value in _values(cell, number)])
    return file.getvalue()


def shown_rows(sheet: Sheet) -> list[list[columns.Entry]]:
    """The cells as they are read, cleaned: the paper's number beside ours, a dash for a number that is not there."""
    return [[_shown(cell) for cell in row] for row in sheet.rows]


def _shown(cell: Entry | str) -> columns.Entry:
    if isinstance(cell, str):
        return columns.Entry(clean(cell))
    own, paper = clean(cell.text) or MISSING, clean(cell.paper)
    return columns.Entry(f"{own} ({paper})" if paper else own, clean(cell.low), clean(cell.high))


def _columns(sheet: Sheet) -> tuple[list[Column], list[Column]]:
    """Key columns and the others; what is too long for a number may wrap, as a key may, rather than be cut off."""
    made, rows = [], shown_rows(sheet)
    for n, (name, number) in enumerate(zip(sheet.header, sheet.numeric, strict=True)):
        wide = any(cell_len(row[n].text) > text.WIDEST_KEY for row in rows)
        made.append(Column(clean(name), _at(n), number=number, key=wide or not number))
    return made[: sheet.group], made[sheet.group :]


def _at(n: int) -> Callable[[Any], columns.Entry]:
    return lambda row: row[n]


def _tex(content: str) -> str:
    """Escaped; hyphens in a row are kept from becoming a dash."""
    return re.sub(r"-(?=-)", "-{}", clean(content).translate(_TEX))


def _tex_number(entry: Entry) -> str:
    """A minus sign before a number, and a dash for none."""
    shown = _tex_signed(entry.text) if clean(entry.text) not in ("", MISSING) else "--"
    return f"{shown} ({_tex_signed(entry.paper)})" if entry.paper else shown


def _tex_signed(content: str) -> str:
    escaped = _tex(content)
    return f"$-${escaped[1:]}" if escaped.startswith("-") and _NUMBER.fullmatch(clean(content)) else escaped


def _tex_interval(cell: Entry | str) -> str:
    if not isinstance(cell, Entry) or not cell.low:
        return ""
    return rf"\scriptsize {_tex_signed(cell.low)} to {_tex_signed(cell.high)}"


def _tex_row(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


def _values(cell: Entry | str, number: bool) -> list[str]:
    if not number:
        return [_harmless(cell.text if isinstance(cell, Entry) else cell)]
    entry = cell if isinstance(cell, Entry) else Entry(cell)
    return [_plain(part) for part in (entry.text, entry.low, entry.high, entry.paper)]


def _plain(content: str) -> str:
    """A number as a machine reads it."""
    content = clean(content)
    if content == MISSING:
        return ""
    return content.replace(",", "") if _NUMBER.fullmatch(content) else _harmless(content)


def _harmless(content: str) -> str:
    """Spreadsheets take wide forms of the signs for the signs themselves."""
    content = clean(content)
    formula = unicodedata.normalize("NFKC", content[:1]).startswith(_FORMULA)
    return f"'{content}" if formula and not _NUMBER.fullmatch(content) else content
