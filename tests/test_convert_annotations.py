"""VIA's and LabelMe's files → COCO, what is bad named, the rest written."""

import json
import math
import sys
from pathlib import Path

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
}
# Area in px and box (x, y, width, height) of each; the ellipse stands upright.
EXPECTED = {
    "polygon": (400, (10, 5, 20, 20)),
    "rect": (400, (10, 5, 20, 20)),
    "rectangle": (400, (10, 5, 20, 20)),
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
    """(VIA's content, or LabelMe's by file name, options) → status, COCO content, stderr."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for name in ("1.png", "more/2.png"):
        Image.new("RGB", (WIDTH, HEIGHT)).save(folder / name)

    def run(via=None, files=(), options=()):
        source = tmp_path / "via.json" if via is not None else folder
        if via is not None:
            source.write_text(json.dumps(via))
        for name, content in dict(files).items():
            text = content if isinstance(content, str) else json.dumps(content)
            (folder / name).write_text(text)
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
        ({"class": {"cat": False, "dog": True}}, (), "dog"),
        ({"size": "large", "color": "red"}, (), None),
        ({"class": ""}, (), None),
        ({}, (), None),
    ],
)
def test_the_class_of_a_region(convert, attributes, options, label):
    rows = [region("rect"), {**region("circle"), "region_attributes": attributes}]
    if "--class-attribute" in options:
        rows = rows[1:]
    status, content, said = convert(via_of(*rows), options=options)
    names = {row["name"] for row in content["categories"]}
    assert names == ({label} if options else {"cat", label} - {None})
    assert (status, "region 1 is left out" in said) == ((0, False) if label else (1, True))


def test_parts_of_a_group_are_one_instance(convert):
    shapes = [shape("polygon", group_id=1), shape("circle", group_id=1),
              shape("circle", "dog", group_id=1), shape("circle"), shape("circle")]  # fmt: skip
    _, content, _ = convert(files={"1.json": labelme(*shapes)})
    assert [len(row["segmentation"]) for row in content["annotations"]] == [2, 1, 1, 1]
    assert [row["category_id"] for row in content["annotations"]] == [1, 2, 1, 1]


BAD_REGIONS = {
    "a point": (region("point"), "a 'point' has no area"),
    "an open line": (region("polyline"), "a 'polyline' has no area"),
    "two points": (region("polygon", all_points_x=[1, 2], all_points_y=[1, 2]), "3 points"),
    "x without y": (region("polygon", all_points_x=[1, 2, 3, 4, 5]), "each with x and y"),
    "no radius": ({**region("circle"), "shape_attributes": {"name": "circle", "cx": 1, "cy": 1}},
                  "lacks 'r'"),
    "a text": (region("circle", r="wide"), "wide"),
    "infinite": (region("circle", r=float("inf")), "no finite number"),
    "far outside": (region("rect", x=100_000), "far outside"),
    "outside": (region("rect", x=100), "covers no pixel"),
    "no object": (7, "region 0 is left out"),
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
        "7.json": labelme(shape("mask"), shape("linestrip"), name="../photos/more/2.png"),
        "8.json": labelme(good, name="/home/anyone/2.txt"),
    }
    status, content, said = convert(files=files)
    assert status == 1
    assert [row["file_name"] for row in content["images"]] == ["1.png", "more/2.png"]
    assert len(content["annotations"]) == 1
    for words in (
        "2.json is left out: this is no valid JSON",
        "3.json is left out: this is no file of LabelMe",
        "4.json: nowhere.png is left out: there is no such image",
        "5.json: more/2.png is left out: the image has (height, width) (40, 60)",
        "6.json: 1.png is left out: 1.png was annotated before",
        "a 'mask' has no area",
        "a 'linestrip' has no area",
        "8.json: /home/anyone/2.txt is left out",
    ):
        assert words in said


def test_given_classes_keep_their_order_and_others_are_named(convert):
    rows = [region("rect", "dog"), region("circle", "cow")]
    status, content, said = convert(via_of(*rows), options=["--classes", "dog", "cat"])
    assert content["categories"] == [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}]
    assert status == 1 and "'cow' is left out: it is not one of --classes" in said


NOTHING = {
    "no instance": via_of(region("point")),
    "not VIA's": {"images": []},
    "a list": [1],
}


@pytest.mark.parametrize("case", NOTHING)
def test_where_nothing_can_be_converted_nothing_is_written(convert, case):
    status, content, said = convert(NOTHING[case])
    assert status == 1 and content is None and said.startswith("error: ")


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
        assert [(n, p[0]) for n, p in polygons["via"]] == [s for s in single if drawn(s[1])]


def drawn(polygon):
    """Whether a polygon covers a pixel; others are left out where they stand alone."""
    from pycocotools import mask as mask_utils

    return mask_utils.area(mask_utils.frPyObjects([polygon], 64, 128)).sum() > 0


def test_the_generator_refuses_an_existing_folder_and_bad_numbers(tmp_path, capsys):
    assert make_own_data.main(["--output", str(tmp_path)]) == 1
    assert "exists" in capsys.readouterr().err
    assert make_own_data.main(["--output", str(tmp_path / "new"), "--labeled", "0"]) == 1
    assert not (tmp_path / "new").exists()
