"""Figures of a few fixed images, and the hook that draws them during training."""

from __future__ import annotations

import copy
import functools
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.data import transforms as T
from detectron2.engine import HookBase
from detectron2.structures import Instances
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from s4m_d2.data import DATASET_MAPPER_REGISTRY, LabeledDatasetMapper, StrongView
from s4m_d2.engine.figures.predictor import Predictor, class_names
from s4m_d2.engine.labeling.pseudo_labeling import PseudoLabeling, UnlabeledViews
from s4m_d2.engine.rng import sample_seeds, undisturbed_generators
from s4m_d2.engine.training.build import labeled_names
from s4m_d2.errors import ConfigError, InputError, OutputError, S4MError
from s4m_d2.losses.structural_distillation import StructuralDistillation
from s4m_d2.sam import SamBackend
from s4m_d2.semi.refinement import TeacherMasks
from s4m_d2.structures import PseudoLabels, sample_generators
from s4m_d2.tiling import build_tiling
from s4m_d2.visualization import (
    ColorScale,
    Panels,
    deepest_point,
    evenly_spaced,
    heat_map,
    mark_point,
    outline,
    overlay,
    readable_scale,
    write_png,
)

logger = logging.getLogger(__name__)

FOLDER = "figures"  # in the stage's
FIGURES = ("labeled", "views", "pseudo_labels", "arp", "similarity", "predictions")
WITHOUT_MODEL = ("labeled", "views")  # do not change during training
OF_TEACHER = ("pseudo_labels", "arp")
DRAWS = 3  # of augmentations, for each labeled image
PAIR_ALL = 0.5  # S4M.ARP.PAIR_FRACTION with which every image of a figure is paired
SCORE_SHOWN = 0.5  # predictions below it are not drawn
CAPTION = "A color stands for an instance; those of touching instances differ."
COSINE_STEP = 0.1  # the color scale, up to 1, starts at a multiple of it
POINT_CAPTION = "Ring: the point. SAM: its tokens there. Models: mask features on SAM's grid."
SAM = "SAM"

Sample = Mapping[str, Any]


