"""What the backends with SAM's prompt encoder and mask decoder share: batches, groups, checks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s4m_d2.errors import InputError, require
from s4m_d2.files import atomic_write
from s4m_d2.sam.backend import EncodedImages, PromptOutput, SamBackend
from s4m_d2.sam.decoder import ImageTokens, Prompts, image_input, predict_masks, transform_tokens
from s4m_d2.sam.precision import AUTO, ImageBudget, compute_dtype, computing_in, prompts_per_pass
from s4m_d2.transfers import to_device, to_host

PADDING_LABEL = -1
BOX_LABELS = (2, 3)  # upper left and lower right corner
VALID_LABELS = (1, 0, PADDING_LABEL, *BOX_LABELS)


class Asked(NamedTuple):
    """What a call of :meth:`~s4m_d2.sam.backend.SamBackend.prompt` asks for."""

    multimask: bool
    masks: bool
    features: bool


@dataclass(frozen=True)
class Frame:
    """The square of ``side`` px that an encoder takes, and how an image lies in it.

    Attributes:
        mean, std: (3, 1, 1) of RGB in 0..255, on the model's device.
        padded: whether the longer side of a content is resized to ``side`` and the rest is padding
            on the right or at the bottom (SAM); otherwise it is stretched to the square (SAM 2).
    """

    side: int
    mean: Tensor
    std: Tensor
    padded: bool

    def resized(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """(H, W) of a content inside the frame, at least 1."""
        if not self.padded:
            return self.side, self.side
        scale = self.side / max(image_size)
        height, width = (max(int(length * scale + 0.5), 1) for length in image_size)
        return height, width

    def scale(self, image_size: tuple[int, int]) -> tuple[float, float]:
        """As :meth:`~s4m_d2.sam.backend.SamBackend.grid_scale`."""
        height, width = self.resized(image_size)
        return width / self.side, height / self.side

    def fill(self, content: Tensor) -> Tensor:
        """(n, 3, H, W) float RGB in 0..255 of equal size as normalized (n, 3, side, side)."""
        height, width = self.resized((content.shape[-2], content.shape[-1]))
        if (height, width) != content.shape[-2:]:
            content = F.interpolate(
                content, (height, width), mode="bilinear", align_corners=False, antialias=True
            )
        normalized = (content - self.mean) / self.std
        return F.pad(normalized, (0, self.side - width, 0, self.side - height))

    def upscale(self, mask_logits: Tensor, image_size: tuple[int, int]) -> Tensor:
        """As :meth:`~s4m_d2.sam.backend.SamBackend.upscale`."""
        logits = mask_logits[:, None]
        if self.padded:
            square = (self.side, self.side)
            logits = F.interpolate(logits, square, mode="bilinear", align_corners=False)
            height, width = self.resized(image_size)
            logits = logits[..., :height, :width]
        return F.interpolate(logits, image_size, mode="bilinear", align_corners=False)[:, 0]


def build_compute_options(cfg: Any) -> dict[str, Any]:
    """The options of a :class:`PointPromptBackend` that ``cfg.S4M.SAM`` gives."""
    sam = cfg.S4M.SAM
    return {
        "max_prompts_per_chunk": sam.MAX_PROMPTS,
        "max_images_per_chunk": sam.MAX_IMAGES,
        "precision": sam.PRECISION,
    }


class PointPromptBackend(SamBackend):
    """Encodes images of any sizes in one batch and decodes their prompts together.

    Neither synchronizes, but for labels that are on the device. How many images and prompts share
    a pass moves results by no more than rounding does. What is returned is float32.

    A subclass adds the image encoder (:meth:`_encode_frames`). One whose modules are not like those
    of segment-anything also replaces :meth:`_prepare` and :meth:`_decode`.

    Args:
        sam: the library's model; it is frozen.
        decoder: its modules that answer prompts, see :mod:`s4m_d2.sam.decoder`.
        frame: the square that the encoder takes.
        max_prompts_per_chunk: prompts that share a decoder pass, at most.
        max_images_per_chunk: images that share an encoder pass, at most; 0: as
            :class:`~s4m_d2.sam.precision.ImageBudget` finds.
        precision: a value of S4M.SAM.PRECISION; a caller's autocast does not count. Positions
            are computed in float32 with each.
    """

    def __init__(
        self,
        sam: Any,
        decoder: Any,
        frame: Frame,
        *,
        max_prompts_per_chunk: int = 256,
        max_images_per_chunk: int = 0,
        precision: str = AUTO,
    ) -> None:
        most = max_prompts_per_chunk
        require("S4M.SAM.MAX_PROMPTS", most, most >= 1, "1 or more")
        compute_dtype(precision, torch.device("cpu"))  # refuses what it does not know
        self.sam = sam.eval().requires_grad_(False)
        self.decoder = decoder
        self.max_prompts_per_chunk = max_prompts_per_chunk
        self.precision = precision
        self.frame = frame
        self.image_side = frame.side
        self.grid_side = decoder.prompt_encoder.image_embedding_size[0]
        self._budget = ImageBudget(max_images_per_chunk)

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where the model and everything it returns is."""
        return self.decoder.mask_decoder.mask_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """In which the model computes."""
        return compute_dtype(self.precision, self.device)

    @property
    def image_encoder(self) -> nn.Module:
        return self.sam.image_encoder

    def save(self, path: str) -> str:
        """Write the weights to ``path`` with a suffix; returns a value for S4M.SAM.CHECKPOINT."""
        with atomic_write(f"{path}.pth", "wb") as file:
            torch.save(self.sam.state_dict(), file)
        return f"{path}.pth"

    def grid_scale(self, image_size: tuple[int, int]) -> tuple[float, float]:
        return self.frame.scale(image_size)

    def upscale(self, mask_logits: Tensor, image_size: tuple[int, int]) -> Tensor:
        return self.frame.upscale(mask_logits, image_size)

    @property
    def channels(self) -> int:
        """C, of the embeddings."""
        return self.decoder.prompt_encoder.no_mask_embed.embedding_dim

    @abstractmethod
    def _encode_frames(self, frames: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Embeddings (n, C, S, S) and finer maps of (n, 3, side, side) frames."""

    def encode(self, images: Tensor, image_sizes: Sequence[tuple[int, int]]) -> EncodedImages:
        sizes, device = list(image_sizes), self.device
        images = to_device(images.detach(), device)
        chunks = [
            self._encode_chunk(images[chunk], sizes[chunk])
            for chunk in self._budget.chunks(len(sizes), device)
        ]
        maps = chunks[0]
        if len(chunks) > 1:
            maps = tuple(torch.cat(parts) for parts in zip(*chunks, strict=True))
        return EncodedImages(maps[0], sizes, maps[1:])

    def _encode_chunk(self, images: Tensor, sizes: list[tuple[int, int]]) -> tuple[Tensor, ...]:
        """Embeddings and finer maps, float32, of images that go through the encoder together."""
        frames: dict[int, Tensor] = {}
        for height, width in dict.fromkeys(sizes):
            rows = [i for i, size in enumerate(sizes) if size == (height, width)]
            content = torch.stack([images[i, :, :height, :width] for i in rows]).float()
            frames.update(zip(rows, self.frame.fill(content), strict=True))
        stacked = torch.stack([frames[i] for i in range(len(sizes))])
        # segment-anything makes indices in each block, on the default device: for those made on
        # the CPU the host would wait.
        with computing_in(self.dtype, self.device), self.device:
            embeddings, finer_maps = self._encode_frames(stacked)
        return embeddings.float(), *(finer.float() for finer in finer_maps)

    def prompt(
        self,
        encoded: EncodedImages,
        points: Sequence[Tensor],
        labels: Sequence[Tensor] | None = None,
        *,
        mask_prompts: Sequence[Tensor] | None = None,
        multimask: bool = True,
        masks: bool = True,
        features: bool = False,
    ) -> list[PromptOutput]:
        if labels is None:
            labels = [torch.ones(p.shape[:2], dtype=torch.long) for p in points]
        _check_prompts(encoded, points, labels)
        token_bytes = 4 * self.channels * self.grid_side**2
        together = prompts_per_pass(self.max_prompts_per_chunk, token_bytes, self.device)
        groups = _group_prompts(_labels_on_host(labels), together)
        counts, asked = [len(p) for p in points], Asked(multimask, masks, features)
        results = {} if len(groups) == 1 else self._empty_results(sum(counts), asked)
        if groups:
            clicks = self._frame_points(encoded, points)
            with computing_in(self.dtype, self.device):
                images = self._prepare(encoded.embeddings, asked)
            if mask_prompts is not None:
                shapes = to_device(torch.cat(list(mask_prompts)), self.device)
        for rows, of_rows, places, kinds in groups:
            index = to_device(rows, self.device)
            prompts = Prompts(
                images=of_rows,
                image_index=to_device(of_rows, self.device),
                points=clicks[to_device(places, self.device)],
                labels=to_device(kinds, self.device),
                has_box=BOX_LABELS[0] in kinds,
                masks=None if mask_prompts is None else shapes[index],
            )
            with computing_in(self.dtype, self.device):
                found = self._decode(images, encoded.finer_maps, prompts, asked)
            for name, values in found.items():
                if len(groups) == 1:  # all prompts, in their order
                    results[name] = values.float()
                else:
                    results[name].index_copy_(0, index, values.float())
        split = {name: values.split(counts) for name, values in results.items()}
        return [
            PromptOutput(**{name: parts[i] for name, parts in split.items()})
            for i in range(len(counts))
        ]

    def _frame_points(self, encoded: EncodedImages, points: Sequence[Tensor]) -> Tensor:
        """(sum of N_i * P_i, 2) points of all images, in pixels of the square frame."""
        flat = [p.detach().reshape(-1, 2).float() for p in points]
        if any(p.device.type != "cpu" for p in points):
            flat = [to_device(p, self.device) for p in flat]
        together = to_device(torch.cat(flat), self.device)
        scales = [self.grid_scale(size) for size in encoded.image_sizes]
        frames = to_device(scales, self.device, torch.float32) * self.image_side
        parts = together.split([p.shape[0] * p.shape[1] for p in points])
        return torch.cat([part * frame for part, frame in zip(parts, frames, strict=True)])

    def _prepare(self, embeddings: Tensor, asked: Asked) -> Any:
        """What all passes share of the images' (B, C, S, S) embeddings, for :meth:`_decode`."""
        return (image_input if asked.masks else ImageTokens)(self.decoder, embeddings)

    def _decode(
        self, images: Any, finer_maps: Sequence[Tensor], prompts: Prompts, asked: Asked
    ) -> dict[str, Tensor]:
        """Fields of PromptOutput for the prompts of one pass; images: of :meth:`_prepare`."""
        if isinstance(images, ImageTokens):
            return {"features": images.after(prompts)}
        image_tokens, position = images
        hidden, attended = transform_tokens(self.decoder, image_tokens, position, prompts)
        tokens = slice(1, None) if asked.multimask else slice(0, 1)
        finer = [finer_map[prompts.image_index] for finer_map in finer_maps]
        logits, ratings = predict_masks(self.decoder, hidden, attended, tokens, finer)
        found = {"mask_logits": logits, "iou_predictions": ratings}
        return found | ({"features": attended} if asked.features else {})

    def _empty_results(self, count: int, asked: Asked) -> dict[str, Tensor]:
        """Uninitialized outputs for ``count`` prompts, by field of PromptOutput."""
        grid = self.grid_side
        shapes: dict[str, tuple[int, ...]] = {}
        if asked.masks:
            answers = self.decoder.mask_decoder.num_multimask_outputs if asked.multimask else 1
            shapes["mask_logits"] = (count, answers, 4 * grid, 4 * grid)
            shapes["iou_predictions"] = (count, answers)
        if asked.features:
            shapes["features"] = (count, self.channels, grid, grid)
        return {name: torch.empty(shape, device=self.device) for name, shape in shapes.items()}


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


def _labels_on_host(labels: Sequence[Tensor]) -> list[np.ndarray]:
    """The labels as arrays; synchronizes once if some are not on the CPU.

    Raises:
        InputError: a label is unknown, or a prompt has one corner of a box, or several boxes.
    """
    elsewhere = [x.device for x in labels if x.device.type != "cpu"]
    if elsewhere:
        arrays = to_host(*(to_device(x, elsewhere[0]) for x in labels))
    else:
        arrays = [x.detach().numpy() for x in labels]
    for number, array in enumerate(arrays):
        corners = np.stack([(array == label).sum(axis=-1) for label in BOX_LABELS])
        is_known = np.isin(array, VALID_LABELS).all()
        if not is_known or (corners != corners[:1]).any() or (corners > 1).any():
            raise InputError(
                f"image {number} has point labels {np.unique(array).tolist()}; expected 1, 0, -1 "
                "(padding), or one 2 and one 3 a prompt (corners of a box)"
            )
    return [array.astype(np.int64) for array in arrays]


def _group_prompts(labels: Sequence[np.ndarray], max_prompts: int) -> list[tuple[np.ndarray, ...]]:
    """Groups of at most ``max_prompts`` prompts with equally many points, all with a box or none.

    A padding point is no neutral token in SAM: it takes part in every attention. Prompts of equal
    length share a pass, so padding never reaches the decoder.

    Args:
        labels: (N_i, P_i) of each image, with padding anywhere.

    Returns:
        int64 arrays of each group of n prompts with k points: (n,) their places among the prompts
        of all images, (n,) of which image they are, (n, k) where their points lie among those of
        all images, (n, k) the points' labels.
    """
    images = np.repeat(np.arange(len(labels)), [len(x) for x in labels])
    kinds = np.full((len(images), max(x.shape[1] for x in labels)), PADDING_LABEL)
    points = np.zeros_like(kinds)
    row = point = 0
    for given in labels:
        own = slice(row, row + len(given)), slice(given.shape[1])
        kinds[own], points[own] = given, point + np.arange(given.size).reshape(given.shape)
        row, point = row + len(given), point + given.size
    order = np.argsort(kinds == PADDING_LABEL, axis=1, kind="stable")  # padding last
    kinds, points = (np.take_along_axis(x, order, axis=1) for x in (kinds, points))
    lengths = (kinds != PADDING_LABEL).sum(axis=1)
    with_box = (kinds == BOX_LABELS[0]).any(axis=1)
    groups: list[tuple[np.ndarray, ...]] = []
    for length, has_box in sorted(set(zip(lengths.tolist(), with_box.tolist(), strict=True))):
        found = np.flatnonzero((lengths == length) & (with_box == has_box))
        for start in range(0, len(found), max_prompts):
            rows = found[start : start + max_prompts]
            groups.append((rows, images[rows], points[rows, :length], kinds[rows, :length]))
    return groups
