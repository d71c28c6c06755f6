"""COCO files of instances that are damaged, contradict themselves or their images."""

import json
import logging

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from s4m_d2.data import CocoFormat, register_splits
from s4m_d2.data.segmentations import check_segmentation
from s4m_d2.engine.config_file import load_config
from s4m_d2.engine.dataset_checks import check_datasets
from s4m_d2.errors import DatasetError

from .rows import BOX_POLYGON, HEIGHT, WIDTH, labeled, mask, one_error, save, scene

NAME = "hostile_coco"
NAN, INF = float("nan"), float("inf")
RUNS = [6 * HEIGHT + 4, *[12, 12] * 23, 12, 10 * HEIGHT + 8]  # of the mask, column by column


def content():
    """Two images with an instance each; the first a polygon, the second an RLE."""
    shapes = [[BOX_POLYGON], {"size": [HEIGHT, WIDTH], "counts": list(RUNS)}]
    images = [
        {"id": i, "file_name": f"{i}.png", "height": HEIGHT, "width": WIDTH} for i in range(2)
    ]
    annotations = [
        {"id": 10 + i, "image_id": i, "category_id": 3, "bbox": [6, 4, 24, 12], "area": 288,
         "iscrowd": 0, "segmentation": shape}
        for i, shape in enumerate(shapes)
    ]  # fmt: skip
    categories = [{"id": 3, "name": "apple"}]
    return {"images": images, "annotations": annotations, "categories": categories}


@pytest.fixture
def load(tmp_path):
    """Text of the JSON file -> records and samples of the whole set."""
    for i in range(2):
        save(tmp_path / "images" / f"{i}.png", scene())
    save(tmp_path / "secret.png", scene())
    json_file = tmp_path / "instances.json"
    register_splits(NAME, CocoFormat(str(json_file), str(tmp_path / "images")), (), full=True)

    def read(text):
        json_file.write_text(text if isinstance(text, str) else json.dumps(text))
        return [labeled(1)(record)["instances"] for record in DatasetCatalog.get(NAME)]

    yield read
    for name in (NAME, f"{NAME}_unlabeled"):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_the_sound_file_gives_both_masks(load):
    for instances in load(content()):
        assert np.array_equal(instances.gt_masks.tensor[0].numpy(), mask())


DEEP = "[" * 100_000
TEXTS = {
    "empty": ("", "no valid JSON"),
    "truncated": (json.dumps(content())[:200], "no valid JSON"),
    "not JSON": ("<html>404</html>", "no valid JSON"),
    "nested too deep": (DEEP, "no valid JSON"),
    "a list": ("[]", "no list 'images'"),
    "a number": ("3", "no list 'images'"),
    "an empty object": ("{}", "no list 'images'"),
}


@pytest.mark.parametrize("row", TEXTS)
def test_files_that_are_no_coco_files(load, row):
    text, says = TEXTS[row]
    with one_error(DatasetError, r"instances\.json", says):
        load(text)


def setting(section, key, value, index=0):
    def change(data):
        data[section][index][key] = value

    return change


def without(section, key):
    def change(data):
        del data[section][0][key]

    return change


def shape(value, index=0):
    return setting("annotations", "segmentation", value, index)


def rle(counts, size=(HEIGHT, WIDTH)):
    return shape({"size": list(size), "counts": counts})


def polygon_with(value):
    return shape([[*BOX_POLYGON[:-1], value]])


def compressed(runs):
    """COCO's text for these runs, which need not fit any size."""
    raw = mask_util.frPyObjects({"size": [sum(runs), 1], "counts": runs}, sum(runs), 1)
    return raw["counts"].decode()


