"""VIA's and LabelMe's files → COCO, what is bad named, the rest written."""

import base64
import io
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "datasets")]

import convert_annotations  # noqa: E402
import make_own_data  # noqa: E402

WIDTH, HEIGHT = 60, 40
VIA = {
    "polygon": {"all_points_x": [10, 30, 30, 10], "all_points_y": [5, 5, 25, 25]},
    "rect": {"x": 10, "y": 5, "width": 20, "height": 20},
    "circle": {"cx": 30, "cy": 20, "r": 10},
    "ellipse": {"cx": 30, "cy": 20, "rx": 20, "ry": 5, "theta": math.pi / 2},
}
LABELME = {
    "polygon": [[10, 5], [30, 5], [30, 25], [10, 25]],
    "rectangle": [[30, 25], [10, 5]],
    "circle": [[30, 20], [30, 30]],
    "rotation": [[10, 5], [30, 7], [28, 27], [8, 25]],
    "oriented_rectangle": [[10, 5], [30, 7], [28, 27], [8, 25]],
}
# Area in px and box (x, y, width, height) of each; the ellipse stands upright.
EXPECTED = {
    "polygon": (400, (10, 5, 20, 20)),
    "rect": (400, (10, 5, 20, 20)),
    "rectangle": (400, (10, 5, 20, 20)),
    "rotation": (404, (8, 5, 22, 22)),
    "oriented_rectangle": (404, (8, 5, 22, 22)),
    "circle": (math.pi * 100, (20, 10, 20, 20)),
    "ellipse": (math.pi * 100, (25, 0, 10, 40)),
}


def region(kind, label="cat", **changes):
    shape = {"name": kind, **VIA.get(kind, {"cx": 3, "cy": 3}), **changes}
    return {"shape_attributes": shape, "region_attributes": {"class": label}}


def shape(kind, label="cat", **changes):
    points = LABELME.get(kind, [[3, 3]])
    return {"label": label, "points": points, "shape_type": kind, "group_id": None} | changes


def labelme(*shapes, name="1.png", **changes):
    return {"shapes": list(shapes), "imagePath": name, "imageHeight": HEIGHT,
            "imageWidth": WIDTH, **changes}  # fmt: skip


