"""From a batch of unlabeled images to the student's input: strong views and pseudo-labels."""

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
from s4m_d2.sam.point_prompts import computing_in
from s4m_d2.semi.arp import ARP
from s4m_d2.semi.ema_teacher import EMATeacher
from s4m_d2.semi.filters import ClassThresholds, drop_duplicates, drop_low_quality, mask_quality
from s4m_d2.semi.pseudo_labels import Selection, select_pseudo_labels
from s4m_d2.semi.refinement import Refinement, build_refiner
from s4m_d2.structures import PseudoLabels, drop_empty, sample_generators
from s4m_d2.transfers import to_device

FLOAT32, AMP = "float32", "amp"  # values of S4M.PSEUDO_LABEL.PRECISION
FIXED, AUTO = "fixed", "auto"  # values of S4M.PSEUDO_LABEL.CLASS_THRESH
_KEPT = ("file_name", "image_id", "height", "width", "seeds")  # of an unlabeled sample


@dataclass(frozen=True)
class UnlabeledViews:
    """Intermediate results from an unlabeled batch to the student's input."""

    student_batch: list[dict]  #: samples of the student: strong view and pseudo-labels
    selections: list[Selection]  #: the teacher's kept predictions, at prediction resolution
    refined: list[PseudoLabels]  #: at image size, before ARP
    arp_images: list[Tensor]  #: (3, H, W) uint8 after ARP, before the strong view's colors
    arp_labels: list[PseudoLabels]  #: after ARP
    stats: dict[str, float | Tensor]  #: scalars to log: numbers, or 0-dim tensors on the device


