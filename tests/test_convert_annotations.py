"""VIA's and LabelMe's files → COCO, what is bad named, the rest written."""

import base64
import io
import json
import math

import convert_annotations
import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

WIDTH, HEIGHT = 60, 40
VIA = {
    "polygon": {"all_points_x": [10, 30, 30, 10], "all_points_y": [5, 5, 25, 25]},
    "rect": {"x": 10, "y": 5, "width": 20, "height": 20},
    "circle": {"cx": 30, "cy": 20, "r": 10},
    "ellipse": {"cx": 30, "cy": 20, "rx": 20, "ry": 5, "theta": math.pi / 2},
}
TURNED = ("rotation", "oriented_rectangle", "quadrilateral")
LABELME = {
    "polygon": [[10, 5], [30, 5], [30, 25], [10, 25]],
    "rectangle": [[30, 25], [10, 5]],
    "circle": [[30, 20], [30, 30]],
    **dict.fromkeys(TURNED, [[10, 5], [30, 7], [28, 27], [8, 25]]),
}
# Area in px and box (x, y, width, height) of each; the ellipse stands upright.
EXPECTED = {
    **dict.fromkeys(("polygon", "rect", "rectangle"), (400, (10, 5, 20, 20))),
    **dict.fromkeys(TURNED, (404, (8, 5, 22, 22))),
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

    def run(via=None, files=(), options=("--overwrite",)):
        source = folder if via is None else tmp_path / "via.json"
        for path, content in {**dict(files), **({} if via is None else {source: via})}.items():
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_bytes(content)
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


def test_shapes(convert):
    image = {"id": 1, "file_name": "1.png", "height": HEIGHT, "width": WIDTH}
    given = [(kind, {"via": via_of(region(kind))}) for kind in VIA]
    given += [(kind, {"files": {"1.json": labelme(shape(kind))}}) for kind in LABELME]
    for kind, source in given:
        status, content, said = convert(**source)
        assert (status, said) == (0, "")
        assert content["categories"] == [{"id": 1, "name": "cat"}] and content["images"] == [image]
        [annotation], (area, box) = content["annotations"], EXPECTED[kind]
        assert annotation["area"] == pytest.approx(area, rel=0.04)
        assert annotation["bbox"] == pytest.approx(box, abs=1.01)
        points = np.reshape(annotation["segmentation"], (-1, 2))
        assert [*points.min(axis=0), *np.ptp(points, axis=0)] == pytest.approx(box, abs=0.02)


def test_projects_and_objects_of_regions_are_read_too(convert):
    plain = via_of(region("rect"), region("circle", "dog"))
    _, expected, _ = convert(plain)
    entry = next(iter(plain.values()))
    entry["regions"] = {str(i): row for i, row in enumerate(entry["regions"])}
    assert convert({"_via_settings": {}, "_via_img_metadata": plain})[1] == expected


def test_the_class_of_a_region(convert):
    size, color = {"size": "large"}, {"size": "large", "color": "red"}
    for attributes, options, label in (
        ({**size, "label": "dog"}, (), "dog"),
        (color, ("--class-attribute", "color"), "red"),
        (color, ("--class-name", "dog"), "dog"),
        ({}, ("--class-name", "dog"), "dog"),
        ({"class": {"cat": False, "dog": True}}, (), "dog"),
        ({"class": "two\n lines"}, (), "two lines"),
    ):
        row = {**region("rect"), "region_attributes": attributes}
        status, content, said = convert(via_of(row), options=("--overwrite", *options))
        assert (status, said) == (0, "")
        assert content["categories"] == [{"id": 1, "name": label}]
    for attributes, named in (
        (color, ["size, color", "--class-attribute", "--class-name"]),
        ({}, ["--class-name"]),
        ({"class": ""}, ["''"]),
        ({"class": {"cat": True, "dog": True}}, ["cat", "dog"]),
        ({"class": "\ud800"}, ["ud800"]),
    ):
        rows = [region("rect"), {**region("circle"), "region_attributes": attributes}]
        status, content, said = convert(via_of(*rows))
        assert status == 1 and [row["name"] for row in content["categories"]] == ["cat"]
        assert all(word in said for word in ["region 1", *named])


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


def test_masks_of_labelme_are_the_same_pixels(convert, tmp_path):
    """The box's corners are its first and last pixel; what is outside the image is not kept."""
    gray = RING.astype(np.uint8)
    corner = (WIDTH - 3, HEIGHT - 5)
    for pixels, origin in ((RING, (10, 5)), (gray, (-3, -2)), (gray * 255, corner)):
        _, content, said = convert(files={"1.json": labelme(mask_shape(*origin, pixels))})
        [row], expected = content["annotations"], drawn(origin)
        found = COCO(str(tmp_path / "out" / "coco.json")).annToMask(row)
        assert said == "" and np.array_equal(found, expected) and row["area"] == expected.sum()
        ys, xs = expected.nonzero()
        assert row["bbox"] == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]


