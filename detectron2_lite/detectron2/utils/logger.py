"""Logging set-up, and tables for the log."""

import atexit
import functools
import logging
import os
import sys
from collections.abc import Mapping

from detectron2.utils.file_io import PathManager
from tabulate import tabulate
from termcolor import colored

_DATE_FORMAT = "%m/%d %H:%M:%S"
_PLAIN_FORMAT = "[%(asctime)s] %(name)s %(levelname)s: %(message)s"
_COLOR_FORMAT = colored("[%(asctime)s %(name)s]: ", "green") + "%(message)s"


class _ColorfulFormatter(logging.Formatter):
    """Marks warnings and errors in red."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        text = super().formatMessage(record)
        if record.levelno < logging.WARNING:
            return text
        return colored(record.levelname, "red", attrs=["blink"]) + " " + text


@functools.lru_cache  # a second call with the same arguments adds no second handler
def setup_logger(
    output: str | None = None,
    distributed_rank: int = 0,
    *,
    color: bool = True,
    name: str = "detectron2",
) -> logging.Logger:
    """Set up the logger `name` at level DEBUG: stdout on rank 0, and a file on every rank.

    output: a file (ends in .txt or .log) or a folder, which gets `log.txt`; ranks above 0 append
        `.rankN` to the name. None writes no file.
    """
    logger = logging.getLogger(name)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    plain = logging.Formatter(_PLAIN_FORMAT, datefmt=_DATE_FORMAT)
    handlers = []
    if distributed_rank == 0:
        colorful = _ColorfulFormatter(_COLOR_FORMAT, datefmt=_DATE_FORMAT)
        handlers.append((sys.stdout, colorful if color else plain))
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


def create_small_table(small_dict: Mapping[str, float]) -> str:
    """Return a one-row Markdown table whose header is the dictionary's keys."""
    style = {"tablefmt": "pipe", "floatfmt": ".3f", "stralign": "center", "numalign": "center"}
    return tabulate([tuple(small_dict.values())], headers=tuple(small_dict), **style)
