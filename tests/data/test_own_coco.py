"""Own COCO files: classes by name, what evaluation needs."""

import json

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from s4m_d2.data.coco_content import class_names, instance_shares, to_evaluate
from s4m_d2.data.custom import OwnCoco, register_own_data
from s4m_d2.errors import DatasetError

HEIGHT, WIDTH = 20, 30
BOX = [5, 4, 15, 4, 15, 14, 5, 14]  # 10 x 10 px


def content(names=("pear", "apple"), ids=(7, 3), segmentations=([BOX],)):
    """An image with one instance of the first class for each segmentation."""
    rows = [
        {"id": i, "image_id": 1, "category_id": ids[0], "bbox": [5, 4, 10, 10], "segmentation": s}
        for i, s in enumerate(segmentations)
    ]
    categories = [{"id": i, "name": name} for i, name in zip(ids, names, strict=True)]
    image = {"id": 1, "file_name": "1.png", "height": HEIGHT, "width": WIDTH}
    return {"images": [image], "annotations": rows, "categories": categories}


@pytest.fixture
def own(tmp_path):
    """content → its OwnCoco; 1.png is there."""

    def write(data, name="a.json", **options):
        Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "1.png")
        (tmp_path / name).write_text(json.dumps(data))
        return OwnCoco(str(tmp_path / name), str(tmp_path), **options)

    return write


@pytest.fixture
def catalog():
    yield
    for name in ("own_labeled", "own_unlabeled", "own_val"):
        if name in DatasetCatalog.list():
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def rle():
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    mask[4:14, 5:15] = 1
    flat = mask.ravel(order="F")
    ends = np.flatnonzero(np.diff(flat)) + 1
    return {"size": [HEIGHT, WIDTH], "counts": np.diff([0, *ends, flat.size]).tolist()}


def test_other_ids_of_the_same_classes_are_mapped(own, catalog):
    labeled = own(content())
    categories = tuple(labeled.read()["categories"])
    val = own(content(names=("apple", "pear"), ids=(7, 3)), "val.json", categories=categories)
    register_own_data(["apple", "pear"], labeled=labeled, validation=(val, val.json_file))
    (first,), (second,) = DatasetCatalog.get("own_labeled"), DatasetCatalog.get("own_val")
    assert first["annotations"][0]["category_id"] == 1  # pear
    assert second["annotations"][0]["category_id"] == 0  # apple, though its id is pear's there
    assert MetadataCatalog.get("own_val").thing_classes == ["apple", "pear"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("pear", "aple"), "lacks apple and it adds aple"),
        (("pear",), "lacks apple"),
        (("pear", "apple", "plum"), "adds plum"),
    ],
)
def test_other_categories_are_refused_by_name(own, names, expected):
    val = content(names=names, ids=range(1, len(names) + 1))
    with pytest.raises(DatasetError, match=expected):
        own(val, categories=tuple(content()["categories"])).read()


def test_classes_of_one_name_and_ids_of_two_kinds_are_refused(own):
    with pytest.raises(DatasetError, match="pear more than once"):
        own(content(names=("pear", "pear"))).read()
    with pytest.raises(DatasetError, match="numbers and texts"):
        own(content(ids=(7, "3"))).read()


def test_classes_are_in_the_order_that_the_loader_gives_them(own, catalog):
    labeled = own(content(names=("pear", "apple", "plum"), ids=(20, 3, 100)))
    names = class_names(labeled.read())
    register_own_data(names, labeled=labeled)
    DatasetCatalog.get("own_labeled")  # sets the classes itself, and refuses others
    assert names == MetadataCatalog.get("own_labeled").thing_classes == ["apple", "pear", "plum"]


def test_only_chosen_images_are_loaded(own, catalog):
    data = content()
    data["images"].append({**data["images"][0], "id": 2, "file_name": "gone.png"})
    register_own_data(["apple", "pear"], labeled=own(data, file_names=frozenset({"1.png"})))
    assert [r["image_id"] for r in DatasetCatalog.get("own_labeled")] == [1]
    register_own_data(["apple", "pear"], labeled=own(data, remedy="Give --images."))
    with pytest.raises(DatasetError, match="gone.png. Give --images"):
        DatasetCatalog.get("own_labeled")


def test_polygons_and_run_lengths_give_the_same_ground_truth(own, tmp_path):
    """Without "area" and "iscrowd", which tools leave out, and with the id 0, which COCO's
    evaluation takes for no match: what it reads is complete, so that it finds all instances."""
    shapes = ([BOX], rle(), [[1, 1, 2, 2], BOX], [[1, 1, 2, 2]])
    data = content(segmentations=shapes)
    result = to_evaluate(data, "a.json", str(tmp_path))
    assert [row["area"] for row in result["annotations"]] == [100, 100, 100]  # the last had no mask
    assert [row["iscrowd"] for row in result["annotations"]] == [0, 0, 0]
    (tmp_path / "truth.json").write_text(json.dumps(result))
    truth = COCO(str(tmp_path / "truth.json"))
    masks = [truth.annToMask(row) for row in result["annotations"]]
    assert all(np.array_equal(mask, masks[0]) for mask in masks)
    found = [
        {"image_id": 1, "category_id": 7, "score": 0.5, "segmentation": truth.annToRLE(row)}
        for row in result["annotations"]
    ]
    evaluation = COCOeval(truth, truth.loadRes(found), "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1)


def test_a_given_area_stays_and_one_that_is_none_is_replaced(tmp_path):
    data = content(segmentations=([BOX], [BOX]))
    data["annotations"][0]["area"], data["annotations"][1]["area"] = 90.5, "large"
    areas = [row["area"] for row in to_evaluate(data, "a.json", str(tmp_path))["annotations"]]
    assert areas == [90.5, 100]
    assert list(instance_shares(data)) == [90.5 / 600, 100 / 600]  # the second: of the box
