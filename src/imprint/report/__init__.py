"""Reports: the summary in a terminal or as Markdown, the budget, and one HTML file."""

from imprint.report.html import write_report
from imprint.report.readings import within_budget
from imprint.report.text import print_summary, to_markdown

__all__ = ["print_summary", "to_markdown", "within_budget", "write_report"]
