"""In which type of numbers SAM computes, and how many images and prompts go together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from s4m_d2.errors import require

AUTO = "auto"
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BFLOAT16_CAPABILITY = (8, 0)  # the first CUDA devices that compute with it
SHARE_OF_FREE_MEMORY = 0.5  # the rest is for what is estimated wrongly, and for fragments
# Image tokens of the prompts of one decoder pass on a CPU, in bytes: larger passes leave its
# caches. Measured with the tiny SAM: a quarter less time than with 5 times as much.
CPU_PASS_BYTES = 4 << 20
# What a decoder pass holds of a prompt at a time on a GPU, in its image tokens in float32: they are
# repeated, projected and upscaled to 4 masks. Counted, not measured.
TOKENS_OF_PROMPT = 16


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


@contextmanager
def computing_in(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Autocast to ``dtype``, and none with float32; an autocast around it does not count."""
    low = dtype != torch.float32
    with torch.autocast(device.type, dtype=dtype if low else None, enabled=low):
        yield


class ImageBudget:
    """How many images go through the encoder together.

    Args:
        max_images: S4M.SAM.MAX_IMAGES. 0: on the CPU one, as a batch leaves its caches and takes
            longer; on a GPU the first image goes alone, and what it needs beyond the memory held
            before tells how many of the next ones fit into half of the memory that is free when
            they come.
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
    """How many prompts go through the decoder together, of which more may not fit, or be slower.

    Args:
        max_prompts: S4M.SAM.MAX_PROMPTS.
        token_bytes: of one prompt's image tokens.
    """
    if device.type == "cuda":
        return fitting(max_prompts, TOKENS_OF_PROMPT * token_bytes, device)
    return max(1, min(max_prompts, CPU_PASS_BYTES // token_bytes))
