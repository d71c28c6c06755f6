"""From a batch of unlabeled images to what the student learns from: views and pseudo-labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from detectron2.config import configurable
from detectron2.structures import ImageList
from torch import Tensor

from s4m_d2.data.transforms import StrongView
from s4m_d2.engine.protocol import QueryPredictions, check_predictions
from s4m_d2.sam import SamBackend, build_sam_backend
from s4m_d2.semi.arp import ARP
from s4m_d2.semi.ema_teacher import EMATeacher
from s4m_d2.semi.pseudo_labels import Selection, select_pseudo_labels
from s4m_d2.semi.refinement import Refinement, build_refiner
from s4m_d2.structures import PseudoLabels, sample_generators


@dataclass(frozen=True)
class UnlabeledViews:
    """Every step between an unlabeled batch and the student's input, for training and drawing.

    Attributes:
        student_batch: samples as the model trains on them: strong view and pseudo-labels.
        selections: the teacher's kept predictions, at prediction resolution.
        refined: the pseudo-labels at image size, before ARP.
        arp_images: (3, H, W) uint8 after ARP, before the strong view's colors.
        arp_labels: the pseudo-labels after ARP.
        stats: scalars to log.
    """

    student_batch: list[dict]
    selections: list[Selection]
    refined: list[PseudoLabels]
    arp_images: list[Tensor]
    arp_labels: list[PseudoLabels]
    stats: dict[str, float] = field(default_factory=dict)


class PseudoLabeling:
    """Teacher → selection → refinement → ARP → strong view (paper, sections 3.3 and 3.4).

    The teacher and SAM see the weak view; ARP and the strong view start from the same geometry
    without the weak view's color distortion. Nothing here is differentiated.

    Args:
        teacher: its model must be :class:`~s4m_d2.engine.protocol.S4MTrainable`.
        refiner: a refiner of REFINER_REGISTRY, or the teacher's own masks.
        arp: None switches it off.
        strong_view: color augmentation of the student's images.
        score_thresh, min_area, mask_thresh: see :func:`select_pseudo_labels`.
        input_format: "RGB" or "BGR", the channel order of the samples' images.
        num_classes: K, which the teacher's logits must have; None: not checked.
    """

    @configurable
    def __init__(
        self,
        *,
        teacher: EMATeacher,
        refiner,
        arp: ARP | None,
        strong_view: StrongView,
        score_thresh: float,
        min_area: float,
        mask_thresh: float,
        input_format: str = "RGB",
        num_classes: int | None = None,
    ) -> None:
        self.teacher = teacher
        self.refiner = refiner
        self.arp = arp
        self.strong_view = strong_view
        self.selection = dict(score_thresh=score_thresh, min_area=min_area, mask_thresh=mask_thresh)
        self.input_format = input_format
        self.num_classes = num_classes

    @classmethod
    def from_config(cls, cfg, teacher: EMATeacher, backend: SamBackend | None = None):
        if backend is None and cfg.S4M.REFINE.ENABLED:
            backend = build_sam_backend(cfg)
        return {
            "teacher": teacher,
            "refiner": build_refiner(cfg, backend),
            "arp": ARP(cfg) if cfg.S4M.ARP.ENABLED else None,
            "strong_view": StrongView(cfg),
            "score_thresh": cfg.S4M.PSEUDO_LABEL.SCORE_THRESH,
            "min_area": cfg.S4M.PSEUDO_LABEL.MIN_AREA,
            "mask_thresh": cfg.S4M.PSEUDO_LABEL.MASK_THRESH,
            "input_format": cfg.INPUT.FORMAT,
            "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
        }

    @torch.no_grad()
    def __call__(self, batch: Sequence[Mapping[str, Any]]) -> UnlabeledViews:
        """Label ``batch``, samples of :class:`~s4m_d2.data.ARPDatasetMapper`.

        Raises:
            InputError: the teacher's predictions are not of the form that the protocol asks for.
        """
        weak = [{**sample, "image": sample["image_weak"]} for sample in batch]
        teacher = self.teacher.model
        predictions = teacher.predict_queries(weak)
        sizes = [tuple(sample["image"].shape[-2:]) for sample in weak]
        check_predictions(predictions, sizes, teacher, self.num_classes)
        device = predictions["pred_logits"][0].device
        selections = self.select(predictions)
        refinement = self.refine(weak, selections, device)

        images = [sample["image"].to(device) for sample in batch]
        labels = refinement.labels
        if self.arp is not None:
            images, labels = self.arp(images, labels, sample_generators(batch, "arp", "cpu"))
        return UnlabeledViews(
            student_batch=self._student_batch(batch, images, labels),
            selections=selections,
            refined=refinement.labels,
            arp_images=images,
            arp_labels=labels,
            stats=label_statistics(selections, refinement, labels),
        )

    def select(self, predictions: QueryPredictions) -> list[Selection]:
        """Apply the thresholds to each image of ``predict_queries``' result."""
        height, width = predictions["padded_size"]
        return [
            select_pseudo_labels(
                logits.float(),
                masks.float(),
                content_size=(h * masks.shape[1] / height, w * masks.shape[2] / width),
                **self.selection,
            )
            for logits, masks, (h, w) in zip(
                predictions["pred_logits"],
                predictions["pred_masks"],
                predictions["image_sizes"],
                strict=True,
            )
        ]

    def refine(
        self, weak: list[dict], selections: list[Selection], device: torch.device
    ) -> Refinement:
        """Refined pseudo-labels at image size; SAM sees the weak view."""
        images = ImageList.from_tensors([sample["image"].to(device) for sample in weak])
        rgb = images.tensor if self.input_format == "RGB" else images.tensor.flip(1)
        generators = sample_generators(weak, "refine_points", device)
        return self.refiner(selections, rgb, images.image_sizes, generators)

    def _student_batch(
        self,
        batch: Sequence[Mapping[str, Any]],
        images: list[Tensor],
        labels: list[PseudoLabels],
    ) -> list[dict]:
        generators = sample_generators(batch, "strong_view", "cpu") or [None] * len(batch)
        kept = ("file_name", "image_id", "height", "width", "seeds")
        return [
            {
                **{key: sample[key] for key in kept if key in sample},
                "image": self.strong_view(image, generator),
                "instances": label.to_instances(),
            }
            for sample, image, label, generator in zip(
                batch, images, labels, generators, strict=True
            )
        ]


def label_statistics(
    selections: Sequence[Selection], refinement: Refinement, after_arp: Sequence[PseudoLabels]
) -> dict[str, float]:
    """Scalars that show how the labeling is doing (means over the batch of one process)."""
    totals: dict[str, float] = {}
    for selection in selections:
        for name, value in selection.stats.items():
            totals[name] = totals.get(name, 0.0) + float(value)
    images, queries = len(selections), max(totals.pop("queries"), 1.0)
    kept = totals.pop("kept")
    stats = {
        "pseudo_labels/per_image": kept / images,
        "pseudo_labels/per_image_after_arp": sum(map(len, after_arp)) / images,
    }
    stats.update({f"pseudo_labels/{name}": value / queries for name, value in totals.items()})
    if len(refinement.predicted_ious):
        stats["refinement/predicted_iou"] = float(refinement.predicted_ious.mean())
        stats["refinement/fallbacks"] = refinement.num_fallbacks / len(refinement.predicted_ious)
    return stats
