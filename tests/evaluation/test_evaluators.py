"""AP by COCO's and by Cityscapes' own scripts: cases by hand, and encoded masks as any others."""

import copy
import json
import math
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from PIL import Image

from s4m_d2.config import add_s4m_config
from s4m_d2.data import splits
from s4m_d2.engine import TeacherTrainer
from s4m_d2.errors import ConfigError, DatasetError
from s4m_d2.evaluation import build_evaluator
from s4m_d2.structures import RLEMasks, encode_masks

SIZE = HEIGHT, WIDTH = 40, 60
CAR = 26  # Cityscapes' label id; an instance is label id * 1000 + its number
CLASSES = ["person", "car"]
LEFT, RIGHT = np.s_[5:25, 5:25], np.s_[5:25, 35:55]  # 400 px each
SAMPLES = [
    {"file_name": f"/images/aachen/aachen_{i}_leftImg8bit.png", "image_id": i} for i in (0, 1)
]
NOTHING = ([], [], [])
FOUND = ([LEFT], [1], [0.9])
WRONG = ([RIGHT], [1], [0.8])  # a false positive


@pytest.fixture
def dataset(request):
    """Register a data set under the test's name and forget it afterwards."""
    name = request.node.name

    def register(**metadata):
        DatasetCatalog.register(name, list)
        MetadataCatalog.get(name).set(**metadata)
        return name

    yield register
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


@pytest.fixture
def cityscapes(dataset, tmp_path):
    """Two images, a car on the left in each."""
    folder = tmp_path / "gt" / "aachen"
    folder.mkdir(parents=True)
    ids = np.full(SIZE, 7, dtype=np.uint16)  # road
    ids[LEFT] = CAR * 1000
    for number in (0, 1):
        Image.fromarray(ids).save(folder / f"aachen_{number}_gtFine_instanceIds.png")
    return dataset(
        evaluator_type="cityscapes_instance", thing_classes=CLASSES, gt_dir=str(folder.parent)
    )


@pytest.fixture
def coco(dataset, tmp_path):
    """Registers images 0, 1, ... with squares (x, y, side) of a single class."""

    def register(*images):
        rows = [
            {"id": 100 * i + j, "image_id": i, "category_id": 3, "iscrowd": 0, "area": s * s,
             "bbox": [x, y, s, s], "segmentation": [[x, y, x + s, y, x + s, y + s, x, y + s]]}
            for i, squares in enumerate(images) for j, (x, y, s) in enumerate(squares, start=1)
        ]  # fmt: skip
        content = {"info": {}, "annotations": rows, "categories": [{"id": 3, "name": "car"}]}
        content["images"] = [
            {"id": i, "file_name": f"{i}.jpg", "height": HEIGHT, "width": WIDTH}
            for i in range(len(images))
        ]
        (tmp_path / "truth.json").write_text(json.dumps(content))
        return dataset(
            evaluator_type="coco",
            json_file=str(tmp_path / "truth.json"),
            thing_dataset_id_to_contiguous_id={3: 0},
            thing_classes=["car"],
        )

    return register


def predictions(regions, labels, scores, encode=False):
    masks = torch.zeros(len(regions), *SIZE, dtype=torch.bool)
    for mask, region in zip(masks, regions, strict=True):
        mask[region] = True
    instances = Instances(SIZE)
    instances.pred_masks = RLEMasks(encode_masks(masks), SIZE) if encode else masks
    instances.pred_classes = torch.tensor(labels, dtype=torch.int64)
    instances.scores = torch.tensor(scores)
    instances.pred_boxes = Boxes(torch.tensor([[5.0, 5.0, 25.0, 25.0]]).repeat(len(regions), 1))
    return {"instances": instances}


def evaluate(evaluator, *outputs):
    evaluator.reset()
    for sample, output in zip(SAMPLES, outputs, strict=False):
        evaluator.process([sample], [output])
    return evaluator.evaluate()["segm"]


@pytest.mark.parametrize("encode", [False, True])
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
def test_cityscapes_ap_counts_images_without_predictions(cityscapes, outputs, expected, encode):
    outputs = [predictions(*output, encode) for output in outputs]
    results = evaluate(build_evaluator(cityscapes), *outputs)
    assert [results[key] for key in ("AP-car", "AP", "AP50")] == pytest.approx([expected] * 3)
    assert math.isnan(results["AP-person"])  # no person in the ground truth


