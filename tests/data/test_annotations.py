"""The reader of COCO files: what exports mean, what is left out with a count, what is refused.

Whatever is read, training and evaluation see the same masks of the same classes.
"""

import contextlib
import copy
import json
import random

import numpy as np
import pycocotools.mask as mask_util
import pytest
from PIL import Image
from pycocotools.coco import COCO

from s4m_d2.data import LabeledDatasetMapper
from s4m_d2.data.annotations import read_annotations
from s4m_d2.errors import DatasetError

HEIGHT, WIDTH = 24, 40
NAMES = ("a.png", "sub/b.png", "u\u0308.png")
BOX = [6, 4, 30, 4, 30, 16, 6, 16]  # 24 x 12 px
MASK = np.zeros((HEIGHT, WIDTH), dtype=bool)
MASK[4:16, 6:30] = True
RUNS = [6 * HEIGHT + 4, *[12, 12] * 23, 12, 10 * HEIGHT + 8]  # of it, down the columns
TEXT = mask_util.encode(np.asfortranarray(MASK, dtype=np.uint8))["counts"].decode()
NAN, INF = float("nan"), float("inf")


def content():
    """Three images, the first with a polygon of a pear and a RLE of an apple, the second with both
    again, the third empty."""
    images = [
        {"id": i, "file_name": name, "height": HEIGHT, "width": WIDTH}
        for i, name in enumerate(NAMES, start=1)
    ]
    sizes = {"size": [HEIGHT, WIDTH]}
    shapes = [[BOX], {**sizes, "counts": RUNS}, [BOX], {**sizes, "counts": TEXT}]
    annotations = [
        {"id": 10 + i, "image_id": 1 + i // 2, "category_id": 7 - 4 * (i % 2), "iscrowd": 0,
         "bbox": [6, 4, 24, 12], "area": 288, "segmentation": shape}
        for i, shape in enumerate(copy.deepcopy(shapes))
    ]  # fmt: skip
    categories = [{"id": 7, "name": "pear"}, {"id": 3, "name": "apple"}]
    return {"images": images, "annotations": annotations, "categories": categories}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for name in NAMES:
        (folder / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (WIDTH, HEIGHT)).save(folder / name)
    return folder


@pytest.fixture
def read(images, tmp_path):
    """Content, or bytes of a file → Annotations."""

    def of(data, image_root=images, **options):
        raw = data if isinstance(data, bytes) else json.dumps(data).encode()
        (tmp_path / "instances.json").write_bytes(raw)
        return read_annotations(str(tmp_path / "instances.json"), str(image_root), **options)

    return of


def trained_on(annotations):
    """(class index, mask) of each instance, by image, as the mapper gives them."""
    mapper = LabeledDatasetMapper(
        geometry=(), color=None, image_format="RGB", num_classes=len(annotations.categories)
    )
    samples = [mapper(record)["instances"] for record in annotations.records]
    return [
        list(zip(s.gt_classes.tolist(), s.gt_masks.tensor.numpy(), strict=True)) for s in samples
    ]


def evaluated_on(annotations):
    """The same of what COCO's API reads from the file that evaluation compares with."""
    truth = COCO()
    truth.dataset = json.loads(json.dumps(annotations.to_coco()))
    with contextlib.redirect_stdout(None):
        truth.createIndex()
    ids = [number for number, _ in annotations.categories]
    rows = [[r for r in truth.imgToAnns[i] if not r["iscrowd"]] for i in truth.imgs]
    return [
        [(ids.index(r["category_id"]), truth.annToMask(r).astype(bool)) for r in of_image]
        for of_image in rows
    ]


def assert_same(annotations):
    for trained, evaluated in zip(trained_on(annotations), evaluated_on(annotations), strict=True):
        assert [index for index, _ in trained] == [index for index, _ in evaluated]
        for (_, one), (_, other) in zip(trained, evaluated, strict=True):
            assert one.any() and np.array_equal(one, other)


def change(path, value):
    """Sets the value under a path of keys."""

    def of(data):
        *way, last = path
        for key in way:
            data = data[key]
        data[last] = value

    return of


