"""The run's report: one page with what was run, what it reached, and what is missing."""

from sft.report.page import write_report

__all__ = ["write_report"]
