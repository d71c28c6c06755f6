"""Labels in the formats of annotation tools, read back."""

import json
import xml.etree.ElementTree as ET

import convert_annotations
import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
from helpers import rle_of
from PIL import Image
from pycocotools.coco import COCO

from s4m_d2.formats import FORMATS
from s4m_d2.formats.coco import are_exact, mask_polygons

NAMES = ["ant", 'bee "2"']
HEIGHT, WIDTH = 40, 60


def blob(seed):
    """The largest connected region of a random field."""
    field = cv2.GaussianBlur(np.random.default_rng(seed).normal(size=(HEIGHT, WIDTH)), (0, 0), 3)
    regions = cv2.connectedComponents((field > 0.02).astype(np.uint8), connectivity=4)[1]
    return regions == 1 + np.bincount(regions.ravel())[1:].argmax()


def shapes():
    """A blob at the border, a ring, two pieces, one pixel."""
    masks = np.zeros((4, HEIGHT, WIDTH), dtype=bool)
    masks[0, 20:, 50:] = np.tri(20, 10, dtype=bool)
    masks[1, 2:12, 3:15], masks[1, 5:8, 6:9] = True, False
    masks[2, 15:20, 5:9] = masks[2, 15:18, 20:31] = True
    masks[3, 0, 59] = True
    return masks


@pytest.fixture
def rows(tmp_path):
    """Two images, the second without instances; their files lie in images/."""
    (tmp_path / "images" / "sub").mkdir(parents=True)
    instances = [
        {"class": n % 2, "score": 0.9 - n / 10, "segmentation": rle_of(mask)}
        for n, mask in enumerate(shapes())
    ]
    instances[0]["sam_iou"] = 0.75
    found = [
        {"file_name": name, "height": HEIGHT, "width": WIDTH, "instances": of_image}
        for name, of_image in (("sub/a b.png", instances), ("b.png", []))
    ]
    for row in found:
        Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "images" / row["file_name"])
    return found


def write(kind, rows, tmp_path):
    return FORMATS[kind](lambda: iter(rows), NAMES, str(tmp_path / "out"), str(tmp_path / "images"))


def masks_of(coco, file_name):
    [image] = [i for i in coco.dataset["images"] if i["file_name"] == file_name]
    return np.array([coco.annToMask(a).astype(bool) for a in coco.imgToAnns[image["id"]]])


@pytest.mark.parametrize("seed", range(8))
def test_polygons_draw_the_very_mask_or_say_that_they_do_not(seed):
    rle = rle_of(blob(seed))
    drawn = blob(seed).astype(np.uint8)
    has_hole = len(cv2.findContours(drawn, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)[0]) > 1
    assert are_exact(mask_polygons(rle), rle) is not has_hole


def test_coco(rows, tmp_path):
    coco = COCO(write("coco", rows, tmp_path))
    assert sorted(coco.anns) == [1, 2, 3, 4] and sorted(coco.imgs) == [1, 2]
    assert [c["name"] for c in coco.loadCats([1, 2])] == NAMES
    assert np.array_equal(masks_of(coco, "sub/a b.png"), shapes())
    kinds = [type(coco.anns[n]["segmentation"]) for n in (1, 2, 3, 4)]
    assert kinds == [list, dict, list, list] and len(coco.anns[3]["segmentation"]) == 2
    assert [coco.anns[n]["score"] for n in (1, 2)] == [0.9, 0.8]
    assert [coco.anns[n].get("sam_iou") for n in (1, 2)] == [0.75, None]
    assert coco.anns[2]["bbox"] == [3, 2, 12, 10] and coco.anns[2]["area"] == 111


def test_labelme(rows, tmp_path):
    """As the converter of LabelMe's files reads them."""
    folder = write("labelme", rows, tmp_path)
    output = tmp_path / "back.json"
    convert_annotations.main([folder, "--output", str(output), "--images", str(tmp_path)])
    coco = COCO(str(output))
    [name] = [i["file_name"] for i in coco.dataset["images"] if "a b" in i["file_name"]]
    assert np.array_equal(masks_of(coco, name), shapes())
    names = {c["id"]: c["name"] for c in coco.dataset["categories"]}
    classes = [names[a["category_id"]] for a in coco.dataset["annotations"]]
    assert classes == [NAMES[n % 2] for n in range(4)]
    shapes_of_file = json.loads((tmp_path / "out" / "sub" / "a b.json").read_text())["shapes"]
    assert shapes_of_file[0]["description"] == "score 0.900, sam_iou 0.750"


def test_labelme_keeps_corrections_and_images_that_differ_in_their_suffix(rows, tmp_path):
    write("labelme", rows, tmp_path)
    corrected = tmp_path / "out" / "b.json"
    corrected.write_text("corrected")
    write("labelme", rows, tmp_path)
    assert corrected.read_text() == "corrected"
    corrected.unlink()
    write("labelme", [*rows, {**rows[1], "file_name": "b.jpg"}], tmp_path)
    files = {p.name: json.loads(p.read_text()) for p in corrected.parent.glob("*.json")}
    paths = {name: content["imagePath"] for name, content in files.items()}
    assert paths == {"b.png.json": "../images/b.png", "b.jpg.json": "../images/b.jpg"}


def test_label_studio(rows, tmp_path):
    rows.append({**rows[1], "file_name": "\udcff.png"})  # not UTF-8
    tasks = json.loads(open(write("label-studio", rows, tmp_path)).read())
    assert tasks[2]["data"]["image"] == "/data/local-files/?d=images/%FF.png"
    assert tasks[0]["data"]["image"] == "/data/local-files/?d=images/sub/a%20b.png"
    assert tasks[1]["predictions"][0]["result"] == []
    regions = tasks[0]["predictions"][0]["result"]
    assert len({region["id"] for region in regions}) == len(regions) == 5  # one has two pieces
    points = [np.array(r["value"]["points"]) * (WIDTH, HEIGHT) / 100 for r in regions]
    rles = [mask_util.frPyObjects([p.ravel().tolist()], HEIGHT, WIDTH) for p in points]
    drawn = [mask_util.decode(rle)[:, :, 0] > 0 for rle in rles]
    assert np.array_equal(drawn[0], shapes()[0]) and np.array_equal(drawn[4], shapes()[3])
    assert np.array_equal(drawn[2] | drawn[3], shapes()[2])
    interface = ET.parse(tmp_path / "out" / "interface.xml").getroot()
    assert [label.get("value") for label in interface.iter("Label")] == NAMES
    assert {r["value"]["polygonlabels"][0] for r in regions} == set(NAMES)
