"""Tiles cover images, and what is found in them is what would be found in the whole image."""

import tracemalloc

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import transforms as T
from detectron2.structures import BoxMode, Instances
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import sliding_window_view
from torch import nn

from s4m_d2.structures import encode_masks
from s4m_d2.tiling import TiledModel, Tiling, encode_window

SIDES = st.integers(1, 100)


@settings(max_examples=50)
@given(SIDES, SIDES, st.integers(5, 120), st.floats(0, 0.8))
def test_tiles_of_one_size_cover_the_image_and_overlap(height, width, size, overlap):
    boxes = Tiling(size, overlap).boxes((height, width))
    assert len(set(boxes)) == len(boxes)
    for start, length in ((0, width), (1, height)):
        spans = sorted({(box[start], box[start + 2]) for box in boxes})
        assert {end - begin for begin, end in spans} == {min(size, length)}
        assert spans[0][0] == 0 and spans[-1][1] == length
        shared = [one[1] - other[0] for one, other in zip(spans, spans[1:], strict=False)]
        assert min(shared, default=size) >= min(overlap * size, size - 1) - 1e-6
    columns = {box[::2] for box in boxes}
    assert {(*row, *column) for row in {box[1::2] for box in boxes} for column in columns} == {
        (box[1], box[3], box[0], box[2]) for box in boxes
    }


def test_without_a_size_an_image_is_its_only_tile():
    assert Tiling().boxes((30, 50)) == [(0, 0, 50, 30)] == Tiling(50).boxes((30, 50))


def test_records_of_tiles_have_the_annotations_that_reach_into_them():
    def annotation(x0, y0, x1, y1, iscrowd=0):
        box = {"bbox": [x0, y0, x1 - x0, y1 - y0], "bbox_mode": BoxMode.XYWH_ABS}
        return {**box, "iscrowd": iscrowd}

    corner, seam = annotation(0, 0, 9, 9), annotation(85, 2, 101, 9)
    crowd = annotation(0, 80, 9, 99, 1)
    labeled = {"file_name": "a", "height": 100, "width": 180, "annotations": [corner, seam, crowd]}
    tiling = Tiling(100, 0.2)
    assert [(r["tile"], r["annotations"]) for r in tiling.records([labeled])] == [
        ((0, 0, 100, 100), [corner, seam, crowd]),
        ((80, 0, 180, 100), [seam]),
    ]
    only_crowd = {**labeled, "annotations": [crowd, annotation(170, 0, 180, 9)]}
    kept = tiling.records([only_crowd], filter_empty=True)
    assert [record["tile"] for record in kept] == [(80, 0, 180, 100)]
    small = {"file_name": "b", "height": 100, "width": 100}
    damaged = {"file_name": "c", "unreadable": "why"}
    tiled = {**small, "width": 101}
    found = tiling.records([small, damaged, tiled])
    assert found[:2] == [small, damaged] and len(found) == 4 and "annotations" not in found[2]
    assert tiling.most([small, labeled]) == 2


class Components(nn.Module):
    """Finds instances exactly: the connected regions of a color, of the class that blue says.

    ``short``: but for the pixels at their borders, and at those of the tile.
    """

    def __init__(self, short=False):
        super().__init__()
        self.short = short

    def forward(self, batched_inputs):
        return [{"instances": self._find(sample["image"])} for sample in batched_inputs]

    def _find(self, image):
        red, green, blue = image.numpy()
        codes = red + 256 * green.astype(int) if image.any() else np.zeros(image.shape[1:], int)
        masks, classes = [], []
        for code in np.unique(codes[codes > 0]):
            count, regions = cv2.connectedComponents((codes == code).astype(np.uint8))
            masks += [regions == number for number in range(1, count)]
            classes += [blue[codes == code][0]] * (count - 1)
        masks = np.array(masks, dtype=bool).reshape(-1, *codes.shape)
        if self.short:
            padded = np.pad(masks, ((0, 0), (1, 1), (1, 1)))
            masks = sliding_window_view(padded, (3, 3), (1, 2)).all((3, 4))
        masks = torch.from_numpy(masks)
        scores = 1 - 0.5 / (1 + masks.sum((1, 2)))  # the more is seen, the more certain
        classes = torch.tensor(np.array(classes, np.int64))
        return Instances(codes.shape, pred_masks=masks, scores=scores, pred_classes=classes)


