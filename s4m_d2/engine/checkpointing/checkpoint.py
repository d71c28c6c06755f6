"""The checkpointer: files written at once, and which of them a run continues from."""

import contextlib
import logging
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm
from torch import nn

from s4m_d2.engine.checkpointing.weight_names import ClassLists, LoadReport, fit
from s4m_d2.errors import S4MError, WeightsError, attempt, raise_all
from s4m_d2.files import atomic_write
from s4m_d2.pretrained import read_weight_file

LAST_CHECKPOINT = "last_checkpoint"
FINAL_CHECKPOINT = "model_final.pth"
_FINAL_POSITION = sys.maxsize
_NUMBERED = re.compile(r"model_(\d{7,})\.pth")

logger = logging.getLogger(__name__)


class S4MCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer with four changes.

    - Files are written atomically, ``last_checkpoint`` after the file.
    - Resuming skips damaged files, and old files can be removed (``keep``).
    - Loading runs no code of the file. It reads our own ``.pth``, ``.pkl`` and ``.safetensors``,
      published ones of Mask2Former, Guided Distillation and S4M, bare state dicts, and backbones
      of Detectron2's model zoo, of torchvision and of timm.
    - Parameters that were not loaded are always reported (:class:`LoadReport`).

    Args:
        save_dir: "": nothing is saved.
        keep: number of numbered checkpoints (model_0000099.pth) that are kept; 0: all.
        classes: class names of the first weights, () if unknown, and of the model (:func:`fit`).
        **options: Detectron2's, and other objects to save and load, by name.
    """

    last_report: LoadReport | None = None  #: of the last call to :meth:`load`
    saved_iteration: int | None = None  #: of the last checkpoint that was written or resumed
    resumed_from: str = ""  #: the checkpoint from which the run was resumed

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        keep: int = 0,
        classes: ClassLists = ((), ()),
        **options: Any,
    ) -> None:
        super().__init__(model, save_dir, **options)
        self.keep, self.classes = keep, classes

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``name``.pth into ``save_dir``, tag it as the last checkpoint, remove old ones."""
        if not self.save_dir or not self.save_to_disk:
            return
        content = {"model": self.model.state_dict()}
        content |= {key: obj.state_dict() for key, obj in self.checkpointables.items()}
        file_name, self.saved_iteration = f"{name}.pth", kwargs.get("iteration")
        path = os.path.join(self.save_dir, file_name)
        self.logger.info("Saving checkpoint to %s", path)
        with atomic_write(path, "wb") as file:
            torch.save(content | kwargs, file)
        self.tag_last_checkpoint(file_name)
        for old in superseded(self.save_dir, file_name, self.keep):
            try:
                os.unlink(os.path.join(self.save_dir, old))
            except OSError as error:
                self.logger.warning("The old checkpoint '%s' cannot be removed: %s", old, error)

    def has_checkpoint(self) -> bool:
        """True if ``save_dir`` has checkpoints, even without ``last_checkpoint``."""
        return bool(self.save_dir) and holds_run(self.save_dir)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Make ``resume_or_load`` resume from this file of ``save_dir``."""
        with atomic_write(os.path.join(self.save_dir, LAST_CHECKPOINT)) as file:
            file.write(last_filename_basename)

    def load(
        self,
        path: str,
        checkpointables: Sequence[str] | None = None,
        *,
        branch: str = "student",
        require: bool = False,
    ) -> dict[str, Any]:
        """Load weights into the model, and the states of other objects in the file.

        Args:
            path: a file, or an address of Detectron2's path manager. "" loads nothing.
            checkpointables: names of the other objects; None: all in the file.
            branch: "student" or "teacher", if the file has both. If it has only the other one, that
                one is loaded, with a warning.
            require: every parameter and buffer of the model must be in the file. Otherwise heads
                may keep their initial weights, but something must match, and the backbone must fit.

        Returns the rest of the file's content, for example "iteration". WeightsError: the file
        cannot be read, is unsafe, or is of another model; the model is unchanged.
        """
        if not path and not require:
            self.logger.info("No weights given: the model starts from its initial values.")
            return {}
        content = self._read(path)
        found = self._load_weights(content, path, branch, require, self.classes).branch
        if found not in (None, branch):
            self.logger.warning("%s: no %s; the %s is loaded.", path, branch, found)
        names = self.checkpointables if checkpointables is None else checkpointables
        return self._load_rest(content, names)

    def inspect(self, path: str, *, branch: str = "student", require: bool = False) -> LoadReport:
        """Report what :meth:`load` would do, by names; the model may be on the meta device."""
        content = self._read(path, mapped=True)
        return fit(self.model.state_dict(), content, branch, path, require, self.classes)[0]

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Resume from ``save_dir``'s last checkpoint if requested and possible, or load ``path``,
        of a file with both models the teacher.

        To resume, the file must have all of the model and the state of every other object. If it is
        damaged, the previous one is used, with a warning.
        """
        if not (resume and self.has_checkpoint()):
            return self.load(path, checkpointables=[], branch="teacher")
        is_main = comm.is_main_process()  # which chooses for all
        found, errors = attempt(find_complete, self.save_dir) if is_main else (None, [])
        name, errors = comm.all_gather((found and found[0], errors))[0]
        raise_all(errors)
        path = os.path.join(self.save_dir, name)
        content = found[1] if found else read_weight_file(path, verified=True)
        absent = [key for key in self.checkpointables if key not in content]
        if absent:
            raise WeightsError(
                f"Cannot continue from '{path}': it holds no state of {', '.join(absent)}. "
                "Start without --resume and give the file as MODEL.WEIGHTS."
            )
        self._load_weights(content, path, "student", True, ((), ()))
        self.resumed_from, self.saved_iteration = path, content.get("iteration")
        return self._load_rest(content, self.checkpointables)

    def finish(self) -> None:
        """Make the checkpoint from which the run was resumed the final one."""
        final = os.path.join(self.save_dir, FINAL_CHECKPOINT)
        if not self.save_to_disk:
            return
        if self.resumed_from != final:
            with open(self.resumed_from, "rb") as source, atomic_write(final, "wb") as file:
                shutil.copyfileobj(source, file)
        self.tag_last_checkpoint(FINAL_CHECKPOINT)

    def reopen(self, iteration: int) -> None:
        """Rename the final checkpoint to a numbered one, if the run was resumed from it."""
        final = os.path.join(self.save_dir, FINAL_CHECKPOINT)
        if not self.save_to_disk or self.resumed_from != final:
            return
        name = f"{numbered_name(iteration)}.pth"
        os.replace(final, os.path.join(self.save_dir, name))
        self.tag_last_checkpoint(name)

    def _load_weights(
        self, content: dict, path: str, branch: str, require: bool, classes: ClassLists
    ) -> LoadReport:
        report, state = fit(self.model.state_dict(), content, branch, path, require, classes)
        self.model.load_state_dict(state, strict=False)
        self.last_report = report
        self.logger.log(logging.WARNING if report.is_surprising else logging.INFO, "%s", report)
        return report

    def _load_rest(self, content: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
        for name in [name for name in names if name in content]:
            try:
                self.checkpointables[name].load_state_dict(content.pop(name))
            except (LookupError, TypeError, ValueError, RuntimeError) as error:
                raise WeightsError(
                    f"Cannot continue: the checkpoint's state of {name!r} does not fit this run "
                    f"({type(error).__name__}: {error}). Continue with the run's config, or start "
                    "without --resume and give the file as MODEL.WEIGHTS."
                ) from error
        content.pop("model", None)
        return content

    def _read(self, path: str, *, mapped: bool = False) -> dict[str, Any]:
        try:
            local_path = self.path_manager.get_local_path(path)
        except OSError as error:
            raise WeightsError(
                f"Weights '{path}' cannot be fetched ({error}). Download the file by other means "
                "and give its path."
            ) from error
        return read_weight_file(local_path, mapped=mapped)


def numbered_name(iteration: int) -> str:
    """Name, without ".pth", of the checkpoint written after an iteration (from 0)."""
    return f"model_{iteration:07d}"


def _position(name: str) -> int | None:
    """Iteration of a checkpoint by its name, the final one's is the largest; None: not one."""
    match = _NUMBERED.fullmatch(name)
    return _FINAL_POSITION if name == FINAL_CHECKPOINT else int(match[1]) if match else None


def ranked(folder: str, first: str = "") -> list[str]:
    """Names of a folder's checkpoints in the order in which to try to resume from them.

    ``first``, even if it does not exist; then earlier ones, the latest first; then later ones, the
    earliest first. Without ``first``, all from the latest to the earliest.
    """
    found = os.listdir(folder) if os.path.isdir(folder) else []
    places = {name: place for name in found if (place := _position(name)) is not None}
    limit = _position(first)
    limit = _FINAL_POSITION if limit is None else limit
    order = sorted(places, key=lambda name: (places[name] > limit, abs(places[name] - limit)))
    return [first, *(name for name in order if name != first)] if first else order


def tagged(folder: str) -> str:
    """Name in ``last_checkpoint``; "" if it is missing or unreadable."""
    try:
        with open(os.path.join(folder, LAST_CHECKPOINT), encoding="utf-8") as file:
            name = file.read().strip()
    except (OSError, ValueError):
        return ""
    return name if name.isprintable() else ""


def holds_run(folder: str) -> bool:
    """True if this folder has a checkpoint that could be resumed or overwritten."""
    return os.path.exists(os.path.join(folder, LAST_CHECKPOINT)) or bool(ranked(folder))


def superseded(folder: str, newest: str, keep: int) -> list[str]:
    """Numbered checkpoints to remove after ``newest`` was written, to keep ``keep``; 0: all."""
    names = [name for name in ranked(folder, newest) if _NUMBERED.fullmatch(name)]
    return names[keep or len(names) :]


def find_complete(folder: str) -> tuple[str, dict[str, Any]]:
    """Name and content of the first complete :func:`ranked` checkpoint; WeightsError: none is."""
    problems: list[S4MError] = []
    for name in ranked(folder, tagged(folder)):
        path = os.path.join(folder, name)
        try:
            content = read_weight_file(path, verified=True)
        except WeightsError as error:
            problems.append(error)
            continue
        for problem in problems:
            logger.warning("%s Continuing from '%s' instead, the same run.", problem, path)
        return name, content
    reasons = " ".join(map(str, problems)) or "There is none."
    raise WeightsError(
        f"Cannot continue: '{folder}' holds no complete checkpoint. {reasons} Copy a complete "
        f"file there and write its name into '{LAST_CHECKPOINT}', or begin anew in another "
        "OUTPUT_DIR."
    )


def saved_state(folder: str) -> tuple[str, dict[str, Any]]:
    """As :func:`find_complete`, memory-mapped, without verifying checksums; ("", {}): none."""
    for name in ranked(folder, tagged(folder)):
        with contextlib.suppress(WeightsError, OSError):
            return name, read_weight_file(os.path.join(folder, name), mapped=True)
    return "", {}


def has_final(folder: str) -> bool:
    """True if the folder has a final checkpoint that is not truncated; little of it is read."""
    return zipfile.is_zipfile(os.path.join(folder, FINAL_CHECKPOINT))