@pytest.fixture
def convert(tmp_path, capsys):
    """(VIA's content, or files by name, options) → status, COCO content, stderr."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for name in ("1.png", "more/2.png"):
        Image.new("RGB", (WIDTH, HEIGHT)).save(folder / name)

    def run(via=None, files=(), options=()):
        source = tmp_path / "via.json" if via is not None else folder
        if via is not None:
            source.write_text(json.dumps(via))
        for name, content in dict(files).items():
            if not isinstance(content, str | bytes):
                content = json.dumps(content)
            content = content.encode() if isinstance(content, str) else content
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
        output = tmp_path / "out" / "coco.json"
        words = [str(source), "--images", str(folder), "--output", str(output), *options]
        status = convert_annotations.main(words)
        content = json.loads(output.read_text()) if output.exists() else None
        if content:
            COCO(str(output))  # reads it
        return status, content, capsys.readouterr().err

    return run


def via_of(*regions, name="1.png"):
    return {f"{name}-1": {"filename": name, "size": -1, "regions": list(regions)}}


def check(annotation, kind):
    area, box = EXPECTED[kind]
    assert annotation["area"] == pytest.approx(area, rel=0.04)
    assert annotation["bbox"] == pytest.approx(box, abs=1.01)
    xs, ys = annotation["segmentation"][0][::2], annotation["segmentation"][0][1::2]
    spans = (min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys))
    assert spans == pytest.approx(box, abs=0.02)


@pytest.mark.parametrize("kind", VIA)
def test_shapes_of_via(convert, kind):
    status, content, said = convert(via_of(region(kind)))
    assert (status, said) == (0, "")
    assert content["categories"] == [{"id": 1, "name": "cat"}]
    image = {"id": 1, "file_name": "1.png", "height": HEIGHT, "width": WIDTH}
    assert content["images"] == [image]
    check(content["annotations"][0], kind)


@pytest.mark.parametrize("kind", LABELME)
def test_shapes_of_labelme(convert, kind):
    status, content, said = convert(files={"1.json": labelme(shape(kind))})
    assert (status, said) == (0, "")
    check(content["annotations"][0], kind)


def test_projects_and_objects_of_regions_are_read_too(convert):
    plain = via_of(region("rect"), region("circle", "dog"))
    _, expected, _ = convert(plain)
    entry = next(iter(plain.values()))
    entry["regions"] = {str(i): row for i, row in enumerate(entry["regions"])}
    project = {"_via_settings": {}, "_via_img_metadata": plain}
    assert convert(project, options=["--overwrite"])[1] == expected


@pytest.mark.parametrize(
    ("attributes", "options", "label"),
    [
        ({"kind": "dog"}, (), "dog"),
        ({"size": "large", "label": "dog"}, (), "dog"),
        ({"size": "large", "color": "red"}, ("--class-attribute", "color"), "red"),
        ({"size": "large", "color": "red"}, ("--class-name", "dog"), "dog"),
        ({}, ("--class-name", "dog"), "dog"),
        ({"class": {"cat": False, "dog": True}}, (), "dog"),
        ({"class": 7}, (), "7"),
        ({"class": "two\n lines"}, (), "two lines"),
    ],
)
def test_the_class_of_a_region(convert, attributes, options, label):
    row = {**region("rect"), "region_attributes": attributes}
    status, content, said = convert(via_of(row), options=options)
    assert (status, said) == (0, "")
    assert content["categories"] == [{"id": 1, "name": label}]


@pytest.mark.parametrize(
    ("attributes", "named"),
    [
        ({"size": "large", "color": "red"}, ["size, color", "--class-attribute", "--class-name"]),
        ({}, ["--class-name"]),
        ({"class": ""}, ["''"]),
        ({"class": True}, ["True"]),
        ({"class": {"cat": True, "dog": True}}, ["cat", "dog"]),
        ({"class": "\ud800"}, ["ud800"]),
    ],
)
def test_a_class_that_is_not_clear_is_named(convert, attributes, named):
    rows = [region("rect"), {**region("circle"), "region_attributes": attributes}]
    status, content, said = convert(via_of(*rows))
    assert status == 1 and [row["name"] for row in content["categories"]] == ["cat"]
    assert all(word in said for word in ["region 1", *named])


def test_one_reason_is_one_line_with_a_count(convert):
    rows = [{**region("rect"), "region_attributes": {}}] * 5
    _, content, said = convert(via_of(*rows, region("rect")))
    assert len(content["annotations"]) == 1
    assert said.count("\n") == 1 and said.startswith("5 ") and "region 0" in said
    status, content, said = convert(via_of(*rows), options=["--overwrite"])
    assert status == 1 and "region 0" in said and "5 left out" in said.splitlines()[0]


def test_labels_may_be_numbers_and_one_name_may_replace_them(convert):
    files = {"1.json": labelme(shape("circle", 1, group_id=3), shape("polygon", "2", group_id=3))}
    _, content, said = convert(files=files)
    assert said == "" and [row["name"] for row in content["categories"]] == ["1", "2"]
    _, content, said = convert(files=files, options=["--class-name", "cell", "--overwrite"])
    assert said == "" and [row["name"] for row in content["categories"]] == ["cell"]
    assert len(content["annotations"]) == 2


def test_parts_of_a_group_are_one_instance(convert):
    shapes = [shape("polygon", group_id=1), shape("circle", group_id=1),
              shape("circle", "dog", group_id=1), shape("circle"), shape("circle")]  # fmt: skip
    _, content, _ = convert(files={"1.json": labelme(*shapes)})
    assert [len(row["segmentation"]) for row in content["annotations"]] == [2, 1, 1, 1]
    assert [row["category_id"] for row in content["annotations"]] == [1, 2, 1, 1]


def base64_png(array, form="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, form)
    return base64.b64encode(buffer.getvalue()).decode()


RING = np.pad(np.zeros((3, 4), dtype=bool), 2, constant_values=True)  # 7 x 8


def mask_shape(x, y, pixels=RING, **changes):
    corners = [[x, y], [x + pixels.shape[1] - 1.0, y + pixels.shape[0] - 1.0]]
    return shape("mask", points=corners, mask=base64_png(pixels), **changes)


def drawn(*origins):
    """(H, W) with RING at each (x, y)."""
    padded = np.zeros((HEIGHT + 20, WIDTH + 20), dtype=bool)
    for x, y in origins:
        padded[10 + y : 17 + y, 10 + x : 18 + x] |= RING
    return padded[10:-10, 10:-10]


@pytest.mark.parametrize("pixels", [RING, RING.astype(np.uint8), RING.astype(np.uint8) * 255])
@pytest.mark.parametrize("origin", [(10, 5), (-3, -2), (WIDTH - 3, HEIGHT - 5)])
def test_masks_of_labelme_are_the_same_pixels(convert, origin, pixels, tmp_path):
    """The box's corners are its first and last pixel; what is outside the image is not kept."""
    _, content, said = convert(files={"1.json": labelme(mask_shape(*origin, pixels))})
    assert said == ""
    row = content["annotations"][0]
    expected = drawn(origin)
    assert np.array_equal(COCO(str(tmp_path / "out" / "coco.json")).annToMask(row), expected)
    assert row["area"] == expected.sum()
    ys, xs = expected.nonzero()
    assert row["bbox"] == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]


