"""SAM's embeddings of images that come again, kept in a folder."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from s4m_d2.files import TENSOR_FILE_ERRORS
from s4m_d2.sam.backend import EncodedImages, PromptOutput, SamBackend, check_images
from s4m_d2.sam.cache_folder import CacheFolder
from s4m_d2.transfers import to_device, to_host

FORMAT_VERSION = 1


class CachedBackend(SamBackend):
    """A backend that looks into a folder before it encodes an image.

    An entry belongs to an image's pixels, as SAM is given them, their number and the backend's
    fingerprint and settings: what is read was computed from the same, and has every bit of it. It
    was computed in the batch of its day, which may differ from today's by rounding. The pixels are
    compared on the host, which waits for them once a batch, and once for embeddings to be kept.

    Several processes may share the folder. An entry that is damaged, or none, is written anew;
    when the folder cannot be written, it is only read from then on. A log says so once each.

    Args:
        backend: which does all the rest.
        folder: is made when the first entry is written.
        max_bytes: of all entries; the least recently used go first.
        settings: what beside the fingerprint tells models apart.

    Raises:
        ConfigError: in ``encode``, a backend without fingerprint.
    """

    def __init__(
        self, backend: SamBackend, folder: str | Path, *, max_bytes: int, settings: str = ""
    ) -> None:
        self.backend = backend
        self.settings = settings
        self._folder = CacheFolder(folder, max_bytes)

    @property
    def image_side(self) -> int:  # type: ignore[override]
        return self.backend.image_side

    @property
    def grid_side(self) -> int:  # type: ignore[override]
        return self.backend.grid_side

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.backend.device

    def fingerprint(self) -> str:
        return self.backend.fingerprint()

    @torch.no_grad()
    def encode(self, images: Tensor, image_sizes: Sequence[tuple[int, int]]) -> EncodedImages:
        sizes = check_images(images, image_sizes)
        if not sizes:
            return self.backend.encode(images, sizes)
        keys = self._keys(images, sizes)
        entries = {key: self._read(key) for key in dict.fromkeys(keys)}
        missing = [keys.index(key) for key, maps in entries.items() if maps is None]
        if missing:
            chosen = images
            if len(missing) < len(images):
                chosen = torch.stack([images[i] for i in missing])
            new = self.backend.encode(chosen, [sizes[i] for i in missing])
            if len(missing) == len(images):  # nothing was known: no way over the host
                self._write([keys[i] for i in missing], new)
                return new
            entries.update(self._write([keys[i] for i in missing], new))
        maps = [torch.stack(maps) for maps in zip(*(entries[key] for key in keys), strict=True)]
        on_device = [to_device(values, self.device) for values in maps]
        return EncodedImages(on_device[0], sizes, tuple(on_device[1:]))

    def prompt(
        self,
        encoded: EncodedImages,
        points: Sequence[Tensor],
        labels: Sequence[Tensor] | None = None,
        **asked: bool,
    ) -> list[PromptOutput]:
        return self.backend.prompt(encoded, points, labels, **asked)

    def grid_scale(self, image_size: tuple[int, int]) -> tuple[float, float]:
        return self.backend.grid_scale(image_size)

    def upscale(self, mask_logits: Tensor, image_size: tuple[int, int]) -> Tensor:
        return self.backend.upscale(mask_logits, image_size)

    def content_mask(self, image_size: tuple[int, int]) -> Tensor:
        return self.backend.content_mask(image_size)

    @cached_property
    def _model_key(self) -> bytes:
        about = (FORMAT_VERSION, self.settings, self.image_side, self.backend.fingerprint())
        return repr(about).encode()

    def _keys(self, images: Tensor, image_sizes: Sequence[tuple[int, int]]) -> list[str]:
        """The name of each image's entry."""
        (pixels,) = to_host(images)
        keys = []
        for image, (height, width) in zip(pixels, image_sizes, strict=True):
            content = np.ascontiguousarray(image[:, :height, :width])
            digest = hashlib.sha256(self._model_key)
            digest.update(repr((content.shape, content.dtype.str)).encode())
            digest.update(content.data)
            keys.append(digest.hexdigest())
        return keys

    def _read(self, key: str) -> list[Tensor] | None:
        """Embeddings (C, S, S) and finer maps of an entry, on the CPU; None: there is none."""
        content = self._folder.read(key)
        if content is None:
            return None
        try:
            maps = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except TENSOR_FILE_ERRORS:
            maps = None
        if not self._is_entry(maps):
            self._folder.warn_of_damage(key, "it holds something else")
            return None
        return maps

    def _is_entry(self, maps: Any) -> bool:
        if not isinstance(maps, list) or not maps:
            return False
        right = all(
            isinstance(values, Tensor) and values.ndim == 3 and values.dtype == torch.float32
            for values in maps
        )
        return right and maps[0].shape[1:] == (self.grid_side, self.grid_side)

    def _write(self, keys: list[str], encoded: EncodedImages) -> dict[str, list[Tensor]]:
        """Keep images; their maps by key, on the CPU."""
        maps = to_host(encoded.embeddings, *encoded.finer_maps)
        entries = {}
        for i, key in enumerate(keys):
            entries[key] = [torch.from_numpy(values[i].copy()) for values in maps]
            content = io.BytesIO()
            torch.save(entries[key], content)
            self._folder.write(key, content.getvalue())
        return entries
