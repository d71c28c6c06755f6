import copy
import json
import math
import os
import tempfile

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from PIL import Image

from s4m_d2.config import add_s4m_config
from s4m_d2.data import custom
from s4m_d2.engine import TeacherTrainer
from s4m_d2.errors import ConfigError, DatasetError
from s4m_d2.evaluation import build_evaluator

HEIGHT, WIDTH = 40, 60
CAR = 26  # Cityscapes' label id; an instance is label id * 1000 + its number
CLASSES = ["person", "car"]
LEFT = (slice(5, 25), slice(5, 25))  # 400 px
RIGHT = (slice(5, 25), slice(35, 55))


@pytest.fixture
def dataset(request):
    """Register a data set under the test's name and forget it afterwards."""
    names = []

    def register(**metadata):
        name = f"{request.node.name}_{len(names)}"
        names.append(name)
        DatasetCatalog.register(name, list)
        MetadataCatalog.get(name).set(**metadata)
        return name

    yield register
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.fixture
def empty_cwd(tmp_path, monkeypatch):
    """The user's working directory, and where temporary folders come to be."""
    cwd, temporary = tmp_path / "cwd", tmp_path / "temporary"
    cwd.mkdir()
    temporary.mkdir()
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    return cwd, temporary


def predictions(regions, labels, scores):
    masks = torch.zeros(len(regions), HEIGHT, WIDTH, dtype=torch.bool)
    for mask, region in zip(masks, regions, strict=True):
        mask[region] = True
    instances = Instances((HEIGHT, WIDTH))
    instances.pred_masks = masks
    instances.pred_classes = torch.tensor(labels, dtype=torch.int64)
    instances.scores = torch.tensor(scores)
    instances.pred_boxes = Boxes(torch.tensor([[5.0, 5.0, 25.0, 25.0]]).repeat(len(regions), 1))
    return {"instances": instances}


def cityscapes_truth(folder, stem, regions):
    ids = np.full((HEIGHT, WIDTH), 7, dtype=np.uint16)  # road
    for number, region in enumerate(regions):
        ids[region] = CAR * 1000 + number
    (folder / "aachen").mkdir(parents=True, exist_ok=True)
    Image.fromarray(ids).save(folder / "aachen" / f"{stem}_gtFine_instanceIds.png")


def cityscapes_sample(stem):
    return {"file_name": f"/images/aachen/{stem}_leftImg8bit.png", "image_id": stem}


def evaluate(evaluator, samples, outputs):
    evaluator.reset()
    for sample, output in zip(samples, outputs, strict=True):
        evaluator.process([sample], [output])
    return evaluator.evaluate()["segm"]


@pytest.fixture
def cityscapes(dataset, tmp_path):
    """Two images, a car on the left in each."""
    for number in (0, 1):
        cityscapes_truth(tmp_path / "gt", f"aachen_00000{number}_000019", [LEFT])
    return dataset(
        evaluator_type="cityscapes_instance",
        thing_classes=CLASSES,
        gt_dir=str(tmp_path / "gt"),
    )


SAMPLES = [cityscapes_sample(f"aachen_00000{number}_000019") for number in (0, 1)]
NOTHING = ([], [], [])
FOUND = ([LEFT], [1], [0.9])
WRONG = ([RIGHT], [1], [0.8])  # a false positive


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [
        ((FOUND, FOUND), 100.0),
        ((FOUND, NOTHING), 50.0),  # precision 1 up to recall 0.5
        ((NOTHING, NOTHING), 0.0),
        ((FOUND, WRONG), 50.0),  # the false positive scores lower
        ((([LEFT], [0], [0.9]), FOUND), 50.0),  # of the wrong class
    ],
)
def test_cityscapes_ap_counts_images_without_predictions(cityscapes, outputs, expected):
    results = evaluate(
        build_evaluator(cityscapes), SAMPLES, [predictions(*output) for output in outputs]
    )
    assert results["AP-car"] == pytest.approx(expected)
    assert results["AP"] == pytest.approx(expected)
    assert results["AP50"] == pytest.approx(expected)
    assert math.isnan(results["AP-person"])  # no person in the ground truth


def test_cityscapes_evaluation_leaves_no_trace(cityscapes, empty_cwd):
    import cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling as scripts

    settings = copy.deepcopy(vars(scripts.args))
    evaluate(build_evaluator(cityscapes, "inference"), SAMPLES, [predictions(*FOUND)] * 2)
    cwd, temporary = empty_cwd
    assert os.listdir(cwd) == [] and os.listdir(temporary) == []
    assert os.getcwd() == str(cwd)
    assert repr(vars(scripts.args)) == repr(settings)


