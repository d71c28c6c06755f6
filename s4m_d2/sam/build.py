"""The backend that a config names."""

from __future__ import annotations

from typing import Any

from s4m_d2.errors import ConfigError
from s4m_d2.sam.backend import SAM_BACKEND_REGISTRY, SamBackend
from s4m_d2.sam.cache import CachedBackend

BYTES_PER_GB = 10**9


def build_sam_backend(cfg: Any, *, cached: bool = False) -> SamBackend:
    """The backend that ``cfg.S4M.SAM.BACKEND`` names, with its weights, frozen, on MODEL.DEVICE.

    Args:
        cached: whether images come again, so that S4M.SAM.CACHE, where it is set, is worth using:
            the labeled images of stage 1.

    Raises:
        ConfigError: no backend has that name.
        WeightsError: its weights are missing or of another model.
    """
    sam = cfg.S4M.SAM
    if sam.BACKEND not in SAM_BACKEND_REGISTRY:
        known = ", ".join(sorted(key for key, _ in SAM_BACKEND_REGISTRY))
        raise ConfigError(
            f"S4M.SAM.BACKEND is '{sam.BACKEND}'; the registered backends are: {known}"
        )
    backend = SAM_BACKEND_REGISTRY.get(sam.BACKEND)(cfg)
    if not (cached and sam.CACHE):
        return backend
    return CachedBackend(
        backend,
        sam.CACHE,
        max_bytes=round(sam.CACHE_SIZE_GB * BYTES_PER_GB),
        settings=f"{sam.BACKEND} {sam.MODEL_TYPE}",
    )
