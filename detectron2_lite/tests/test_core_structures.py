"""Boxes, masks, instances and batches of images, on hand-computed cases."""

import numpy as np
import pytest
import torch
from detectron2.structures import (
    BitMasks,
    Boxes,
    BoxMode,
    ImageList,
    Instances,
    PolygonMasks,
    polygons_to_bitmask,
)

SQUARE = [1.0, 1.0, 5.0, 1.0, 5.0, 4.0, 1.0, 4.0]
TRIANGLE = [0.0, 0.0, 4.0, 0.0, 0.0, 6.0]


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_boxes_change_their_mode_and_keep_their_type(kind):
    single = kind in (list, tuple)
    xywh = kind([1.0, 2.0, 3.0, 4.0] if single else [[1.0, 2.0, 3.0, 4.0]])
    xyxy = BoxMode.convert(xywh, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
    assert type(xyxy) is type(xywh)
    np.testing.assert_array_equal(np.ravel(xyxy), [1, 2, 4, 6])
    back = BoxMode.convert(xyxy, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
    np.testing.assert_array_equal(np.ravel(back), np.ravel(xywh))
    np.testing.assert_array_equal(np.ravel(xywh), [1, 2, 3, 4])


def test_box_modes_without_a_conversion_are_refused():
    box = [0.0, 0.0, 1.0, 1.0]
    with pytest.raises(AssertionError, match="Relative"):
        BoxMode.convert(box, BoxMode.XYXY_REL, BoxMode.XYXY_ABS)
    with pytest.raises(NotImplementedError):
        BoxMode.convert(box, BoxMode.XYXY_ABS, BoxMode.XYWHA_ABS)


def test_boxes_measure_themselves():
    boxes = Boxes([[0, 0, 2, 3], [-1, 2, 9, 2], [4, 4, 12, 8]])
    assert boxes.area().tolist() == [6, 0, 32]
    assert boxes.nonempty().tolist() == [True, False, True]
    assert boxes.nonempty(threshold=3).tolist() == [False, False, True]
    boxes.clip((6, 10))
    assert boxes.tensor.tolist() == [[0, 0, 2, 3], [0, 2, 9, 2], [4, 4, 10, 6]]
    assert Boxes([[float("inf"), 0, 1, 1]]).area().tolist() == [float("-inf")]
    with pytest.raises(AssertionError, match="infinite"):
        Boxes([[float("nan"), 0, 1, 1]]).clip((6, 10))


def test_boxes_are_indexed_and_joined_like_tensors():
    boxes = Boxes(torch.arange(12).view(3, 4))
    assert boxes.tensor.dtype == torch.float32
    assert boxes[1].tensor.tolist() == [[4, 5, 6, 7]]
    assert len(boxes[torch.tensor([True, False, True])]) == 2
    assert len(boxes[5:]) == 0
    assert [b.tolist() for b in boxes][2] == [8, 9, 10, 11]
    joined = Boxes.cat([boxes, boxes[:1]])
    assert len(joined) == 4
    joined.tensor.zero_()
    assert boxes.tensor[0].tolist() == [0, 1, 2, 3]
    assert Boxes.cat([]).tensor.shape == Boxes(torch.empty(0)).tensor.shape == (0, 4)
    with pytest.raises(AssertionError):
        Boxes(torch.zeros(2, 5))


def test_polygons_are_filled():
    mask = polygons_to_bitmask([np.array(SQUARE)], 6, 8)
    expected = np.zeros((6, 8), dtype=bool)
    expected[1:4, 1:5] = True
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, expected)
    assert polygons_to_bitmask([], 6, 8).shape == (6, 8)
    two = polygons_to_bitmask([np.array(SQUARE), np.array(SQUARE) + 2], 9, 9)
    assert two.sum() == 12 + 12 - 2


def test_bit_masks_know_their_boxes():
    tensor = torch.zeros(3, 6, 8)
    tensor[0, 2:4, 1:7] = 1
    tensor[2, 5, 7] = 2
    masks = BitMasks(tensor)
    assert masks.tensor.dtype == torch.bool
    assert tuple(masks.image_size) == (6, 8)
    assert masks.nonempty().tolist() == [True, False, True]
    assert masks.get_bounding_boxes().tensor.tolist() == [[1, 2, 7, 4], [0] * 4, [7, 5, 8, 6]]
    assert BitMasks(np.zeros((0, 6, 8))).get_bounding_boxes().tensor.shape == (0, 4)
    with pytest.raises(AssertionError):
        BitMasks(tensor[0])


def test_bit_masks_are_indexed_and_joined_like_tensors():
    masks = BitMasks(torch.eye(4)[:, None])
    assert masks[2].tensor.tolist() == [[[False, False, True, False]]]
    assert len(masks[1:]) == 3
    assert len(masks[torch.tensor([True, False, False, True])]) == 2
    assert masks[torch.tensor([3, 0])].tensor[0].equal(masks.tensor[3])
    assert len(BitMasks.cat([masks, masks[:1]])) == 5
    assert [m.shape for m in masks] == [(1, 4)] * 4
    assert masks.to("cpu").device.type == "cpu"
    with pytest.raises(AssertionError):
        masks[2, 0]


def test_polygons_become_bit_masks():
    polygons = PolygonMasks([[SQUARE], [], [SQUARE, TRIANGLE]])
    for source in (polygons, polygons.polygons):
        masks = BitMasks.from_polygon_masks(source, 6, 8)
        assert masks.tensor.shape == (3, 6, 8)
        assert masks.tensor[0].sum() == 12
        assert masks.nonempty().tolist() == [True, False, True]
        union = polygons_to_bitmask([np.array(SQUARE), np.array(TRIANGLE)], 6, 8)
        assert masks.tensor[2].equal(torch.from_numpy(union))
    assert BitMasks.from_polygon_masks([], 6, 8).tensor.shape == (0, 6, 8)


def test_polygon_masks_measure_themselves():
    masks = PolygonMasks([[torch.tensor(SQUARE)], [SQUARE, TRIANGLE]])
    assert masks.polygons[0][0].dtype == np.float64
    assert masks.get_bounding_boxes().tensor.tolist() == [[1, 1, 5, 4], [0, 0, 5, 6]]
    assert PolygonMasks([[SQUARE], []]).nonempty().tolist() == [True, False]
    assert masks.to("cuda") is masks


@pytest.mark.parametrize(
    "item, expected",
    [
        (1, [1]),
        (slice(1, None), [1, 2]),
        ([2, 0], [2, 0]),
        (torch.tensor([2, 1]), [2, 1]),
        (torch.tensor([True, False, True]), [0, 2]),
    ],
)
def test_polygon_masks_are_indexed_like_tensors(item, expected):
    squares = [[list(np.array(SQUARE) + i)] for i in range(3)]
    picked = PolygonMasks(squares)[item]
    assert [polygons[0].tolist() for polygons in picked] == [squares[i][0] for i in expected]
    assert len(PolygonMasks.cat([picked, picked])) == 2 * len(expected)


@pytest.mark.parametrize(
    "polygons, message",
    [
        ((), "list of list"),
        ([np.zeros(6)], "per instance"),
        ([[np.zeros(4)]], "4 coordinates"),
        ([[np.zeros(7)]], "7 coordinates"),
    ],
)
def test_malformed_polygons_are_refused(polygons, message):
    with pytest.raises(ValueError, match=message):
        PolygonMasks(polygons)


def make_instances(n):
    return Instances(
        (6, 8),
        gt_boxes=Boxes(torch.arange(4 * n).view(n, 4)),
        gt_classes=torch.arange(n),
        names=[str(i) for i in range(n)],
    )


def test_instances_keep_fields_of_one_length():
    instances = make_instances(3)
    instances.scores = torch.ones(3)
    assert instances.has("scores")
    assert instances.scores is instances.get("scores") is instances.get_fields()["scores"]
    with pytest.raises(AssertionError, match="length 2"):
        instances.scores = torch.ones(2)
    instances.remove("scores")
    with pytest.raises(AttributeError, match="scores"):
        _ = instances.scores
    assert instances.image_size == (6, 8)
    with pytest.raises(NotImplementedError):
        len(Instances((6, 8)))
    with pytest.raises(NotImplementedError):
        iter(instances)


@pytest.mark.parametrize(
    "item, expected",
    [(0, [0]), (-1, [2]), (slice(1, 3), [1, 2])],
)
def test_every_field_is_indexed(item, expected):
    picked = make_instances(3)[item]
    assert picked.gt_classes.tolist() == expected
    assert picked.gt_boxes.tensor[:, 0].tolist() == [4 * i for i in expected]
    assert picked.names == [str(i) for i in expected]
    with pytest.raises(IndexError):
        make_instances(3)[3]


def test_tensor_fields_take_masks_and_vectors():
    instances = make_instances(3)
    instances.remove("names")
    assert instances[instances.gt_classes != 1].gt_classes.tolist() == [0, 2]
    assert instances[torch.tensor([2, 0])].gt_classes.tolist() == [2, 0]


def test_instances_are_joined_field_by_field():
    joined = Instances.cat([make_instances(2), make_instances(1)])
    assert joined.gt_classes.tolist() == [0, 1, 0]
    assert joined.names == ["0", "1", "0"]
    assert len(joined.gt_boxes) == 3
    assert len(joined.to("cpu")) == 3
    with pytest.raises(AssertionError):
        Instances.cat([make_instances(2), Instances((9, 9), gt_classes=torch.zeros(1))])


@pytest.mark.parametrize(
    "options, size",
    [
        ({}, (5, 7)),
        ({"size_divisibility": 4}, (8, 8)),
        ({"size_divisibility": 4, "padding_constraints": {"size_divisibility": 5}}, (5, 10)),
        ({"padding_constraints": {"square_size": 9}}, (9, 9)),
        ({"size_divisibility": 4, "padding_constraints": {"square_size": 9}}, (12, 12)),
    ],
)
def test_images_are_padded_at_the_bottom_right(options, size):
    images = [torch.rand(3, 5, 4), torch.rand(3, 2, 7)]
    batch = ImageList.from_tensors(images, pad_value=-1.0, **options)
    assert batch.tensor.shape == (2, 3, *size)
    assert batch.image_sizes == [(5, 4), (2, 7)]
    for i, image in enumerate(images):
        assert batch[i].equal(image)
        outside = batch.tensor[i].numel() - image.numel()
        assert (batch.tensor[i] == -1).sum() == outside
    single = ImageList.from_tensors(images[:1], **options)
    assert single.tensor.shape[0] == len(single) == 1
    assert single[0].equal(images[0])


def test_images_of_other_channels_do_not_fit_together():
    with pytest.raises(AssertionError):
        ImageList.from_tensors([torch.rand(3, 5, 4), torch.rand(1, 5, 4)])
    masks = ImageList.from_tensors([torch.ones(2, 3, dtype=torch.bool)], size_divisibility=4)
    assert masks.tensor.dtype == torch.bool
    assert masks.to(torch.float32).tensor.sum() == 6
