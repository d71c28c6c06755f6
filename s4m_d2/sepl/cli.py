"""The command line of SEPL, `s4m-sepl` or `python tools/sepl.py`."""

from __future__ import annotations

import argparse
import sys

from s4m_d2.errors import S4MError
from s4m_d2.sepl import enhance_command, evaluate_command, visualize_command

DESCRIPTION = "Enhance CAM pseudo-labels with SAM's masks (SEPL, arXiv 2305.05803)."
DEFAULT_COMMAND = "enhance"
COMMANDS = {
    "enhance": (enhance_command, "redraw a folder of pseudo-labels (what is done without a name)"),
    "evaluate": (evaluate_command, "IoU of each class and mIoU, before and after"),
    "visualize": (visualize_command, "pictures of image, label maps and masks"),
}


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = argparse.ArgumentParser(prog="s4m-sepl", description=DESCRIPTION)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, text) in COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=text))
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run a command; the exit status: 0 all done, 1 an error, or images that failed, 2 misuse."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if not words or words[0] not in (*COMMANDS, "-h", "--help"):
        words.insert(0, DEFAULT_COMMAND)
    args = build_parser().parse_args(words)
    try:
        return COMMANDS[args.command][0].run(args)
    except S4MError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
