"""Augmentations: policies that look at their input and choose a deterministic transform."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
from fvcore.transforms.transform import Transform, TransformList

__all__ = ["AugInput", "Augmentation", "AugmentationList"]


class Augmentation:
    """A policy: :meth:`get_transform` decides, :meth:`__call__` decides and applies.

    ``input_args`` names the attributes of the input that :meth:`get_transform` is called with.
    If None, a single parameter means ``image``, several are taken by their own names.
    """

    input_args: tuple[str, ...] | None = None

    def _init(self, params: dict[str, Any] | None = None) -> None:
        """Set attributes from a constructor's ``locals()``."""
        for key, value in (params or {}).items():
            if key != "self" and not key.startswith("_"):
                setattr(self, key, value)

    def get_transform(self, *args: Any) -> Transform:
        """Choose the transform. Convention for the arguments: ``image`` is (H, W[, C]) uint8 or
        float, ``boxes`` (N, 4) float32 XYXY in pixels, ``sem_seg`` (H, W) uint8.
        """
        raise NotImplementedError

    def __call__(self, aug_input: AugInput) -> Transform:
        """Change ``aug_input`` in place and return the transform that did it."""
        transform = self.get_transform(*self._collect_args(aug_input))
        assert isinstance(transform, Transform), (
            f"{type(self)}.get_transform must return a Transform, got {type(transform)}!"
        )
        aug_input.transform(transform)
        return transform

    def _collect_args(self, aug_input: Any) -> list[Any]:
        if self.input_args is None:
            params = inspect.signature(self.get_transform).parameters
            self.input_args = ("image",) if len(params) == 1 else tuple(params)
        return [getattr(aug_input, name) for name in self.input_args]

    def __repr__(self) -> str:
        """Name and the arguments that differ from their defaults."""
        parts = []
        for name, param in inspect.signature(type(self)).parameters.items():
            if not hasattr(self, name):
                return super().__repr__()
            if (value := getattr(self, name)) is not param.default:
                parts.append(f"{name}={value!r}")
        return f"{type(self).__name__}({', '.join(parts)})"


class _TransformToAug(Augmentation):
    """A policy that always chooses the same transform."""

    def __init__(self, tfm: Transform):
        self.tfm = tfm

    def get_transform(self, *args: Any) -> Transform:
        return self.tfm


class AugmentationList(Augmentation):
    """Apply augmentations in sequence. It can only be called: each policy needs to see what the
    one before it made.
    """

    def __init__(self, augs: list[Augmentation | Transform]):
        self.augs = [x if isinstance(x, Augmentation) else _TransformToAug(x) for x in augs]

    def __call__(self, aug_input: AugInput) -> TransformList:
        return TransformList([aug(aug_input) for aug in self.augs])

    def __repr__(self) -> str:
        return f"AugmentationList[{', '.join(map(str, self.augs))}]"


class AugInput:
    """What augmentations look at and change: ``image`` (H, W[, C]) uint8 in [0, 255] or float,
    ``boxes`` (N, 4) float32 XYXY in pixels, ``sem_seg`` (H, W) uint8 labels.
    """

    def __init__(
        self, image: np.ndarray, *, boxes: np.ndarray | None = None,
        sem_seg: np.ndarray | None = None,
    ):  # fmt: skip
        assert isinstance(image, np.ndarray), f"An image is a numpy array, got {type(image)}!"
        assert image.ndim in (2, 3), f"An image is (H, W) or (H, W, C), got {image.shape}."
        self.image, self.boxes, self.sem_seg = image, boxes, sem_seg

    def transform(self, tfm: Transform) -> None:
        """Apply ``tfm`` to everything that is set, in place."""
        self.image = tfm.apply_image(self.image)
        if self.boxes is not None:
            self.boxes = tfm.apply_box(self.boxes)
        if self.sem_seg is not None:
            self.sem_seg = tfm.apply_segmentation(self.sem_seg)
