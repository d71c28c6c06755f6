from . import builtin as _builtin  # noqa: F401
from .cityscapes import load_cityscapes_instances
from .coco import load_coco_json, register_coco_instances

__all__ = ["load_cityscapes_instances", "load_coco_json", "register_coco_instances"]