class FigureSet:
    """Draws figures of fixed images, which are read when they are first drawn.

    Default generators, modules' modes and gradients are afterwards as they were.

    Args:
        cfg: config of a stage, or of a whole run.
        count: images per figure.
        models: by name in the figures; empty: no predictions and similarities.
        labeling: of stage 2; None: no pseudo-labels and ARP.
        backend: SAM; None: no similarities.
        resized: resize validation images as in evaluation. (With INPUT.TILE, predictions are of
            whole images, other figures of resized tiles.)
        point: (x, y) in pixels of the image, for similarities; None: inside the largest instance.
    """

    def __init__(
        self,
        cfg: CfgNode,
        count: int,
        models: Mapping[str, nn.Module] | None = None,
        labeling: PseudoLabeling | None = None,
        backend: SamBackend | None = None,
        *,
        resized: bool = False,
        point: tuple[float, float] | None = None,
    ) -> None:
        self.models, self.labeling = dict(models or {}), labeling
        self.backend, self.point = backend, point
        self.order = cfg.INPUT.FORMAT
        self._rgb = functools.partial(to_rgb, order=self.order)
        self.names = functools.cache(lambda: class_names(cfg))
        tiled = bool(cfg.INPUT.TILE.SIZE)  # each is resized on its own
        samples = functools.partial(validation_samples, cfg, count)
        self._whole = functools.cache(lambda: samples(resized=resized and not tiled))
        tiles = functools.cache(lambda: samples(tiles=True, resized=True))
        self._validation = tiles if tiled else self._whole
        self._labeled = functools.cache(lambda: labeled_samples(cfg, count, DRAWS))
        self._unlabeled = functools.cache(lambda: unlabeled_samples(cfg, count))
        self._strong_view = StrongView(cfg).batch
        self._predictor = functools.partial(Predictor, cfg)

    @classmethod
    def of_stage(
        cls,
        cfg: CfgNode,
        count: int,
        model: nn.Module,
        labeling: PseudoLabeling | None = None,
        **options: Any,
    ) -> FigureSet:
        """Build the figures of a stage: of its model without wrappers and, in stage 2, labeling."""
        models = {os.path.basename(cfg.OUTPUT_DIR): model}  # by the stage's name
        if labeling is not None:
            models["teacher"] = labeling.teacher.model
        user = getattr(model, "distillation", None) if labeling is None else labeling.refiner
        return cls(cfg, count, models, labeling, getattr(user, "backend", None), **options)

    def choose(self, wanted: Sequence[str] = FIGURES) -> list[str]:
        """Select the wanted figures that can be drawn."""
        can = {
            "pseudo_labels": self.labeling is not None,
            "arp": self.labeling is not None and self.labeling.arp is not None,
            "similarity": self.backend is not None and bool(self.models),
            "predictions": bool(self.models),
        }
        return [name for name in wanted if can.get(name, True)]

    def draw(self, name: str) -> np.ndarray:
        """Draw one of FIGURES, (H, W, 3) uint8 RGB.

        S4MError: an image or annotation is missing or malformed, or a model lacks a method.
        """
        with undisturbed(*self.models.values()):
            return getattr(self, f"{name}_panels")().draw()

    def labeled_panels(self) -> Panels:
        """Labeled images, plain and augmented."""
        rows = [[self._truth(sample) for sample in row] for row in self._labeled()]
        draws = (f"augmented, draw {draw}" for draw in range(1, len(rows[0])))
        return Panels(["labeled image", *draws], rows, caption=CAPTION)

    def views_panels(self) -> Panels:
        """Unlabeled images: plain, weak and strong view."""
        samples = self._unlabeled()
        plain = [sample["image"] for sample in samples]
        weak = [sample["image_weak"] for sample in samples]
        strong = self._strong_view(plain, sample_generators(samples, "strong_view", "cpu"))
        rows = [list(map(self._rgb, views)) for views in zip(plain, weak, strong, strict=True)]
        return Panels(["geometry", "weak view (teacher, SAM)", "strong view (student)"], rows)

    def pseudo_labels_panels(self) -> Panels:
        """The way of images through stage 2: the teacher's pseudo-labels, refined, exchanged, and
        what the first model, the student, predicts."""
        samples, names, rows = self._validation(), self.names(), []
        assert self.labeling is not None
        student, model = next(iter(self.models.items()), ("", None))
        for start in range(0, len(samples), 2):  # in pairs, which exchange instances
            pair = samples[start : start + 2]
            views, refines, exchanges = self._label(pair)
            for i, sample in enumerate(pair):
                weak = self._rgb(sample["image_weak"])
                mixed = self._rgb(views.student_batch[i]["image"])
                height, width = weak.shape[:2]
                labels = views.selections[i].labels
                masks = views.selections[i].masks_at((height, width))
                row: list[np.ndarray | None] = [
                    weak,
                    self._truth({**sample, "image": sample["image_weak"]}),
                    draw_labels(weak, labels.with_masks(masks), names, scores=True),
                    draw_labels(weak, views.refined[i], names) if refines else None,
                    draw_labels(mixed, views.arp_labels[i], names) if exchanges else None,
                ]
                if model is not None:
                    [output] = model([{**sample, "height": height, "width": width}])
                    row += [draw_found(self._rgb(sample["image"]), output["instances"], names)]
                rows.append(row)
        columns = ["weak view", "ground truth", "teacher's pseudo-labels", "refined by SAM"]
        columns += ["ARP, strong view", f"{student}'s predictions"]
        caption = f"{CAPTION} Percentages: scores; predictions from {SCORE_SHOWN:.0%} on."
        return Panels(columns[: len(rows[0])], rows, caption=caption)

    def arp_panels(self) -> Panels:
        """Before and after the exchange of instances, and the student's input."""
        samples, names, rows = self._validation(), self.names(), []
        views, *_ = self._label(samples)
        for i, sample in enumerate(samples):
            before, after = self._rgb(sample["image"]), self._rgb(views.arp_images[i])
            labels = draw_labels(after, views.arp_labels[i], names)
            outlined = outline(labels, (before != after).any(2))
            student = self._rgb(views.student_batch[i]["image"])
            rows.append([draw_labels(before, views.refined[i], names), outlined, student])
        columns = ["before the paste", "after the paste", "student's input (strong view)"]
        caption = f"{CAPTION} Black and white outlines: pasted from the partner."
        return Panels(columns, rows, caption=caption)

    def similarity_panels(self) -> Panels:
        samples = self._validation()
        points = [self.point or point_of(sample) for sample in samples]
        distillation = StructuralDistillation(backend=self.backend)
        return similarity_panels(samples, points, self.models, distillation, self.order)

    def predictions_panels(self) -> Panels:
        """Images, ground truth, and each model's predictions."""
        samples, names = self._whole(), self.names()
        images = [self._rgb(sample["image"]) for sample in samples]
        columns = [images, [self._truth(sample) for sample in samples]]
        for model in self.models.values():
            predict = self._predictor(model)
            columns.append([draw_found(i, predict(i), names) for i in images])
        caption = f"{CAPTION} Percentages: scores; from {SCORE_SHOWN:.0%} on."
        rows = [list(row) for row in zip(*columns, strict=True)]
        return Panels(["image", "ground truth", *self.models], rows, caption=caption)

    def _label(self, samples: Sequence[Sample]) -> tuple[UnlabeledViews, bool, bool]:
        """Label as in training, each image with a partner; whether masks are refined, exchanged."""
        assert self.labeling is not None
        labeling = copy.copy(self.labeling)
        if labeling.arp is not None:
            labeling.arp = copy.copy(labeling.arp)
            labeling.arp.pair_fraction = PAIR_ALL
        refines = not isinstance(labeling.refiner, TeacherMasks)
        return labeling(samples), refines, labeling.arp is not None

    def _truth(self, sample: Sample) -> np.ndarray:
        image, truth = self._rgb(sample["image"]), sample["instances"]
        return overlay(image, truth.gt_masks.tensor, truth.gt_classes, self.names())