def test_cityscapes_evaluation_of_a_part_says_so(cityscapes, caplog):
    results = evaluate(build_evaluator(cityscapes), SAMPLES[:1], [predictions(*FOUND)])
    assert results["AP"] == pytest.approx(100)
    assert "evaluated 1 of 2 images" in caplog.text


def test_missing_ground_truth_is_named(dataset, tmp_path):
    name = dataset(
        evaluator_type="cityscapes_instance", thing_classes=CLASSES, gt_dir=str(tmp_path)
    )
    with pytest.raises(DatasetError, match=f"{name}.*gtFine_instanceIds"):
        evaluate(build_evaluator(name), SAMPLES[:1], [predictions(*FOUND)])


@pytest.fixture
def coco(dataset, tmp_path):
    annotation = {
        "id": 1,
        "image_id": 1,
        "category_id": 3,
        "bbox": [5, 5, 20, 20],
        "area": 400,
        "iscrowd": 0,
        "segmentation": [[5, 5, 25, 5, 25, 25, 5, 25]],
    }
    images = [{"id": i, "file_name": f"{i}.jpg", "height": HEIGHT, "width": WIDTH} for i in (1, 2)]
    content = {
        "info": {},
        "images": images,
        "annotations": [annotation],
        "categories": [{"id": 3, "name": "car"}],
    }
    json_file = tmp_path / "truth.json"
    json_file.write_text(json.dumps(content))
    return dataset(
        evaluator_type="coco",
        json_file=str(json_file),
        image_root=str(tmp_path),
        thing_classes=["car"],
        thing_dataset_id_to_contiguous_id={3: 0},
    )


COCO_SAMPLES = [{"image_id": i, "file_name": f"{i}.jpg"} for i in (1, 2)]


def test_coco_ap_survives_an_image_without_predictions(coco, empty_cwd):
    outputs = [predictions([LEFT], [0], [0.9]), predictions(*NOTHING)]
    results = evaluate(build_evaluator(coco), COCO_SAMPLES, outputs)
    assert results["AP"] == pytest.approx(100)
    assert os.listdir(empty_cwd[0]) == []


def test_coco_has_mask_results_even_if_nothing_is_predicted(coco):
    results = evaluate(build_evaluator(coco), COCO_SAMPLES, [predictions(*NOTHING)] * 2)
    assert math.isnan(results["AP"]) or results["AP"] == 0


@pytest.mark.parametrize(
    ("own", "tile", "most", "expected"),
    [(True, 0, 150, 100), (False, 0, 150, 100 * 67 / 101), (False, 40, 75, 100)],
)
def test_on_own_data_and_with_tiles_all_detections_count_and_else_100(
    dataset, tmp_path, monkeypatch, own, tile, most, expected
):
    """All of 150 instances are found; COCO's precision is read at 101 recalls."""
    corners = [(x, y) for x in range(0, WIDTH, 4) for y in range(0, HEIGHT, 4)]
    rows = [
        {"id": i, "image_id": 1, "category_id": 1, "iscrowd": 0, "bbox": [x, y, 4, 4], "area": 16,
         "segmentation": [[x, y, x + 4, y, x + 4, y + 4, x, y + 4]]}
        for i, (x, y) in enumerate(corners, start=1)
    ]  # fmt: skip
    image = {"id": 1, "file_name": "1.jpg", "height": HEIGHT, "width": WIDTH}
    cells = [{"id": 1, "name": "cell"}]
    content = {"info": {}, "images": [image], "annotations": rows, "categories": cells}
    (tmp_path / "truth.json").write_text(json.dumps(content))
    ids = {"thing_dataset_id_to_contiguous_id": {1: 0}}
    name = dataset(evaluator_type="coco", json_file=str(tmp_path / "truth.json"), **ids)
    if own:
        monkeypatch.setattr(custom, "VALIDATION", name)
    monkeypatch.setattr(DatasetCatalog, "get", {name: [image]}.get)
    cfg = get_cfg()
    add_s4m_config(cfg)
    cfg.OUTPUT_DIR, cfg.TEST.DETECTIONS_PER_IMAGE, cfg.INPUT.TILE.SIZE = str(tmp_path), most, tile
    found = predictions([np.s_[y : y + 4, x : x + 4] for x, y in corners], [0] * 150, [0.9] * 150)
    results = evaluate(TeacherTrainer.build_evaluator(cfg, name), COCO_SAMPLES[:1], [found])
    assert [results[key] for key in ("AP", "AP50", "APs")] == pytest.approx([expected] * 3)


def test_a_data_set_without_a_measure_is_refused(dataset):
    with pytest.raises(ConfigError, match="'semantic'.*'coco' or 'cityscapes_instance'"):
        build_evaluator(dataset(evaluator_type="semantic"))
