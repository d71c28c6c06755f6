"""fvcore's transforms, :class:`ResizeTransform` and the augmentations; used as ``T``."""
# ruff: noqa: F403

from fvcore.transforms.transform import *

from .augmentation import *
from .augmentation_impl import *
from .transform import *

__all__ = [name for name in globals() if not name.startswith("_")]
