"""Training targets and what is refused."""

import pytest
import torch
from detectron2.structures import BitMasks, Instances, PolygonMasks

from s4m_d2.errors import DatasetError, InputError
from s4m_d2.modeling.targets import prepare_targets

SIZE = (6, 10)


def prepare(sample, padded_size=SIZE):
    return prepare_targets(
        [sample], padded_size=padded_size, num_classes=8, device=torch.device("cpu")
    )


def make(labels, masks, size=SIZE):
    fields = {"gt_classes": torch.tensor(labels, dtype=torch.int64)}
    if masks is not None:
        fields["gt_masks"] = masks
    return {
        "file_name": "aachen_7.png",
        "image": torch.zeros(3, *SIZE, dtype=torch.uint8),
        "instances": Instances(size, **fields),
    }


@pytest.mark.parametrize("wrap", [BitMasks, lambda masks: masks, lambda masks: masks.float()])
def test_masks_are_padded_at_the_bottom_and_right(wrap):
    masks = torch.rand(2, *SIZE, generator=torch.Generator().manual_seed(0)) > 0.5
    [target] = prepare(make([3, 7], wrap(masks)), padded_size=(8, 16))
    assert target["labels"].tolist() == [3, 7]
    assert target["masks"].dtype == torch.bool and target["masks"].shape == (2, 8, 16)
    assert torch.equal(target["masks"][:, :6, :10], masks)
    assert target["masks"].sum() == masks.sum()


def test_image_without_instances_needs_no_masks():
    [target] = prepare(make([], None), padded_size=(8, 16))
    assert target["labels"].shape == (0,) and target["masks"].shape == (0, 8, 16)


ONE = torch.ones(1, *SIZE, dtype=torch.bool)


@pytest.mark.parametrize(
    ("sample", "error", "words"),
    [
        (make([8], BitMasks(ONE)), DatasetError, ["aachen_7.png", "class id 8", "0..7"]),
        (make([-1], BitMasks(ONE)), DatasetError, ["aachen_7.png", "class id -1"]),
        (make([1], ONE[:, :5]), DatasetError, ["aachen_7.png", "(1, 5, 10)", "(6, 10)"]),
        (make([1, 2], None), InputError, ["aachen_7.png", "gt_masks"]),
        (
            make([1], PolygonMasks([[torch.zeros(6).numpy()]])),
            InputError,
            ["PolygonMasks", "INPUT.MASK_FORMAT"],
        ),
        ({"file_name": "aachen_7.png"}, InputError, ["aachen_7.png", "instances"]),
    ],
    ids=["id too large", "negative id", "size", "no masks", "polygons", "no instances"],
)
def test_bad_annotations_are_named(sample, error, words):
    with pytest.raises(error) as caught:
        prepare(sample)
    for word in words:
        assert word in str(caught.value)
