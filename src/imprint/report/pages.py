"""What every page has in common: our own templates and style, tables, a file that appears whole."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from imprint.report.sheet import Sheet, shown_rows
from imprint.report.words import clean
from imprint.store import atomic_file

SHORT, WIDE = 4, 48
"""Characters of the longest cell of a column, its title among them."""


def template(name: str) -> jinja2.Template:
    """One of our own templates; what is put into it is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_asset),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def _asset(name: str) -> str:
    """One of our own files."""
    return files("imprint.report").joinpath(name).read_text(encoding="utf-8")


def style() -> dict[str, Any]:
    """The style, the only text besides the figures that is not escaped, and the hash by which a page allows it."""
    text = _asset("report.css") + _asset("study.css")
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return {"style": Markup(text), "style_hash": digest}


def page_table(sheet: Sheet) -> dict[str, Any]:
    """A sheet as `sheet.html.j2` shows it."""
    rows = shown_rows(sheet)
    widths = [max([len(name), *(len(row[n].text) for row in rows)]) for n, name in enumerate(sheet.header)]
    kinds = [_kind(n < sheet.group, sheet.numeric[n], width) for n, width in enumerate(widths)]
    return {
        "title": clean(sheet.title),
        "columns": [(clean(name), kind) for name, kind in zip(sheet.header, kinds, strict=True)],
        "group": sheet.group,
        "rows": rows,
        "remarks": sheet.remarks,
    }


def _kind(key: bool, number: bool, width: int) -> str:
    """The classes of a column: a key that takes little room, a number, or a text that needs some to be read."""
    if key:
        return "key short" if width <= SHORT else "key"
    return "n" if number else "wide" if width > WIDE else ""


def write_page(path: Path, page: str) -> Path:
    """The file, whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8", newline="\n")
    return path
