"""Masks of everything in an image: SAM asked at a grid of points (Kirillov et al., 2023).

The grid, the filters and the suppression of duplicates are segment-anything's
``SamAutomaticMaskGenerator``; what it asks and what answers is a backend, of any kind.
"""

import hashlib
import sys
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from segment_anything import SamAutomaticMaskGenerator
from segment_anything.utils.amg import (
    MaskData,
    batched_mask_to_box,
    calculate_stability_score,
    is_box_near_crop_edge,
    mask_to_rle_pytorch,
    uncrop_masks,
)
from torch import Tensor

from s4m_d2.errors import InputError
from s4m_d2.sam.backend import EncodedImages, SamBackend, held_modules
from s4m_d2.transfers import to_device, to_host

MASK_THRESHOLD = 0.0  # of mask logits, for every backend
PIXEL_CENTER = 0.5  # SAM's clicks are pixels of the square frame and mean their centers


@dataclass(frozen=True)
class AutomaticMaskSettings:
    """Settings of SAM's automatic masks: its own names and defaults, which are those of ViT-H.

    InputError: a setting is out of its range.
    """

    points_per_side: int = 32  #: of the grid: its square is asked
    points_per_batch: int = 64  #: asked together; 3 masks of each are held at the image's size
    pred_iou_thresh: float = 0.88  #: keeps masks that SAM rates higher, in [0, 1]
    #: keeps masks whose area hardly depends on the threshold of the logits: IoU, in [0, 1], of
    #: those at + and - ``stability_score_offset``
    stability_score_thresh: float = 0.95
    stability_score_offset: float = 1.0  #: in logits
    box_nms_thresh: float = 0.7  #: of masks whose boxes have a larger IoU the best rated stays
    crop_n_layers: int = 0  #: layer i asks again in 4 ** i overlapping crops, each encoded
    crop_nms_thresh: float = 0.7  #: the same between crops; masks of smaller ones stay
    crop_overlap_ratio: float = 512 / 1500  #: in layer 1, as a share of the short side
    crop_n_points_downscale_factor: int = 1  #: its i-th power divides the points a side of layer i
    min_mask_region_area: int = 0  #: px; smaller holes are filled, smaller islands removed; 0: not

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            low = int(name.endswith(("_side", "_batch", "_factor")))
            high = 1 if name.endswith(("_thresh", "_ratio")) else sys.maxsize
            if not low <= value <= high:
                limit = "to 1" if high == 1 else "on"
                raise InputError(f"{name} is {value}; expected a number from {low} {limit}")
        if self.crop_n_points_downscale_factor**self.crop_n_layers > self.points_per_side:
            raise InputError(
                f"points_per_side is {self.points_per_side}, of which "
                f"crop_n_points_downscale_factor {self.crop_n_points_downscale_factor} leaves none "
                f"in layer {self.crop_n_layers} of the crops; give more points, or fewer layers"
            )