MALFORMED = {
    "images is an object": (lambda data: data.update(images={}), "no list 'images'"),
    "no annotations": (lambda data: data.pop("annotations"), "no list 'annotations'"),
    "no categories": (lambda data: data.pop("categories"), "no list 'categories'"),
    "empty categories": (lambda data: data["categories"].clear(), "'categories' is empty"),
    "entry is no object": (lambda data: data["images"].append(7), "entry 2 of 'images' lacks id"),
    "image without height": (without("images", "height"), "entry 0 of 'images' lacks height"),
    "image without name": (without("images", "file_name"), "entry 0 of 'images' lacks file_name"),
    "no bbox": (without("annotations", "bbox"), "entry 0 of 'annotations' lacks bbox"),
    "no image_id": (without("annotations", "image_id"), "lacks image_id"),
    "no segmentation": (without("annotations", "segmentation"), "lacks segmentation"),
    "category without name": (without("categories", "name"), "entry 0 of 'categories' lacks name"),
    "dangling image": (setting("annotations", "image_id", 99), "annotation 10 has image_id 99"),
    "dangling category": (
        setting("annotations", "category_id", 4), "annotation 10 has category_id 4"),
    "id is a list": (setting("images", "id", [1]), r"id \[1\]; expected a number"),
    "id is NaN": (setting("annotations", "id", NAN), "id nan; expected a number"),
    "image_id is an object": (setting("annotations", "image_id", {}), "image_id {}; expected"),
    "same image id": (setting("images", "id", 1), "ids of 'images' are not unique"),
    "same annotation id": (setting("annotations", "id", 11), "ids of 'annotations' are not uniq"),
    "same category id": (
        lambda data: data["categories"].append({"id": 3, "name": "pear"}), "'categories' are not"),
    "height is text": (setting("images", "height", "24"), "height '24'; expected a whole number"),
    "height is 0": (setting("images", "height", 0), "height 0; expected a whole number"),
    "width is infinite": (setting("images", "width", INF), "width inf; expected"),
    "width is negative": (setting("images", "width", -40), "width -40; expected"),
    "name is a number": (setting("images", "file_name", 7), "file_name 7; expected a text"),
    "name is empty": (setting("images", "file_name", ""), "file_name ''; expected a text"),
    "name leads out": (setting("images", "file_name", "../secret.png"), "../secret.png leads"),
    "name is absolute": (setting("images", "file_name", "/etc/hostname"), "/etc/hostname leads"),
    "name of no file": (setting("images", "file_name", "gone.png"), "1 of 2 images .*gone.png"),
    "box with NaN": (setting("annotations", "bbox", [NAN, 4, 24, 12]), "bbox .*four finite"),
    "box with infinity": (setting("annotations", "bbox", [6, 4, INF, 12]), "bbox .*four finite"),
    "box of 3 numbers": (setting("annotations", "bbox", [6, 4, 24]), "bbox .*four finite"),
    "empty box": (setting("annotations", "bbox", []), "bbox .*four finite"),
    "polygon with NaN": (polygon_with(NAN), "annotation 10: .* finite numbers"),
    "polygon with infinity": (polygon_with(-INF), "annotation 10: .* finite numbers"),
    "polygon with 1e999": (polygon_with("X"), "annotation 10: .* finite numbers"),
    "polygon with null": (polygon_with(None), "annotation 10: .* finite numbers"),
    "polygon far away": (polygon_with(1e300), r"annotation 10: .*1e\+300, far outside"),
    "flat polygon": (shape(BOX_POLYGON), "annotation 10: a polygon must be a list"),
    "polygon of points": (shape([[{"x": 1, "y": 2}]]), "annotation 10: a polygon must be a list"),
    "no polygon": (shape([]), "annotation 10: the list of polygons is empty"),
    "null": (shape(None), "annotation 10: .*type NoneType"),
    "a word": (shape("mask"), "annotation 10: .*type str"),
    "RLE of another size": (rle([WIDTH * HEIGHT], (WIDTH, HEIGHT)), r"10: .*\(40, 24\), but the"),
    "RLE of size 5": (shape({"size": 5, "counts": [5]}), r"10: an RLE's size must be"),
    "RLE without counts": (shape({"size": [HEIGHT, WIDTH]}), "10: an RLE needs the keys"),
    "RLE too short": (rle([5, 6]), "10: an RLE's counts sum to 11; expected .*960"),
    "RLE too long": (rle([900, 100]), "10: an RLE's counts sum to 1000"),
    "negative counts": (rle([-40, 1000]), "10: an RLE's counts must be"),
    "counts with halves": (rle([0.5, 959.5]), "10: an RLE's counts must be"),
    "counts are null": (rle(None), "10: an RLE's counts must be"),
    "text too long": (rle(compressed([900, 100])), "10: an RLE's counts sum to 1000"),
    "text too short": (rle(compressed([90, 100])), "10: an RLE's counts sum to 190"),
    "text cut in a number": (rle(compressed([900, 60])[:-1]), "10: an RLE's counts must be"),
    "text without end": (rle("o" * 500), "10: an RLE's counts must be"),
    "no text": (rle(""), "10: an RLE's counts must be"),
    "text of anything": (rle("\u2764"), "10: an RLE's counts must be"),
    "image of another size": (setting("images", "width", WIDTH + 1), r"0\.png has .*\(24, 41\)"),
    "sides swapped": (
        lambda data: data["images"][0].update(height=WIDTH, width=HEIGHT), r"0.png has .*\(40"),
}  # fmt: skip


