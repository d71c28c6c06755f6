"""What backends with SAM's prompt encoder and mask decoder share: batches, precision, memory."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s4m_d2.errors import InputError, require
from s4m_d2.files import atomic_write
from s4m_d2.sam.backend import EncodedImages, PromptOutput, SamBackend
from s4m_d2.sam.decoder import ImageTokens, Prompts, image_input, predict_masks
from s4m_d2.transfers import to_device, to_host

PADDING_LABEL = -1
BOX_LABELS = (2, 3)  # upper left and lower right corner
VALID_LABELS = (1, 0, PADDING_LABEL, *BOX_LABELS)
AUTO = "auto"
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BFLOAT16_CAPABILITY = (8, 0)  # the first CUDA devices that compute with it
SHARE_OF_FREE_MEMORY = 0.5  # the rest is for what is estimated wrongly, and for fragments
# Bytes of the image tokens of one decoder pass on a CPU: larger passes leave its caches. Measured
# with the tiny SAM: a quarter less time than with 5 times as much.
CPU_PASS_BYTES = 4 << 20
# What a decoder pass on a GPU holds of a prompt at a time, in its image tokens in float32: they are
# repeated, projected and upscaled to 4 masks. Counted, not measured.
TOKENS_OF_PROMPT = 16
_resize = partial(F.interpolate, mode="bilinear", align_corners=False)
Decoder = Callable[[Prompts], tuple[Tensor, ...]]  # of the images for which it was made


@dataclass(frozen=True)
class Frame:
    """The square of ``side`` px that an encoder takes, and how an image lies in it.

    If ``padded``, the longer side of a content is resized to ``side`` and the rest is padding on
    the right or at the bottom (SAM); otherwise it is stretched to the square (SAM 2).
    """

    side: int
    mean: Tensor  #: (3, 1, 1) of RGB in 0..255, on the model's device
    std: Tensor
    padded: bool

    def resized(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """(H, W) of a content inside the frame, at least 1."""
        if not self.padded:
            return self.side, self.side
        scale = self.side / max(image_size)
        height, width = (max(int(length * scale + 0.5), 1) for length in image_size)
        return height, width

    def fill(self, content: Tensor) -> Tensor:
        """(3, H, W) RGB in 0..255, as normalized (1, 3, side, side) float32."""
        height, width = self.resized((content.shape[-2], content.shape[-1]))
        content = content[None].float()
        if (height, width) != content.shape[-2:]:
            content = _resize(content, (height, width), antialias=True)
        normalized = (content - self.mean) / self.std
        return F.pad(normalized, (0, self.side - width, 0, self.side - height))


class PointPromptBackend(SamBackend):
    """Encodes images of any sizes in one batch and decodes their prompts together.

    Neither synchronizes, but for labels that are on the device. What is returned is float32; how
    many images and prompts share a pass changes it by rounding alone.

    A subclass adds the image encoder (:meth:`_encode_frames`). One whose modules are not like those
    of segment-anything also replaces :meth:`_masks` and :meth:`_features`.

    Args:
        sam: the library's model; it is frozen.
        decoder: its modules that answer prompts, see :mod:`s4m_d2.sam.decoder`.
        frame: the square that the encoder takes.
        max_prompts: that share a decoder pass.
        max_images: that share an encoder pass; 0: as :class:`ImageBudget` finds.
        precision: a value of S4M.SAM.PRECISION; a caller's autocast does not count, and positions
            are always computed in float32.
    """

    def __init__(
        self,
        sam: Any,
        decoder: Any,
        frame: Frame,
        *,
        max_prompts: int = 256,
        max_images: int = 0,
        precision: str = AUTO,
    ) -> None:
        require("S4M.SAM.MAX_PROMPTS", max_prompts, max_prompts >= 1, "1 or more")
        compute_dtype(precision, torch.device("cpu"))  # refuses what it does not know
        self.sam = sam.eval().requires_grad_(False)
        self.decoder = decoder
        self.max_prompts = max_prompts
        self.precision = precision
        self.frame = frame
        self.image_side = frame.side
        self.grid_side = decoder.prompt_encoder.image_embedding_size[0]
        self.channels = decoder.prompt_encoder.no_mask_embed.embedding_dim  # C, of the embeddings
        self._budget = ImageBudget(max_images)

    @classmethod
    def build_from_config(cls, cfg: Any, sam: Any, *args: Any) -> Any:
        """Build from a loaded model, on MODEL.DEVICE, with the options of ``cfg.S4M.SAM``."""
        keys = "MAX_PROMPTS", "MAX_IMAGES", "PRECISION"
        options: dict[str, Any] = {key.lower(): cfg.S4M.SAM[key] for key in keys}
        return cls(sam.to(cfg.MODEL.DEVICE), *args, **options)

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
        height, width = self.frame.resized(image_size)
        return width / self.image_side, height / self.image_side

    def upscale(self, mask_logits: Tensor, image_size: tuple[int, int]) -> Tensor:
        logits = mask_logits[:, None]
        if self.frame.padded:
            height, width = self.frame.resized(image_size)
            logits = _resize(logits, 2 * (self.image_side,))[..., :height, :width]
        return _resize(logits, image_size)[:, 0]

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
        embeddings, *finer_maps = (torch.cat(parts) for parts in zip(*chunks, strict=True))
        return EncodedImages(embeddings, sizes, tuple(finer_maps))

    def _encode_chunk(self, images: Tensor, sizes: list[tuple[int, int]]) -> tuple[Tensor, ...]:
        """Embeddings and finer maps, float32, of images that go through the encoder together."""
        pairs = zip(images, sizes, strict=True)
        frames = torch.cat([self.frame.fill(image[:, :h, :w]) for image, (h, w) in pairs])
        # segment-anything makes indices in each block, on the default device: for those made on
        # the CPU the host would wait.
        with computing_in(self.dtype, self.device), self.device:
            embeddings, finer_maps = self._encode_frames(frames)
        return embeddings.float(), *(finer.float() for finer in finer_maps)

    def prompt(
        self,
        encoded: EncodedImages,
        points: Sequence[Tensor],
        labels: Sequence[Tensor] | None = None,
        *,
        mask_prompts: Sequence[Tensor] | None = None,
    ) -> list[PromptOutput]:
        if labels is None:
            labels = [torch.ones(p.shape[:2], dtype=torch.long) for p in points]
        side, answers = 4 * self.grid_side, self.decoder.mask_decoder.num_multimask_outputs
        shapes = (answers, side, side), (answers,)
        found = self._in_passes(encoded, points, labels, self._masks, shapes, mask_prompts)
        return [PromptOutput(*of_image) for of_image in found]

    def prompted_features(self, encoded: EncodedImages, points: Sequence[Tensor]) -> list[Tensor]:
        labels = [torch.ones(len(p), 1, dtype=torch.long) for p in points]
        clicks, shape = [p[:, None] for p in points], (self.channels, *2 * (self.grid_side,))
        found = self._in_passes(encoded, clicks, labels, self._features, [shape])
        return [features for (features,) in found]

    def _in_passes(
        self,
        encoded: EncodedImages,
        points: Sequence[Tensor],
        labels: Sequence[Tensor],
        prepare: Callable[[EncodedImages], Decoder],
        shapes: Sequence[tuple[int, ...]],
        mask_prompts: Sequence[Tensor] | None = None,
    ) -> list[tuple[Tensor, ...]]:
        """What a decoder returns for each image's prompts: float32, of ``shapes`` per prompt."""
        token_bytes = 4 * self.channels * self.grid_side**2
        together = prompts_per_pass(self.max_prompts, token_bytes, self.device)
        groups = _group_prompts(_checked_labels(encoded, points, labels), together)
        counts, device = [len(p) for p in points], self.device
        results = [torch.empty(sum(counts), *shape, device=device) for shape in shapes]
        clicks = self._frame_points(encoded, points)
        given = None if mask_prompts is None else to_device(torch.cat(list(mask_prompts)), device)
        with computing_in(self.dtype, device):
            decode = prepare(encoded)
        for rows, images, places, kinds in groups:
            index = to_device(rows, device)
            prompts = Prompts(
                images=images,
                image_index=to_device(images, device),
                points=clicks[to_device(places, device)],
                labels=to_device(kinds, device),
                has_box=BOX_LABELS[0] in kinds,
                masks=None if given is None else given[index],
            )
            with computing_in(self.dtype, device):
                found = decode(prompts)
            for result, values in zip(results, found, strict=True):
                result.index_copy_(0, index, values.float())
        return list(zip(*(result.split(counts) for result in results), strict=True))

    def _frame_points(self, encoded: EncodedImages, points: Sequence[Tensor]) -> Tensor:
        """(sum of N_i * P_i, 2) points of all images, in pixels of the square frame."""
        flat = torch.cat([p.detach().reshape(-1, 2).float() for p in points])
        scales = [self.grid_scale(size) for size in encoded.image_sizes]
        frames = to_device(scales, self.device, torch.float32) * self.image_side
        parts = to_device(flat, self.device).split([p.shape[0] * p.shape[1] for p in points])
        return torch.cat([part * frame for part, frame in zip(parts, frames, strict=True)])

    def _masks(self, encoded: EncodedImages) -> Decoder:
        """Make a decoder: prompts -> mask logits (N, 3, 4S, 4S) and predicted IoUs (N, 3)."""
        images = image_input(self.decoder, encoded.embeddings)
        return lambda prompts: predict_masks(self.decoder, *images, encoded.finer_maps, prompts)

    def _features(self, encoded: EncodedImages) -> Decoder:
        """Make a decoder: prompts -> image tokens (N, C, S, S)."""
        tokens = ImageTokens(self.decoder, encoded.embeddings)
        return lambda prompts: (tokens.after(prompts),)