def test_masks_and_polygons_of_a_group_are_one_instance(convert, tmp_path):
    parts = [mask_shape(1, 1, group_id=4), shape("polygon", group_id=4),
             mask_shape(40, 30, group_id=4), mask_shape(40, 30)]  # fmt: skip
    _, content, _ = convert(files={"1.json": labelme(*parts)})
    assert len(content["annotations"]) == 2
    expected = drawn((1, 1), (40, 30))
    expected[5:25, 10:30] = True
    whole = COCO(str(tmp_path / "out" / "coco.json")).annToMask(content["annotations"][0])
    assert np.array_equal(whole, expected)


BAD_MASKS = {
    "another size than its box": mask_shape(1, 1) | {"points": [[1, 1], [5, 5]]},
    "no mask": shape("mask", points=[[1, 1], [2, 2]]),
    "no picture": mask_shape(1, 1) | {"mask": base64.b64encode(b"text").decode()},
    "no base64": mask_shape(1, 1) | {"mask": "é"},
    "a number": mask_shape(1, 1) | {"mask": 5},
    "empty": mask_shape(1, 1, np.zeros((2, 2), dtype=bool)),
    "outside": mask_shape(1000, 1),
    "infinite": mask_shape(1, 1) | {"points": [[1, 1], [1e999, 1]]},
}


@pytest.mark.parametrize("row", BAD_MASKS)
def test_a_bad_mask_is_named_and_the_others_go_on(convert, row):
    status, content, said = convert(files={"1.json": labelme(BAD_MASKS[row], mask_shape(1, 1))})
    assert status == 1 and len(content["annotations"]) == 1
    assert said.count("\n") == 1 and "1.json" in said and "Traceback" not in said


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "gbk"])
def test_byte_order_marks_are_read_and_other_encodings_named(convert, encoding):
    text = json.dumps(labelme(shape("circle", "狗")), ensure_ascii=False)
    files = {"1.json": text.encode(encoding), "2.json": labelme(shape("circle"), name="more/2.png")}
    status, content, said = convert(files=files)
    names = [row["name"] for row in content["categories"]]
    if encoding == "gbk":
        assert (status, names) == (1, ["cat"]) and "1.json" in said and "UTF-8" in said
    else:
        assert (status, said, names) == (0, "", ["cat", "狗"])


@pytest.mark.parametrize(
    "name", ["1.jpg", "1.TIF", "1", "C:\\photos\\1.jpeg", "../elsewhere/1.bmp"]
)
def test_the_image_on_disk_may_have_another_suffix(convert, name):
    _, content, said = convert(files={"a.json": labelme(shape("circle"), name=name)})
    assert said == "" and content["images"][0]["file_name"] == "1.png"
    _, content, said = convert(via_of(region("circle"), name=name), options=["--overwrite"])
    assert said == "" and content["images"][0]["file_name"] == "1.png"


def test_where_two_images_have_another_suffix_neither_is_chosen(convert, tmp_path):
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "photos" / "1.bmp")
    status, content, said = convert(files={"a.json": labelme(shape("circle"), name="1.jpg")})
    assert status == 1 and content is None and "1.bmp" in said and "1.png" in said
    _, content, _ = convert(files={"a.json": labelme(shape("circle"), name="1.bmp")})
    assert content["images"][0]["file_name"] == "1.bmp"