def tiled(size, overlap, model=None):
    keep = T.ResizeShortestEdge(0)
    return TiledModel(model=model or Components(), resize=keep, tiling=Tiling(size, overlap))


def whole(found):
    masks = np.asarray(found.pred_masks, dtype=bool)
    pairs = zip(found.pred_classes.tolist(), masks, strict=True)
    return sorted((label, mask.tobytes()) for label, mask in pairs if mask.any())


def scene(seed, size, overlap, image_size):
    """Ellipses and rectangles around all borders and corners of tiles, of all sizes, and others."""
    rng = np.random.default_rng(seed)
    height, width = image_size
    boxes = Tiling(size, overlap).boxes(image_size)
    xs = sorted({x for box in boxes for x in box[::2]})
    ys = sorted({y for box in boxes for y in box[1::2]})
    centers = [(x, y) for x in xs for y in ys]
    centers += [(x, rng.integers(height)) for x in xs for _ in range(5)]
    centers += [(rng.integers(width), y) for y in ys for _ in range(5)]
    image = np.zeros((height, width, 3), np.uint8)
    instances = []
    for number, (x, y) in enumerate(rng.permutation(centers).tolist(), start=1):
        region = np.zeros((height, width), np.uint8)
        reach = (2 + rng.integers(0, rng.choice([4, 16, 50]), 2)).tolist()
        if rng.random() < 0.5:
            cv2.ellipse(region, (x, y), reach, float(rng.uniform(0, 180)), 0, 360, 1, -1)
        else:
            cv2.rectangle(region, (x - reach[0], y - reach[1]), (x + reach[0], y), 1, -1)
        mask = region.astype(bool)
        if mask.any() and not image[mask].any():
            label = int(rng.integers(3))
            image[mask] = number % 256, number // 256, label
            instances.append((label, mask.tobytes()))
    return torch.from_numpy(image.transpose(2, 0, 1)), sorted(instances)


@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize(("seed", "overlap"), [(0, 0.1), (1, 0.2), (2, 0.2), (3, 0.5)])
def test_instances_on_all_seams_and_corners_are_found_once_and_whole(seed, overlap, short):
    image_size = (150 + 7 * seed, 201 - 11 * seed)
    image, instances = scene(seed, 64, overlap, image_size)
    model = Components(short)
    (output,) = tiled(64, overlap, model)([{"image": image}])
    found = output["instances"]
    untiled = whole(model([{"image": image}])[0]["instances"])
    assert whole(found) == untiled and len(untiled) > 30
    assert short or untiled == instances
    for box, mask in zip(found.pred_boxes.tensor.tolist(), found.pred_masks, strict=True):
        rows, columns = mask.nonzero(as_tuple=True)
        assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)


def test_an_image_of_one_tile_is_given_to_the_model_and_its_answer_returned():
    image, _ = scene(0, 64, 0.2, (60, 64))
    found = tiled(64, 0.2)([{"image": image}])[0]["instances"]
    assert whole(found) == whole(Components()([{"image": image}])[0]["instances"])
    assert isinstance(found.pred_masks, torch.Tensor)


class Answers(nn.Module):
    """Says of each tile what it is told: [(x0, x1, class, score)] of bars in its frame."""

    def __init__(self, *answers):
        super().__init__()
        self.answers = answers

    def forward(self, batched_inputs):
        pairs = zip(batched_inputs, self.answers, strict=True)
        return [{"instances": self._bars(*pair)} for pair in pairs]

    def _bars(self, sample, bars):
        masks = torch.zeros(len(bars), sample["height"], sample["width"], dtype=torch.bool)
        for mask, (x0, x1, _, _) in zip(masks, bars, strict=True):
            mask[2:5, x0:x1] = True
        labels, scores = ([bar[i] for bar in bars] for i in (2, 3))
        found = Instances(tuple(masks.shape[1:]), pred_masks=masks)
        found.pred_classes = torch.tensor(labels, dtype=torch.int64)
        found.scores, found.sam_ious = torch.tensor(scores), torch.tensor(scores) / 2
        return found


