"""The deterministic resize that the augmentations use."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from fvcore.transforms.transform import Transform
from PIL import Image

__all__ = ["ResizeTransform"]

_TORCH_MODES = {Image.NEAREST: "nearest", Image.BILINEAR: "bilinear", Image.BICUBIC: "bicubic"}


class ResizeTransform(Transform):
    """Resize from ``(h, w)`` to ``(new_h, new_w)`` with a PIL interpolation code.

    uint8 images go through PIL (antialiased), other types through torch's interpolate (not
    antialiased). Segmentations use nearest.
    """

    def __init__(self, h: int, w: int, new_h: int, new_w: int, interp: int | None = None):
        super().__init__()
        interp = Image.BILINEAR if interp is None else interp
        self._set_attributes(locals())

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        """(H, W) or (H, W, C); the type is kept."""
        assert img.shape[:2] == (self.h, self.w), (img.shape, self.h, self.w)
        interp = self.interp if interp is None else interp
        if img.dtype == np.uint8:
            flat = img[:, :, 0] if img.shape[2:] == (1,) else img  # PIL has no (H, W, 1)
            resized = np.asarray(Image.fromarray(flat).resize((self.new_w, self.new_h), interp))
            return resized.reshape(self.new_h, self.new_w, *img.shape[2:])
        mode = _TORCH_MODES[interp]
        nchw = torch.from_numpy(np.ascontiguousarray(img)).reshape(1, *img.shape[:2], -1)
        nchw = F.interpolate(
            nchw.permute(0, 3, 1, 2),
            (self.new_h, self.new_w),
            mode=mode,
            align_corners=None if mode == "nearest" else False,
        )
        return nchw.permute(0, 2, 3, 1).reshape(self.new_h, self.new_w, *img.shape[2:]).numpy()

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """(N, 2) float (x, y); changed in place."""
        coords[:, 0] = coords[:, 0] * (self.new_w * 1.0 / self.w)
        coords[:, 1] = coords[:, 1] * (self.new_h * 1.0 / self.h)
        return coords

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        return self.apply_image(segmentation, interp=Image.NEAREST)