PICTURE = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("name", "form", "written"),
    [
        ("3.png", "PNG", "3.png"),
        ("new/3.jpg", "JPEG", "new/3.jpg"),
        ("3.tif", "PNG", "3.png"),
        ("..\\elsewhere\\3.png", "PNG", "3.png"),
    ],
)
def test_embedded_images_are_written_where_they_are_missing(convert, tmp_path, name, form, written):
    data = base64_png(PICTURE, form)
    files = {"a.json": labelme(shape("circle"), name=name, imageData=data)}
    before = set(tmp_path.rglob("*.*"))
    status, content, said = convert(files=files)
    assert (status, said, content["images"][0]["file_name"]) == (0, "", written)
    path = tmp_path / "photos" / written
    assert path.read_bytes() == base64.b64decode(data)
    new = set(tmp_path.rglob("*.*")) - before
    assert {p.name for p in new} == {"a.json", path.name, "coco.json"}
    path.write_bytes(base64.b64decode(base64_png(255 - PICTURE, form)))
    kept = path.read_bytes()
    assert convert(files=files, options=["--overwrite"])[1] == content
    assert path.read_bytes() == kept


def test_the_first_of_two_embedded_images_of_a_name_is_kept(convert, tmp_path):
    first, second = base64_png(PICTURE), base64_png(255 - PICTURE)
    files = {"a.json": labelme(shape("circle"), name="3.tif", imageData=first),
             "b.json": labelme(shape("polygon"), name="3.tif", imageData=second)}  # fmt: skip
    status, content, said = convert(files=files)
    assert status == 1 and len(content["annotations"]) == 1 and "b.json" in said
    assert (tmp_path / "photos" / "3.png").read_bytes() == base64.b64decode(first)


@pytest.mark.parametrize("name", ["3.png", ".", "..", "", "/"])
@pytest.mark.parametrize(
    "data", ["é", "AAAA", base64_png(PICTURE)[:400], base64_png(PICTURE, "PPM")]
)
def test_embedded_images_that_cannot_be_read_are_named(convert, tmp_path, name, data):
    files = {"a.json": labelme(shape("circle"), name=name, imageData=data),
             "b.json": labelme(shape("circle"))}  # fmt: skip
    before = set(tmp_path.rglob("*"))
    status, content, said = convert(files=files)
    assert status == 1 and len(content["images"]) == 1 and "a.json" in said
    new = {path.name for path in set(tmp_path.rglob("*")) - before}
    assert new == {"a.json", "b.json", "out", "coco.json"}


def test_a_file_of_labelme_alone_and_hidden_folders(convert, tmp_path):
    files = {".checkpoints/1.json": labelme(shape("circle")), "1.json": labelme(shape("circle"))}
    _, content, said = convert(files=files)
    assert said == ""
    output = tmp_path / "alone.json"
    source = str(tmp_path / "photos" / "1.json")
    assert convert_annotations.main([source, "--output", str(output)]) == 0
    assert json.loads(output.read_text()) == content


@pytest.mark.parametrize("name", ["x" * 300, "3\0\n\x1b[2J.png", "\ud800.png", "1.png/3.png"])
def test_names_that_no_file_can_have_are_named(convert, name):
    data = base64_png(PICTURE)
    files = {"a.json": labelme(shape("circle"), name=name, imageData=data),
             "b.json": labelme(shape("circle"), name="more/2.png")}  # fmt: skip
    status, content, said = convert(files=files)
    assert status == 1 and len(content["images"]) == 1 and "a.json" in said
    assert said.count("\n") == 1 and said.strip().isprintable()
    row = via_of(region("circle"), name=name)
    assert convert({**row, **via_of(region("circle"))}, options=["--overwrite"])[0] == 1


