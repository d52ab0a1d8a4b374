"""A run as a page to look at (``report.html``) and as a contact sheet."""

from tasks.report.write import write_report

__all__ = ["write_report"]
