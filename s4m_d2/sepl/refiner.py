"""SEPL's rule as a refiner of instances: SAM's automatic masks replace the teacher's masks."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import configurable
from pycocotools import mask as mask_utils
from torch import Generator, Tensor

from s4m_d2.sam.automatic_masks import AutomaticMasks, AutomaticMaskSettings
from s4m_d2.semi.pseudo_labels import Selection
from s4m_d2.semi.refinement import FALLBACKS, PREDICTED_IOU, REFINER_REGISTRY, Refinement
from s4m_d2.sepl.rule import O_P_THRESH, O_S_THRESH, assign_masks
from s4m_d2.structures import PseudoLabels, dense_overlaps, mask_areas
from s4m_d2.transfers import to_device, to_host


class SEPLRefiner:
    """Replaces each instance's mask by the union of the automatic masks that SEPL selects for it.

    The segments of :func:`~s4m_d2.sepl.rule.assign_masks` are the teacher's masks, resized to the
    image; they may overlap. An instance without a selected mask keeps the teacher's. Classes and
    scores do not change; nothing is random.

    SAM's automatic generator works image by image and partly on the host: it synchronizes several
    times per image, unlike :class:`~s4m_d2.semi.PointRefiner`; only the encoder is batched.

    Args:
        backend: a :class:`~s4m_d2.sam.backend.SamBackend`.
        automatic_masks: an :class:`~s4m_d2.sam.automatic_masks.AutomaticMasks` of this backend, or
            an object with its ``generate``.
        o_s_thresh, o_p_thresh: in [0, 1]; 1 switches a rule off.
    """

    @configurable
    def __init__(
        self,
        *,
        backend,
        automatic_masks,
        o_s_thresh: float = O_S_THRESH,
        o_p_thresh: float = O_P_THRESH,
    ) -> None:
        self.backend = backend
        self.automatic_masks = automatic_masks
        self.thresholds = {"o_s_thresh": o_s_thresh, "o_p_thresh": o_p_thresh}

    @classmethod
    def from_config(cls, cfg, backend) -> dict:
        settings = {key.lower(): value for key, value in cfg.S4M.REFINE.SEPL.items()}
        thresholds = {key: settings.pop(key) for key in ("o_s_thresh", "o_p_thresh")}
        return {
            "backend": backend,
            "automatic_masks": AutomaticMasks(backend, AutomaticMaskSettings(**settings)),
            **thresholds,
        }

    @torch.no_grad()
    def __call__(
        self,
        selections: Sequence[Selection],
        images: Tensor,
        image_sizes: Sequence[tuple[int, int]],
        generators: Sequence[Generator] | None = None,
    ) -> Refinement:
        """See :class:`~s4m_d2.semi.PointRefiner`; ``generators`` are not used, masks may be empty,
        and predicted IoUs are those of the selected masks."""
        labels = [PseudoLabels.empty(size, images.device) for size in image_sizes]
        active = [i for i, selection in enumerate(selections) if len(selection.labels)]
        ious: list[float] = []
        fallbacks = instances = 0
        if active:
            shown = images[to_device(active, images.device)]
            encoded = self.backend.encode(shown, [image_sizes[i] for i in active])
            shown = shown.round().clamp(0, 255).to(torch.uint8)
            [pictures] = to_host(shown.permute(0, 2, 3, 1))
        for place, i in enumerate(active):
            height, width = image_sizes[i]
            picture = np.ascontiguousarray(pictures[place, :height, :width])
            records = self.automatic_masks.generate(picture, encoded=encoded.select([place]))
            masks, chosen, redrawn = self._redraw(selections[i], (height, width), records)
            labels[i] = selections[i].labels.with_masks(masks)
            ious += [records[row]["predicted_iou"] for row in chosen]
            instances += len(masks)
            fallbacks += len(masks) - redrawn
        predicted = to_device(np.array(ious, dtype=np.float32), images.device)
        stats: dict[str, Any] = {PREDICTED_IOU: predicted.mean()} if ious else {}
        return Refinement(labels, stats | ({FALLBACKS: fallbacks / instances} if active else {}))

    def _redraw(
        self, selection: Selection, size: tuple[int, int], records: Sequence[Mapping[str, Any]]
    ) -> tuple[Tensor, np.ndarray, int]:
        """(N, H, W) masks of an image, indices of the selected records, number of new masks."""
        masks = selection.masks_at(size)
        if not len(records):
            return masks, np.zeros(0, dtype=np.int64), 0
        decoded = mask_utils.decode([record["segmentation"] for record in records])
        by_column = to_device(decoded.transpose(2, 1, 0), masks.device)
        objects = by_column.transpose(1, 2).contiguous().view(torch.bool)
        overlaps, areas = dense_overlaps(objects, masks), mask_areas(objects)
        segments, _, chosen = assign_masks(overlaps, areas, mask_areas(masks), **self.thresholds)
        owners, selected = to_host(segments, chosen)
        new = np.unique(owners[selected])
        for owner in new:
            members = np.flatnonzero(selected & (owners == owner))
            masks[owner] = objects[to_device(members, objects.device)].any(dim=0)
        return masks, np.flatnonzero(selected), len(new)


@REFINER_REGISTRY.register()
def sepl(cfg, backend) -> SEPLRefiner:
    """``S4M.REFINE.METHOD: sepl``."""
    return SEPLRefiner(cfg, backend)
