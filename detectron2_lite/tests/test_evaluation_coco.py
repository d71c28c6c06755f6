"""COCO's AP of hand-made predictions, against values computed by hand.

COCO's precision-recall curve has 101 recalls; finding k of n objects without a false positive
covers those up to k / n.
"""

import itertools
import json
import math

import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Boxes, Instances

SIZE = 120
CAT, DOG = 0, 1
DATASET_IDS = {7: CAT, 3: DOG}  # neither contiguous nor in order
SQUARE = (10, 10, 110, 110)
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_names = itertools.count()


def rectangle(x0, y0, x1, y1):
    mask = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    mask[y0:y1, x0:x1] = True
    return mask


def polygon(x0, y0, x1, y1):
    return [[x0, y0, x1, y0, x1, y1, x0, y1]]


def make_dataset(folder, truth, annotated=True):
    """Register images with [(class, box), …] each; returns the name of the data set."""
    name = f"evaluation_coco_{next(_names)}"
    category = {label: dataset_id for dataset_id, label in DATASET_IDS.items()}
    objects = [(i, *item) for i, items in enumerate(truth) for item in items]
    annotations = [
        {
            "id": number + 1, "image_id": i, "category_id": category[label], "iscrowd": 0,
            "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
            "area": (box[2] - box[0]) * (box[3] - box[1]), "segmentation": polygon(*box),
        }
        for number, (i, label, box) in enumerate(objects)
    ]  # fmt: skip
    content = {
        "info": {},
        "images": [{"id": i, "height": SIZE, "width": SIZE} for i in range(len(truth))],
        "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}],
    }
    if annotated:
        content["annotations"] = annotations
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content))
    # COCO's results are in the order of the sorted category ids
    MetadataCatalog.get(name).set(
        json_file=str(path),
        thing_classes=["dog", "cat"],
        thing_dataset_id_to_contiguous_id=DATASET_IDS,
    )
    return name


def instances(items, masks=True):
    """[(class, box, score), …]"""
    result = Instances((SIZE, SIZE))
    result.pred_boxes = Boxes(torch.tensor([item[1] for item in items]).float().reshape(-1, 4))
    result.pred_classes = torch.tensor([item[0] for item in items], dtype=torch.int64)
    result.scores = torch.tensor([item[2] for item in items], dtype=torch.float32)
    if masks:
        drawn = [rectangle(*item[1]) for item in items]
        result.pred_masks = torch.stack(drawn) if drawn else torch.zeros(0, SIZE, SIZE).bool()
    return result


def evaluate(name, predictions, masks=True, **kwargs):
    evaluator = COCOEvaluator(name, use_fast_impl=False, **kwargs)
    evaluator.reset()
    for image_id, items in enumerate(predictions):
        evaluator.process([{"image_id": image_id}], [{"instances": instances(items, masks)}])
    return evaluator.evaluate()


def test_perfect_predictions_score_100(tmp_path):
    truth = [[(CAT, SQUARE), (DOG, (0, 0, 20, 20))], [(CAT, (5, 5, 55, 55))], []]
    predictions = [[(*item, 0.9) for item in items] for items in truth]
    results = evaluate(make_dataset(tmp_path, truth), predictions)
    assert set(results) == {"bbox", "segm"}
    for scores in results.values():
        assert set(scores) == {*METRICS, "AP-cat", "AP-dog"}
        assert all(score == pytest.approx(100) for score in scores.values())


@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_half_of_the_objects_found(tmp_path, task):
    name = make_dataset(tmp_path, [[(CAT, SQUARE)], [(CAT, SQUARE)]])
    scores = evaluate(name, [[(CAT, SQUARE, 0.9)], []])[task]
    assert scores["AP"] == pytest.approx(100 * 51 / 101)
    assert scores["APl"] == pytest.approx(100 * 51 / 101)
    assert math.isnan(scores["APs"])
    assert math.isnan(scores["APm"])
    assert math.isnan(scores["AP-dog"]) or math.isnan(scores["AP-cat"])


@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_an_overlap_counts_up_to_its_threshold(tmp_path, task):
    x0, y0, x1, _ = SQUARE
    name = make_dataset(tmp_path, [[(CAT, SQUARE)]])
    scores = evaluate(name, [[(CAT, (x0, y0, x1, y0 + 62), 0.9)]])[task]
    assert scores["AP"] == pytest.approx(30)  # IoU 0.62 passes 0.50, 0.55, 0.60 of ten
    assert scores["AP50"] == pytest.approx(100)
    assert scores["AP75"] == pytest.approx(0)