def test_cityscapes_evaluation_leaves_no_trace(cityscapes, tmp_path, monkeypatch):
    import cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling as scripts

    for name in ("cwd", "temporary"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    settings = copy.deepcopy(vars(scripts.args))
    evaluate(build_evaluator(cityscapes, "inference"), *[predictions(*FOUND)] * 2)
    assert os.listdir(".") == [] and os.listdir(tempfile.tempdir) == []
    assert os.getcwd() == str(tmp_path / "cwd")
    assert repr(vars(scripts.args)) == repr(settings)


def test_cityscapes_evaluation_of_a_part_says_so_and_of_nothing_is_refused(cityscapes, caplog):
    assert evaluate(build_evaluator(cityscapes), predictions(*FOUND))["AP"] == pytest.approx(100)
    assert "1 of 2" in caplog.text
    for truth in Path(MetadataCatalog.get(cityscapes).gt_dir).rglob("*.png"):
        truth.unlink()
    with pytest.raises(DatasetError, match=f"{cityscapes}.*gtFine_instanceIds"):
        evaluate(build_evaluator(cityscapes), predictions(*FOUND))


def test_coco_ap_survives_images_without_predictions_or_any(coco, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = coco([(5, 5, 20)], [])
    assert os.listdir(tmp_path) == ["truth.json"]
    found, nothing = predictions([LEFT], [0], [0.9]), predictions(*NOTHING)
    assert evaluate(build_evaluator(name), found, nothing)["AP"] == pytest.approx(100)
    assert not evaluate(build_evaluator(name), nothing, nothing)["AP"] > 0
    assert os.listdir(tmp_path) == ["truth.json"]


def test_coco_results_of_encoded_masks_are_those_of_detectron2(coco, tmp_path, monkeypatch):
    """To the last character, of ours, which does not decode, and of Detectron2's, which does."""
    name = coco([(5, 5, 20)], [(3, 2, 10), (30, 9, 15)])
    boxes = [LEFT, RIGHT, np.s_[2:13, 2:12], np.s_[10:24, 31:46]]
    written, results = [], []
    for build, encode in (
        (COCOEvaluator, False),
        (build_evaluator, False),
        (build_evaluator, True),
    ):
        folder = tmp_path / f"{build.__name__} {encode}"
        outputs = [predictions(boxes, [0] * 4, [0.9, 0.7, 0.8, 0.6], encode) for _ in SAMPLES]
        with monkeypatch.context() as patch:
            if encode:
                patch.setattr("s4m_d2.structures._decode", lambda rle: pytest.fail("decoded"))
            results.append(evaluate(build(name, output_dir=str(folder)), *outputs))
        written.append((folder / "coco_instances_results.json").read_text())
    assert written[0] == written[1] == written[2] and len(json.loads(written[0])) == 8
    assert repr(results[0]) == repr(results[1]) == repr(results[2]) and results[0]["AP"] > 0


@pytest.mark.parametrize(
    ("own", "tile", "most", "expected"),
    [(True, 0, 150, 100), (False, 0, 150, 100 * 67 / 101), (False, 40, 75, 100)],
)
def test_on_own_data_and_with_tiles_all_detections_count_and_else_100(
    coco, tmp_path, monkeypatch, own, tile, most, expected
):
    """All of 150 instances are found; COCO's precision is read at 101 recalls."""
    corners = [(x, y) for x in range(0, WIDTH, 4) for y in range(0, HEIGHT, 4)]
    name = coco([(x, y, 4) for x, y in corners])
    if own:
        monkeypatch.setattr(splits, "OWN_VALIDATION", name)
    image = {"file_name": "1.jpg", "height": HEIGHT, "width": WIDTH}
    monkeypatch.setattr(DatasetCatalog, "get", {name: [image]}.get)
    cfg = get_cfg()
    add_s4m_config(cfg)
    cfg.OUTPUT_DIR, cfg.TEST.DETECTIONS_PER_IMAGE, cfg.INPUT.TILE.SIZE = str(tmp_path), most, tile
    found = predictions([np.s_[y : y + 4, x : x + 4] for x, y in corners], [0] * 150, [0.9] * 150)
    results = evaluate(TeacherTrainer.build_evaluator(cfg, name), found)
    assert [results[key] for key in ("AP", "AP50", "APs")] == pytest.approx([expected] * 3)


def test_a_data_set_without_a_measure_is_refused(dataset):
    with pytest.raises(ConfigError, match="semantic"):
        build_evaluator(dataset(evaluator_type="semantic"))
