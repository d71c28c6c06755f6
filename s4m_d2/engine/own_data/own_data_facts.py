"""Statistics of the labeled images of own data."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Sequence

import cv2
import numpy as np
import pycocotools.mask as mask_util

from s4m_d2.data.annotations import Annotations
from s4m_d2.engine.own_data.derived_settings import SIZE_STEP, DataFacts
from s4m_d2.errors import DatasetError
from s4m_d2.tiling import Tiling

_INSTANCES_A_SIDE = 8  # median instances side by side in an image that is small enough
_MANY, _FEW, _NEARLY_ALL = 30, 12, 95  # in so many % of the images, of the tiles
_ROOM, _USUAL_SIDE = 1.5, 90  # least side of a tile, in sides of this percentile of the instances
_SMALLEST_TILE = 64  # px
_COUNTED_IMAGES = 1000  # evenly spaced ones
_PIXELS_LOOKED_AT = 1 << 28  # of encoded masks, evenly spaced ones


def suitable_tile(records: Sequence[dict]) -> tuple[int, str]:
    """Choose the side of tiles, px, for labeled images, and the reason; 0: no tiles.

    No tiles if the median instance (the longer side of its box) is at least a sixteenth of the
    image's side and nearly all images have at most 30 instances. Otherwise tiles such that nearly
    all have at most 12 instances, if nine tenths of the instances still fit well and tiles are
    smaller than half of the image.
    """
    records = records[:: -(-len(records) // _COUNTED_IMAGES) or 1]
    sides = [max(a["bbox"][2:]) for record in records for a in _instances(record)]
    if not sides:
        return 0, ""
    image = statistics.median(max(_size(record)) for record in records)
    median, most = statistics.median(sides), _usual_most(records)
    size = min(_INSTANCES_A_SIDE * median, image)
    if most <= _MANY and 2 * size >= image:
        return 0, ""
    least = max(_SMALLEST_TILE, _ROOM * np.percentile(sides, _USUAL_SIDE))
    size = max(math.ceil(least / SIZE_STEP), int(size) // SIZE_STEP) * SIZE_STEP
    while (in_tiles := _usual_most(Tiling(size).records(records))) > _FEW and (
        size - SIZE_STEP >= least
    ):
        size -= SIZE_STEP
    if 2 * size >= image:
        return 0, ""
    return size, (
        f"the median instance is {median:g} px long, {_NEARLY_ALL} % of the tiles have at most "
        f"{in_tiles} instances; of images, {image:g} px long, {most}"
    )


def data_facts(
    labeled: Annotations,
    train: Collection[str],
    unlabeled: int,
    validation: int,
    tiling: Tiling | None = None,
) -> DataFacts:
    """Compute the statistics from which settings are derived.

    Args:
        labeled: all labeled images.
        train: file names of those to train on.
        unlabeled, validation: numbers of images.
        tiling: tiles to use; None: :func:`suitable_tile`.

    Raises:
        DatasetError: there is no image to train on.
    """
    images = labeled.part(train).records
    if not images:
        raise DatasetError(
            "S4M.DATA.LABELED (--labeled) has no image to train on. Give a json with 'images'."
        )
    tile = suitable_tile(images)
    tiling = tiling or Tiling(tile[0])
    part = tiling.records(images)
    sizes = [_size(record) for record in part]
    areas = [(a["area"], math.prod(_size(record))) for record in part for a in _instances(record)]
    return DataFacts(
        height=statistics.median(height for height, _ in sizes),
        width=statistics.median(width for _, width in sizes),
        long_side=statistics.median(map(max, sizes)),
        short_side=statistics.median(map(min, sizes)),
        labeled=sum(1 for record in part if _instances(record)),
        unlabeled=round(unlabeled * len(part) / len(images)),
        validation=validation,
        most_instances=max(len(_instances(r)) for r in tiling.records(labeled.records)),
        instance_share=statistics.median([min(a / whole, 1.0) for a, whole in areas] or [1.0]),
        in_one_piece=_in_one_piece(images),
        tile=tile,
        unit="a tile" if tiling.size else "an image",
    )


def _in_one_piece(records: Sequence[dict]) -> float:
    instances = [(math.prod(_size(record)), a) for record in records for a in _instances(record)]
    pixels = sum(area for area, a in instances if isinstance(a["segmentation"], dict))
    some = instances[:: -(-pixels // _PIXELS_LOOKED_AT) or 1]
    return statistics.mean([_pieces(a) == 1 for _, a in some] or [False])


def _pieces(annotation: dict) -> int:
    if isinstance(annotation["segmentation"], list):
        return len(annotation["segmentation"])
    x, y, width, height = map(round, annotation["bbox"])
    mask = mask_util.decode(annotation["segmentation"])[y : y + height, x : x + width]
    return cv2.connectedComponents(np.ascontiguousarray(mask))[0] - 1


def _usual_most(records: Sequence[dict]) -> int:
    """Maximum number of instances in nearly all records that have any."""
    counts = [count for record in records if (count := len(_instances(record)))]
    return int(np.percentile(counts, _NEARLY_ALL))


def _instances(record: dict) -> list[dict]:
    return [annotation for annotation in record["annotations"] if not annotation["iscrowd"]]


def _size(record: dict) -> tuple[int, int]:
    x0, y0, x1, y1 = record.get("tile", (0, 0, record["width"], record["height"]))
    return y1 - y0, x1 - x0
