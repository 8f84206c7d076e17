"""Reports: the summary in a terminal or as Markdown, the budget, and one HTML file.

Each is imported when it is first used: `imprint.release`, which the page is written with, needs only the readings.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_WHERE = {
    "print_summary": "imprint.report.summary",
    "to_markdown": "imprint.report.summary",
    "write_report": "imprint.report.html",
}
__all__ = ["print_summary", "to_markdown", "write_report"]

if TYPE_CHECKING:
    from imprint.report.html import write_report
    from imprint.report.summary import print_summary, to_markdown


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'imprint.report' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)