class AutomaticMasks(SamAutomaticMaskGenerator):
    """SAM's masks of everything in an image: the library's generator, asking any backend, also
    about images smaller than their crops.

    Of what the backend answers on its own device, ratings and then the masks that stay come to the
    host: it synchronizes three times per batch of points, where the library does several times per
    mask. Points stay on the CPU until the backend takes them, which does not wait then.

    Args:
        backend: of any kind.
        settings: the defaults are SAM's.
    """

    def __init__(self, backend: SamBackend, settings: AutomaticMaskSettings | None = None) -> None:
        self.backend = backend
        self.settings = settings or AutomaticMaskSettings()
        unused = SimpleNamespace(image_encoder=SimpleNamespace(img_size=0))
        super().__init__(unused, **asdict(self.settings), output_mode="coco_rle")
        self.predictor = self  # of which the library calls set_image and reset_image
        self._encoded: EncodedImages | None = None
        self._fingerprint = ""

    def generate(
        self, image: np.ndarray, encoded: EncodedImages | None = None
    ) -> list[dict[str, Any]]:
        """The masks of an image.

        Args:
            image: (H, W, 3) uint8 RGB.
            encoded: the same image alone, from the backend's ``encode``, where that is at hand
                and no crops are asked for: the encoder does not run then.

        Returns:
            SAM's records, best rated first where there are no crops: ``segmentation`` (compressed
            COCO RLE of (H, W), counts as str), ``area`` in pixels, ``bbox`` [x, y, w, h] (of pixel
            indices: w and h are one less than the pixels), ``predicted_iou``,
            ``stability_score``, ``point_coords`` [[x, y]] that was asked, ``crop_box``
            [x, y, w, h] in which it was. Masks may overlap; none is empty. [] where none passes
            the filters.
        """
        self._encoded = encoded
        return [record for record in super().generate(image) if record["area"]]

    def fingerprint(self) -> str:
        """SHA-256 over SAM's weights and the settings that masks depend on.

        Equal only where the masks of equal images are equal, up to rounding: that is all
        ``points_per_batch`` changes, which does not count. All weights are read, the first time.
        """
        if self._fingerprint:
            return self._fingerprint
        backend: Any = self.backend
        settings = {name: float(value) for name, value in asdict(self.settings).items()}
        del settings["points_per_batch"]
        # A user's backend may have none of these.
        frame, dtype = (getattr(backend, name, None) for name in ("frame", "dtype"))
        pixels = frame and (frame.mean.tolist(), frame.std.tolist())
        modules = held_modules(backend)
        kind = type(backend).__name__, backend.image_side, str(dtype)
        digest = hashlib.sha256(repr((*kind, backend.device.type, pixels, settings)).encode())
        # Each tensor once, though some modules are parts of others.
        for name, value in (*modules.named_parameters(), *modules.named_buffers()):
            digest.update(repr((name, str(value.dtype), tuple(value.shape))).encode())
            digest.update(to_host(value.detach().contiguous().flatten().view(torch.uint8))[0].data)
        self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def set_image(self, image: np.ndarray) -> None:
        """Encode an (H, W, 3) uint8 RGB image or crop, unless it was given encoded."""
        if self._encoded is None:
            pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))[None]
            self._encoded = self.backend.encode(pixels, [image.shape[:2]])

    def reset_image(self) -> None:
        """Forget the image."""
        self._encoded = None

    def _process_crop(
        self, image: np.ndarray, crop_box: list[int], layer: int, orig_size: tuple[int, ...]
    ) -> MaskData:
        left, top, right, bottom = crop_box
        if left >= right or top >= bottom:  # of an image of less than 2 ** layers pixels a side
            return MaskData()
        data = super()._process_crop(image, crop_box, layer, orig_size)
        # Without masks the library's are not (0, 4), and fail where crops are compared.
        data["crop_boxes"] = data["crop_boxes"].reshape(-1, 4).long()
        return data

    def _process_batch(
        self,
        points: np.ndarray,
        im_size: tuple[int, ...],
        crop_box: list[int],
        orig_size: tuple[int, ...],
    ) -> MaskData:
        height, width = orig_size
        masks, ratings = self._ask(points, (im_size[0], im_size[1]))
        masks, ious = masks.flatten(0, 1), to_host(ratings.flatten())[0]
        rows = np.arange(len(ious))
        if self.pred_iou_thresh > 0:
            rows = np.flatnonzero(ious > self.pred_iou_thresh)
            masks = masks[to_device(rows, masks.device)]
        scores = calculate_stability_score(masks, MASK_THRESHOLD, self.stability_score_offset)
        [scores] = to_host(scores)
        if self.stability_score_thresh > 0:
            stable = np.flatnonzero(scores >= self.stability_score_thresh)
            masks = masks[to_device(stable, masks.device)]
            rows, scores = rows[stable], scores[stable]
        masks = masks > MASK_THRESHOLD
        boxes, masks = map(torch.from_numpy, to_host(batched_mask_to_box(masks), masks))
        data = MaskData(
            masks=masks,
            boxes=boxes,
            iou_preds=torch.from_numpy(ious[rows]),
            stability_score=torch.from_numpy(scores),
            points=torch.from_numpy(points[rows // ratings.shape[1]]),
        )
        data.filter(~is_box_near_crop_edge(boxes, crop_box, [0, 0, width, height]))
        data["rles"] = mask_to_rle_pytorch(uncrop_masks(data["masks"], crop_box, height, width))
        del data["masks"]
        return data

    def _ask(self, points: np.ndarray, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Logits (N, M, H, W) and ratings (N, M) for clicks on the image of ``size`` (H, W).

        points: (N, 2) pixels (x, y). What the library makes pixels of the square frame means their
        centers: in the backend's points, normalized over the content, half a pixel more.
        """
        assert self._encoded is not None  # by set_image
        frame = np.array(self.backend.grid_scale(size)) * self.backend.image_side
        clicks = points / np.array(size[::-1]) + PIXEL_CENTER / frame
        clicks = clicks.clip(max=1.0)  # of contents of a few pixels, half of one is beyond
        [answer] = self.backend.prompt(self._encoded, [torch.from_numpy(clicks).float()[:, None]])
        masks = self.backend.upscale(answer.mask_logits.flatten(0, 1), size)
        return masks.unflatten(0, answer.iou_predictions.shape), answer.iou_predictions