def remove(section, key):
    def of(data):
        for row in data[section]:
            del row[key]

    return of


def shape(value, index=0):
    return change(("annotations", index, "segmentation"), value)


def each(section, key, value):
    def of(data):
        for row in data[section]:
            row[key] = value(row[key])

    return of


def pairs(numbers):
    return [list(pair) for pair in zip(numbers[::2], numbers[1::2], strict=True)]


def named_twice(data):
    """As Roboflow writes it: an unused super-category with a class's name, or one of its own."""
    data["categories"] += [{"id": 0, "name": "pear"}, {"id": 1, "name": "fruit"}]
    for row in data["categories"][:2]:
        row["supercategory"] = "fruit"


def deleted_rows(data):
    """As COCO Annotator marks them."""
    data["images"].append({"id": 9, "file_name": "gone.png", "deleted": True})
    data["annotations"].append({"image_id": 1, "category_id": 3, "deleted": True})
    data["annotations"][0]["deleted"] = False


def lvis(data):
    for row in data["images"]:
        row["coco_url"] = f"http://images.cocodataset.org/train/{row.pop('file_name')}"


#: Changes that leave the file's meaning as it is.
MEANT = {
    "as it is": lambda data: None,
    "iscrowd null": each("annotations", "iscrowd", lambda _: None),
    "no iscrowd": remove("annotations", "iscrowd"),
    "bbox text": each("annotations", "bbox", lambda box: [str(number) for number in box]),
    "no bbox": remove("annotations", "bbox"),
    "bbox of another size": each("annotations", "bbox", lambda box: [1.5 * side for side in box]),
    "area from 0 to 1": each("annotations", "area", lambda area: area / 1e4),
    "no ids": remove("annotations", "id"),
    "ids repeat": each("annotations", "id", lambda _: 0),
    "image ids text": each("annotations", "image_id", str),
    "image ids text, both": lambda data: (
        each("annotations", "image_id", lambda i: f"x{i}")(data),
        each("images", "id", lambda i: f"x{i}")(data),
    ),
    "image ids float": each("images", "id", float),
    "category ids text": each("annotations", "category_id", str),
    "sizes missing": remove("images", "height"),
    "sizes text": each("images", "width", str),
    "flat polygon": shape(BOX),
    "polygon of pairs": shape([pairs(BOX)]),
    "pairs alone": shape(pairs(BOX)),
    "OpenCV's contour": shape([[[pair] for pair in pairs(BOX)]]),
    "numbers as text": shape([[str(number) for number in BOX]]),
    "empty runs": shape({"size": [HEIGHT, WIDTH], "counts": [*RUNS[:-1], 5, 0, RUNS[-1] - 5]}),
    "backslashes": change(("images", 1, "file_name"), "sub\\b.png"),
    "tool's path": change(("images", 0, "file_name"), "..\\..\\media\\upload\\4\\a.png"),
    "path of another machine": change(("images", 1, "file_name"), "/home/x/sub/b.png"),
    "composed letter": change(("images", 2, "file_name"), "\u00fc.png"),
    "Label Studio's upload": change(("images", 0, "file_name"), "../4/0a1b2c3d-a.png"),
    "Label Studio's folder": change(("images", 2, "file_name"), "/data/?d=x/u%CC%88.png"),
    "address": change(("images", 1, "file_name"), "https://x.org/a%2Fsub/b.png?key=a/b"),
    "no file name but an address": lvis,
    "other case": change(("images", 1, "file_name"), "Sub/B.PNG"),
    "RLE in a list": shape([{"size": [HEIGHT, WIDTH], "counts": TEXT}]),
    "listed twice": lambda data: data.update({k: data[k] * 2 for k in ("images", "categories")}),
    "deleted": deleted_rows,
    "spaces around a name": each("categories", "name", lambda name: f" {name} "),
    "names twice": named_twice,
    "background": lambda data: data["categories"].append({"id": 0, "name": "_background_"}),
    "numeric names": each("categories", "name", lambda name: 1 if name == "pear" else 0),
}


