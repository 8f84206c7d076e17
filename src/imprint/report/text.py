"""The summary as text: for a terminal of any width, for a file it is piped into, and as Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from imprint.report import words
from imprint.report.notes import budget_note, fixed_note, reasons, record_notes
from imprint.report.tables import (
    Column,
    Entry,
    Row,
    budget_columns,
    cost_columns,
    key_columns,
    outcome_columns,
    point_columns,
    summary,
)
from imprint.results import Grid

LAST = "At the last epoch"
BEST = "At the epoch of best validation perplexity"
_GAP = 2
_WIDEST_KEY = 24


def print_summary(grid: Grid, frame: pd.DataFrame, console: Console) -> None:
    """Print what was trained, both blocks of the summary, and what was left out.

    A table that is wider than the console first puts its intervals on a second line, then continues in another
    table. Off a terminal the same comes as plain text.
    """
    rows = summary(grid, frame)
    keys = key_columns(rows)
    tuned = [row for row in rows if row.run_id is not None]
    last, best = point_columns(grid.attacks, lambda row: row.last), point_columns(grid.attacks, lambda row: row.best)
    _print_block("What was trained", keys, [*cost_columns(), *outcome_columns()], tuned, console)
    _print_block(f"{LAST}: AUC of each attack with its 95% interval", keys, last, rows, console)
    _print_block(BEST, keys, [*best, *budget_columns(grid)], rows, console)
    for note in _notes(grid, rows):
        console.print(_text(note, console), highlight=False)


def to_markdown(grid: Grid, frame: pd.DataFrame) -> str:
    """Both blocks of the summary as Markdown tables, and the notes under them."""
    rows = summary(grid, frame)
    keys = key_columns(rows)
    last = [*cost_columns(), *point_columns(grid.attacks, lambda row: row.last), *outcome_columns()]
    best = [*point_columns(grid.attacks, lambda row: row.best), *budget_columns(grid)]
    notes = [f"- {_escaped(note)}" for note in _notes(grid, rows)]
    blocks = [f"**{LAST}**", _markdown([*keys, *last], rows), f"**{BEST}**", _markdown([*keys, *best], rows)]
    return "\n\n".join([*blocks, "\n".join(notes)]) + "\n"


def _notes(grid: Grid, rows: Sequence[Row]) -> list[str]:
    return [*reasons(rows), *budget_note(grid), *fixed_note(grid.attacks), *record_notes(grid)]


def _print_block(title: str, keys: list[Column], columns: list[Column], rows: Sequence[Row], console: Console) -> None:
    for number, (part, joint) in enumerate(_parts(keys, columns, rows, console.width)):
        heading = title if number == 0 else f"{title}, continued"
        console.print(_text(heading, console, "bold"), highlight=False)
        table = Table(box=box.SIMPLE_HEAD if console.is_terminal else box.ASCII2, padding=(0, 1), show_edge=False)
        for column in [*keys, *part]:
            table.add_column(
                _text(column.title, console),
                justify="right" if column.number else "left",
                overflow="fold",
                max_width=_WIDEST_KEY if column.key else None,
                no_wrap=not column.key,
            )
        for row in rows:
            entries = [column.entry(row) for column in [*keys, *part]]
            table.add_row(*(_cell(entry, joint, console) for entry in entries))
        console.print(table)
        console.print()


def _parts(
    keys: list[Column], columns: list[Column], rows: Sequence[Row], width: int
) -> list[tuple[list[Column], str]]:
    """How to break columns into tables that fit, and what joins a number with its interval."""
    taken = sum(min(_WIDEST_KEY, _width(column, rows, " ")) + _GAP + 1 for column in keys)
    for joint in (" ", "\n"):
        if taken + sum(_width(column, rows, joint) + _GAP + 1 for column in columns) <= width:
            return [(columns, joint)]
    parts: list[list[Column]] = [[]]
    room = width - taken
    for column in columns:
        needed = _width(column, rows, "\n") + _GAP + 1
        if parts[-1] and needed > room:
            parts.append([])
            room = width - taken
        parts[-1].append(column)
        room -= needed
    return [(part, "\n") for part in parts]


def _width(column: Column, rows: Sequence[Row], joint: str) -> int:
    texts = [column.title, *(_joined(column.entry(row), joint) for row in rows)]
    return max(Text(line).cell_len for text in texts for line in text.split("\n"))


def _joined(entry: Entry, joint: str) -> str:
    """A number with its interval; reasons are too long for a column and become notes."""
    return joint.join(filter(None, (entry.text, entry.more if entry.exact else "")))


def _cell(entry: Entry, joint: str, console: Console) -> Text:
    number, *interval = _joined(entry, joint).split(joint, 1)
    text = _text(number, console)
    if interval:
        text.append(joint).append(_text(interval[0], console, "dim"))
    return text


def _text(text: str, console: Console, style: str = "") -> Text:
    """Never markup: names may hold brackets. What the console's encoding lacks becomes a question mark."""
    return Text(text.encode(console.encoding, "replace").decode(console.encoding), style=style)


def _markdown(columns: list[Column], rows: Sequence[Row]) -> str:
    lines = [[_escaped(column.title) for column in columns], ["--:" if c.number else ":--" for c in columns]]
    lines += [[_escaped(_joined(column.entry(row), " ")) for column in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _escaped(text: str) -> str:
    """Neither HTML nor Markdown survives in a name; an underscore inside a word is safe and stays readable."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*\[\]|~#!])", r"\\\1", text)
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\_", text)