class PseudoLabeling:
    """Teacher → selection → refinement → ARP → strong view (paper, sections 3.3 and 3.4).

    Teacher and SAM get the weak view; ARP and the strong view use the same geometry without the
    weak view's color distortion. Synchronizes three times: for the selection, and for empty masks
    after refinement and after ARP.

    Args:
        teacher: its model must be :class:`~s4m_d2.engine.labeling.protocol.S4MTrainable`.
        refiner: a refiner of REFINER_REGISTRY, or the teacher's own masks.
        arp: None: off.
        strong_view: ``(images, generators) -> images``, see :meth:`s4m_d2.data.StrongView.batch`.
        score_thresh, min_area, mask_thresh: see :func:`select_pseudo_labels`.
        num_classes: K, which the teacher's logits must have.
        input_format: "RGB" or "BGR", the channel order of the samples' images.
        precision: FLOAT32: the teacher labels outside a caller's autocast; AMP: inside.
        duplicate_iou, duplicate_overlap: of refined masks, see :func:`drop_duplicates`; 1.0: off.
        class_thresholds: the scores' thresholds by class; None: ``score_thresh``.
        mask_quality_thresh: labels with a lower :func:`mask_quality` are dropped; 0.0: none.
        label_weight: weight labels in the losses by that quality.
        pixel_weight: weight pixels in the losses by :meth:`Selection.doubts_at`.
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
        duplicate_overlap: float = 1.0,
        class_thresholds: ClassThresholds | None = None,
        mask_quality_thresh: float = 0.0,
        label_weight: bool = False,
        pixel_weight: bool = False,
    ) -> None:
        self.teacher, self.refiner, self.arp, self.strong_view = teacher, refiner, arp, strong_view
        rules = {"score_thresh": score_thresh, "min_area": min_area, "mask_thresh": mask_thresh}
        self.selection: dict[str, Any] = rules
        self.num_classes, self.input_format, self.precision = num_classes, input_format, precision
        self.duplicate_iou, self.duplicate_overlap = duplicate_iou, duplicate_overlap
        self.class_thresholds, self.mask_quality_thresh = class_thresholds, mask_quality_thresh
        self.label_weight, self.pixel_weight = label_weight, pixel_weight

    @classmethod
    def from_config(cls, cfg, teacher: EMATeacher, backend: SamBackend | None = None):
        if backend is None and cfg.S4M.REFINE.ENABLED:
            backend = build_sam_backend(cfg)
        rules, num_classes = cfg.S4M.PSEUDO_LABEL, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
        thresholds = None
        if rules.CLASS_THRESH == AUTO:
            thresholds = ClassThresholds(rules.SCORE_THRESH, num_classes)
        return {
            "teacher": teacher,
            "refiner": build_refiner(cfg, backend),
            "arp": ARP(cfg) if cfg.S4M.ARP.ENABLED else None,
            "strong_view": StrongView(cfg).batch,
            "score_thresh": rules.SCORE_THRESH,
            "min_area": rules.MIN_AREA,
            "mask_thresh": rules.MASK_THRESH,
            "input_format": cfg.INPUT.FORMAT,
            "num_classes": num_classes,
            "precision": rules.PRECISION,
            "duplicate_iou": rules.DUPLICATE_IOU,
            "duplicate_overlap": rules.DUPLICATE_OVERLAP,
            "class_thresholds": thresholds,
            "mask_quality_thresh": rules.MASK_QUALITY_THRESH,
            "label_weight": rules.LABEL_WEIGHT,
            "pixel_weight": rules.PIXEL_WEIGHT,
        }

    @torch.no_grad()
    def __call__(self, batch: Sequence[Mapping], *, learn: bool = False) -> UnlabeledViews:
        """Label ``batch``, samples of :class:`~s4m_d2.data.ARPDatasetMapper`; as :meth:`label`."""
        weak = [{**sample, "image": sample["image_weak"]} for sample in batch]
        selections, refinement = self.label(weak, learn=learn)
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
                "instances": of_image.to_instances(weighted=self.label_weight),
            }
            for sample, view, of_image in zip(batch, strong, labels, strict=True)
        ]
        stats = label_statistics(selections, refinement, labels)
        if self.class_thresholds is not None:
            stats["pseudo_labels/lowest_thresh"] = self.class_thresholds().amin()
        return UnlabeledViews(student_batch, selections, refinement.labels, images, labels, stats)

    @torch.no_grad()
    def label(self, weak: list[dict], *, learn: bool = False) -> tuple[list[Selection], Refinement]:
        """Select the teacher's predictions on samples' "image", and refine them.

        ``learn``: the class thresholds follow these predictions; in training, in all processes
        together. InputError: the teacher's predictions do not satisfy the protocol.
        """
        teacher: Any = self.teacher.model
        device = next(teacher.parameters()).device if self.precision != AMP else None
        with nullcontext() if device is None else computing_in(torch.float32, device):
            predictions = teacher.predict_queries(weak)
            sizes = [tuple(sample["image"].shape[-2:]) for sample in weak]
            check_predictions(predictions, sizes, teacher, self.num_classes)
            if learn and self.class_thresholds is not None:
                self.class_thresholds.observe(predictions["pred_logits"])
            selections = self.select(predictions)
            return selections, self.refine(weak, selections)

    def select(self, predictions: QueryPredictions) -> list[Selection]:
        """Apply the thresholds to the result of ``predict_queries``. Synchronizes once."""
        height, width = predictions["padded_size"]
        logits, masks = list(predictions["pred_logits"]), list(predictions["pred_masks"])
        content_sizes = [
            (h * of_image.shape[1] / height, w * of_image.shape[2] / width)
            for of_image, (h, w) in zip(masks, predictions["image_sizes"], strict=True)
        ]
        rules = self.selection
        if self.class_thresholds is not None:
            rules = {**rules, "score_thresh": self.class_thresholds().to(logits[0].device)}
        return select_pseudo_labels(logits, masks, content_sizes=content_sizes, **rules)

    def refine(self, weak: list[dict], selections: list[Selection]) -> Refinement:
        """Refine pseudo-labels with SAM on the weak view; at image size, without empty masks."""
        sizes = [tuple(sample["image"].shape[-2:]) for sample in weak]
        padded = [max(sides) for sides in zip(*sizes, strict=True)]
        device, dtype = selections[0].mask_logits.device, weak[0]["image"].dtype
        images = torch.zeros(len(weak), 3, *padded, dtype=dtype, device=device)
        for image, sample, (height, width) in zip(images, weak, sizes, strict=True):
            image[:, :height, :width] = to_device(sample["image"], device)
        rgb = images if self.input_format == "RGB" else images.flip(1)
        generators = sample_generators(weak, "refine_points", "cpu")
        return self.judge(selections, self.refiner(selections, rgb, sizes, generators))

    def judge(self, selections: Sequence[Selection], refinement: Refinement) -> Refinement:
        """Weight labels and drop those that are empty, of low quality or duplicates.

        ``selections``, which were refined, and ``refinement`` have the same rows.
        """
        pairs = list(zip(refinement.labels, selections, strict=True))
        drops_duplicates = min(self.duplicate_iou, self.duplicate_overlap) < 1.0
        if self.label_weight or self.mask_quality_thresh > 0 or drops_duplicates:
            pairs = [(replace(x, quality=mask_quality(s, x)), s) for x, s in pairs]
        if self.pixel_weight:
            pairs = [(replace(x, doubts=s.doubts_at(x.image_size)), s) for x, s in pairs]
        labels = drop_empty([of_image for of_image, _ in pairs])
        count, stats = sum(map(len, labels)), dict(refinement.stats)
        if self.mask_quality_thresh > 0:  # first: else it could replace a better duplicate
            labels = drop_low_quality(labels, self.mask_quality_thresh)
            dropped, count = count - sum(map(len, labels)), sum(map(len, labels))
            stats["pseudo_labels/low_quality_per_image"] = dropped / len(labels)
        if drops_duplicates:
            labels = drop_duplicates(labels, self.duplicate_iou, self.duplicate_overlap)
            dropped = count - sum(map(len, labels))
            stats["pseudo_labels/duplicates_per_image"] = dropped / len(labels)
        return Refinement(labels, stats)


def label_statistics(
    selections: Sequence[Selection], refinement: Refinement, after_arp: Sequence[PseudoLabels]
) -> dict[str, float | Tensor]:
    """Means over a process' batch: numbers, or 0-dim tensors on the device."""
    totals: Counter[str] = Counter()
    for selection in selections:
        totals.update(selection.stats)
    images, queries = len(selections), max(totals.pop("queries"), 1)
    stats: dict[str, float | Tensor] = {
        "pseudo_labels/per_image": totals.pop("kept") / images,
        "pseudo_labels/per_image_after_arp": sum(map(len, after_arp)) / images,
    }
    stats |= {f"pseudo_labels/{name}": value / queries for name, value in totals.items()}
    return stats | refinement.stats