def test_exports_that_mean_the_same_give_the_same(read):
    for name, change_nothing in MEANT.items():
        data = content()
        change_nothing(data)
        annotations = read(data)
        trained = trained_on(annotations)
        # classes are in the order of their ids
        assert [[index for index, _ in of_image] for of_image in trained] == [[1, 0], [1, 0], []]
        assert all(np.array_equal(mask, MASK) for image in trained for _, mask in image), name
        assert_same(annotations)
        rows = annotations.to_coco()["annotations"]
        assert all((row["bbox"], row["area"]) == ([6, 4, 24, 12], 288) for row in rows), name
        assert [row["id"] for row in rows] == [1, 2, 3, 4]


def test_a_bom_is_read(read):
    data = content()
    data["categories"][0]["name"] = "Mühle"
    for encoding in ("utf-8-sig", "utf-16"):
        assert "Mühle" in read(json.dumps(data, ensure_ascii=False).encode(encoding)).classes


def rle(counts, size=(HEIGHT, WIDTH)):
    return shape({"size": list(size), "counts": counts})


def test_what_cannot_be_used_is_counted_and_left_out_alike(read):
    for spoil, counted in LEFT_OUT.values():
        data = content()
        spoil(data)
        annotations = read(data)
        assert annotations.findings.instances == sum(map(len, trained_on(annotations))) == 3
        assert counted in annotations.findings.summary and len(annotations.findings.warnings) == 1
        assert_same(annotations)


COPY = {"id": 99, "image_id": 1, "category_id": 7, "segmentation": [[*BOX[4:], *BOX[:4]]]}
#: Changes after which 3 of 4 instances can be used; what is counted.
LEFT_OUT = {
    "null": (shape(None), "without a mask"),
    "empty polygon": (shape([[]]), "without a mask"),
    "a box": (shape([[6, 4, 30, 16]]), "without a mask"),
    "RLE of nothing": (shape({"size": [0, 0], "counts": []}), "without a mask"),
    "empty RLE": (rle([HEIGHT * WIDTH]), "without a pixel"),
    "outside": (shape([[n + 400 for n in BOX]]), "without a pixel"),
    "coordinates from 0 to 1": (shape([[n / 40 for n in BOX]]), "without a pixel"),
    "crowd": (change(("annotations", 0, "iscrowd"), "1"), "crowds"),
    "crowd without a mask": (
        lambda data: data["annotations"][0].update(iscrowd=1, segmentation=[]), "without a mask"),
    "copy": (
        lambda data: data["annotations"].append({**data["annotations"].pop(), **COPY}), "copies"),
    "image not listed": (change(("annotations", 0, "image_id"), 99), "not listed"),
}  # fmt: skip


def test_a_polygon_of_two_points_beside_a_good_one_is_counted(read):
    data = content()
    shape([[1, 2], BOX, [1, 2, 3, 4, 5, 6, 7]])(data)
    annotations = read(data)
    assert np.array_equal(trained_on(annotations)[0][0][1], MASK)
    assert "2 polygons" in annotations.findings.summary
    assert_same(annotations)


def test_a_file_without_any_usable_instance_is_refused(read):
    beside_others = ("image not listed", "copy")
    for spoil, counted in [row for name, row in LEFT_OUT.items() if name not in beside_others]:
        data = content()
        data["annotations"] = data["annotations"][:1]
        spoil(data)
        with pytest.raises(DatasetError, match=rf"instances\.json.* {counted}.*id 10"):
            read(data)


def test_few_crowds_are_counted_and_many_are_warned_of(read):
    data = content()
    data["annotations"] = [
        {**row, "segmentation": [[n + shift for n in BOX]]}
        for row in data["annotations"]
        for shift in range(5)
    ]
    data["annotations"][0] = {**data["annotations"][0], "iscrowd": 1}
    findings = read(data).findings
    assert "crowds" in findings.summary and findings.instances == 19 and not findings.warnings