def draw_labels(
    image: np.ndarray, labels: PseudoLabels, names: Sequence[str], *, scores: bool = False
) -> np.ndarray:
    """Draw an image with pseudo-labels of its size."""
    shown = labels.scores.tolist() if scores else None
    return overlay(image, labels.masks.cpu(), labels.labels.tolist(), names, shown)


def draw_found(image: np.ndarray, found: Instances, names: Sequence[str]) -> np.ndarray:
    """Draw an image with predictions of its size, those of at least SCORE_SHOWN."""
    found = found[found.scores >= SCORE_SHOWN].to("cpu")
    labels, scores = found.pred_classes.tolist(), found.scores.tolist()
    return overlay(image, found.pred_masks, labels, names, scores)


def validation_samples(
    cfg: CfgNode, count: int, *, tiles: bool = False, resized: bool = False
) -> list[dict]:
    """Choose the validation images, or tiles, with most instances in evenly spaced groups.

    Returns samples with "image", the same as "image_weak", "instances" and "seeds"; not augmented,
    with ``resized`` as in evaluation.
    """
    if not cfg.DATASETS.TEST:
        raise ConfigError("DATASETS.TEST is empty: name the data set whose images are drawn.")
    records = DatasetCatalog.get(cfg.DATASETS.TEST[0])
    records = build_tiling(cfg).records(records) if tiles else records
    group = max(1, len(records) // count)
    chosen = [
        max(records[start : start + group], key=lambda record: len(record["annotations"]))
        for start in range(0, min(group * count, len(records)), group)
    ]
    sizes = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
    mapper = _plain_mapper(cfg, [T.ResizeShortestEdge(*sizes, "choice")] if resized else [])
    samples = [mapper(record) for record in _seeded(cfg, chosen)]
    return [{**sample, "image_weak": sample["image"]} for sample in samples]


def labeled_samples(cfg: CfgNode, count: int, draws: int) -> list[list[dict]]:
    """Labeled images or tiles, each plain and with ``draws`` augmentations of training."""
    records = [record for name in labeled_names(cfg) for record in DatasetCatalog.get(name)]
    chosen = evenly_spaced(build_tiling(cfg).records(records, filter_empty=True), count)
    augmented = DATASET_MAPPER_REGISTRY.get(cfg.INPUT.DATASET_MAPPER_NAME)(cfg, True)
    columns = [map(_plain_mapper(cfg, []), _seeded(cfg, chosen))]
    columns += [map(augmented, _seeded(cfg, chosen, f"draw {draw}")) for draw in range(draws)]
    return [list(row) for row in zip(*columns, strict=True)]


def unlabeled_samples(cfg: CfgNode, count: int) -> list[dict]:
    """Unlabeled images or tiles as in training: "image", "image_weak" and "seeds"."""
    records = [record for name in cfg.DATASETS.UNLABELED for record in DatasetCatalog.get(name)]
    if not records:
        raise ConfigError("DATASETS.UNLABELED is empty: name the unlabeled set that is drawn.")
    chosen = evenly_spaced(build_tiling(cfg).records(records), count)
    views = DATASET_MAPPER_REGISTRY.get(cfg.S4M.UNLABELED_MAPPER)(cfg, True)
    return list(map(views, _seeded(cfg, chosen, "unlabeled")))


def _seeded(cfg: CfgNode, records: Sequence[Sample], stream: str = "overview") -> list[dict]:
    return [
        {**record, "seeds": sample_seeds(cfg.SEED, stream, position)}
        for position, record in enumerate(records)
    ]


def _plain_mapper(cfg: CfgNode, geometry: Sequence[Any]) -> LabeledDatasetMapper:
    return LabeledDatasetMapper(
        geometry=geometry,
        color=None,
        image_format=cfg.INPUT.FORMAT,
        num_classes=cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
    )


def to_rgb(image: Tensor, order: str = "RGB") -> np.ndarray:
    """(3, H, W) uint8 in ``order`` → (H, W, 3) RGB array."""
    array = image.permute(1, 2, 0).cpu().numpy()
    return np.ascontiguousarray(array if order == "RGB" else array[:, :, ::-1])


@torch.no_grad()
def similarity_maps_at(
    sample: Sample,
    point: tuple[float, float],
    models: Mapping[str, nn.Module],
    distillation: StructuralDistillation,
) -> tuple[dict[str, np.ndarray], tuple[float, float]]:
    """Compute the similarity maps that structural distillation compares, for one point.

    Args:
        sample: "file_name" and "image" (3, H, W) uint8 in the models' channel order.
        point: (x, y) in pixels of the image.
        models: at least one, in eval mode.

    Returns cosines between the point and the grid's cells with content, (rows, columns) float32, of
    SAM's tokens (SAM) and of each model by name; number of (rows, columns) of the content.

    InputError: the point is outside the image. ConfigError: a model has no ``mask_features``.
    """
    height, width = sample["image"].shape[-2:]
    x, y = point
    if not (0 <= x < width and 0 <= y < height):
        image = f"{sample['file_name']}, which is {width} x {height} px"
        raise InputError(f"The point {x:g} {y:g} lies outside {image}. Give pixels of the image.")
    place = (x + 0.5) / width, (y + 0.5) / height
    maps: dict[str, Tensor] = {}
    model: Any
    for name, model in models.items():
        if not hasattr(model, "mask_features"):
            raise ConfigError(
                f"{type(model).__name__} has no mask_features(batched_inputs), which similarity "
                "maps need: see S4MMaskFormer.mask_features, or leave 'similarity' out."
            )
        features, images, sizes = model.mask_features([sample])
        points = torch.tensor([[place]], device=images.device)
        own, sam, content = distillation.similarities(features, images, sizes, points)
        maps |= {SAM: sam, name: own}
    side = distillation.backend.grid_side
    rows, columns = int(content[0].any(1).sum()), int(content[0].any(0).sum())
    grids = {
        name: values.view(side, side)[: max(rows, 1), : max(columns, 1)].cpu().numpy()
        for name, values in maps.items()
    }
    across, down = distillation.backend.grid_scale((height, width))
    return grids, (down * side, across * side)


def similarity_panels(
    samples: Sequence[Sample],
    points: Sequence[tuple[float, float]],
    models: Mapping[str, nn.Module],
    distillation: StructuralDistillation,
    order: str,
) -> Panels:
    """Images with a point each, and their :func:`similarity_maps_at`; ``order``: RGB or BGR."""
    pairs = zip(samples, points, strict=True)
    found = [similarity_maps_at(*pair, models, distillation) for pair in pairs]
    lowest = min(float(grid.min()) for grids, _ in found for grid in grids.values())
    low = min(math.floor(lowest / COSINE_STEP) * COSINE_STEP, 1.0 - COSINE_STEP)
    scale = ColorScale(low, 1.0, "cosine similarity")
    rows = []
    for sample, point, (grids, cells) in zip(samples, points, found, strict=True):
        image = to_rgb(sample["image"], order)
        factor = readable_scale(image)  # as other figures' pictures
        image = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)
        colored = [heat_map(grid, image.shape[:2], scale, cells) for grid in grids.values()]
        place = [(value + 0.5) * factor for value in point]
        rows.append([mark_point(picture, place) for picture in (image, *colored)])
    return Panels(["image", SAM, *models], rows, scale=scale, caption=POINT_CAPTION)


