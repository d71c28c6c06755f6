"""A SAM whose masks are given, with or without its passes, and one whose embeddings are."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarking import synthetic
from s4m_d2.sam import EncodedImages, PromptOutput


class FixedAnswers:
    """A backend that asks another one and then answers with synthetic masks.

    Args:
        backend: a :class:`~s4m_d2.sam.SamBackend`; what is not defined here is its.
        counts: instances of each image, in the order in which images are encoded.
        image_size: (H, W) of the images.
    """

    def __init__(self, backend, counts: Sequence[int], image_size: tuple[int, int]) -> None:
        self._backend = backend
        self._passes = True
        frame = 4 * backend.grid_side
        content = [backend.grid_scale(image_size)] * len(counts)
        self._answers = [
            tuple(tensor.to(backend.device) for tensor in answer)
            for answer in synthetic.sam_answers(counts, frame, content)
        ]
        self._channels = backend.decoder.prompt_encoder.embed_dim

    def __getattr__(self, name: str) -> Any:
        if name == "_backend":  # of a copy that has no attributes yet
            raise AttributeError(name)
        return getattr(self._backend, name)

    @contextlib.contextmanager
    def without_passes(self) -> Iterator[None]:
        """Answer at once: neither the encoder nor the decoder is run."""
        self._passes = False
        try:
            yield
        finally:
            self._passes = True

    def only(self, index: int) -> FixedAnswers:
        """The same for the batch that holds image ``index`` alone."""
        alone = copy.copy(self)
        alone._answers = [self._answers[index]]
        return alone

    def encode(
        self, images: Tensor, image_sizes: Sequence[tuple[int, int]], **options: Any
    ) -> EncodedImages:
        if self._passes:
            return self._backend.encode(images, image_sizes, **options)
        side = self._backend.grid_side
        empty = torch.zeros(1, self._channels, side, side, device=self._backend.device)
        return EncodedImages(empty.expand(len(image_sizes), -1, -1, -1), list(image_sizes))

    def prompt(
        self, encoded: EncodedImages, points: Sequence[Tensor], labels=None, **options: bool
    ) -> list[PromptOutput]:
        if self._passes:
            self._backend.prompt(encoded, points, labels, **options)
        return [
            PromptOutput(masks[: len(p)], ious[: len(p)], None)
            for p, (masks, ious) in zip(points, self._answers, strict=False)
        ]


class KnownImages:
    """A backend that gives what it encoded before and asks another one for everything else."""

    def __init__(self, backend, encoded: EncodedImages) -> None:
        self._backend = backend
        self._encoded = encoded

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def encode(self, images: Tensor, image_sizes: Sequence[tuple[int, int]]) -> EncodedImages:
        return self._encoded
