"""Tiles: overlapping squares of images that are large or have many small instances.

Training uses tiles as images (:meth:`Tiling.records`). Inference segments each tile of an image and
merges predictions across tile borders (:class:`TiledModel`), in the memory of a few tiles.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import transforms as T
from detectron2.structures import Boxes, BoxMode, Instances
from torch import Tensor, nn

from s4m_d2.data.annotations import targets
from s4m_d2.data.transforms import apply_geometry
from s4m_d2.structures import (
    RLEMasks,
    as_rles,
    decode_window,
    dense_overlaps,
    encode_edges,
    mask_areas,
)

TILES_AT_ONCE = 4  # in one batch of the model
SAME_SHARE = 0.5  # overlap from which on two predictions are one instance
CUT_SHARE = 64  # predictions that end within 1/64 of a tile's side from its border are cut there

Box = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels of the image


@dataclass(frozen=True)
class Tiling:
    """Cuts images into overlapping tiles.

    Attributes:
        size: side of a tile, px of the image; 0: no tiles.
        overlap: minimum overlap of neighboring tiles, as a share of the side, in [0, 1).
    """

    size: int = 0
    overlap: float = 0.2

    def boxes(self, image_size: tuple[int, int]) -> list[Box]:
        """Tiles that cover an image of (H, W), row by row, at equal distances, all of one size:
        ``size``, or the image's side if that is smaller."""
        height, width = image_size
        rows, columns = self._starts(height), self._starts(width)
        high, wide = (min(self.size or side, side) for side in image_size)
        return [(x, y, x + wide, y + high) for y in rows for x in columns]

    def _starts(self, length: int) -> list[int]:
        if not 0 < self.size < length:
            return [0]
        stride = max(1, math.floor(self.size * (1 - self.overlap)))
        steps = -(-(length - self.size) // stride)
        return [(length - self.size) * step // steps for step in range(steps + 1)]

    def records(self, records: Iterable[dict], *, filter_empty: bool = False) -> list[dict]:
        """Replace Detectron2's records of images by records of tiles.

        A tile's record is that of its image, with "tile" (its box) and the annotations whose boxes
        overlap it; instances cut by its border are targets too. ``filter_empty``: without tiles of
        no annotation but crowds. Records of images of one tile, or of unknown size (unreadable),
        are unchanged.
        """
        found = []
        for record in records:
            sized = "height" in record and "width" in record
            boxes = self.boxes((record["height"], record["width"])) if sized else []
            if len(boxes) <= 1:
                found.append(record)
            elif "annotations" not in record:
                found += [{**record, "tile": box} for box in boxes]
            else:
                found += cut_record(record, boxes, filter_empty=filter_empty)
        return found

    def most(self, records: Iterable[dict]) -> int:
        """Largest number of tiles of an image."""
        return max((len(self.boxes((r["height"], r["width"]))) for r in records), default=1)


def build_tiling(cfg: CfgNode) -> Tiling:
    """Build the tiling of INPUT.TILE."""
    return Tiling(cfg.INPUT.TILE.SIZE, cfg.INPUT.TILE.OVERLAP)


def cut_record(record: dict, boxes: Sequence[Box], *, filter_empty: bool) -> list[dict]:
    """Records of the boxes of an annotated image, see :meth:`Tiling.records`."""
    annotations = record["annotations"]
    extents = np.array(
        [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
    ).reshape(-1, 4)
    inside = {box: [annotations[i] for i in _overlapping(extents, box)] for box in boxes}
    tiles = [{**record, "tile": box, "annotations": found} for box, found in inside.items()]
    return [tile for tile in tiles if targets(tile) or not filter_empty]


def _overlapping(boxes: np.ndarray, box: Sequence[int] | np.ndarray) -> list[int]:
    """Indices of those of (N, 4) boxes that overlap a box."""
    overlaps = (boxes[:, :2] < box[2:]) & (boxes[:, 2:] > box[:2])
    return np.flatnonzero(overlaps.all(1)).tolist()


class TiledModel(nn.Module):
    """Segments whole images as in evaluation, by the tiles of ``tiling``; each is resized.

    ``model``: a Detectron2 meta-architecture in eval mode.
    """

    @configurable
    def __init__(self, *, model: nn.Module, resize: T.Augmentation, tiling: Tiling) -> None:
        super().__init__()
        self.training = model.training  # evaluation restores this mode
        self.model, self.resize, self.tiling = model, resize, tiling

    @classmethod
    def from_config(cls, cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
        resize = T.ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, "choice")
        return {"model": model, "resize": resize, "tiling": build_tiling(cfg)}

    def forward(self, batched_inputs: Sequence[Mapping[str, Any]]) -> list[dict[str, Instances]]:
        """Segment each sample's "image", (3, H, W) uint8 of its own size on the CPU.

        Returns dicts with "instances" of (H, W): the model's own for an image of one tile;
        otherwise ``pred_masks`` (:class:`RLEMasks`), ``pred_boxes``, ``scores``, ``pred_classes``
        and ``sam_ious`` (nan: the model gives none), best first, on the CPU, without empty masks.
        DatasetError: an image is so narrow that nothing is left after resizing.
        """
        return [{"instances": self._segment(sample["image"])} for sample in batched_inputs]

    def _segment(self, image: Tensor) -> Instances:
        height, width = image.shape[-2:]
        tiles = self.tiling.boxes((height, width))
        if len(tiles) == 1:
            return self._predict(image, tiles)[0]
        seams = _Seams(tiles, (height, width))
        for start in range(0, len(tiles), TILES_AT_ONCE):
            some = tiles[start : start + TILES_AT_ONCE]
            for tile, instances in zip(some, self._predict(image, some), strict=True):
                seams.add(tile, instances.to("cpu"))
        return seams.joined()

    def _predict(self, image: Tensor, tiles: Sequence[Box]) -> list[Instances]:
        samples = []
        for x0, y0, x1, y1 in tiles:
            view = np.ascontiguousarray(image[:, y0:y1, x0:x1].permute(1, 2, 0).numpy())
            view, _ = apply_geometry([self.resize], view, seed=0)  # which draws nothing
            tensor = torch.from_numpy(np.ascontiguousarray(view.transpose(2, 0, 1)))
            samples.append({"image": tensor, "height": y1 - y0, "width": x1 - x0})
        return [output["instances"] for output in self.model(samples)]


@dataclass(eq=False)
class _Piece:
    """A prediction in a tile."""

    tile: Box
    rle: Mapping[str, Any]  # in the tile's frame
    box: Box
    is_cut: bool  # it reaches (nearly) a border of the tile that is not a border of the image
    area: int
    label: int
    score: float
    sam_iou: float  # nan if unknown
    same: list[_Piece] = field(default_factory=list)  # in other tiles, of the same instance


class _Seams:
    """Merges predictions of the tiles of an image.

    A cut piece is dropped if another tile contains it uncut. Of the others, two of one class in
    different tiles are one instance

    - if both are cut and agree (IoU) where the tiles overlap: they are joined;
    - if one is not cut, and they share half of the smaller one: the one with the higher score is
      kept.
    """

    def __init__(self, tiles: Sequence[Box], image_size: tuple[int, int]) -> None:
        self.tiles = np.array(tiles)
        self.image_size = image_size
        self.found: dict[Box, list[_Piece]] = {tile: [] for tile in tiles}
        self.margin = (tiles[0][2] - tiles[0][0]) // CUT_SHARE

    def add(self, tile: Box, found: Instances) -> None:
        """Add the predictions of a tile, once per tile."""
        tiles = list(self.found)
        near = [tiles[n] for n in _overlapping(self.tiles, tile) if tiles[n] != tile]
        rles = as_rles(found.pred_masks)
        boxes = mask_util.toBbox(rles).reshape(-1, 4).astype(int).tolist()
        columns = (mask_util.area(rles), found.pred_classes, found.scores)
        ious = found.sam_ious.tolist() if found.has("sam_ious") else [math.nan] * len(found)
        rows = zip(rles, boxes, *(column.tolist() for column in columns), ious, strict=True)
        for rle, (x, y, wide, high), *values in rows:
            x, y = tile[0] + x, tile[1] + y
            box = x, y, x + wide, y + high
            is_cut = self._is_cut(box, tile)
            if wide and not (is_cut and any(self._shows(other, box) for other in near)):
                self.found[tile].append(_Piece(tile, rle, box, is_cut, *values))
        for other in near:
            self._compare(other, tile)

    def _is_cut(self, box: Box, tile: Box) -> bool:
        height, width = self.image_size
        return any(
            border != end and abs(side - border) <= self.margin
            for side, border, end in zip(box, tile, (0, 0, width, height), strict=True)
        )

    def _shows(self, tile: Box, box: Box) -> bool:
        """Whether a box is in a tile, and not cut there."""
        inside = tile[0] <= box[0] and tile[1] <= box[1] and box[2] <= tile[2] and box[3] <= tile[3]
        return inside and not self._is_cut(box, tile)

    def _compare(self, *tiles: Box) -> None:
        """Find pieces of two tiles that are of the same instance."""
        corners = np.array(tiles)
        region = np.concatenate([corners.max(0)[:2], corners.min(0)[2:]])
        sides = []
        for found in (self.found[tile] for tile in tiles):
            boxes = np.array([piece.box for piece in found]).reshape(-1, 4)
            sides.append([found[row] for row in _overlapping(boxes, region)])
        if not all(sides):
            return
        parts = [_parts(side, region) for side in sides]
        areas = [mask_areas(part) for part in parts]
        both = dense_overlaps(*parts)
        either = areas[0][:, None] + areas[1][None] - both
        for row, column in both.nonzero().tolist():
            a, b = sides[0][row], sides[1][column]
            whole = either[row, column] if a.is_cut and b.is_cut else min(a.area, b.area)
            if a.label == b.label and both[row, column] >= SAME_SHARE * whole:
                a.same.append(b)
                b.same.append(a)

    def joined(self) -> Instances:
        """Merged instances of the image, best first."""
        pieces = [piece for found in self.found.values() for piece in found]
        groups: dict[_Piece, list[_Piece]] = {}  # by the best piece of each, which is its first
        best_of: dict[_Piece, _Piece] = {}
        for piece in sorted(pieces, key=_by_score):
            known = dict.fromkeys(best_of[other] for other in piece.same if other in best_of)
            members = [m for best in sorted(known, key=_by_score) for m in groups[best]] + [piece]
            is_whole = not all(member.is_cut for member in members)
            if known and (is_whole or len({member.tile for member in members}) < len(members)):
                continue
            for best in known:
                del groups[best]
            groups[members[0]] = members
            best_of |= dict.fromkeys(members, members[0])
        found = sorted(groups, key=_by_score)
        boxes = [np.array([member.box for member in groups[best]]) for best in found]
        extents = [(*box.min(0)[:2], *box.max(0)[2:]) for box in boxes]
        masks = [self._mask(groups[best]) for best in found]
        return Instances(
            self.image_size,
            pred_masks=RLEMasks(masks, self.image_size),
            pred_boxes=Boxes(torch.tensor(np.array(extents, np.float32).reshape(-1, 4))),
            scores=torch.tensor([piece.score for piece in found]),
            pred_classes=torch.tensor([piece.label for piece in found], dtype=torch.int64),
            sam_ious=torch.tensor([piece.sam_iou for piece in found]),
        )

    def _mask(self, members: Sequence[_Piece]) -> dict[str, Any]:
        placed = [
            encode_window(decode_window(piece.rle)[0], piece.box[:2], self.image_size)
            for piece in members
        ]
        return placed[0] if len(placed) == 1 else mask_util.merge(placed)


def _by_score(piece: _Piece) -> float:
    return -piece.score


def _parts(side: Sequence[_Piece], region: np.ndarray) -> Tensor:
    """(N, h, w) bool masks of pieces of one tile in a region of it."""
    x0, y0 = side[0].tile[:2]
    rows, columns = slice(region[1] - y0, region[3] - y0), slice(region[0] - x0, region[2] - x0)
    masks = [mask_util.decode(piece.rle)[rows, columns] for piece in side]
    return torch.from_numpy(np.stack(masks).view(bool))


def encode_window(
    window: np.ndarray, corner: tuple[int, int], image_size: tuple[int, int]
) -> dict[str, Any]:
    """COCO's RLE of an image's mask that is zero outside a window, without the full mask.

    window: (h, w) uint8 of 0 and 1, not empty. corner: (x, y) of its upper left pixel.
    """
    edges = np.diff(np.pad(window.astype(np.int8), ((1, 1), (0, 0))), axis=0)
    columns, rows = np.nonzero(edges.T)  # by column: a start, an end, a start, ...
    ends: np.ndarray = (corner[0] + columns.astype(np.int64)) * image_size[0] + corner[1] + rows
    inner = ends[1:-1].reshape(-1, 2)
    is_gap = inner[:, 0] < inner[:, 1]  # else a run goes on at the top of the next column
    ends = np.concatenate([ends[:1], inner[is_gap].reshape(-1), ends[-1:]])
    return encode_edges(ends, image_size)
