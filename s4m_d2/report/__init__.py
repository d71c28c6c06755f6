"""Results of a run: files for other tools, and report.html."""

from s4m_d2.report.page import write_report
from s4m_d2.report.run import read_curves, read_results, stored_results, write_results

__all__ = ["read_curves", "read_results", "stored_results", "write_report", "write_results"]