def point_of(sample: Sample) -> tuple[float, float]:
    """Pixel (x, y) farthest inside the largest instance; without instances, the center."""
    height, width = sample["image"].shape[-2:]
    masks = sample["instances"].gt_masks.tensor
    if not len(masks):
        return (width // 2, height // 2)
    return deepest_point(masks[int(masks.flatten(1).sum(1).argmax())].cpu().numpy())


@contextmanager
def undisturbed(*models: nn.Module) -> Iterator[None]:
    """Run the block in eval mode without gradients; modes and default generators are restored."""
    modes = {module: module.training for model in models for module in model.modules()}
    for module in modes:
        module.training = False
    try:
        with torch.no_grad(), undisturbed_generators():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


class FiguresHook(HookBase):
    """Draws the same figures of the same images every ``period`` iterations, in the main process.

    Each is written to ``folder/NAME_ITERATION.png`` and to TensorBoard as figures/NAME, those of
    WITHOUT_MODEL once. Training continues without a figure that cannot be drawn or written.
    """

    def __init__(self, figures: FigureSet, names: Sequence[str], period: int, folder: str) -> None:
        self.figures, self.names, self.period, self.folder = figures, list(names), period, folder

    def after_step(self) -> None:
        finished = self.trainer.iter + 1
        if finished % self.period:
            return
        for name in list(self.names):
            try:
                picture = self.figures.draw(name)
            except (S4MError, torch.cuda.OutOfMemoryError) as error:
                logger.warning("The figure '%s' is left out from here on: %s", name, error)
                self.names.remove(name)
                continue
            get_event_storage().put_image(f"{FOLDER}/{name}", picture.transpose(2, 0, 1))
            try:
                write_png(picture, os.path.join(self.folder, f"{name}_{finished:07d}.png"))
            except OutputError as error:  # maybe not for long
                logger.warning("The figure '%s' is not written: %s", name, error)
            if name in WITHOUT_MODEL:
                self.names.remove(name)


def figure_hooks(cfg: CfgNode, model: nn.Module, labeling: Any = None) -> list[FiguresHook]:
    """Build the hook of S4M.FIGURES, if enabled; arguments as of :meth:`FigureSet.of_stage`."""
    settings = cfg.S4M.FIGURES
    if not settings.PERIOD or not comm.is_main_process():
        return []
    figures = FigureSet.of_stage(cfg, settings.IMAGES, model, labeling)
    names, folder = figures.choose(settings.WHAT), os.path.join(cfg.OUTPUT_DIR, FOLDER)
    return [FiguresHook(figures, names, settings.PERIOD, folder)]
