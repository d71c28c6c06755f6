"""The deterministic resize that the augmentations use."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from fvcore.transforms.transform import Transform
from PIL import Image

__all__ = ["ResizeTransform"]

_TORCH_MODES = {
    Image.NEAREST: "nearest",
    Image.BILINEAR: "bilinear",
    Image.BICUBIC: "bicubic",
}


class ResizeTransform(Transform):
    """Resize from ``(h, w)`` to ``(new_h, new_w)``.

    uint8 images go through PIL (its filters widen when shrinking, so there is no aliasing), all
    other types through :func:`torch.nn.functional.interpolate`. Segmentations use nearest.

    Args:
        interp: a PIL interpolation code, bilinear by default.
    """

    def __init__(self, h: int, w: int, new_h: int, new_w: int, interp: int | None = None):
        super().__init__()
        interp = Image.BILINEAR if interp is None else interp
        self._set_attributes(locals())

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        """(H, W) or (H, W, C) of any type that the chosen path takes; the type is kept."""
        assert img.shape[:2] == (self.h, self.w), (
            f"ResizeTransform was made for {(self.h, self.w)}, got an image of {img.shape[:2]}."
        )
        interp = self.interp if interp is None else interp
        resize = self._with_pil if img.dtype == np.uint8 else self._with_torch
        return resize(img, interp)

    def _with_pil(self, img: np.ndarray, interp: int) -> np.ndarray:
        single = img.ndim > 2 and img.shape[2] == 1
        pil_image = Image.fromarray(img[:, :, 0] if single else img)
        resized = np.asarray(pil_image.resize((self.new_w, self.new_h), interp))
        return resized[:, :, None] if single else resized

    def _with_torch(self, img: np.ndarray, interp: int) -> np.ndarray:
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
        """(H, W) labels, resized with nearest."""
        return self.apply_image(segmentation, interp=Image.NEAREST)

    def inverse(self) -> ResizeTransform:
        """Resize back to the old size."""
        return ResizeTransform(self.new_h, self.new_w, self.h, self.w, self.interp)
