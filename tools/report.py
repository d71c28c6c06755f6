#!/usr/bin/env python
"""Write OUTPUT_DIR/report.html from what lies in the output folders of runs."""

from s4m_d2.commands.report import main

if __name__ == "__main__":
    raise SystemExit(main())