BAD_REGIONS = {
    "a point": (region("point"), "a 'point' has no area"),
    "an open line": (region("polyline"), "a 'polyline' has no area"),
    "two points": (region("polygon", all_points_x=[1, 2], all_points_y=[1, 2]), "3 points"),
    "x without y": (region("polygon", all_points_x=[1, 2, 3, 4, 5]), "each with x and y"),
    "no radius": ({**region("circle"), "shape_attributes": {"name": "circle", "cx": 1, "cy": 1}},
                  "lacks 'r'"),
    "no list": ({**region("rect"), "region_attributes": None}, "region 0"),
    "a text": (region("circle", r="wide"), "wide"),
    "infinite": (region("circle", r=float("inf")), "no finite number"),
    "far outside": (region("rect", x=100_000), "far outside"),
    "outside": (region("rect", x=100), "covers no pixel"),
    "no object": (7, "region 0"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD_REGIONS)
def test_a_bad_region_is_named_and_the_others_go_on(convert, bad):
    row, expected = BAD_REGIONS[bad]
    status, content, said = convert(via_of(row, region("rect")))
    assert status == 1 and len(content["annotations"]) == 1
    assert said.count("\n") == 1
    assert "1.png" in said and expected in said and "Traceback" not in said


def test_bad_files_and_images_are_named_and_the_others_go_on(convert):
    good = shape("rectangle")
    files = {
        "1.json": labelme(good),
        "2.json": "{",
        "3.json": json.dumps({"images": []}),
        "4.json": labelme(good, name="nowhere.png"),
        "5.json": labelme(good, name="more\\2.png", imageHeight=HEIGHT + 1),
        "6.json": labelme(good, name="1.png"),
        "7.json": labelme(shape("point"), shape("linestrip"), name="../photos/more/2.png"),
        "8.json": labelme(good, name="/home/anyone/x.txt"),
    }
    status, content, said = convert(files=files)
    assert status == 1
    assert [row["file_name"] for row in content["images"]] == ["1.png", "more/2.png"]
    assert len(content["annotations"]) == 1
    lines = said.splitlines()
    for words in (
        ("2.json", "JSON"),
        ("3.json", "LabelMe"),
        ("4.json", "nowhere.png", "no such image"),
        ("5.json", "more/2.png", "(40, 60)", "(41, 60)"),
        ("6.json", "1.png", "before"),
        ("7.json", "shape 0", "'point'"),
        ("7.json", "shape 1", "'linestrip'"),
        ("8.json", "/home/anyone/x.txt"),
    ):
        assert any(all(word in line for word in words) for line in lines), words


def test_given_classes_keep_their_order_and_others_are_named(convert):
    rows = [region("rect", "dog"), region("circle", "cow")]
    status, content, said = convert(via_of(*rows), options=["--classes", "dog", "cat"])
    assert content["categories"] == [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}]
    assert status == 1 and "'cow'" in said and "--classes" in said


NOTHING = {
    "no instance": via_of(region("point")),
    "not VIA's": {"images": []},
    "VIA 3": {"project": {}, "file": {"1": {"fname": "1.png"}}, "metadata": {}, "view": {}},
    "no entry": {},
    "a list": [1],
}


@pytest.mark.parametrize("case", NOTHING)
def test_where_nothing_can_be_converted_nothing_is_written(convert, case):
    status, content, said = convert(NOTHING[case])
    assert status == 1 and content is None and said.startswith("error: ") and "via.json" in said


def test_an_existing_file_is_kept_unless_asked(convert):
    _, before, _ = convert(via_of(region("rect")))
    status, after, said = convert(via_of(region("circle")))
    assert status == 1 and after == before and "--overwrite" in said
    assert convert(via_of(region("circle")), options=["--overwrite"])[1] != before


def test_the_generators_formats_hold_the_same_shapes(tmp_path):
    """COCO's and LabelMe's the same instances; VIA, which has no groups, the same polygons."""
    sets = {}
    for kind in make_own_data.FORMATS:
        data = tmp_path / kind
        make_own_data.make_own_data(data, labeled=3, unlabeled=1, seed=1, size=(128, 64), kind=kind)
        assert len(list((data / "unlabeled").iterdir())) == 1
        if kind == "coco":
            sets[kind] = json.loads((data / "annotations.json").read_text())
            continue
        source = data / ("via.json" if kind == "via" else "labeled")
        sets[kind], _ = convert_annotations.convert(source, data / "labeled", data / "coco.json")
    for image in range(3):
        polygons = {kind: [] for kind in sets}
        for kind, content in sets.items():
            names = {row["id"]: row["name"] for row in content["categories"]}
            rows = [row for row in content["annotations"] if row["image_id"] == image + 1]
            polygons[kind] = [(names[r["category_id"]], r["segmentation"]) for r in rows]
        assert polygons["coco"] and polygons["labelme"] == polygons["coco"]
        single = [(n, p) for n, parts in polygons["coco"] for p in parts]
        assert [(n, p[0]) for n, p in polygons["via"]] == [s for s in single if covers(s[1])]


def covers(polygon):
    """Whether a polygon covers a pixel; others are left out where they stand alone."""
    from pycocotools import mask as mask_utils

    return mask_utils.area(mask_utils.frPyObjects([polygon], 64, 128)).sum() > 0


def test_the_generator_refuses_an_existing_folder_and_bad_numbers(tmp_path, capsys):
    assert make_own_data.main(["--output", str(tmp_path)]) == 1
    assert "exists" in capsys.readouterr().err
    assert make_own_data.main(["--output", str(tmp_path / "new"), "--labeled", "0"]) == 1
    assert not (tmp_path / "new").exists()
