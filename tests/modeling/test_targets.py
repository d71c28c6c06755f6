"""Training targets and what is refused."""

import pytest
import torch
from detectron2.structures import BitMasks, Instances, PolygonMasks
from seeds import seeded

from s4m_d2.errors import DatasetError, InputError
from s4m_d2.modeling.meta_arch import prepare_target

SIZE = (6, 10)


def prepare(sample, padded_size=SIZE):
    return prepare_target(sample, padded_size, num_classes=8, device=torch.device("cpu"))


def make(labels, masks, size=SIZE):
    fields = {"gt_classes": torch.tensor(labels, dtype=torch.int64)}
    if masks is not None:
        fields["gt_masks"] = masks
    return {
        "file_name": "aachen_7.png",
        "image": torch.zeros(3, *SIZE, dtype=torch.uint8),
        "instances": Instances(size, **fields),
    }


def test_masks_are_padded_at_the_bottom_and_right():
    masks = torch.rand(2, *SIZE, generator=seeded(0)) > 0.5
    for given in (BitMasks(masks), masks, masks.float()):
        target = prepare(make([3, 7], given), padded_size=(8, 16))
        assert target["labels"].tolist() == [3, 7]
        assert target["masks"].dtype == torch.bool and target["masks"].shape == (2, 8, 16)
        assert torch.equal(target["masks"][:, :6, :10], masks)
        assert target["masks"].sum() == masks.sum()
    target = prepare(make([], None), padded_size=(8, 16))
    assert target["labels"].shape == (0,) and target["masks"].shape == (0, 8, 16)


def test_pixels_of_the_padding_are_not_doubted():
    sample = make([3], torch.ones(1, *SIZE, dtype=torch.bool))
    assert prepare(sample).keys() == {"labels", "masks"}
    sample["instances"].gt_weights = torch.tensor([0.5])
    sample["instances"].gt_doubts = torch.full((1, *SIZE), 7, dtype=torch.uint8)
    target = prepare(sample, padded_size=(8, 16))
    assert target["weights"].tolist() == [0.5]
    assert torch.equal(target["doubts"] == 7, target["masks"]) and target["doubts"].sum() == 7 * 60


ONE = torch.ones(1, *SIZE, dtype=torch.bool)


def test_bad_annotations_are_named():
    for sample, error, words in (
        (make([8], BitMasks(ONE)), DatasetError, ["class id 8", "0..7"]),
        (make([-1], BitMasks(ONE)), DatasetError, ["class id -1"]),
        (make([1], ONE[:, :5]), DatasetError, ["(1, 5, 10)", "(6, 10)"]),
        (make([1, 2], None), InputError, ["gt_masks"]),
        (make([1], PolygonMasks([[torch.zeros(6).numpy()]])), InputError, ["INPUT.MASK_FORMAT"]),
        ({"file_name": "aachen_7.png"}, InputError, ["instances"]),
    ):
        with pytest.raises(error) as caught:
            prepare(sample)
        assert all(word in str(caught.value) for word in ("aachen_7.png", *words))
