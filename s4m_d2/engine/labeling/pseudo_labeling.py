"""From a batch of unlabeled images to the student's input: strong views and pseudo-labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from detectron2.config import configurable
from torch import Tensor

from s4m_d2.data.strong_view import StrongView
from s4m_d2.engine.labeling.protocol import QueryPredictions, check_predictions
from s4m_d2.sam import SamBackend, build_sam_backend
from s4m_d2.sam.precision import computing_in
from s4m_d2.semi.arp import ARP
from s4m_d2.semi.duplicates import drop_duplicates
from s4m_d2.semi.ema_teacher import EMATeacher
from s4m_d2.semi.pseudo_labels import Selection, select_in_batch
from s4m_d2.semi.refinement import Refinement, build_refiner
from s4m_d2.structures import PseudoLabels, drop_empty, sample_generators
from s4m_d2.transfers import to_device

FLOAT32, AMP = "float32", "amp"  # values of S4M.PSEUDO_LABEL.PRECISION
_KEPT = ("file_name", "image_id", "height", "width", "seeds")  # of an unlabeled sample


@dataclass(frozen=True)
class UnlabeledViews:
    """Intermediate results from an unlabeled batch to the student's input.

    Attributes:
        student_batch: training samples of the student: strong view and pseudo-labels.
        selections: the teacher's kept predictions, at prediction resolution.
        refined: pseudo-labels at image size, before ARP.
        arp_images: (3, H, W) uint8 after ARP, before the strong view's color augmentation.
        arp_labels: pseudo-labels after ARP.
        stats: scalars to log: numbers, or 0-dim tensors on the device.
    """

    student_batch: list[dict]
    selections: list[Selection]
    refined: list[PseudoLabels]
    arp_images: list[Tensor]
    arp_labels: list[PseudoLabels]
    stats: dict[str, float | Tensor]


class PseudoLabeling:
    """Teacher → selection → refinement → ARP → strong view (paper, sections 3.3 and 3.4).

    Teacher and SAM get the weak view; ARP and the strong view use the same geometry without the
    weak view's color distortion. No gradients are computed.

    Synchronizes three times: for the selection, and for empty masks after refinement and after ARP.

    Args:
        teacher: its model must be :class:`~s4m_d2.engine.labeling.protocol.S4MTrainable`.
        refiner: a refiner of REFINER_REGISTRY, or the teacher's own masks.
        arp: None: off.
        strong_view: ``(images, generators) -> images``, color augmentation of the student's images:
            :meth:`StrongView.batch <s4m_d2.data.StrongView.batch>`.
        score_thresh, min_area, mask_thresh: see :func:`select_pseudo_labels`.
        num_classes: K, which the teacher's logits must have.
        input_format: "RGB" or "BGR", the channel order of the samples' images.
        precision: FLOAT32: the teacher labels outside a caller's autocast; AMP: inside.
        duplicate_iou: of the refined masks, see :func:`drop_duplicates`; 1.0: off.
    """

    @configurable
    def __init__(
        self,
        *,
        teacher: EMATeacher,
        refiner,
        arp: ARP | None,
        strong_view: Callable[..., list[Tensor]],
        score_thresh: float,
        min_area: float,
        mask_thresh: float,
        num_classes: int,
        input_format: str = "RGB",
        precision: str = AMP,
        duplicate_iou: float = 1.0,
    ) -> None:
        self.teacher = teacher
        self.refiner = refiner
        self.arp = arp
        self.strong_view = strong_view
        self.selection = dict(score_thresh=score_thresh, min_area=min_area, mask_thresh=mask_thresh)
        self.input_format = input_format
        self.num_classes = num_classes
        self.precision = precision
        self.duplicate_iou = duplicate_iou

    @classmethod
    def from_config(cls, cfg, teacher: EMATeacher, backend: SamBackend | None = None):
        if backend is None and cfg.S4M.REFINE.ENABLED:
            backend = build_sam_backend(cfg)
        return {
            "teacher": teacher,
            "refiner": build_refiner(cfg, backend),
            "arp": ARP(cfg) if cfg.S4M.ARP.ENABLED else None,
            "strong_view": StrongView(cfg).batch,
            "score_thresh": cfg.S4M.PSEUDO_LABEL.SCORE_THRESH,
            "min_area": cfg.S4M.PSEUDO_LABEL.MIN_AREA,
            "mask_thresh": cfg.S4M.PSEUDO_LABEL.MASK_THRESH,
            "input_format": cfg.INPUT.FORMAT,
            "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            "precision": cfg.S4M.PSEUDO_LABEL.PRECISION,
            "duplicate_iou": cfg.S4M.PSEUDO_LABEL.DUPLICATE_IOU,
        }

    @torch.no_grad()
    def __call__(self, batch: Sequence[Mapping[str, Any]]) -> UnlabeledViews:
        """Label ``batch``, samples of :class:`~s4m_d2.data.ARPDatasetMapper`; as :meth:`label`."""
        selections, refinement = self.label([{**s, "image": s["image_weak"]} for s in batch])
        device = selections[0].mask_logits.device
        images = [to_device(sample["image"], device) for sample in batch]
        labels = refinement.labels
        if self.arp is not None:
            images, labels = self.arp(images, labels, sample_generators(batch, "arp", "cpu"))
        strong = self.strong_view(images, sample_generators(batch, "strong_view", "cpu"))
        student_batch = [
            {
                **{key: sample[key] for key in _KEPT if key in sample},
                "image": view,
                "instances": of_image.to_instances(),
            }
            for sample, view, of_image in zip(batch, strong, labels, strict=True)
        ]
        stats = label_statistics(selections, refinement, labels)
        return UnlabeledViews(student_batch, selections, refinement.labels, images, labels, stats)

    @torch.no_grad()
    def label(self, weak: list[dict]) -> tuple[list[Selection], Refinement]:
        """Select the teacher's predictions on samples' "image", and refine them.

        Raises:
            InputError: the teacher's predictions do not satisfy the protocol.
        """
        teacher: Any = self.teacher.model
        device = next(teacher.parameters()).device if self.precision != AMP else None
        with nullcontext() if device is None else computing_in(torch.float32, device):
            predictions = teacher.predict_queries(weak)
            sizes = [tuple(sample["image"].shape[-2:]) for sample in weak]
            check_predictions(predictions, sizes, teacher, self.num_classes)
            selections = self.select(predictions)
            return selections, self.refine(weak, selections, predictions["pred_logits"][0].device)

    def select(self, predictions: QueryPredictions) -> list[Selection]:
        """Apply the thresholds to the result of ``predict_queries``. Synchronizes once."""
        height, width = predictions["padded_size"]
        masks = list(predictions["pred_masks"])
        content_sizes = [
            (h * of_image.shape[1] / height, w * of_image.shape[2] / width)
            for of_image, (h, w) in zip(masks, predictions["image_sizes"], strict=True)
        ]
        logits = list(predictions["pred_logits"])
        return select_in_batch(logits, masks, content_sizes=content_sizes, **self.selection)

    def refine(
        self, weak: list[dict], selections: list[Selection], device: torch.device
    ) -> Refinement:
        """Refine pseudo-labels with SAM on the weak view; at image size, without empty masks."""
        sizes = [tuple(sample["image"].shape[-2:]) for sample in weak]
        padded = [max(sides) for sides in zip(*sizes, strict=True)]
        images = torch.zeros(len(weak), 3, *padded, dtype=weak[0]["image"].dtype, device=device)
        for image, sample, (height, width) in zip(images, weak, sizes, strict=True):
            image[:, :height, :width] = to_device(sample["image"], device)
        rgb = images if self.input_format == "RGB" else images.flip(1)
        generators = sample_generators(weak, "refine_points", "cpu")
        refinement = self.refiner(selections, rgb, sizes, generators)
        labels = drop_empty(refinement.labels)
        if self.duplicate_iou >= 1.0:
            return replace(refinement, labels=labels)
        kept = drop_duplicates(labels, self.duplicate_iou)
        dropped = sum(map(len, labels)) - sum(map(len, kept))
        return replace(refinement, labels=kept, num_duplicates=dropped)


def label_statistics(
    selections: Sequence[Selection], refinement: Refinement, after_arp: Sequence[PseudoLabels]
) -> dict[str, float | Tensor]:
    """Scalars to log (means over the batch of one process): numbers, or 0-dim tensors on the
    device.
    """
    totals: Counter[str] = Counter()
    for selection in selections:
        totals.update(selection.stats)
    images, queries = len(selections), max(totals.pop("queries"), 1)
    stats: dict[str, float | Tensor] = {
        "pseudo_labels/per_image": totals.pop("kept") / images,
        "pseudo_labels/per_image_after_arp": sum(map(len, after_arp)) / images,
    }
    stats |= {f"pseudo_labels/{name}": value / queries for name, value in totals.items()}
    if refinement.num_duplicates is not None:
        stats["pseudo_labels/duplicates_per_image"] = refinement.num_duplicates / images
    if len(refinement.predicted_ious):
        stats["refinement/predicted_iou"] = refinement.predicted_ious.mean()
    refined = refinement.num_instances
    refined = len(refinement.predicted_ious) if refined is None else refined
    if refined:
        stats["refinement/fallbacks"] = refinement.num_fallbacks / refined
    return stats