def test_a_more_confident_false_positive_halves_the_precision(tmp_path):
    name = make_dataset(tmp_path, [[(CAT, SQUARE)]])
    scores = evaluate(name, [[(CAT, SQUARE, 0.5), (CAT, (0, 0, 5, 5), 0.9)]])["segm"]
    assert scores["AP"] == pytest.approx(50)
    scores = evaluate(name, [[(CAT, SQUARE, 0.9), (CAT, (0, 0, 5, 5), 0.5)]])["segm"]
    assert scores["AP"] == pytest.approx(100)


def test_the_class_matters(tmp_path):
    name = make_dataset(tmp_path, [[(CAT, SQUARE), (DOG, (0, 0, 8, 8))]])
    scores = evaluate(name, [[(DOG, SQUARE, 0.9), (DOG, (0, 0, 8, 8), 0.8)]])["segm"]
    assert sorted([scores["AP-cat"], scores["AP-dog"]]) == pytest.approx([0, 50])
    assert scores["AP"] == pytest.approx(25)


def test_masks_and_not_boxes_decide_the_size_of_a_mask(tmp_path):
    """A mask of 20 x 20 in a box of 100 x 100, next to a small object that is found."""
    small = (0, 0, 20, 20)
    name = make_dataset(tmp_path, [[(CAT, small)]])
    found = instances([(CAT, small, 0.5), (CAT, SQUARE, 0.9)])
    found.pred_masks[1] = rectangle(60, 60, 80, 80)
    evaluator = COCOEvaluator(name, use_fast_impl=False)
    evaluator.reset()
    evaluator.process([{"image_id": 0}], [{"instances": found}])
    results = evaluator.evaluate()
    assert results["bbox"]["APs"] == pytest.approx(100)  # the large box is not small: ignored
    assert results["segm"]["APs"] == pytest.approx(50)  # the small mask is a false positive


def test_predictions_without_masks_have_boxes_only(tmp_path):
    name = make_dataset(tmp_path, [[(CAT, SQUARE)]])
    results = evaluate(name, [[(CAT, SQUARE, 0.9)]], masks=False)
    assert list(results) == ["bbox"]


def test_tasks_can_be_chosen(tmp_path):
    name = make_dataset(tmp_path, [[(CAT, SQUARE)]])
    assert list(evaluate(name, [[(CAT, SQUARE, 0.9)]], tasks=("segm",))) == ["segm"]


def test_only_the_most_confident_detections_count(tmp_path):
    boxes = [(9 * i, 0, 9 * i + 8, 8) for i in range(12)]
    name = make_dataset(tmp_path, [[(CAT, box) for box in boxes]])
    predictions = [[(CAT, box, 0.9 - 0.01 * i) for i, box in enumerate(boxes)]]
    scores = evaluate(name, predictions, max_dets_per_image=11)["segm"]
    assert scores["AP"] == pytest.approx(100 * 92 / 101)  # recalls 0.00 … 0.91 of 11 / 12
    assert scores["AP50"] == scores["APs"] == pytest.approx(scores["AP"])
    assert evaluate(name, predictions)["segm"]["AP"] == pytest.approx(100)


def test_no_detections_give_nan(tmp_path):
    name = make_dataset(tmp_path, [[(CAT, SQUARE)]])
    scores = evaluate(name, [[]], tasks=("segm",))["segm"]
    assert set(scores) == set(METRICS)
    assert all(math.isnan(score) for score in scores.values())


def test_no_processed_images_give_no_result(tmp_path):
    assert evaluate(make_dataset(tmp_path, [[(CAT, SQUARE)]]), []) == {}


def test_results_are_saved_with_the_ids_of_the_data_set(tmp_path):
    name = make_dataset(tmp_path, [[(CAT, SQUARE)]], annotated=False)
    out = tmp_path / "new" / "out"
    assert evaluate(name, [[(DOG, SQUARE, 0.5)]], output_dir=str(out)) == {}
    (result,) = json.loads((out / "coco_instances_results.json").read_text())
    assert (result["image_id"], result["category_id"]) == (0, 3)
    assert result["bbox"] == [10, 10, 100, 100]
    assert result["score"] == 0.5
    assert result["segmentation"]["size"] == [SIZE, SIZE]


def test_a_class_out_of_range_is_named(tmp_path):
    name = make_dataset(tmp_path, [[(CAT, SQUARE)]])
    with pytest.raises(AssertionError, match="2"):
        evaluate(name, [[(2, SQUARE, 0.5)]])


def test_a_data_set_without_json_needs_a_folder():
    MetadataCatalog.get("evaluation_coco_without_json").set(thing_classes=["cat"])
    with pytest.raises(ValueError, match=r"COCO"):
        COCOEvaluator("evaluation_coco_without_json")


def test_no_instances_give_no_json():
    assert instances_to_coco_json(instances([]), 5) == []
