"""Names, shapes and outputs of the public Mask2Former."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model

DATA = Path(__file__).parents[1] / "data_reference"
TOLERANCE = 1e-4


def fixture_weights(shapes):
    """The state that the fixture's recipe gives to entries of these names and shapes."""
    state = {}
    for key, tensor in shapes.items():
        if not tensor.is_floating_point() or key == "criterion.empty_weight":
            state[key] = tensor
            continue
        generator = torch.Generator().manual_seed((zlib.crc32(key.encode()) + 1) % 2**31)
        x = torch.randn(tensor.shape, generator=generator)
        if key.endswith("running_var"):
            state[key] = 1 + 0.1 * x.abs()
        elif x.dim() <= 1 and key.endswith("weight"):
            state[key] = 1 + 0.1 * x
        else:
            state[key] = 0.05 * x
    return state


@pytest.fixture
def reference():
    with np.load(DATA / "mask2former_tiny_fixture.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


@pytest.fixture
def reference_model(make_tiny_model):
    model = make_tiny_model().eval()
    model.load_state_dict(fixture_weights(model.state_dict()))
    return model


def test_state_dict_has_the_names_and_shapes_of_mask2former_r50(cityscapes_cfg):
    model = build_model(cityscapes_cfg)
    expected = json.loads((DATA / "mask2former_r50_cityscapes_keys.json").read_text())
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == expected


@torch.no_grad()
def test_queries_match_the_reference(reference, reference_model):
    predictions = reference_model.predict_queries(
        [{"image": image} for image in reference["image"]]
    )
    for name in ("pred_logits", "pred_masks"):
        torch.testing.assert_close(predictions[name], reference[name], rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_auxiliary_outputs_and_mask_features_match_the_reference(reference, reference_model):
    images = (reference["image"] - reference_model.pixel_mean) / reference_model.pixel_std
    outputs = reference_model.sem_seg_head(reference_model.backbone(images))
    features = outputs["mask_features"].flatten(2)
    for actual, expected in (
        (outputs["aux_outputs"][0]["pred_logits"], reference["aux0_logits"]),
        (features.mean(-1), reference["mask_features_mean"]),
        (features.std(-1), reference["mask_features_std"]),
    ):
        torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)