def test_parts_of_a_group_are_one_instance(convert, tmp_path):
    parts = [
        mask_shape(1, 1, group_id=4),
        shape("polygon", group_id=4),
        mask_shape(40, 30, group_id=4),
        shape("circle", "dog", group_id=4),
        mask_shape(40, 30),
        shape("circle", 1, group_id=2),
        shape("polygon", "1", group_id=2),
    ]
    _, content, said = convert(files={"1.json": labelme(*parts)})
    rows, names = content["annotations"], {r["id"]: r["name"] for r in content["categories"]}
    assert said == ""
    assert [names[row["category_id"]] for row in rows] == ["cat", "dog", "cat", "1"]
    expected = drawn((1, 1), (40, 30))
    expected[5:25, 10:30] = True
    whole = COCO(str(tmp_path / "out" / "coco.json")).annToMask(rows[0])
    assert np.array_equal(whole, expected) and len(rows[3]["segmentation"]) == 2


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


@pytest.mark.parametrize("name", ["1.TIF", "1", "C:\\photos\\1.jpeg", "../elsewhere/1.jpg"])
def test_the_image_on_disk_may_have_another_suffix_if_it_is_the_only_one(convert, tmp_path, name):
    files = {"a.json": labelme(shape("circle"), name=name)}
    _, content, said = convert(files=files)
    assert said == "" and content["images"][0]["file_name"] == "1.png"
    _, content, said = convert(via_of(region("circle"), name=name))
    assert said == "" and content["images"][0]["file_name"] == "1.png"
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "photos" / "1.bmp")
    status, _, said = convert(files=files)
    assert status == 1 and "1.bmp" in said and "1.png" in said


PICTURE = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
WRITTEN = [("3.png", "PNG", "3.png"), ("new/3.jpg", "JPEG", "new/3.jpg")]
WRITTEN += [("3.tif", "PNG", "3.png"), ("..\\elsewhere\\3.png", "PNG", "elsewhere/3.png")]


@pytest.mark.parametrize(("name", "form", "written"), WRITTEN)
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
    other = base64_png(255 - PICTURE, form)  # the first is kept, whether written before or now
    files["b.json"] = labelme(shape("polygon"), name=name, imageData=other)
    status, content, said = convert(files=files)
    assert status == 1 and len(content["annotations"]) == 1 and "b.json" in said
    assert path.read_bytes() == base64.b64decode(data)


def test_a_file_of_labelme_alone_and_hidden_folders(convert, tmp_path):
    files = {".checkpoints/1.json": labelme(shape("circle")), "1.json": labelme(shape("circle"))}
    _, content, said = convert(files=files)
    assert said == ""
    output = tmp_path / "alone.json"
    source = str(tmp_path / "photos" / "1.json")
    assert convert_annotations.main([source, "--output", str(output)]) == 0
    assert json.loads(output.read_text()) == content


BAD_VIA = {
    "a point": region("point"),
    "an open line": region("polyline"),
    "two points": region("polygon", all_points_x=[1, 2], all_points_y=[1, 2]),
    "x without y": region("polygon", all_points_x=[1, 2, 3, 4, 5]),
    "no radius": {**region("circle"), "shape_attributes": {"name": "circle", "cx": 1, "cy": 1}},
    "no list": {**region("rect"), "region_attributes": None},
    "a text": region("circle", r="wide"),
    "infinite": region("circle", r=float("inf")),
    "far outside": region("rect", x=100_000),
    "outside": region("rect", x=100),
    "no object": 7,
}
BAD_LABELME = {
    "a mask of another size": mask_shape(1, 1) | {"points": [[1, 1], [5, 5]]},
    "no mask": shape("mask", points=[[1, 1], [2, 2]]),
    "no picture": mask_shape(1, 1) | {"mask": base64.b64encode(b"text").decode()},
    "no base64": mask_shape(1, 1) | {"mask": "é"},
    "an empty mask": mask_shape(1, 1, np.zeros((2, 2), dtype=bool)),
    "a mask outside": mask_shape(1000, 1),
    "an infinite mask": mask_shape(1, 1) | {"points": [[1, 1], [1e999, 1]]},
}


def test_a_bad_shape_is_named_and_the_others_go_on(convert):
    given = [(name, "1.png", {"via": via_of(row, region("rect"))}) for name, row in BAD_VIA.items()]
    for name, row in BAD_LABELME.items():
        given.append((name, "1.json", {"files": {"1.json": labelme(row, mask_shape(1, 1))}}))
    for name, file, source in given:
        status, content, said = convert(**source)
        assert status == 1 and len(content["annotations"]) == 1, name
        assert said.count("\n") == 1 and file in said


def test_bad_files_and_images_are_named_and_the_others_go_on(convert):
    good = shape("rectangle")
    files = {
        "1.json": labelme(good),
        "2.json": b"{",
        "3.json": {"images": []},
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
    assert all(f"{number}.json" in said for number in range(2, 9)) and "/1.json" not in said


def test_given_classes_keep_their_order_and_others_are_named(convert):
    rows = [region("rect", "dog"), region("circle", "cow")]
    _, before, _ = convert(via_of(region("rect")))
    status, content, said = convert(via_of(*rows), options=())  # the file there is kept
    assert status == 1 and content == before and "--overwrite" in said
    options = ["--overwrite", "--classes", "dog", "cat"]
    status, content, said = convert(via_of(*rows), options=options)
    assert content["categories"] == [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}]
    assert status == 1 and "'cow'" in said and "--classes" in said


def test_where_nothing_can_be_converted_nothing_is_written(convert):
    for via in (
        via_of(region("point")),
        {"images": []},
        {"project": {}, "file": {"1": {"fname": "1.png"}}, "metadata": {}, "view": {}},  # VIA 3
        {},
        [1],
    ):
        status, content, said = convert(via)
        assert status == 1 and content is None and "via.json" in said
