"""Loads a trained model of a checkpoint; predicts on single images, or labels them as stage 2."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from torch import nn

from s4m_d2.engine import own_data
from s4m_d2.engine.checkpointing.checkpoint import S4MCheckpointer
from s4m_d2.engine.labeling.pseudo_labeling import PseudoLabeling
from s4m_d2.engine.stages import stage_config
from s4m_d2.errors import ConfigError
from s4m_d2.evaluation import masks_as_rle
from s4m_d2.files import read_lines
from s4m_d2.structures import PseudoLabels, RLEMasks, encode_masks, mask_boxes
from s4m_d2.tiling import TiledModel


def load_model(cfg: CfgNode, weights: str, branch: str) -> tuple[nn.Module, str | None]:
    """Load the ``branch`` "student" or "teacher" of a checkpoint of either stage, in eval mode.

    Returns the model, and which of the two it is according to the file; None: it has one model.
    WeightsError: the file is missing, damaged or of another model.
    """
    model = build_model(stage_config(cfg, "student"))  # without distillation
    checkpointer = S4MCheckpointer(model)
    checkpointer.load(weights, checkpointables=[], branch=branch, require=True)
    report = checkpointer.last_report
    return model.eval(), report.branch if report else None


def class_names(cfg: CfgNode, file_name: str = "") -> list[str]:
    """Find the names of a model's classes, without reading a data set.

    From the file (one name per line, in the order of the class ids), else from the run on own data,
    which stored them in its OUTPUT_DIR, else from the metadata of the first of DATASETS.TEST, or
    of TRAIN, else "class 0", "class 1", ... ConfigError: the number is not
    MODEL.SEM_SEG_HEAD.NUM_CLASSES. DatasetError: the file, or the run's, cannot be read.
    """
    count = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    origin = folder = os.path.join(cfg.OUTPUT_DIR, own_data.FOLDER)
    names: Sequence[str] = [f"class {index}" for index in range(count)]
    if file_name:
        names, origin = [*filter(None, read_lines(file_name))], file_name
    elif cfg.S4M.DATA.LABELED and own_data.is_stored(folder):
        names = own_data.read_stored(folder).classes
    elif known := (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
        origin = known[0]
        names = MetadataCatalog.get(origin).get("thing_classes", names)
    if len(names) != count:
        raise ConfigError(
            f"'{origin}' names {len(names)} classes; MODEL.SEM_SEG_HEAD.NUM_CLASSES is {count}. "
            "Give a file with one name per line, in the order of the class ids, as --class-names."
        )
    return list(names)


class Predictor:
    """Segments single images as in evaluation: resized, or in tiles, with masks at full size.

    ``model`` is a Detectron2 meta-architecture in eval mode.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module) -> None:
        self.model, self.input_format = TiledModel(cfg, model), cfg.INPUT.FORMAT

    @torch.no_grad()
    def __call__(self, image: np.ndarray, min_score: float = 0.0) -> Instances:
        """Segment an image, (H, W, 3) uint8 RGB; instances with a lower score are left out.

        Returns Instances of size (H, W) on the CPU, best first: ``pred_masks``, ``pred_classes``,
        ``scores``. The masks are :class:`~s4m_d2.structures.RLEMasks` if the model supports it.
        """
        view = image if self.input_format == "RGB" else image[:, :, ::-1]
        tensor = torch.from_numpy(np.require(view, requirements=["C", "W"])).permute(2, 0, 1)
        with masks_as_rle(self.model.model):
            found = self.model([{"image": tensor}])
        instances = found[0]["instances"].to("cpu")
        instances = instances[instances.scores >= min_score]
        return instances[instances.scores.argsort(descending=True, stable=True)]


class Labeler(nn.Module):
    """Stage 2's labeling as a model, by the training's thresholds, for a :class:`Predictor`."""

    def __init__(self, labeling: PseudoLabeling) -> None:
        super().__init__()
        self.labeling, self.training = labeling, False

    @torch.no_grad()
    def forward(self, batched_inputs: Sequence[Mapping[str, Any]]) -> list[dict[str, Instances]]:
        """As of a Detectron2 model; the "instances", none empty, have ``pred_masks``
        (:class:`RLEMasks`), ``pred_boxes``, ``scores``, ``pred_classes`` and ``sam_ious`` (nan: the
        mask is not SAM's).
        """
        _, refinement = self.labeling.label([dict(sample) for sample in batched_inputs])
        return [
            {"instances": _instances(labels, (s.get("height", h), s.get("width", w)))}
            for labels, s in zip(refinement.labels, batched_inputs, strict=True)
            for h, w in [labels.image_size]
        ]


def _instances(labels: PseudoLabels, size: tuple[int, int]) -> Instances:
    rles, boxes = [], [labels.masks.new_zeros((0, 4), dtype=torch.float32)]
    for mask in labels.masks.unsqueeze(1):  # at full size in the memory of one
        if labels.image_size != size:
            mask = F.interpolate(mask[None].float(), size, mode="bilinear")[0] > 0.5
        rles += encode_masks(mask)
        boxes.append(mask_boxes(mask))
    ious = labels.sam_ious
    found = Instances(
        size,
        pred_masks=RLEMasks(rles, size),
        pred_boxes=Boxes(torch.cat(boxes)),
        scores=labels.scores,
        pred_classes=labels.labels,
        sam_ious=torch.full_like(labels.scores, math.nan) if ious is None else ious,
    )
    return found[found.pred_boxes.nonempty()]
