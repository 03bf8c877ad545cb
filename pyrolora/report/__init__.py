"""The page that a report is: what it holds, and how it is written."""

from pyrolora.report.report import Report, page_file, report_on

__all__ = ["Report", "page_file", "report_on"]
