"""Results of a run: files for other tools, and report.html."""

from s4m_d2.report.curves import read_curves, read_results, stored_results, write_results
from s4m_d2.report.page import write_report

__all__ = ["read_curves", "read_results", "stored_results", "write_report", "write_results"]
