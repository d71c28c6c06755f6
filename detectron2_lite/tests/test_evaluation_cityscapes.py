"""Cityscapes' AP of hand-made predictions, against values computed by hand.

Cityscapes integrates its curve in steps between neighboring recalls, with precision 1 at recall
0, and averages over ten thresholds and over the classes that occur.
"""

import importlib
import os
import sys

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import CityscapesInstanceEvaluator
from detectron2.evaluation import cityscapes_evaluation as module
from detectron2.structures import Instances
from PIL import Image

pytest.importorskip("cityscapesscripts")

H, W = 64, 128
PERSON, CAR = 0, 1
CLASSES = ["person", "car"]
LABEL_IDS = {PERSON: 24, CAR: 26}
FRAME = "tinytown_000000_{:06d}"
LEFT, RIGHT, SMALL = (10, 0, 60, 50), (70, 0, 120, 50), (0, 0, 9, 9)


@pytest.fixture(autouse=True)
def scripts_under_both_names(monkeypatch):
    """Some versions of Detectron2 import cityscapesscripts from a package of Meta's own."""
    parts = ("", ".helpers", ".helpers.labels", ".evaluation",
             ".evaluation.evalInstanceLevelSemanticLabeling")  # fmt: skip
    for part in parts:
        alias = "deeplearning.projects.cityscapesApi.cityscapesscripts" + part
        monkeypatch.setitem(sys.modules, alias, importlib.import_module("cityscapesscripts" + part))
    for parent in ("deeplearning", "deeplearning.projects", "deeplearning.projects.cityscapesApi"):
        monkeypatch.setitem(sys.modules, parent, type(sys)(parent))


def rectangle(x0, y0, x1, y1):
    mask = np.zeros((H, W), bool)
    mask[y0:y1, x0:x1] = True
    return mask


