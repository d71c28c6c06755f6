"""Write OUTPUT_DIR/report.html from the files in the output folders of runs.

    python tools/report.py output/quickstart

Training writes the page when it ends; this command writes it again, or for a run that is still
training or was killed. The page needs no network: results of both models by class, pictures, curves
of losses, pseudo-labels and AP, settings.
"""

from __future__ import annotations

import argparse
import sys

from s4m_d2.engine.command.run_report import write_report
from s4m_d2.errors import S4MError


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", metavar="OUTPUT_DIR", help="of a training")
    args = parser.parse_args(arguments)
    try:
        for folder in args.folders:
            print(write_report(folder))
    except S4MError as error:
        sys.exit(f"{type(error).__name__}: {error}")
