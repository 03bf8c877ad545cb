"""A posterior in words for a reader: one page about it, and tables for a terminal."""

from pyrolora.report.report import Report, page_file, report_on
from pyrolora.report.terminal import as_table

__all__ = ["Report", "as_table", "page_file", "report_on"]
