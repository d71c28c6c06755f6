"""Saving at once, loading safely: one checkpointer for training, evaluation and backbones."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import parse_qs

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from torch import Tensor

from s4m_d2.engine.load_report import LoadReport, compare, refuse_unfit
from s4m_d2.engine.weight_files import read_weight_file
from s4m_d2.engine.weight_names import BRANCHES, ModelWeights, model_weights
from s4m_d2.errors import WeightsError
from s4m_d2.files import atomic_write
from s4m_d2.modeling.backbones.weight_names import to_own_names

LAST_CHECKPOINT = "last_checkpoint"


class S4MCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, on either engine, with three things changed.

    - A file appears under its name only when it is complete, and ``last_checkpoint`` after it.
    - Loading runs no code of the file: tensors and plain values from ``.pth``, arrays from
      ``.pkl``, tensors from ``.safetensors``. It reads our own files, published ones of
      Mask2Former, Guided Distillation and S4M, bare state dicts, and backbones of Detectron2's
      model zoo and of torchvision.
    - What was not loaded is never silent: see :class:`LoadReport`, and ``require`` of :meth:`load`.
    """

    #: The report of the last call to :meth:`load`.
    last_report: LoadReport | None = None

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``name``.pth into ``save_dir`` and tag it as the last checkpoint."""
        if not self.save_dir or not self.save_to_disk:
            return
        content = {"model": self.model.state_dict()}
        content |= {key: obj.state_dict() for key, obj in self.checkpointables.items()}
        content |= kwargs
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        with atomic_write(path, "wb") as file:
            torch.save(content, file)
        self.tag_last_checkpoint(f"{name}.pth")

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Make ``resume_or_load`` continue from this file of ``save_dir``."""
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
        """Load weights into the model, and the state of other objects that the file holds.

        Args:
            path: a file, or an address that Detectron2's path manager knows; "?matching_heuristics=
                True" after it matches names as suffixes. "" loads nothing.
            checkpointables: names of the other objects; None: all that the file holds.
            branch: "student" or "teacher", where the file holds both. If it says that it holds the
                other one only, that one is loaded, with a warning.
            require: every parameter and buffer of the model must be in the file. Without it, heads
                may start anew, but something must match, and a backbone's shapes must be right.

        Returns:
            What else the file holds, for example "iteration".

        Raises:
            WeightsError: the file cannot be read, is unsafe, or is of another model. The model then
                is as it was.
        """
        if branch not in BRANCHES:
            raise ValueError(f"branch must be one of {sorted(BRANCHES)}, got {branch!r}")
        if not path:
            if require:
                raise WeightsError("No weights given: set MODEL.WEIGHTS to a checkpoint.")
            self.logger.info("No weights given: the model starts from its initial values.")
            return {}
        content = self._read(path)
        weights = model_weights(content, branch, path)
        if weights.branch not in (None, branch):
            self.logger.warning(
                "%s holds a %s and no %s: the %s is loaded.",
                path, weights.branch, branch, weights.branch,
            )  # fmt: skip
        self._load_weights(weights, path, require)
        return self._load_rest(
            content, self.checkpointables if checkpointables is None else checkpointables
        )

    def inspect(self, path: str, *, branch: str = "student", require: bool = False) -> LoadReport:
        """What :meth:`load` would do with a file of weights; the model may be on the meta device.

        Args and errors are those of :meth:`load`. The values of a ``.pth`` are not read.
        """
        weights = model_weights(self._read(path, mapped=True), branch, path)
        return self._compare(weights, path, require)[0]

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Continue from ``save_dir``'s last checkpoint if asked and possible, or load ``path``.

        Continuing needs all of the model in the file, and the state of every other object.
        """
        if not (resume and self.has_checkpoint()):
            return self.load(path, checkpointables=[])
        path = self.get_checkpoint_file()
        try:
            content = read_weight_file(path)
        except WeightsError as error:
            tag = os.path.join(self.save_dir, LAST_CHECKPOINT)
            raise WeightsError(
                f"{error} To continue from an older checkpoint, write its name into '{tag}'."
            ) from error
        absent = [key for key in self.checkpointables if key not in content]
        if absent:
            raise WeightsError(
                f"Cannot continue from '{path}': it holds no state of {', '.join(absent)}. "
                "Start without --resume and give the file as MODEL.WEIGHTS."
            )
        self._load_weights(model_weights(content, "student", path), path, require=True)
        return self._load_rest(content, self.checkpointables)

    def _load_rest(self, content: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
        """Load the state of other objects; return what is left."""
        for name in names:
            if name not in content:
                continue
            try:
                self.checkpointables[name].load_state_dict(content.pop(name))
            except (LookupError, TypeError, ValueError, RuntimeError) as error:
                raise WeightsError(
                    f"Cannot continue: the checkpoint's state of {name!r} does not fit this run "
                    f"({type(error).__name__}: {error}). Continue with the config and the number "
                    "of parameters that the run began with, or start without --resume and give "
                    "the file as MODEL.WEIGHTS."
                ) from error
        content.pop("model", None)
        return content

    def _read(self, path: str, *, mapped: bool = False) -> dict[str, Any]:
        local_path, query = self._local_path(path)
        return {**read_weight_file(local_path, mapped=mapped), **query}

    def _local_path(self, path: str) -> tuple[str, dict[str, bool]]:
        name, _, query = (path, "", "") if os.path.exists(path) else path.partition("?")
        options = parse_qs(query)
        if options not in ({}, {"matching_heuristics": ["True"]}):
            raise WeightsError(f"Weights '{path}': only ?matching_heuristics=True may follow.")
        try:
            return self.path_manager.get_local_path(name), {k: True for k in options}
        except OSError as error:
            raise WeightsError(
                f"Weights '{name}' cannot be fetched ({error}). Download the file by other means "
                "and give its path."
            ) from error

    def _load_weights(self, weights: ModelWeights, path: str, require: bool) -> None:
        report, state = self._compare(weights, path, require)
        self.model.load_state_dict({name: state[name] for name in report.matched}, strict=False)
        self.last_report = report
        self.logger.log(logging.WARNING if report.is_surprising else logging.INFO, "%s", report)
        for line in report.lists():
            self.logger.debug("%s", line)

    def _compare(
        self, weights: ModelWeights, path: str, require: bool
    ) -> tuple[LoadReport, dict[str, Tensor]]:
        """What fits of a file's weights, and these under the model's names."""
        own = self.model.state_dict()
        state = to_own_names(weights.state, own)
        by_suffix = weights.by_suffix and state.keys() == weights.state.keys()
        if by_suffix:
            try:
                state = align_and_update_state_dicts(own, state, c2_conversion=weights.caffe2)
            except ValueError as error:
                raise WeightsError(f"Weights '{path}': {error}") from error
        report = compare(own, state, path, by_suffix=by_suffix, branch=weights.branch)
        refuse_unfit(report, own, require)
        return report, state