# Tiles [0, 20) and [10, 30) of an image 30 px wide: bars of the left one, of the right one, of all.
CASES = {
    "parts that agree continue each other, with the better score": (
        [(5, 20, 0, 0.6)], [(0, 15, 0, 0.8)], [(5, 25, 0, 0.8)],
    ),
    "parts that differ where both tiles look do not": (
        [(16, 20, 0, 0.6), (2, 12, 0, 0.5)], [(0, 15, 0, 0.8)], [(10, 25, 0, 0.8), (2, 12, 0, 0.5)],
    ),
    "parts of other classes do not": (
        [(5, 20, 1, 0.6)], [(0, 15, 0, 0.8)], [(10, 25, 0, 0.8), (5, 20, 1, 0.6)],
    ),
    "of two that are whole the more certain stays": (
        [(12, 18, 0, 0.6)], [(2, 9, 0, 0.8)], [(12, 19, 0, 0.8)],
    ),
    "what is cut is left to the tile that shows it whole": (
        [(15, 20, 0, 0.9)], [(5, 12, 0, 0.8)], [(15, 22, 0, 0.8)],
    ),
    "even to one that does not find it": ([(15, 20, 0, 0.9)], [], []),
    "what a tile finds twice is its model's business": (
        [(2, 9, 0, 0.9), (2, 9, 0, 0.7)], [], [(2, 9, 0, 0.9), (2, 9, 0, 0.7)],
    ),
    "a part is continued by one part of a tile": (
        [(5, 20, 0, 0.9)],
        [(0, 15, 0, 0.8), (0, 17, 0, 0.3)],
        [(5, 25, 0, 0.9)],
    ),
    "a mask without a pixel is nothing": ([(3, 3, 0, 0.9)], [(3, 3, 0, 0.9)], []),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_how_predictions_of_two_tiles_are_joined(case):
    left, right, expected = CASES[case]
    image = torch.zeros(3, 20, 30, dtype=torch.uint8)
    found = tiled(20, 0.5, Answers(left, right))([{"image": image}])[0]["instances"]
    columns = [mask.any(0).nonzero() for mask in found.pred_masks]
    bars = [(int(c.min()), int(c.max()) + 1) for c in columns]
    labels = found.pred_classes.tolist()
    assert [(*bar, label) for bar, label in zip(bars, labels, strict=True)] == [
        bar[:3] for bar in expected
    ]
    assert found.scores.tolist() == pytest.approx([bar[3] for bar in expected])
    assert torch.equal(found.sam_ious, found.scores / 2)


@given(st.integers(0, 2**32 - 1), st.booleans())
def test_a_window_is_encoded_as_its_whole_image(seed, full_height):
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 12, 2)
    y0, x0 = (0 if full_height else rng.integers(height)), rng.integers(width)
    window = (rng.random((height - y0, rng.integers(1, width - x0 + 1))) < 0.7).astype(np.uint8)
    window[-1, -1] = 1
    mask = torch.zeros(1, height, width, dtype=torch.bool)
    mask[0, y0:, x0 : x0 + window.shape[1]] = torch.from_numpy(window.view(bool))
    found = encode_window(window, (x0, y0), (height, width))
    assert found == encode_masks(mask)[0]


def test_memory_of_a_large_image_is_that_of_tiles_and_encoded_masks():
    height, width = 2500, 12_000
    image = torch.zeros(1, height, width, dtype=torch.uint8)
    image[0, 1000:1100, 500:11_500] = 3
    image[0, 1200:2190, 11_000:11_900] = 1
    tracemalloc.start()
    try:
        found = tiled(500, 0.2)([{"image": image.expand(3, -1, -1)}])[0]["instances"]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sorted(mask_util.area(found.pred_masks.rles)) == [900 * 990, 100 * 11_000]
    assert peak < height * width / 2
