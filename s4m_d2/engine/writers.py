"""What a run logs, on a disk that may be full for a while."""

from __future__ import annotations

import logging

from detectron2.utils.events import EventWriter

logger = logging.getLogger(__name__)


class ForgivingWriter(EventWriter):
    """A writer whose failures to write end no training.

    The values of the iterations in between are lost to this writer. Each outage is reported once.

    Args:
        writer: of metrics.json or TensorBoard's files.
    """

    def __init__(self, writer: EventWriter) -> None:
        self._writer = writer
        self._failing = False

    def write(self) -> None:
        try:
            self._writer.write()
        except OSError as error:
            self._report(error)
        else:
            self._failing = False

    def close(self) -> None:
        try:
            self._writer.close()
        except OSError as error:
            self._report(error)

    def _report(self, error: OSError) -> None:
        if not self._failing:
            logger.warning(
                "%s cannot write: %s. Training goes on without these records; free space or "
                "correct the permissions.", type(self._writer).__name__, error,
            )  # fmt: skip
        self._failing = True
