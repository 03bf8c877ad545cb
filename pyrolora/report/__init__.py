"""A posterior in words for a reader: a page, a model card, and tables for a terminal."""

from pyrolora.report.card import card_of
from pyrolora.report.publish import push, save
from pyrolora.report.report import Report, judge_by, page_file, report_on
from pyrolora.report.terminal import as_table

__all__ = ["Report", "as_table", "card_of", "judge_by", "page_file", "push", "report_on", "save"]