def _checked_labels(
    encoded: EncodedImages, points: Sequence[Tensor], labels: Sequence[Tensor]
) -> list[np.ndarray]:
    """The labels as int64 arrays; synchronizes once if they are not on the CPU.

    InputError: shapes disagree, a label is unknown, or a prompt has one corner of a box, or several
    boxes.
    """
    if not len(points) == len(labels) == len(encoded):
        raise InputError(
            f"{len(encoded)} encoded images, but points for {len(points)} and labels for "
            f"{len(labels)}; give one tensor an image, with no rows where there is no prompt"
        )
    arrays = to_host(*labels)
    for number, (p, kinds) in enumerate(zip(points, arrays, strict=True)):
        corners = np.stack([(kinds == label).sum(axis=-1) for label in BOX_LABELS])
        are_known = np.isin(kinds, VALID_LABELS).all() and corners.max(initial=0) <= 1
        fits = kinds.ndim == 2 and p.shape == (*kinds.shape, 2)
        if not fits or not are_known or (corners[0] != corners[1]).any():
            raise InputError(
                f"image {number} has points {tuple(p.shape)} with labels {kinds.shape} of "
                f"{np.unique(kinds).tolist()}; expected (N, P, 2) with (N, P) of 1, 0, -1 "
                "(padding), or one 2 and one 3 a prompt (corners of a box)"
            )
    return [array.astype(np.int64) for array in arrays]


