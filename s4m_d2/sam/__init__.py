"""The frozen SAM: interface and backends. Importing this registers the backends."""

import s4m_d2.sam.hugging_face
import s4m_d2.sam.sam2
import s4m_d2.sam.segment_anything  # noqa: F401
from s4m_d2.sam.backend import (
    SAM_BACKEND_REGISTRY,
    EncodedImages,
    PromptOutput,
    SamBackend,
    build_sam_backend,
)

__all__ = [
    "SAM_BACKEND_REGISTRY",
    "EncodedImages",
    "PromptOutput",
    "SamBackend",
    "build_sam_backend",
]
