"""Logging set-up and rate-limited logging."""

import atexit
import functools
import logging
import os
import sys
import time
from collections.abc import Mapping

from detectron2.utils.file_io import PathManager
from tabulate import tabulate
from termcolor import colored

_DATE_FORMAT = "%m/%d %H:%M:%S"
_PLAIN_FORMAT = "[%(asctime)s] %(name)s %(levelname)s: %(message)s"
_COLOR_FORMAT = colored("[%(asctime)s %(name)s]: ", "green") + "%(message)s"


class _ColorfulFormatter(logging.Formatter):
    """Abbreviates the root logger's name and marks warnings and errors in red."""

    def __init__(self, root_name: str, abbrev_name: str):
        super().__init__(_COLOR_FORMAT, datefmt=_DATE_FORMAT)
        self._root, self._abbrev = root_name + ".", abbrev_name + "." if abbrev_name else ""

    def formatMessage(self, record: logging.LogRecord) -> str:
        fields = {**record.__dict__, "name": record.name.replace(self._root, self._abbrev)}
        text = super().formatMessage(logging.makeLogRecord(fields))
        if record.levelno < logging.WARNING:
            return text
        name = "WARNING" if record.levelno == logging.WARNING else "ERROR"
        return colored(name, "red", attrs=["blink"]) + " " + text


@functools.lru_cache  # a second call with the same arguments adds no second handler
def setup_logger(
    output: str | None = None,
    distributed_rank: int = 0,
    *,
    color: bool = True,
    name: str = "detectron2",
    abbrev_name: str | None = None,
    enable_propagation: bool = False,
    configure_stdout: bool = True,
) -> logging.Logger:
    """Set up the logger `name` at level DEBUG: stdout on rank 0, and a file on every rank.

    output: a file (ends in .txt or .log) or a folder, which gets `log.txt`; ranks above 0 append
        `.rankN` to the name. None writes no file.
    abbrev_name: replaces `name` on stdout ("d2" for "detectron2"); "" leaves it out.
    """
    logger = logging.getLogger(name)
    logger.setLevel(logging.DEBUG)
    logger.propagate = enable_propagation
    plain = logging.Formatter(_PLAIN_FORMAT, datefmt=_DATE_FORMAT)
    handlers = []
    if configure_stdout and distributed_rank == 0:
        short = ("d2" if name == "detectron2" else name) if abbrev_name is None else abbrev_name
        formatter = _ColorfulFormatter(name, short) if color else plain
        handlers.append((sys.stdout, formatter))
    if output is not None:
        filename = output if output.endswith((".txt", ".log")) else os.path.join(output, "log.txt")
        filename += f".rank{distributed_rank}" if distributed_rank > 0 else ""
        PathManager.mkdirs(os.path.dirname(filename))
        handlers.append((_log_stream(filename), plain))
    for stream, formatter in handlers:
        handler = logging.StreamHandler(stream)
        handler.setFormatter(formatter)
        logger.addHandler(handler)
    return logger


@functools.cache  # loggers that write to one file share one stream
def _log_stream(filename: str):
    stream = PathManager.open(filename, "a")
    atexit.register(stream.close)
    return stream


_last_logged: dict[tuple[str, int], float] = {}


def log_every_n_seconds(lvl: int, msg: str, n: float = 1, *, name: str | None = None) -> None:
    """Log at most once in `n` seconds from the calling line; `name` is by default its module."""
    frame = sys._getframe(1)
    line, now = (frame.f_code.co_filename, frame.f_lineno), time.time()
    if now - _last_logged.get(line, float("-inf")) >= n:
        logging.getLogger(name or frame.f_globals["__name__"]).log(lvl, msg)
        _last_logged[line] = now


def create_small_table(small_dict: Mapping[str, float]) -> str:
    """Return a one-row Markdown table whose header is the dictionary's keys."""
    style = {"tablefmt": "pipe", "floatfmt": ".3f", "stralign": "center", "numalign": "center"}
    return tabulate([tuple(small_dict.values())], headers=tuple(small_dict), **style)
