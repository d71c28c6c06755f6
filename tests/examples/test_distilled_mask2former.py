"""examples/distilled_mask2former: structural distillation added to a model from outside."""

from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Instances
from helpers import SMALL_HEAD, logged

from s4m_d2 import StructuralDistillation, build_sam_backend

PROJECT = "distilled_mask2former"
CONFIG = f"{PROJECT}/toyscapes.yaml"
SMALL = SMALL_HEAD | {"S4M.DISTILL.NUM_POINTS": 4}
SIZES = [(64, 128), (60, 90)]  # the second is padded


@pytest.fixture
def distillation(import_example):
    return import_example(PROJECT, "distillation")


@pytest.fixture
def cfg(example_config):
    return example_config(CONFIG, **SMALL)


@pytest.fixture
def loss(cfg):
    return StructuralDistillation(cfg, build_sam_backend(cfg))


def new_model(cfg):
    torch.manual_seed(0)
    return build_model(cfg)


@pytest.fixture
def samples():
    generator = torch.Generator().manual_seed(3)
    batch = []
    for height, width in SIZES:
        masks = torch.zeros(2, height, width, dtype=torch.bool)
        masks[0, 5:40, 10:60] = masks[1, 30:55, 50:85] = True
        noise = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
        fields = {"gt_masks": BitMasks(masks), "gt_classes": torch.tensor([1, 5])}
        batch.append({"image": noise, "instances": Instances((height, width), **fields)})
    return batch


def losses(model, samples):
    torch.manual_seed(1)  # samples without seeds: PyTorch's own generator draws the points
    return model.train()(samples)


def test_the_loss_added_from_outside_is_the_built_in_one(cfg, distillation, loss, samples):
    for order in ("RGB", "BGR"):
        built_in, plain = new_model(cfg), new_model(cfg)
        built_in.distillation, built_in.input_format = loss, order
        outside = distillation.add_structural_distillation(plain, loss, input_format=order)
        expected, found = losses(built_in, samples), losses(outside, samples)
        assert found["loss_sd"] > 0
        torch.testing.assert_close(found, expected)
        sum(expected.values()).backward()
        sum(found.values()).backward()
        for mine, theirs in zip(outside.parameters(), built_in.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad)


def test_nothing_else_of_the_model_changes(cfg, distillation, loss, samples):
    plain = new_model(cfg)
    model = distillation.add_structural_distillation(new_model(cfg), loss)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert type(model) is type(plain)
    with torch.no_grad():
        results = zip(model.eval()(samples), plain.eval()(samples), strict=True)
    for found, expected in results:
        assert torch.equal(found["instances"].scores, expected["instances"].scores)
    supervised = losses(plain, samples)
    distilled = losses(model, samples)
    assert distilled.keys() - supervised.keys() == {"loss_sd"}
    assert all(torch.equal(distilled[name], value) for name, value in supervised.items())


def test_the_script_trains_and_evaluates_without_sam(import_example, command_line, tmp_path):
    script = import_example(PROJECT, "train_net")
    script.main(command_line(CONFIG, **SMALL, SOLVER__MAX_ITER=2))
    run = Path(tmp_path, "run")
    found = logged(run)
    assert 0 < found["loss_sd"] < found["total_loss"] < float("inf")
    weights = str(run / "model_final.pth")
    plain = {"MODEL__WEIGHTS": weights, "S4M__SAM__BACKEND": "not there"}
    results = script.main(command_line(CONFIG, "--eval-only", **SMALL, **plain))
    assert results["segm"]["AP"] == pytest.approx(found["segm/AP"], nan_ok=True)
