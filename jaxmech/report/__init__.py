"""The report: from a run folder's tables to one self-contained page and a summary in the terminal."""

from jaxmech.report.page import write_report
from jaxmech.report.summary import print_summary, show
from jaxmech.report.verdict import ClaimCard, cards

__all__ = ["ClaimCard", "cards", "print_summary", "show", "write_report"]
