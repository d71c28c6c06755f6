"""Saving at once, loading safely: one checkpointer for training, evaluation and backbones."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from torch import Tensor

from s4m_d2.engine.weight_files import BRANCHES, ModelWeights, model_weights, read_weight_file
from s4m_d2.errors import WeightsError
from s4m_d2.files import atomic_write
from s4m_d2.modeling.backbones.weight_names import ADDED_LAYERS, to_own_names

LAST_CHECKPOINT = "last_checkpoint"
BACKBONE_PREFIX = "backbone."
MIN_BACKBONE_SHARE = 0.9  # with less of the backbone in it, a file is of another backbone
SHOWN_NAMES = 5

_SET_BY_CONFIG = ("pixel_mean", "pixel_std")  # older files lack them
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class LoadReport:
    """What became of a file's weights. All names are the model's, but for ``unexpected``.

    Attributes:
        path: the file.
        matched: loaded.
        missing: of the model, not in the file.
        unexpected: of the file, not in the model.
        mismatched: (name, shape in the file, shape in the model), not loaded.
    """

    path: str
    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]

    def __str__(self) -> str:
        parts = [f"{len(self.matched)} parameters loaded from {self.path}"]
        parts += [
            f"{len(names)} {what} ({_first(names)})"
            for what, names in (
                ("not in the file", self.missing),
                ("of another shape", [_shapes(entry) for entry in self.mismatched]),
                ("of the file unused", self.unexpected),
            )
            if names
        ]
        return "; ".join(parts)


class S4MCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, on either engine, with three things changed.

    - A file appears under its name only when it is complete, and ``last_checkpoint`` after it.
    - Loading runs no code of the file: tensors and plain values from ``.pth``, arrays from
      ``.pkl``. It reads our own files, published ones of Mask2Former, Guided Distillation and S4M,
      bare state dicts, and backbones of Detectron2's model zoo and of torchvision.
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
            branch: "student" or "teacher", where the file holds both.
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
        local_path, query = self._local_path(path)
        content = {**read_weight_file(local_path), **query}
        self._load_weights(model_weights(content, branch, path), path, require)
        return self._load_rest(
            content, self.checkpointables if checkpointables is None else checkpointables
        )

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
            if name in content:
                self.checkpointables[name].load_state_dict(content.pop(name))
        content.pop("model", None)
        return content

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
        own = self.model.state_dict()
        state = to_own_names(weights.state, own)
        by_suffix = weights.by_suffix and state.keys() == weights.state.keys()
        if by_suffix:
            try:
                state = align_and_update_state_dicts(own, state, c2_conversion=weights.caffe2)
            except ValueError as error:
                raise WeightsError(f"Weights '{path}': {error}") from error
        report = _compare(own, state, by_suffix, path)
        _check(report, own, require)
        self.model.load_state_dict({name: state[name] for name in report.matched}, strict=False)
        self.last_report = report
        self.logger.log(logging.WARNING if _is_surprising(report) else logging.INFO, "%s", report)


def _compare(
    own: Mapping[str, Tensor], state: Mapping[str, Tensor], by_suffix: bool, path: str
) -> LoadReport:
    matched, missing, mismatched, used = [], [], [], set()
    for name, value in own.items():
        found = next((key for key in _candidates(name, by_suffix) if key in state), None)
        if found is None:
            if not name.endswith((*_SET_BY_CONFIG, "num_batches_tracked")):
                missing.append(name)
            continue
        used.add(found)
        if state[found].shape != value.shape:
            mismatched.append((name, tuple(state[found].shape), tuple(value.shape)))
        else:
            (matched if found == name else missing).append(name)
    unexpected = [key for key in state if key not in used]
    return LoadReport(path, *map(tuple, (matched, missing, unexpected, mismatched)))


def _candidates(name: str, by_suffix: bool) -> list[str]:
    """The names under which a file may hold a parameter, the longest first."""
    words = name.split(".")
    return [".".join(words[i:]) for i in range(len(words) if by_suffix else 1)]


def _check(report: LoadReport, own: Mapping[str, Tensor], require: bool) -> None:
    """Refuse a file that is not of this model, or not enough of it."""
    mismatched = [
        entry for entry in report.mismatched if require or entry[0].startswith(BACKBONE_PREFIX)
    ]
    if mismatched:
        raise WeightsError(
            f"Weights '{report.path}' are of another architecture: "
            f"{_first([_shapes(entry) for entry in mismatched])}. Use the config that the file was "
            "trained with, or weights that fit this config."
        )
    if not report.matched:
        raise WeightsError(
            f"Weights '{report.path}' hold nothing of this model: it has {_first(list(own))}; the "
            f"file has {_first(report.unexpected)}."
        )
    if require and report.missing:
        raise WeightsError(
            f"Weights '{report.path}' lack {len(report.missing)} of the model's {len(own)} "
            f"parameters: {_first(report.missing)}. A whole model is needed here, not a backbone; "
            "use a checkpoint of a training run with this config."
        )
    missing = [name for name in report.missing if _is_backbone_weight(name)]
    backbone = [name for name in own if _is_backbone_weight(name)]
    present = len(backbone) - len(missing)
    if 0 < present < MIN_BACKBONE_SHARE * len(backbone):
        raise WeightsError(
            f"Weights '{report.path}' hold only {present} of the backbone's {len(backbone)} "
            f"parameters; {_first(missing)} are missing. Set the backbone's depth to that of the "
            "file, or use weights that fit this config."
        )


def _is_surprising(report: LoadReport) -> bool:
    """Something did not fit, beyond a bare backbone that leaves the heads at their start."""
    bare = all(name.startswith(BACKBONE_PREFIX) for name in report.matched)
    missing = [name for name in report.missing if not bare or _is_backbone_weight(name)]
    return bool(report.mismatched or missing)


def _is_backbone_weight(name: str) -> bool:
    """Of a backbone that a file may hold: no statistics, and nothing that starts anew."""
    new = name.startswith(ADDED_LAYERS) or name.endswith(_STATISTICS)
    return name.startswith(BACKBONE_PREFIX) and not new


def _shapes(entry: tuple[str, tuple[int, ...], tuple[int, ...]]) -> str:
    name, in_file, in_model = entry
    return f"{name} is {in_file} in the file and {in_model} in the model"


def _first(names: Sequence[str]) -> str:
    more = ", …" if len(names) > SHOWN_NAMES else ""
    return ", ".join(names[:SHOWN_NAMES]) + more
