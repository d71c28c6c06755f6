"""examples/own_meta_arch: Detectron2's Mask R-CNN. The embedded engine has none."""

import os

import pytest
import torch

pytest.importorskip("detectron2.modeling.roi_heads", reason="needs Detectron2 itself")

from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from s4m_d2.engine import S4MCheckpointer, S4MTrainer, stage_config
from s4m_d2.engine.labeling.protocol import check_model, check_predictions

PROJECT = "own_meta_arch"
CONFIG = "own_meta_arch/mask_rcnn.yaml"
CLASS = 2
SURE = 8.0


@pytest.fixture
def mask_rcnn(import_example):
    return import_example(PROJECT, "mask_rcnn")


@pytest.fixture
def cfg(mask_rcnn, example_config):
    changes = {"SOLVER__MAX_ITER": 3, "S4M__BURN_IN": 1}
    few = {"TEST__DETECTIONS_PER_IMAGE": 3}  # SAM is asked about each
    return example_config(CONFIG, **changes, **few, DATASETS__TEST="()")


def confident(model):
    """Let the model see class 2 in every proposal, and all of the box as its mask."""
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.bias[CLASS] = SURE
        model.roi_heads.mask_head.predictor.bias.fill_(SURE)
    return model


def samples(*sizes):
    generator = torch.Generator().manual_seed(1)
    draw = {"generator": generator, "dtype": torch.uint8}
    return [{"image": torch.randint(0, 256, (3, *size), **draw)} for size in sizes]


def test_detections_are_the_queries(mask_rcnn, cfg, monkeypatch):
    model = build_model(cfg).eval()
    found = [Instances((64, 96)), Instances((60, 128))]
    for instances, boxes in zip(found, ([[8.0, 8.0, 40.0, 56.0]], []), strict=True):
        instances.pred_boxes = Boxes(torch.tensor(boxes).view(-1, 4))
        instances.scores = torch.full((len(boxes),), 0.75)
        instances.pred_classes = torch.full((len(boxes),), CLASS)
        instances.pred_masks = torch.full((len(boxes), 1, 28, 28), 0.99)
    monkeypatch.setattr(model, "inference", lambda batch, do_postprocess: found)
    predictions = model.predict_queries(samples((64, 96), (60, 128)))
    check_predictions(predictions, [(64, 96), (60, 128)], model, 8)
    assert predictions["padded_size"] == (64, 128)
    assert predictions["pred_logits"][0].softmax(1)[0, CLASS] == pytest.approx(0.75, abs=1e-4)
    mask = predictions["pred_masks"][0][0] > 0
    inside = torch.zeros(16, 32, dtype=torch.bool)
    inside[2:14, 2:10] = True  # the box, in quarters
    assert torch.equal(mask, inside)
    assert predictions["pred_masks"][1].shape == (0, 16, 32)


def test_the_real_models_predictions_are_what_the_protocol_asks_for(cfg):
    model = confident(build_model(cfg)).eval()
    check_model(model)
    with torch.no_grad():
        found = model.predict_queries(samples((64, 100), (58, 128)))
    check_predictions(found, [(64, 100), (58, 128)], model, 8)
    assert all(len(logits) for logits in found["pred_logits"])
    assert (torch.cat(found["pred_logits"]).argmax(1) == CLASS).all()


def test_mask_rcnn_learns_from_pseudo_labels(cfg, tmp_path):
    cfg = stage_config(cfg, "student")
    os.makedirs(cfg.OUTPUT_DIR)
    S4MCheckpointer(confident(S4MTrainer.build_model(cfg)), str(tmp_path)).save("stage_1")
    trainer = S4MTrainer(cfg, str(tmp_path / "stage_1.pth"))
    steps, views = [], []
    step = trainer._trainer
    model, labeling = step.model, step.labeling
    forward = model.forward
    model.forward = lambda batch: steps.append(forward(batch)) or steps[-1]
    step.labeling = lambda batch: views.append(labeling(batch)) or views[-1]
    trainer.train()
    labels = [label for found in views[0].arp_labels for label in found.labels.tolist()]
    assert labels and set(labels) == {CLASS}
    _, of_unlabeled = steps[:2]
    assert of_unlabeled["loss_mask"] > 0 and of_unlabeled["loss_box_reg"] > 0
    assert all(torch.isfinite(loss) for losses in steps for loss in losses.values())
