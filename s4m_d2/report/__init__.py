"""Results of a run: files for other tools, and report.html."""

from s4m_d2.report.curves import read_curves, read_results, write_results
from s4m_d2.report.page import render_page
from s4m_d2.report.run import Run, Settings, Stage, pictures_of

__all__ = [
    "Run",
    "Settings",
    "Stage",
    "pictures_of",
    "read_curves",
    "read_results",
    "render_page",
    "write_results",
]
