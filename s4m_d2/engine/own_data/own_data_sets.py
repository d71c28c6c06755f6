"""The data sets of a run on own data: registered, stored and reported."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

from detectron2.utils import comm

from s4m_d2.data.annotations import Annotations
from s4m_d2.data.custom import register_own_data
from s4m_d2.data.listing import counted
from s4m_d2.engine.checks.findings import Finding
from s4m_d2.engine.own_data import own_data_files as files

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OwnData:
    """What a run on own data trains and is evaluated on.

    Attributes:
        stored: classes, derived settings and unlabeled images.
        labeled, validation: annotated images; None: no evaluation.
        ground_truth: the COCO file that evaluation compares with; it exists after :meth:`save`.
        unlabeled_dir: "" without stage 2.
        folder: where the run keeps its data.
        is_new: the run begins: everything is to be stored there.
        notes: what the user should know.
        kept: keys that would have been derived but are the user's.
    """

    stored: files.StoredData
    labeled: Annotations
    validation: Annotations | None
    ground_truth: str
    unlabeled_dir: str
    folder: str
    is_new: bool
    notes: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()

    def register(self) -> None:
        """Register the data sets in this process, under the names of :mod:`s4m_d2.data.custom`."""
        validation = None
        if self.validation is not None:
            validation = self.validation, self.ground_truth
        unlabeled = None
        if self.unlabeled_dir:
            unlabeled = self.unlabeled_dir, self.stored.unlabeled
        register_own_data(labeled=self.labeled, unlabeled=unlabeled, validation=validation)

    def save(self, *, warn: bool = False) -> None:
        """Write what the run begins with, where that is not done; all processes call it.

        Args:
            warn: also log the notes, where no check before the run has shown them.

        Raises:
            OutputError: the system refuses to write.
        """
        if comm.is_main_process():
            self._write()
            for note in self.notes if warn else ():
                logger.warning("%s", note)
        comm.synchronize()  # the others read the ground truth when they build an evaluator

    def _write(self) -> None:
        val = None
        if self.validation is not None and self.ground_truth != self.validation.json_file:
            val = self.validation.to_coco()
        if self.is_new:
            files.store(self.folder, self.stored, self.labeled.to_coco(), val)
        elif val is not None:
            files.write_json(self.ground_truth, val)

    def findings(self) -> list[Finding]:
        """Lines of the report before training: the classes, then each derived setting."""
        names = self.stored.classes
        text = f"{len(names)} class{'es' * (len(names) > 1)}: {', '.join(names)}"
        if self.unlabeled_dir and self.stored.left_out:
            text += f"; left out of the unlabeled folder: {counted(self.stored.left_out)}"
        if not self.is_new:
            text += f"; as the run began, in {os.path.relpath(self.folder)}"
        lines = [Finding("own data", text, (), self.notes)]
        kept = set(self.kept)
        settings = [setting for setting in self.stored.settings if setting.key not in kept]
        lines += [Finding("derived", str(setting)) for setting in settings]
        if kept:
            lines.append(Finding("not derived", f"set by you: {', '.join(self.kept)}"))
        return lines
