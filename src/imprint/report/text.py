"""Tables as text: for a terminal of any width, for a file it is piped into, and as Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from imprint.report.columns import Column, Entry
from imprint.report.tables import Row

_GAP = 2
"""Columns between two columns: the padding and the separator."""
WIDEST_KEY = 24
_PLAIN = box.Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)
"""Off a terminal: nothing but a line of dashes below the titles."""


def print_block(title: str, keys: list[Column], columns: list[Column], rows: Sequence[Row], console: Console) -> None:
    """Print a table within the width of the console.

    What is too wide first puts its intervals on a second line, then continues in another table with the same keys.
    Off a terminal the same comes as plain text.
    """
    for number, (part, joint) in enumerate(_parts(keys, columns, rows, console.width)):
        heading = title if number == 0 else f"{title} (continued)"
        console.print(printable(heading, console, "bold"), highlight=False)
        table = Table(box=box.SIMPLE_HEAD if console.is_terminal else _PLAIN, padding=(0, 1, 0, 0), show_edge=False)
        for column in [*keys, *part]:
            table.add_column(
                printable(column.title, console),
                justify="right" if column.number else "left",
                overflow="fold",
                max_width=WIDEST_KEY if column.key else None,
                no_wrap=not column.key,
            )
        for row in rows:
            entries = [column.entry(row) for column in [*keys, *part]]
            table.add_row(*(_cell(entry, joint, console) for entry in entries))
        console.print(table)
        console.print()


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], console: Console) -> None:
    """A plain table: the first column names, the others hold numbers."""
    console.print(printable(title, console, "bold"), highlight=False)
    table = Table(box=box.SIMPLE_HEAD if console.is_terminal else _PLAIN, padding=(0, 1, 0, 0), show_edge=False)
    for n, name in enumerate(header):
        table.add_column(printable(name, console), justify="right" if n else "left", overflow="fold")
    for row in rows:
        table.add_row(*(printable(entry, console) for entry in row))
    console.print(table)


def _parts(
    keys: list[Column], columns: list[Column], rows: Sequence[Row], width: int
) -> list[tuple[list[Column], str]]:
    """How to break columns into tables that fit, and what joins a number with its interval."""
    taken = sum(min(WIDEST_KEY, _width(column, rows, " ")) + _GAP for column in keys) - 1  # padding alone at the end
    for joint in (" ", "\n"):
        if taken + sum(_width(column, rows, joint) + _GAP for column in columns) <= width:
            return [(columns, joint)]
    parts: list[list[Column]] = [[]]
    room = width - taken
    for column in columns:
        needed = _width(column, rows, "\n") + _GAP
        if parts[-1] and needed > room:
            parts.append([])
            room = width - taken
        parts[-1].append(column)
        room -= needed
    return [(part, "\n") for part in parts]


def _width(column: Column, rows: Sequence[Row], joint: str) -> int:
    texts = [column.title, *(joint.join(_halves(column.entry(row), joint)) for row in rows)]
    return max(cell_len(line) for text in texts for line in text.split("\n"))


def _halves(entry: Entry, joint: str) -> list[str]:
    """A number and its interval; on a line of its own the interval needs no brackets."""
    dash = " to " if "-" in entry.low + entry.high else "-"
    interval = f"{entry.low}{dash}{entry.high}" if joint == "\n" and entry.low else entry.interval
    return [half for half in (entry.text, interval) if half]


def _cell(entry: Entry, joint: str, console: Console) -> Text:
    halves = [printable(half, console, style) for half, style in zip(_halves(entry, joint), ("", "dim"), strict=False)]
    return Text(joint).join(halves)


def printable(text: str, console: Console, style: str = "") -> Text:
    """Never markup: names may hold brackets. What the console's encoding lacks becomes a question mark."""
    return Text(text.encode(console.encoding, "replace").decode(console.encoding), style=style)


def markdown(columns: list[Column], rows: Sequence[Row]) -> str:
    lines = [[escaped(column.title) for column in columns], ["--:" if c.number else ":--" for c in columns]]
    lines += [[escaped(" ".join(_halves(column.entry(row), " "))) for column in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def escaped(text: str) -> str:
    """Neither HTML nor Markdown survives in a name; an underscore inside a word is safe and stays readable.

    In a pull request a name calls nobody and is no link: that takes a space of no width, as a backslash is not enough.
    """
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*\[\]|~#!])", r"\\\1", text)
    text = re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)
    return re.sub(r"@(?=\w)|:(?=//)|www(?=\.)", "\\g<0>\u200b", text)
