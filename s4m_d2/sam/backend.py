"""The frozen SAM: interface, registry, builder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fvcore.common.registry import Registry
from torch import Tensor, nn

from s4m_d2.errors import registered
from s4m_d2.transfers import to_device

SAM_BACKEND_REGISTRY = Registry("SAM_BACKEND")
SAM_BACKEND_REGISTRY.__doc__ = """Builders ``cfg -> SamBackend``, with weights, on MODEL.DEVICE."""


def held_modules(backend: object) -> nn.ModuleList:
    """The modules that a backend of any kind holds, of which some may be parts of others."""
    return nn.ModuleList([part for part in vars(backend).values() if isinstance(part, nn.Module)])


@dataclass
class EncodedImages:
    """Image embeddings of a batch, to be prompted any number of times."""

    embeddings: Tensor  #: (B, C, S, S)
    image_sizes: list[tuple[int, int]]  #: (H, W) of each image's content, as given to ``encode``
    #: (B, C_i, S_i, S_i) with S_i >= S, finest first, if the backend's mask decoder needs them
    finer_maps: tuple[Tensor, ...] = ()

    def __len__(self) -> int:
        return len(self.image_sizes)

    def select(self, indices: Sequence[int]) -> EncodedImages:
        """The images at the given positions, in that order."""
        chosen = to_device(list(indices), self.embeddings.device, torch.long)
        return EncodedImages(
            self.embeddings[chosen],
            [self.image_sizes[i] for i in indices],
            tuple(finer[chosen] for finer in self.finer_maps),
        )


@dataclass
class PromptOutput:
    """Answers to the N prompts of one image, three masks each."""

    mask_logits: Tensor  #: (N, 3, 4S, 4S) in the square frame: see ``upscale``
    iou_predictions: Tensor  #: (N, 3), of each mask


class SamBackend(ABC):
    """A frozen SAM. Not an ``nn.Module``: as an attribute it adds no parameters to a model."""

    image_side: int  #: of the encoder's square frame, px
    grid_side: int  #: S, of the feature grid
    device: torch.device

    @abstractmethod
    def encode(self, images: Tensor, image_sizes: Sequence[tuple[int, int]]) -> EncodedImages:
        """Encode a batch, without synchronizing.

        Args:
            images: (B, 3, H, W) RGB in 0..255, uint8 or float; content at the top left.
            image_sizes: (H, W) of each image's content.
        """

    @abstractmethod
    def prompt(
        self,
        encoded: EncodedImages,
        points: Sequence[Tensor],
        labels: Sequence[Tensor] | None = None,
        *,
        mask_prompts: Sequence[Tensor] | None = None,
    ) -> list[PromptOutput]:
        """Predict masks, for the prompts of all images together.

        Args:
            points: one (N_i, P, 2) tensor per image, (x, y) in [0, 1] over its content; N_i may
                be 0.
            labels: one (N_i, P) tensor per image: 1 positive, 0 negative, 2 and 3 the upper left
                and lower right corner of a box, -1 padding, which changes nothing. Default: all
                positive. The host reads them: on the device they cost one synchronization.
            mask_prompts: one (N_i, 4S, 4S) tensor per image, logits of a mask in the square frame,
                as those of the answers.
        """

    @abstractmethod
    def prompted_features(self, encoded: EncodedImages, points: Sequence[Tensor]) -> list[Tensor]:
        """Compute how SAM sees an image after a click, for the clicks of all images together.

        Args:
            points: one (N_i, 2) tensor per image of clicks, of which each is a prompt of its own.

        Returns:
            (N_i, C, S, S) image tokens after the decoder's two-way transformer, for each image.
        """

    @abstractmethod
    def grid_scale(self, image_size: tuple[int, int]) -> tuple[float, float]:
        """(sx, sy) in (0, 1]: factors from content-normalized to grid-normalized (x, y)."""

    @abstractmethod
    def upscale(self, mask_logits: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Crop logits (N, h, w) of the square frame to the content and resize: (N, H, W)."""

    def content_mask(self, image_size: tuple[int, int]) -> Tensor:
        """(S, S) bool: grid cells whose center is inside the content."""
        centers = (torch.arange(self.grid_side, device=self.device) + 0.5) / self.grid_side
        scale_x, scale_y = self.grid_scale(image_size)
        return (centers < scale_y)[:, None] & (centers < scale_x)[None, :]


def build_sam_backend(cfg: Any) -> SamBackend:
    """Build the backend of ``cfg.S4M.SAM.BACKEND`` with its weights, frozen, on MODEL.DEVICE.

    Raises:
        WeightsError: its weights are missing or of another model.
    """
    return registered(SAM_BACKEND_REGISTRY, "S4M.SAM.BACKEND", cfg.S4M.SAM.BACKEND)(cfg)
