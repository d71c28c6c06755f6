"""AP of the same imperfect predictions, against what Detectron2's evaluators report."""

import json

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import BitMasks, Boxes, Instances
from test_evaluation_cityscapes import (  # noqa: F401
    FRAME,
    evaluator,
    scripts_under_both_names,
)
from test_evaluation_cityscapes import H as HEIGHT
from test_evaluation_cityscapes import W as WIDTH

SIZE = 160
CLASSES = {3: "cat", 11: "dog", 5: "bird", 8: "fish"}  # ids of the data set
SORTED_IDS = sorted(CLASSES)


def ellipse(x, y, a, b, height=SIZE, width=SIZE):
    rows, columns = np.mgrid[:height, :width] + 0.5
    return ((columns - x) / a) ** 2 + ((rows - y) / b) ** 2 <= 1


def scene(random, count):
    """(class, x, y, a, b) of some objects; their half axes fall into all of COCO's sizes."""
    center = random.uniform(20, SIZE - 20, (count, 2))
    axes = random.choice([5.0, 14.0, 30.0, 70.0], (count, 1)) * random.uniform(0.7, 1.3, (count, 2))
    return [(random.randint(4), *c, *a) for c, a in zip(center, axes, strict=True)]


def guess(random, objects):
    """Jittered objects, some of another class, some missing, some twice, and false ones."""
    guessed = []
    for label, *shape in [*objects, *objects[:2], *scene(random, 2)]:
        if random.rand() < 0.85:
            jitter = random.normal(1, 0.06, 4)
            other = random.randint(4) if random.rand() < 0.1 else label
            score = round(random.beta(4, 2), 1)  # there are ties
            guessed.append((other, *(np.array(shape) * jitter), score))
    return guessed


def instances_of(guessed):
    masks = [ellipse(*shape) for _, *shape, _ in guessed]
    tensor = torch.from_numpy(np.stack(masks) if masks else np.zeros((0, SIZE, SIZE), bool))
    result = Instances((SIZE, SIZE), pred_masks=tensor)
    result.pred_boxes = Boxes(BitMasks(tensor).get_bounding_boxes().tensor + 0.25)
    result.scores = torch.tensor([float(g[-1]) for g in guessed])
    result.pred_classes = torch.tensor([int(g[0]) for g in guessed], dtype=torch.int64)
    return result


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """A data set of 14 images, and predictions for it."""
    import pycocotools.mask as mask_util

    random, annotations, predictions = np.random.RandomState(0), [], []
    for image_id in range(14):
        objects = scene(random, random.randint(0, 7))
        for i, (label, *shape) in enumerate(objects):
            mask = ellipse(*shape)
            rle = mask_util.encode(np.asfortranarray(mask, dtype=np.uint8))
            crowd = int(i == 4)
            annotations.append({
                "id": len(annotations) + 1, "image_id": image_id, "category_id": SORTED_IDS[label],
                "bbox": mask_util.toBbox(rle).tolist(), "area": float(mask.sum()), "iscrowd": crowd,
                "segmentation": {"size": [SIZE, SIZE], "counts": rle["counts"].decode()},
            })  # fmt: skip
        predictions.append(instances_of(guess(random, objects)))
    folder = tmp_path_factory.mktemp("coco")
    content = {
        "info": {}, "annotations": annotations,
        "images": [{"id": i, "height": SIZE, "width": SIZE} for i in range(14)],
        "categories": [{"id": i, "name": name} for i, name in CLASSES.items()],
    }  # fmt: skip
    (folder / "coco.json").write_text(json.dumps(content))
    name = "reference_evaluation"
    MetadataCatalog.get(name).set(
        json_file=str(folder / "coco.json"),
        thing_classes=[CLASSES[i] for i in SORTED_IDS],
        thing_dataset_id_to_contiguous_id={i: n for n, i in enumerate(SORTED_IDS)},
    )
    yield name, predictions
    MetadataCatalog.remove(name)


@pytest.mark.parametrize(
    "name, options",
    [
        ("both", {}),
        ("segm", {"tasks": ("segm",)}),
        ("few", {"max_dets_per_image": 1}),
    ],
)
@pytest.mark.parametrize("fast", [False, True])
def test_coco_ap(reference, coco, tmp_path, name, options, fast):
    """Detectron2's compiled code, where there is some, gives what pycocotools does."""
    dataset, predictions = coco
    made = COCOEvaluator(dataset, output_dir=str(tmp_path), use_fast_impl=fast, **options)
    made.reset()
    for image_id, instances in enumerate(predictions):
        made.process([{"image_id": image_id}], [{"instances": instances}])
    results = {task: dict(scores) for task, scores in made.evaluate().items()}
    if reference.recorded is None or not fast:
        reference(f"evaluation/coco/{name}", results, rel=1e-7)
    saved = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert 30 < len(saved) < 100
    if name == "both" and not fast:
        for result in saved:
            result.pop("segmentation")["counts"].encode("ascii")
        reference("evaluation/coco/saved", saved[::6], rel=1e-6)


def test_cityscapes_ap(reference, evaluator):  # noqa: F811
    random = np.random.RandomState(1)
    boxes = []
    for _ in range(5):
        x0, y0 = random.randint(0, WIDTH - 50, 4), random.randint(0, HEIGHT - 40, 4)
        w, h = random.randint(12, 48, 4), random.randint(10, 38, 4)
        boxes.append(list(zip(x0, y0, x0 + w, y0 + h, strict=True)))
    truth = [[(i % 2, tuple(map(int, box))) for i, box in enumerate(frame)] for frame in boxes]
    made = evaluator(truth)
    for frame, items in enumerate(truth):
        masks, classes = [], []
        for label, (x0, y0, x1, y1) in items[frame % 2 :] + [(0, (5, 5, 25, 25))]:
            center, axes = ((x0 + x1) / 2, (y0 + y1) / 2), ((x1 - x0) / 1.8, (y1 - y0) / 1.9)
            masks.append(ellipse(*center, *axes, HEIGHT, WIDTH))
            classes.append(label)
        found = Instances((HEIGHT, WIDTH), pred_masks=torch.from_numpy(np.stack(masks)))
        found.scores = torch.from_numpy(np.round(random.rand(len(masks)), 1)).float()
        found.pred_classes = torch.tensor(classes)
        file_name = f"x/{FRAME.format(frame)}_leftImg8bit.png"
        made.process([{"file_name": file_name}], [{"instances": found}])
    results = {task: dict(scores) for task, scores in made.evaluate().items()}
    assert 5 < results["segm"]["AP"] < results["segm"]["AP50"] < 95
    reference("evaluation/cityscapes", results, rel=1e-7)