def _group_prompts(labels: Sequence[np.ndarray], max_prompts: int) -> list[tuple[np.ndarray, ...]]:
    """Groups of at most ``max_prompts`` prompts with equally many points, all with a box or none.

    A padding point is no neutral token in SAM: it takes part in every attention. Prompts of equal
    length share a pass, so padding never reaches the decoder.

    Returns int64 arrays of each group of n prompts with k points: (n,) their places among the
    prompts of all images, (n,) of which image they are, (n, k) where their points lie among those
    of all images, (n, k) the points' labels.
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
    alike = 2 * lengths + (kinds == BOX_LABELS[0]).any(axis=1)
    groups: list[tuple[np.ndarray, ...]] = []
    for value in np.unique(alike):
        found = np.flatnonzero(alike == value)
        for start in range(0, len(found), max_prompts):
            rows, length = found[start : start + max_prompts], value // 2
            groups.append((rows, images[rows], points[rows, :length], kinds[rows, :length]))
    return groups


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The type that a value of S4M.SAM.PRECISION means on a device."""
    known = (AUTO, *PRECISIONS)
    require("S4M.SAM.PRECISION", precision, precision in known, f"one of {', '.join(known)}")
    if precision != AUTO:
        return PRECISIONS[precision]
    if device.type != "cuda":
        return torch.float32
    modern = torch.cuda.get_device_capability(device) >= BFLOAT16_CAPABILITY
    return torch.bfloat16 if modern else torch.float16


def computing_in(dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """Autocast to ``dtype``, and none with float32; an autocast around it does not count."""
    low = dtype != torch.float32
    return torch.autocast(device.type, dtype=dtype if low else None, enabled=low)


class ImageBudget:
    """How many images go through the encoder together: S4M.SAM.MAX_IMAGES.

    0: on the CPU one, as a batch leaves its caches and takes longer; on a GPU the first image goes
    alone, and what it needs beyond the memory held before tells how many of the next ones fit into
    half of the memory that is free when they come.
    """

    def __init__(self, max_images: int = 0) -> None:
        require("S4M.SAM.MAX_IMAGES", max_images, max_images >= 0, "0 or more")
        self.max_images = max_images
        self.bytes_per_image: int | None = None  # unknown

    def chunks(self, count: int, device: torch.device) -> Iterator[slice]:
        """Slices of ``count`` images, each to be encoded before the next is taken.

        On a GPU its peak of memory begins anew at the first image.
        """
        start, size = 0, self.max_images or 1
        if device.type == "cuda" and not self.max_images and self.bytes_per_image is None:
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            yield slice(0, 1)
            self.bytes_per_image = torch.cuda.max_memory_allocated(device) - before
            start = 1
        while start < count:
            if self.bytes_per_image is not None:
                size = fitting(count - start, self.bytes_per_image, device)
            yield slice(start, start + size)
            start += size


def fitting(most: int, bytes_each: int, device: torch.device) -> int:
    """How many of ``most`` need half of a GPU's free memory at most; at least 1."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + unused
    return max(1, min(most, int(SHARE_OF_FREE_MEMORY * free / max(bytes_each, 1))))


def prompts_per_pass(max_prompts: int, token_bytes: int, device: torch.device) -> int:
    """How many prompts go through the decoder together: S4M.SAM.MAX_PROMPTS, or fewer if more may
    not fit, or be slower. token_bytes: of one prompt's image tokens."""
    if device.type == "cuda":
        return fitting(max_prompts, TOKENS_OF_PROMPT * token_bytes, device)
    return max(1, min(max_prompts, CPU_PASS_BYTES // token_bytes))