def test_boxes_in_the_place_of_outlines_are_warned_of(read):
    data = content()
    row = data["annotations"][0]
    boxes = [{**row, "id": n, "segmentation": [[x + n % 9 for x in BOX]]} for n in range(36)]
    for n, box in enumerate(boxes):
        box["segmentation"][0][1::2] = [y + n // 9 for y in BOX[1::2]]
    data["annotations"] = boxes
    [warning] = read(data).findings.warnings
    assert "36 masks" in warning
    boxes[7]["segmentation"] = [[6, 4, 30, 4, 6, 16]]
    assert not read(data).findings.warnings


def twice(section, **changes):
    return lambda data: data[section].append({**data[section][0], **changes})


def both_used(data):
    twice("categories", id=9)(data)
    data["annotations"][2]["category_id"] = 9


#: Changes that leave no clear meaning, and what the message names.
REFUSED = {
    "images is an object": (lambda data: data.update(images={}), "images"),
    "entry is no object": (lambda data: data["images"].append(7), "images"),
    "no file name": (change(("images", 0, "file_name"), None), "None"),
    "lone surrogate": (change(("images", 0, "file_name"), "a\ud800.png"), "a"),
    "class of a lone surrogate": (change(("categories", 0, "name"), "\udfff"), "id 7"),
    "leads out": (change(("images", 0, "file_name"), "../gone.png"), "../gone.png"),
    "leads to another": (change(("images", 1, "file_name"), "x/a.png"), "a.png and x/a.png"),
    "no such file": (change(("images", 0, "file_name"), "gone.png"), "gone.png"),
    "lies in a sub-folder": (change(("images", 1, "file_name"), "b.png"), "sub"),
    "panoptic": (
        lambda data: data.update(annotations=[{"image_id": 1, "segments_info": []}]), "panoptic"),
    "keypoints": (
        lambda data: data.update(annotations=[{"image_id": 1, "keypoints": []}]), "keypoints"),
    "file twice": (twice("images", id=9), r"a.png \(id 1\) and a.png \(id 9\)"),
    "image id twice": (twice("images", file_name="d.png"), "a.png .*and d.png"),
    "image id is a list": (change(("images", 0, "id"), [1]), "a.png"),
    "category twice": (both_used, "pear"),
    "category id twice": (twice("categories", name="plum"), "plum"),
    "category unknown": (change(("annotations", 0, "category_id"), 4), "id 10 .*4"),
    "iscrowd 2": (change(("annotations", 0, "iscrowd"), 2), "id 10"),
    "NaN": (shape([[*BOX[:-1], NAN]]), "id 10"),
    "far away": (shape([[*BOX[:-1], 1e300]]), r"1e\+300"),
    "points as objects": (shape([[{"x": 1, "y": 2}]]), "id 10"),
    "a word": (shape("mask"), "id 10"),
    "RLE of another size": (rle([WIDTH * HEIGHT], (WIDTH, HEIGHT)), "id 10"),
    "RLE of size 5": (shape({"size": 5, "counts": [5]}), "id 10"),
    "RLE too short": (rle([5, 6]), "id 10"),
    "negative counts": (rle([-40, 1000]), "id 10"),
    "counts with halves": (rle([0.5, 959.5]), "id 10"),
    "text cut in a number": (rle(TEXT[:-1]), "id 10"),
    "text of anything": (rle("\u2764"), "id 10"),
    "a size that is not the file's": (change(("images", 0, "width"), 10**9), "a.png"),
}  # fmt: skip


def test_what_has_no_clear_meaning_is_named(read):
    for spoil, named in REFUSED.values():
        data = content()
        spoil(data)
        with pytest.raises(DatasetError, match=rf"(?s)instances\.json.*{named}"):
            read(data)


def test_a_folder_that_is_missing_is_doubted_unless_it_is_a_tools(read):
    for name, doubts in (("x/a.png", 1), ("../x/a.png", 0), ("C:\\x\\a.png", 0)):
        data = content()
        data["images"][0]["file_name"] = name
        findings = read(data).findings
        assert len(findings.warnings) == doubts and "a.png" in findings.summary


def test_all_problems_come_in_one_report(read):
    data = content()
    for row in ("iscrowd 2", "file twice"):
        REFUSED[row][0](data)
    for index in (1, 2, 3):
        shape("mask", index)(data)
    every = r"\.json: 1 .*a\.png \(id 9.*\n.*\.json: 4 .*id 10.*id 11.*id 12.* 1 more"
    with pytest.raises(DatasetError, match=every):
        read(data)


def test_files_of_another_kind_are_named(read):
    not_json = (b"", json.dumps(content()).encode()[:200], b"<html>404</html>", b"[" * 100_000)
    others = (b'[{"image_id": 1, "score": 0.5}]', b"3", b"{}")
    gbk = ('{"name": "方块"}'.encode("gbk"), "UTF-8")
    for raw, named in (*((raw, "JSON") for raw in not_json), *((raw, "") for raw in others), gbk):
        with pytest.raises(DatasetError, match=rf"instances\.json.*{named}"):
            read(raw)


def test_classes_of_another_file_are_matched_by_name(read):
    other = content()
    other["categories"] = [{"id": 1, "name": "apple"}, {"id": 2, "name": "plum"}]
    other["annotations"] = [{**row, "category_id": 1} for row in other["annotations"]]
    annotations = read(other, classes=["pear", "apple"])  # plum is not used
    assert [index for index, _ in trained_on(annotations)[0]] == [1, 1]
    assert annotations.classes == ["pear", "apple"]
    assert "plum" in annotations.findings.summary and "pear" in annotations.findings.summary
    assert_same(annotations)
    other["annotations"][0]["category_id"] = 2
    with pytest.raises(DatasetError, match="plum"):
        read(other, classes=["pear", "apple"])


def test_only_chosen_images_are_looked_at(read):
    data = content()
    shape("mask")(data)
    annotations = read(data, choose=lambda names: names[1:])
    assert [record["image_id"] for record in annotations.records] == [2, 3]
    with pytest.raises(DatasetError):
        read(data, choose=lambda names: names[:1])


def test_a_given_area_stays(read):
    data = content()
    del data["annotations"][3]["area"]
    data["annotations"][0]["area"], data["annotations"][1]["area"] = 90.5, "large"
    records = read(data).records
    assert [[a["area"] for a in r["annotations"]] for r in records] == [[90.5, 288], [288] * 2, []]


def test_a_file_is_parsed_once_and_again_when_it_changes(read):
    first = read(content())
    assert read_annotations(first.json_file, first.image_root) is first
    data = content()
    del data["annotations"][0]
    assert read(data).findings.instances == 3


EXTREMES = [
    None, True, False, 0, 1, -1, 2, 0.5, -0.0, 1e-300, 1e300, 10**18, 10**400, NAN, INF, -INF, "",
    "0", "1", "x", "a.png", NAMES[2], "../a.png", "\ud800", "\0", [], {}, [[]], [0], [[0, 0]],
    [[1, 1, 9, 1, 9, 9]], {"size": [HEIGHT, WIDTH], "counts": [0, HEIGHT * WIDTH]}, "1" * 5000,
]  # fmt: skip


def mutate(data, rng):
    """Change one place of a JSON value."""
    places, stack = [], [data]
    while stack:
        node = stack.pop()
        keys = node if isinstance(node, dict) else range(len(node))
        places += [(node, key) for key in keys]
        stack += [node[key] for key in keys if isinstance(node[key], dict | list)]
    node, key = rng.choice(places)
    kind = rng.choice(["remove", "twice", "change"])
    other, place = rng.choice(places)
    values = [node[key], other[place], str(node[key]), [node[key]], *EXTREMES]
    if kind == "remove":
        del node[key]
    elif kind == "twice" and isinstance(node, list):
        node.insert(rng.randrange(len(node) + 1), copy.deepcopy(node[key]))
    else:
        node[key] = copy.deepcopy(rng.choice(values))


def test_mutated_files_load_alike_or_end_in_one_error(read):
    rng = random.Random(0)
    loaded = 0
    for _ in range(2000):
        data = content()
        for _ in range(rng.choice([1, 1, 2, 4])):
            mutate(data, rng)
        try:
            annotations = read(data)
            assert_same(annotations)
            loaded += 1
        except DatasetError:
            pass
    assert 400 < loaded < 1900