@pytest.fixture
def evaluator(tmp_path, monkeypatch):
    """Makes an evaluator for frames of [(class, box), …] each, in a fresh working folder."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    city = tmp_path / "gtFine" / "val" / "tinytown"
    city.mkdir(parents=True)

    def make(truth):
        for frame, items in enumerate(truth):
            ids = np.full((H, W), 7, np.int32)  # road
            for number, (label, box) in enumerate(items):
                ids[rectangle(*box)] = LABEL_IDS[label] * 1000 + number
            name = FRAME.format(frame) + "_gtFine_instanceIds.png"
            Image.fromarray(ids.astype(np.uint16)).save(city / name)
        dataset = f"evaluation_cityscapes_{tmp_path.name}"
        MetadataCatalog.pop(dataset, None)
        MetadataCatalog.get(dataset).set(thing_classes=CLASSES, gt_dir=str(city.parent))
        result = CityscapesInstanceEvaluator(dataset)
        result.reset()
        return result

    return make


def output_of(items):
    """[(class, mask or box, score), …]"""
    masks = [item[1] if isinstance(item[1], np.ndarray) else rectangle(*item[1]) for item in items]
    result = Instances((H, W))
    result.pred_classes = torch.tensor([item[0] for item in items], dtype=torch.int64)
    result.scores = torch.tensor([item[2] for item in items], dtype=torch.float32)
    result.pred_masks = torch.from_numpy(np.stack(masks) if masks else np.zeros((0, H, W), bool))
    return {"instances": result}


def evaluate(evaluator, predictions):
    for frame, items in enumerate(predictions):
        path = f"/anywhere/{FRAME.format(frame)}_leftImg8bit.png"
        evaluator.process([{"file_name": path}], [output_of(items)])
    return evaluator.evaluate()


def test_perfect_predictions_score_100(evaluator):
    truth = [[(PERSON, LEFT), (CAR, RIGHT)], [(PERSON, RIGHT)], []]
    predictions = [[(*item, 0.9) for item in items] for items in truth]
    results = evaluate(evaluator(truth), predictions)
    assert list(results) == ["segm"]
    assert results["segm"] == pytest.approx({"AP": 100, "AP50": 100})


def test_an_overlap_counts_up_to_its_threshold(evaluator):
    x0, y0, x1, _ = LEFT
    results = evaluate(evaluator([[(CAR, LEFT)]]), [[(CAR, (x0, y0, x1, y0 + 31), 0.9)]])
    assert results["segm"] == pytest.approx({"AP": 30, "AP50": 100})  # IoU 31 / 50 = 0.62


def test_half_of_the_objects_found(evaluator):
    truth = [[(CAR, LEFT), (CAR, RIGHT)]]
    results = evaluate(evaluator(truth), [[(CAR, LEFT, 0.9)]])
    assert results["segm"] == pytest.approx({"AP": 50, "AP50": 50})


@pytest.mark.parametrize("false_score, expected", [(0.9, 25), (0.3, 100)])
def test_a_false_positive_costs_precision(evaluator, false_score, expected):
    """(recall, precision) is (1, 1/2) with both predictions; with the more confident one alone it
    is (0, 0) if that is the false one, which leaves a step of 1/2 at precision 1/2, else (1, 1)."""
    results = evaluate(evaluator([[(CAR, LEFT)]]), [[(CAR, LEFT, 0.5), (CAR, RIGHT, false_score)]])
    assert results["segm"] == pytest.approx({"AP": expected, "AP50": expected})


def test_classes_that_occur_are_averaged(evaluator):
    truth = [[(PERSON, LEFT), (CAR, RIGHT)]]
    results = evaluate(evaluator(truth), [[(PERSON, LEFT, 0.1), (PERSON, RIGHT, 0.9)]])
    assert results["segm"]["AP50"] == pytest.approx((25 + 0) / 2)


@pytest.mark.parametrize("height, expected", [(9, 100), (12, 50)])
def test_objects_under_100_pixels_do_not_count(evaluator, height, expected):
    small = (0, 52, 9, 52 + height)
    results = evaluate(evaluator([[(CAR, LEFT), (CAR, small)]]), [[(CAR, LEFT, 0.9)]])
    assert results["segm"]["AP"] == pytest.approx(expected)


def test_objects_of_frames_without_predictions_are_missed(evaluator):
    results = evaluate(evaluator([[(CAR, LEFT)], [(CAR, LEFT)]]), [[(CAR, LEFT, 0.9)], []])
    assert results["segm"]["AP"] == pytest.approx(50)


def test_no_predictions_at_all_score_0(evaluator):
    results = evaluate(evaluator([[(CAR, LEFT)]]), [[]])
    assert results["segm"] == pytest.approx({"AP": 0, "AP50": 0})


def test_predictions_are_written_as_cityscapes_expects_them(evaluator):
    made = evaluator([[(CAR, LEFT)]])
    path = f"{FRAME.format(0)}_leftImg8bit.png"
    made.process([{"file_name": path}], [output_of([(CAR, LEFT, 0.75), (PERSON, RIGHT, 0.5)])])
    stem = os.path.join(made._temp_dir, FRAME.format(0) + "_leftImg8bit")
    with open(stem + "_pred.txt") as file:
        lines = [line.split() for line in file]
    assert [(line[1], float(line[2])) for line in lines] == [("26", 0.75), ("24", 0.5)]
    assert lines[1][0] == os.path.basename(stem) + "_1_person.png"
    mask = np.array(Image.open(stem + "_1_person.png"))
    assert np.array_equal(mask, rectangle(*RIGHT) * np.uint8(255))


def test_each_round_starts_anew_and_cleans_up(evaluator):
    made = evaluator([[(CAR, LEFT)]])
    folders = [made._temp_dir]
    assert evaluate(made, [[(CAR, LEFT, 0.9)]])["segm"]["AP"] == pytest.approx(100)
    made.reset()
    folders.append(made._temp_dir)
    assert evaluate(made, [[(CAR, RIGHT, 0.9)]])["segm"]["AP"] == pytest.approx(0)
    assert not any(os.path.exists(folder) for folder in folders)


@pytest.mark.skipif(not hasattr(module, "_score"), reason="scores with evaluateImgLists")
def test_nothing_is_written_into_the_working_folder(evaluator):
    evaluate(evaluator([[(CAR, LEFT)]]), [[(CAR, LEFT, 0.9)]])
    assert os.listdir() == []
