from . import builtin as _builtin  # noqa: F401
from .coco import load_coco_json, register_coco_instances

__all__ = ["load_coco_json", "register_coco_instances"]
