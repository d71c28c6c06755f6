"""Masks of everything in an image: SAM asked at a grid of points (Kirillov et al., 2023).

The grid, the filters and the suppression of duplicates are segment-anything's
``SamAutomaticMaskGenerator``; what it asks and what answers is a backend, of any kind.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import asdict, dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from segment_anything import SamAutomaticMaskGenerator
from segment_anything.utils.amg import MaskData
from torch import Tensor

from s4m_d2.errors import InputError
from s4m_d2.sam.backend import EncodedImages, SamBackend

PIXEL_CENTER = 0.5  # SAM's clicks are pixels of the square frame and mean their centers


@dataclass(frozen=True)
class AutomaticMaskSettings:
    """Settings of segment-anything's ``SamAutomaticMaskGenerator``, and its defaults, for ViT-H.

    InputError: a setting is out of its range. Thresholds and ratios are in [0, 1].
    """

    points_per_side: int = 32
    points_per_batch: int = 64
    pred_iou_thresh: float = 0.88
    stability_score_thresh: float = 0.95
    stability_score_offset: float = 1.0
    box_nms_thresh: float = 0.7
    crop_n_layers: int = 0
    crop_nms_thresh: float = 0.7
    crop_overlap_ratio: float = 512 / 1500
    crop_n_points_downscale_factor: int = 1
    min_mask_region_area: int = 0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            low = int(name.startswith("points") or name.endswith("factor"))
            high = 1 if name.endswith(("thresh", "ratio")) else sys.maxsize
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
    """The library's generator with any backend, also for images smaller than its crops."""

    def __init__(self, backend: SamBackend, settings: AutomaticMaskSettings | None = None) -> None:
        self.backend = backend
        self.settings = settings or AutomaticMaskSettings()
        unused = SimpleNamespace(image_encoder=SimpleNamespace(img_size=backend.image_side))
        super().__init__(unused, **asdict(self.settings), output_mode="coco_rle")
        self.predictor = _Predictor(backend)

    def generate(self, image: np.ndarray) -> list[dict[str, Any]]:
        """SAM's records of an (H, W, 3) uint8 RGB image, best rated first where no crops are made.

        They have ``segmentation`` (compressed COCO RLE of (H, W), counts as str), ``area`` in
        pixels, ``bbox`` [x, y, w, h] (of pixel indices: w and h are one less than the pixels),
        ``predicted_iou``, ``stability_score``, ``point_coords`` [[x, y]] that was asked and
        ``crop_box`` [x, y, w, h]. Masks may overlap; none is empty. [] where none passes.
        """
        return [record for record in super().generate(image) if record["area"]]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over all of SAM's weights and the settings that masks depend on, but for rounding
        (``points_per_batch``)."""
        backend: Any = self.backend
        settings = {name: float(value) for name, value in asdict(self.settings).items()}
        del settings["points_per_batch"]
        pixels = backend.frame.mean.tolist(), backend.frame.std.tolist()
        kind = type(backend).__name__, backend.image_side, str(backend.dtype)
        about = *kind, backend.device.type, pixels, settings
        digest = hashlib.sha256(repr(about).encode())
        for name, value in backend.sam.state_dict().items():
            digest.update(repr((name, str(value.dtype), tuple(value.shape))).encode())
            digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

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


class _Predictor:
    """A backend as the predictor that the library's generator asks; also its ``transform``.

    Points stay on the CPU until the backend takes them, which does not wait for its device then.
    """

    device = torch.device("cpu")
    model = SimpleNamespace(mask_threshold=0.0)  # of logits, for every backend
    encoded: EncodedImages

    def __init__(self, backend: SamBackend) -> None:
        self.backend, self.transform = backend, self

    def set_image(self, image: np.ndarray) -> None:
        """Encode an (H, W, 3) uint8 RGB image or crop."""
        pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))[None]
        self.encoded = self.backend.encode(pixels, [image.shape[:2]])

    def reset_image(self) -> None:
        del self.encoded

    def apply_coords(self, points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Clicks as the backend takes them, from (N, 2) pixels (x, y) of an image of (H, W).

        What the library makes pixels of the square frame means their centers: in the backend's
        points, normalized over the content, half a pixel more.
        """
        frame = np.array(self.backend.grid_scale(size)) * self.backend.image_side
        clicks = points / np.array(size[::-1]) + PIXEL_CENTER / frame
        return clicks.clip(max=1.0)  # of contents of a few pixels, half of one is beyond

    def predict_torch(self, clicks: Tensor, *_: Tensor, **__: bool) -> tuple[Tensor, Tensor, None]:
        """Logits (N, M, H, W) and ratings (N, M) for (N, 1, 2) positive clicks."""
        [answer] = self.backend.prompt(self.encoded, [clicks.float()])
        low, ratings = answer.mask_logits, answer.iou_predictions
        assert low is not None and ratings is not None  # a prompt gives masks by default
        masks = self.backend.upscale(low.flatten(0, 1), self.encoded.image_sizes[0])
        return masks.unflatten(0, low.shape[:2]), ratings, None
