"""Write OUTPUT_DIR/report.html from the files in the output folders of runs.

    python tools/report.py output/quickstart

Training writes the page when it ends; this command writes it again, or for a run that is still
training or was killed.
"""

from s4m_d2.engine.command.arguments import command_parser
from s4m_d2.engine.command.launch import exit_status
from s4m_d2.report import write_report


@exit_status
def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit status."""
    parser = command_parser(__doc__)
    parser.add_argument("folders", nargs="+", metavar="OUTPUT_DIR", help="of a training")
    for folder in parser.parse_args(arguments).folders:
        print(write_report(folder))
    return 0
