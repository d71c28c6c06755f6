"""Evaluators see the same in encoded masks as in a tensor of masks."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from PIL import Image
from torch import nn

from s4m_d2.evaluation import COCOInstanceAP, build_evaluator, masks_as_rle
from s4m_d2.structures import RLEMasks, encode_masks

SIZE = HEIGHT, WIDTH = 40, 60
COUNT = 5
CAR = 26  # Cityscapes' label id


def masks_of(image, count=COUNT):
    """Random boxes, the first of them the ground truth."""
    rng = np.random.default_rng(image)
    masks = torch.zeros(count, *SIZE, dtype=torch.bool)
    for mask in masks:
        top, left = rng.integers(0, 15), rng.integers(0, 30)
        mask[top : top + rng.integers(12, 25), left : left + rng.integers(15, 30)] = True
    return masks


def output_of(image, encode, count=COUNT):
    masks = masks_of(image, count)
    instances = Instances(SIZE)
    instances.pred_masks = RLEMasks(encode_masks(masks), SIZE) if encode else masks
    instances.pred_classes = torch.arange(count) % 2
    instances.scores = torch.linspace(0.3, 0.9, count)
    instances.pred_boxes = Boxes(torch.rand(count, 4, generator=torch.Generator().manual_seed(1)))
    return {"instances": instances}


@pytest.fixture
def dataset(request):
    name = request.node.name
    DatasetCatalog.register(name, list)
    yield MetadataCatalog.get(name)
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


@pytest.fixture
def coco(dataset, tmp_path):
    images = [{"id": i, "file_name": f"{i}.jpg", "height": 40, "width": 60} for i in range(3)]
    annotations = []
    for image in range(2):
        (rle,) = encode_masks(masks_of(image)[:1])
        segmentation = {"size": rle["size"], "counts": rle["counts"].decode()}
        area = int(masks_of(image)[0].sum())
        common = {"category_id": 1, "bbox": [0, 0, 9, 9], "area": area, "iscrowd": 0}
        annotations.append(
            {"id": image + 1, "image_id": image, "segmentation": segmentation, **common}
        )
    categories = [{"id": 1, "name": "person"}, {"id": 2, "name": "car"}]
    truth = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    dataset.set(
        json_file=str(tmp_path / "truth.json"),
        thing_classes=["person", "car"],
        thing_dataset_id_to_contiguous_id={1: 0, 2: 1},
        evaluator_type="coco",
    )
    return dataset.name


def run(evaluator, outputs):
    evaluator.reset()
    samples = [
        {"image_id": i, "file_name": f"/aachen/aachen_{i}_leftImg8bit.png"}
        for i in range(len(outputs))
    ]
    evaluator.process(samples, outputs)
    return evaluator.evaluate()


@pytest.mark.parametrize("evaluator", [COCOInstanceAP, COCOEvaluator])
def test_coco_results_are_the_same_to_the_last_character(coco, tmp_path, evaluator):
    """Of ours, which does not decode, and of Detectron2's, which does."""
    written, results = [], []
    for encode in (False, True):
        folder = tmp_path / str(encode)
        outputs = [output_of(0, encode), output_of(1, encode), output_of(2, encode, count=0)]
        results.append(run(evaluator(coco, output_dir=str(folder)), outputs))
        written.append((folder / "coco_instances_results.json").read_text())
    assert written[0] == written[1]
    assert len(json.loads(written[0])) == 2 * COUNT
    assert repr(results[0]) == repr(results[1])
    assert results[0]["segm"]["AP"] > 0


def test_our_coco_evaluator_decodes_nothing(coco, monkeypatch):
    assert isinstance(build_evaluator(coco), COCOInstanceAP)
    monkeypatch.setattr("s4m_d2.structures._decode", lambda rle: pytest.fail("decoded"))
    run(build_evaluator(coco), [output_of(0, True)])


def test_cityscapes_scripts_are_given_the_same(dataset, tmp_path, monkeypatch):
    (tmp_path / "gt" / "aachen").mkdir(parents=True)
    for image in range(2):
        ids = np.full(SIZE, 7, dtype=np.uint16)
        ids[masks_of(image)[0]] = CAR * 1000
        Image.fromarray(ids).save(
            tmp_path / "gt" / "aachen" / f"aachen_{image}_gtFine_instanceIds.png"
        )
    dataset.set(
        evaluator_type="cityscapes_instance",
        thing_classes=["car", "person"],
        gt_dir=str(tmp_path / "gt"),
    )
    contents, results = [], []
    for encode in (False, True):
        evaluator = build_evaluator(dataset.name)
        pairs = evaluator._pairs

        def read_first(evaluator=evaluator, pairs=pairs):
            folder = Path(evaluator._root)
            contents.append({f.name: f.read_bytes() for f in sorted(folder.iterdir())})
            return pairs()

        monkeypatch.setattr(evaluator, "_pairs", read_first)
        results.append(run(evaluator, [output_of(image, encode) for image in range(2)]))
    assert len(contents[0]) == 2 * (COUNT + 1)
    assert contents[0] == contents[1]
    for index, mask in enumerate(masks_of(0)):
        written = Image.open(io.BytesIO(contents[0][f"aachen_0_{index}.png"]))
        assert np.array_equal(np.asarray(written), mask.numpy())
    assert repr(results[0]) == repr(results[1])
    assert results[0]["segm"]["AP-car"] > 0


def test_models_are_switched_and_switched_back():
    model = nn.Identity()
    model.rle_masks = False
    with masks_as_rle(model):
        assert model.rle_masks is True
    assert model.rle_masks is False
    with pytest.raises(KeyError), masks_as_rle(model):
        raise KeyError
    assert model.rle_masks is False


def test_models_that_know_nothing_of_encoded_masks_are_left_alone():
    model = nn.Identity()
    with masks_as_rle(model):
        assert not hasattr(model, "rle_masks")
