"""Run in a process of its own: runs commands one after the other, as they stand, in this folder.

Reads a JSON list of commands, each the words after `python`, from standard input; writes a list of
[exit status, what it printed].
"""

import contextlib
import io
import json
import logging
import runpy
import signal
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


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
    """Exit status and output; logging and signals are afterwards as they were."""
    loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore", "s4m_d2")]
    handlers = [list(logger.handlers) for logger in loggers]
    signals = [signal.getsignal(number) for number in SIGNALS]
    text, status = io.StringIO(), 0
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        try:
            status = run(words)
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
            text.write("" if isinstance(end.code, int | None) else str(end.code))
        except BaseException:  # of the command alone; the others are run
            status = -1
            traceback.print_exc()
    for logger, before in zip(loggers, handlers, strict=True):
        logger.handlers[:] = before
    for number, before in zip(SIGNALS, signals, strict=True):
        signal.signal(number, before)
    return status, text.getvalue()


if __name__ == "__main__":
    request = json.load(sys.stdin)
    print(json.dumps([output_of(words) for words in request]))
