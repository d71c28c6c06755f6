"""Loads a trained model of a checkpoint, and predicts on single images."""

from __future__ import annotations

import os

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Instances
from torch import nn

from s4m_d2.engine.checkpointing.checkpoint import S4MCheckpointer
from s4m_d2.engine.own_data import own_data_files
from s4m_d2.engine.stages import stage_config
from s4m_d2.errors import ConfigError
from s4m_d2.evaluation import masks_as_rle
from s4m_d2.files import read_lines
from s4m_d2.tiling import TiledModel


def load_model(cfg: CfgNode, weights: str, branch: str) -> tuple[nn.Module, str | None]:
    """Load the ``branch`` "student" or "teacher" of a checkpoint of either stage, in eval mode.

    Returns:
        the model, and which of the two it is according to the file; None: the file has one model.

    Raises:
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
    which stored them in its OUTPUT_DIR, else from the metadata of the first of DATASETS.TEST, else
    "class 0", "class 1", ...

    Raises:
        ConfigError: the number is not MODEL.SEM_SEG_HEAD.NUM_CLASSES.
        DatasetError: the file, or the stored files of the run, cannot be read.
    """
    count = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    folder = os.path.join(cfg.OUTPUT_DIR, own_data_files.FOLDER)
    names: list[str] | None
    if file_name:
        names, origin = [*filter(None, read_lines(file_name))], f"'{file_name}'"
    elif cfg.S4M.DATA.LABELED and own_data_files.is_stored(folder):
        names, origin = list(own_data_files.read_stored(folder).classes), f"'{folder}'"
    else:
        first = next(iter(cfg.DATASETS.TEST), "")
        names = MetadataCatalog.get(first).get("thing_classes") if first else None
        origin = f"the data set '{first}'"
    if names is None:
        return [f"class {index}" for index in range(count)]
    if len(names) != count:
        raise ConfigError(
            f"{origin} names {len(names)} classes, but MODEL.SEM_SEG_HEAD.NUM_CLASSES is {count}. "
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
        """Segment one image.

        Args:
            image: (H, W, 3) uint8, RGB.
            min_score: instances with a lower score are left out.

        Returns:
            Instances of size (H, W) on the CPU, best first: ``pred_masks``, ``pred_classes``,
            ``scores``. The masks are :class:`~s4m_d2.structures.RLEMasks` if the model supports it.
        """
        view = image if self.input_format == "RGB" else image[:, :, ::-1]
        tensor = torch.from_numpy(np.require(view, requirements=["C", "W"])).permute(2, 0, 1)
        with masks_as_rle(self.model.model):
            found = self.model([{"image": tensor}])
        instances = found[0]["instances"].to("cpu")
        instances = instances[instances.scores >= min_score]
        return instances[instances.scores.argsort(descending=True, stable=True)]
