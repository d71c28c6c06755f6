"""Boxes, masks, instances and batches of images."""

from .boxes import Boxes, BoxMode
from .image_list import ImageList
from .instances import Instances
from .masks import BitMasks, PolygonMasks, polygons_to_bitmask

# fmt: off
__all__ = [
    "BitMasks", "BoxMode", "Boxes", "ImageList", "Instances", "PolygonMasks", "polygons_to_bitmask",
]
