"""Run in a process of its own: runs commands one after the other, as they stand, in this folder.

Reads a JSON list of commands, each the words after `python`, from standard input; writes a list of
[exit status, what it printed].
"""

import contextlib
import io
import json
import runpy
import sys
import traceback
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
from helpers import ROOT, signals_and_logging_kept  # noqa: E402


def run(words: list[str]) -> int:
    """A script of the project, or `-c CODE`; its exit status."""
    if words[0] == "-c":
        exec(compile(words[1], "-c", "exec"), {"__name__": "__main__"})
        return 0
    script = ROOT / words[0]
    sys.argv = [str(script), *words[1:]]
    sys.path.insert(0, str(script.parent))
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.path.remove(str(script.parent))
    return 0


def output_of(words: list[str]) -> tuple[int, str]:
    """Exit status and output."""
    text, status = io.StringIO(), 0
    output = contextlib.redirect_stdout(text), contextlib.redirect_stderr(text)
    with output[0], output[1], signals_and_logging_kept():
        try:
            status = run(words)
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
            text.write("" if isinstance(end.code, int | None) else str(end.code))
        except BaseException:  # of the command alone; the others are run
            status = -1
            traceback.print_exc()
    return status, text.getvalue()


if __name__ == "__main__":
    request = json.load(sys.stdin)
    print(json.dumps([output_of(words) for words in request]))
