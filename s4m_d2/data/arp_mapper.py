"""Unlabeled images: the two views that the method needs. Annotations are never read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import transforms as T

from s4m_d2.data.build import DATASET_MAPPER_REGISTRY
from s4m_d2.data.images import read_image
from s4m_d2.data.sampling import SampleSeeds, start_sample
from s4m_d2.data.transforms import ColorDistortion, apply_geometry, build_geometry, of_tile
from s4m_d2.errors import InputError


@DATASET_MAPPER_REGISTRY.register()
class ARPDatasetMapper:
    """Turn an unlabeled record into two views of the same geometry.

    "image" is the geometric view: ARP pastes on it and the strong view starts from it.
    "image_weak" adds the color distortion: the teacher and SAM see it.

    Args:
        is_train: must be True.
        geometry: Detectron2 augmentations that need the image only.
        color: distortion of the weak view, or None.
        image_format: "RGB" or "BGR".
        rng: seeds the samples of a loader that attaches no "seeds"; default: the system's entropy.
    """

    skip_unreadable = True  # the stream loader replaces an image that cannot be read

    @configurable
    def __init__(
        self,
        is_train: bool = True,
        *,
        geometry: Sequence[T.Augmentation],
        color: ColorDistortion | None,
        image_format: str,
        rng: np.random.Generator | None = None,
    ) -> None:
        if not is_train:
            raise InputError("This mapper is for training; test with Detectron2's DatasetMapper.")
        self._geometry = list(geometry)
        self._color = color
        self._image_format = image_format
        self._seeds = SampleSeeds(rng)

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict:
        return {
            "is_train": is_train,
            "geometry": build_geometry(cfg),
            "color": ColorDistortion(cfg.INPUT.FORMAT) if cfg.INPUT.COLOR_AUG_SSD else None,
            "image_format": cfg.INPUT.FORMAT,
        }

    def __call__(self, record: dict) -> dict:
        """Map one record, which stays as it is.

        Returns:
            A sample with "image" and "image_weak", both (3, H, W) uint8, content only.

        Raises:
            DatasetError: the image is missing, damaged or truncated.
        """
        image = read_image(record["file_name"], self._image_format)
        seeds = self._seeds.of(record)
        geometry = of_tile(self._geometry, record)
        view, _ = apply_geometry(geometry, image, seeds.geometry, record["file_name"])
        weak = view if self._color is None else self._color(view, seeds.color())
        sample = start_sample(record, image)
        sample["image"] = torch.from_numpy(view.transpose(2, 0, 1).copy())
        sample["image_weak"] = torch.from_numpy(weak.transpose(2, 0, 1).copy())
        return sample
