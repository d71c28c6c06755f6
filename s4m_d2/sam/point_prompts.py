"""What the backends with SAM's prompt encoder and mask decoder share: batches, chunks, checks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from s4m_d2.errors import ConfigError, InputError
from s4m_d2.sam.backend import EncodedImages, PromptOutput, SamBackend
from s4m_d2.sam.decoder import (
    PADDING_LABEL,
    PromptedDecoder,
    predict_masks,
    transform_tokens,
    valid_point_groups,
)

DEFAULT_MAX_PROMPTS = 256
VALID_LABELS = (1, 0, PADDING_LABEL)


class PointPromptBackend(SamBackend):
    """Encodes images of any sizes in one batch and decodes their prompts together.

    A backend adds the geometry (``grid_scale``, ``upscale`` and :meth:`_to_frames`) and the image
    encoder (:meth:`_encode_frames`).
    """

    def __init__(
        self, decoder: PromptedDecoder, image_side: int, *, max_prompts_per_chunk: int
    ) -> None:
        """At most ``max_prompts_per_chunk`` prompts share a decoder pass."""
        if max_prompts_per_chunk < 1:
            raise ConfigError(f"S4M.SAM.MAX_PROMPTS is {max_prompts_per_chunk}; expected 1 or more")
        self.decoder = decoder
        self.max_prompts_per_chunk = max_prompts_per_chunk
        self.image_side = image_side
        self.grid_side = decoder.prompt_encoder.image_embedding_size[0]

    @property
    def device(self) -> torch.device:
        """Where the model and everything it returns is."""
        return self.decoder.mask_decoder.mask_tokens.weight.device

    @abstractmethod
    def _to_frames(self, content: Tensor) -> Tensor:
        """(n, 3, H, W) float RGB in 0..255 of equal size, as the encoder's (n, 3, side, side)."""

    @abstractmethod
    def _encode_frames(self, frames: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Embeddings (n, C, S, S) and finer maps of (n, 3, side, side) frames."""

    @torch.no_grad()
    def encode(self, images: Tensor, image_sizes: Sequence[tuple[int, int]]) -> EncodedImages:
        sizes = _check_images(images, image_sizes)
        if not sizes:
            channels = self.decoder.prompt_encoder.embed_dim
            empty = torch.zeros(0, channels, self.grid_side, self.grid_side, device=self.device)
            return EncodedImages(empty, [])
        images = images.to(self.device)
        frames = torch.zeros(len(sizes), 3, self.image_side, self.image_side, device=self.device)
        for size in dict.fromkeys(sizes):
            rows = [i for i, other in enumerate(sizes) if other == size]
            frames[rows] = self._to_frames(images[rows, :, : size[0], : size[1]].float())
        embeddings, finer_maps = self._encode_frames(frames)
        return EncodedImages(
            embeddings.float(), sizes, tuple(finer.float() for finer in finer_maps)
        )

    @torch.no_grad()
    def prompt(
        self,
        encoded: EncodedImages,
        points: Sequence[Tensor],
        labels: Sequence[Tensor] | None = None,
        *,
        multimask: bool = True,
        masks: bool = True,
        features: bool = False,
    ) -> list[PromptOutput]:
        if labels is None:
            labels = [torch.ones(p.shape[:2], dtype=torch.long) for p in points]
        _check_prompts(encoded, points, labels)
        counts = [len(p) for p in points]
        results = self._empty_results(sum(counts), multimask, masks, features)
        if sum(counts):
            tokens = slice(1, None) if multimask else slice(0, 1)
            for rows, index, *prompts in self._chunks(encoded, points, labels):
                hidden, attended = transform_tokens(
                    self.decoder, encoded.embeddings, index, *prompts
                )
                if features:
                    results["features"][rows] = attended.float()
                if masks:
                    finer = [finer_map[index] for finer_map in encoded.finer_maps]
                    logits, quality = predict_masks(self.decoder, hidden, attended, tokens, finer)
                    results["mask_logits"][rows] = logits.float()
                    results["iou_predictions"][rows] = quality.float()
        split = {name: value.split(counts) for name, value in results.items()}
        names = ("mask_logits", "iou_predictions", "features")
        return [
            PromptOutput(*(split[name][i] if name in split else None for name in names))
            for i in range(len(counts))
        ]

    def _chunks(
        self, encoded: EncodedImages, points: Sequence[Tensor], labels: Sequence[Tensor]
    ) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """(rows, image index, frame points, labels) of the prompts that share a decoder pass."""
        longest = max(p.shape[1] for p in points)
        all_points, all_labels = [], []
        for p, x, size in zip(points, labels, encoded.image_sizes, strict=True):
            frame = torch.tensor(self.grid_scale(size), device=self.device) * self.image_side
            missing = longest - p.shape[1]
            all_points.append(F.pad(p.to(self.device).float() * frame, (0, 0, 0, missing)))
            all_labels.append(F.pad(x.to(self.device), (0, missing), value=PADDING_LABEL))
        image_index = torch.cat([
            torch.full((len(p),), i, device=self.device) for i, p in enumerate(points)
        ])  # fmt: skip
        chunks = []
        for group in valid_point_groups(torch.cat(all_points), torch.cat(all_labels)):
            parts = (tensor.split(self.max_prompts_per_chunk) for tensor in group)
            for rows, chunk_points, chunk_labels in zip(*parts, strict=True):
                chunks.append((rows, image_index[rows], chunk_points, chunk_labels))
        return chunks

    def _empty_results(
        self, count: int, multimask: bool, masks: bool, features: bool
    ) -> dict[str, Tensor]:
        """Uninitialized outputs for ``count`` prompts, by field of PromptOutput."""
        channels, grid = self.decoder.prompt_encoder.embed_dim, self.grid_side
        outputs = self.decoder.mask_decoder.num_multimask_outputs if multimask else 1
        shapes: dict[str, tuple[int, ...]] = {}
        if masks:
            shapes["mask_logits"] = (count, outputs, 4 * grid, 4 * grid)
            shapes["iou_predictions"] = (count, outputs)
        if features:
            shapes["features"] = (count, channels, grid, grid)
        return {name: torch.empty(shape, device=self.device) for name, shape in shapes.items()}


def _check_images(images: Tensor, image_sizes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The sizes as tuples of int, or an InputError."""
    if images.ndim != 4 or images.shape[1] != 3 or len(images) != len(image_sizes):
        raise InputError(
            f"images of shape {tuple(images.shape)} with {len(image_sizes)} image_sizes; "
            "expected (B, 3, H, W) and one (H, W) an image"
        )
    sizes = [(int(height), int(width)) for height, width in image_sizes]
    for number, size in enumerate(sizes):
        if min(size) < 1 or size[0] > images.shape[2] or size[1] > images.shape[3]:
            raise InputError(
                f"image {number} has a content of {size}, which does not fit into the batch's "
                f"{tuple(images.shape[2:])}"
            )
    return sizes


def _check_prompts(
    encoded: EncodedImages, points: Sequence[Tensor], labels: Sequence[Tensor]
) -> None:
    if not len(points) == len(labels) == len(encoded):
        raise InputError(
            f"{len(encoded)} encoded images, but points for {len(points)} and labels for "
            f"{len(labels)}; give one tensor an image, with no rows where there is no prompt"
        )
    for number, (p, x) in enumerate(zip(points, labels, strict=True)):
        if p.ndim != 3 or p.shape[2] != 2 or x.shape != p.shape[:2]:
            raise InputError(
                f"image {number} has points {tuple(p.shape)} and labels {tuple(x.shape)}; "
                "expected (N, P, 2) and (N, P)"
            )
        if not torch.isin(x.cpu(), torch.tensor(VALID_LABELS, dtype=x.dtype)).all():
            raise InputError(
                f"image {number} has point labels {torch.unique(x).tolist()}; expected 1, 0 or "
                "-1 (padding)"
            )