@pytest.mark.parametrize("row", MALFORMED)
def test_malformed_entries_are_named(load, row):
    change, says = MALFORMED[row]
    data = content()
    change(data)
    text = json.dumps(data).replace('"X"', "1e999")
    with one_error(DatasetError, r"instances\.json|0\.png", says):
        load(text)


def test_compressed_rles_are_summed_as_the_api_wrote_them():
    """Random masks: every run length from 0 to thousands, differences of both signs."""
    rng = np.random.default_rng(0)
    for _ in range(30):
        runs = rng.integers(1, 2 ** rng.integers(1, 14), 2 * rng.integers(1, 20)).tolist()
        runs[0] *= int(rng.integers(2))
        segmentation = {"size": [sum(runs), 1], "counts": compressed(runs)}
        check_segmentation(segmentation, (sum(runs), 1))
        with pytest.raises(DatasetError, match=f"sum to {sum(runs)}; expected"):
            check_segmentation({**segmentation, "size": [sum(runs) + 1, 1]}, (sum(runs) + 1, 1))


def crowd(data):
    data["annotations"][0]["iscrowd"] = 1


LEFT_OUT = {
    "polygon without points": shape([[]]),
    "polygon of two points": shape([[1, 2, 3, 4]]),
    "odd number of coordinates": shape([BOX_POLYGON[:-1]]),
}


@pytest.mark.parametrize("row", LEFT_OUT)
def test_polygons_of_less_than_three_points_are_left_out_and_warned_about(load, row, caplog):
    data = content()
    LEFT_OUT[row](data)
    with caplog.at_level(logging.WARNING):
        assert [len(instances) for instances in load(data)] == [0, 1]
    assert "1 instances" in caplog.text and "valid" in caplog.text


def test_a_polygon_of_less_than_three_points_beside_a_good_one_changes_nothing(load):
    data = content()
    shape([[1, 2], BOX_POLYGON])(data)
    assert np.array_equal(load(data)[0].gt_masks.tensor[0].numpy(), mask())


def test_an_image_with_crowds_only_has_no_instances(load):
    data = content()
    crowd(data)
    assert [len(instances) for instances in load(data)] == [0, 1]
    shape([])(data)
    assert [len(instances) for instances in load(data)] == [0, 1]


def test_an_image_without_annotations_has_no_instances(load):
    data = content()
    del data["annotations"][0]
    assert [len(instances) for instances in load(data)] == [0, 1]


@pytest.mark.parametrize("box", [[6, 4, 0, 0], [6, 4, -3, 12], [900, 900, 5, 5]])
def test_boxes_are_those_of_the_masks_whatever_the_file_says(load, box):
    data = content()
    setting("annotations", "bbox", box)(data)
    assert load(data)[0].gt_boxes.tensor.tolist() == [[6, 4, 30, 16]]


def test_a_link_inside_the_folder_may_lead_out(load, tmp_path):
    (tmp_path / "images" / "link.png").symlink_to(tmp_path / "secret.png")
    data = content()
    setting("images", "file_name", "link.png")(data)
    assert len(load(data)) == 2


def both_crowd(data):
    for annotation in data["annotations"]:
        annotation["iscrowd"] = 1


def no_annotations(data):
    data["annotations"].clear()


def no_images(data):
    data["images"].clear()
    data["annotations"].clear()


def one_file_twice(data):
    data["images"][1]["file_name"] = data["images"][0]["file_name"]


SETS = {
    "crowd only": (both_crowd, "2 images and no instance"),
    "no annotations": (no_annotations, "2 images and no instance"),
    "no images": (no_images, "has no images"),
    "one file twice": (one_file_twice, r"0\.png is in .*and in"),
}


@pytest.mark.parametrize("row", SETS)
def test_sets_with_nothing_to_learn_from_are_refused_before_training(load, row):
    change, says = SETS[row]
    data = content()
    change(data)
    cfg = load_config("", [
        "DATASETS.TRAIN", f"('{NAME}',)", "S4M.STAGE", "teacher", "INPUT.FORMAT", "RGB",
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "1",
    ])  # fmt: skip
    load(data)
    with one_error(DatasetError, NAME, says):
        check_datasets(cfg)
