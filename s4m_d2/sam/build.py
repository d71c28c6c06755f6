"""The backend that a config names."""

from __future__ import annotations

from typing import Any

from s4m_d2.errors import ConfigError
from s4m_d2.sam.backend import SAM_BACKEND_REGISTRY, SamBackend


def build_sam_backend(cfg: Any) -> SamBackend:
    """The backend that ``cfg.S4M.SAM.BACKEND`` names, with its weights, frozen, on MODEL.DEVICE.

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
    return SAM_BACKEND_REGISTRY.get(sam.BACKEND)(cfg)
