"""Augmentations: random policies that look at their input and choose a deterministic transform."""

from __future__ import annotations

import inspect
import pprint
from typing import Any

import numpy as np
from fvcore.transforms.transform import Transform, TransformList

__all__ = [
    "AugInput",
    "Augmentation",
    "AugmentationList",
    "StandardAugInput",
    "apply_augmentations",
]


def _check_image(img: np.ndarray) -> None:
    assert isinstance(img, np.ndarray), f"An augmentation needs a numpy array, got a {type(img)}!"
    assert img.ndim in (2, 3), f"An image is (H, W) or (H, W, C), got shape {img.shape}."


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
            if len(params) == 1:
                self.input_args = ("image",)
            elif any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in params.values()):
                raise TypeError(
                    f"{type(self)}.get_transform takes *args or **kwargs, so its inputs are "
                    "unknown: set `input_args` or override `__call__`."
                )
            else:
                self.input_args = tuple(params)
        for name in self.input_args:
            if not hasattr(aug_input, name):
                raise AttributeError(
                    f"{type(self)}.get_transform needs input attribute '{name}', "
                    f"but it is not an attribute of {type(aug_input)}!"
                )
        return [getattr(aug_input, name) for name in self.input_args]

    def _rand_range(self, low: float = 1.0, high: float | None = None, size: Any = None):
        """Uniform in [low, high), or in [0, low) without ``high``; numpy's global generator."""
        if high is None:
            low, high = 0, low
        return np.random.uniform(low, high, [] if size is None else size)

    def __repr__(self) -> str:
        """Name and the arguments that differ from their defaults."""
        parts = []
        for name, param in inspect.signature(type(self).__init__).parameters.items():
            if name == "self":
                continue
            if param.kind in (param.VAR_POSITIONAL, param.VAR_KEYWORD) or not hasattr(self, name):
                return super().__repr__()
            value = getattr(self, name)
            if value is not param.default:
                text = pprint.pformat(value)
                parts.append(f"{name}={'...' if chr(10) in text else text}")
        return f"{type(self).__name__}({', '.join(parts)})"

    def __str__(self) -> str:
        return repr(self)


class _TransformToAug(Augmentation):
    """A policy that always chooses the same transform."""

    def __init__(self, tfm: Transform):
        self.tfm = tfm

    def get_transform(self, *args: Any) -> Transform:
        return self.tfm

    def __call__(self, aug_input: AugInput) -> Transform:
        aug_input.transform(self.tfm)
        return self.tfm

    def __repr__(self) -> str:
        return repr(self.tfm)


def _transform_to_aug(tfm_or_aug: Transform | Augmentation) -> Augmentation:
    assert isinstance(tfm_or_aug, (Transform, Augmentation)), (
        f"Expected a Transform or an Augmentation, got {tfm_or_aug!r}."
    )
    return tfm_or_aug if isinstance(tfm_or_aug, Augmentation) else _TransformToAug(tfm_or_aug)


class AugmentationList(Augmentation):
    """Apply augmentations one after the other; each sees the output of the one before.

    It can only be called: there is no :meth:`get_transform` for the whole chain in advance.
    """

    def __init__(self, augs: list[Augmentation | Transform]):
        self.augs = [_transform_to_aug(x) for x in augs]

    def __call__(self, aug_input: AugInput) -> TransformList:
        return TransformList([aug(aug_input) for aug in self.augs])

    def __repr__(self) -> str:
        return f"AugmentationList[{', '.join(map(str, self.augs))}]"


class AugInput:
    """What augmentations look at and change in place.

    Args:
        image: (H, W) or (H, W, C), uint8 in [0, 255] or float.
        boxes: (N, 4) float32, XYXY in pixels.
        sem_seg: (H, W) uint8 labels.
    """

    def __init__(
        self,
        image: np.ndarray,
        *,
        boxes: np.ndarray | None = None,
        sem_seg: np.ndarray | None = None,
    ):
        _check_image(image)
        self.image = image
        self.boxes = boxes
        self.sem_seg = sem_seg

    def transform(self, tfm: Transform) -> None:
        """Apply ``tfm`` to everything that is set."""
        self.image = tfm.apply_image(self.image)
        if self.boxes is not None:
            self.boxes = tfm.apply_box(self.boxes)
        if self.sem_seg is not None:
            self.sem_seg = tfm.apply_segmentation(self.sem_seg)

    def apply_augmentations(self, augmentations: list[Augmentation | Transform]) -> TransformList:
        """The same as ``AugmentationList(augmentations)(self)``."""
        return AugmentationList(augmentations)(self)


StandardAugInput = AugInput


def apply_augmentations(
    augmentations: list[Augmentation | Transform], inputs: np.ndarray | AugInput
) -> tuple[np.ndarray | AugInput, TransformList]:
    """Augment an image or an :class:`AugInput`; returns the result and the transforms used."""
    if isinstance(inputs, np.ndarray):
        aug_input = AugInput(inputs)
        transforms = aug_input.apply_augmentations(augmentations)
        return aug_input.image, transforms
    return inputs, inputs.apply_augmentations(augmentations)
