"""Several COCO files as one."""

import json

import pytest
from PIL import Image

from s4m_d2.data.annotations import read_annotations
from s4m_d2.data.merging import merge_annotations
from s4m_d2.errors import DatasetError


@pytest.fixture
def part(tmp_path):
    """(name, categories {name: id}, images {path below tmp_path/name: (color, classes)}) → read.

    The instances of an image are squares at different places.
    """

    def make(name, categories, images):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        content = {"images": [], "annotations": []}
        content["categories"] = [{"id": n, "name": c} for c, n in categories.items()]
        for number, (file, (color, classes)) in enumerate(images.items(), start=7):
            Image.new("RGB", (40, 30), color).save(folder / file)
            content["images"].append({"id": number, "file_name": file})
            for i, c in enumerate(classes):
                square = {"segmentation": [[i, 0, i + 9, 0, i + 9, 9, i, 9]]}
                row = {"image_id": number, "category_id": categories[c], **square}
                content["annotations"].append(row)
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return read_annotations(str(tmp_path / f"{name}.json"), str(folder))

    return make


def classes_of(annotations):
    """{image's name: its instances' classes}."""
    return {
        annotations.name(r): [annotations.classes[a["category_id"]] for a in r["annotations"]]
        for r in annotations.records
    }


def test_classes_meet_by_name_whatever_their_ids(part):
    first = part("a", {"cat": 5, "dog": 2}, {"1.png": ("red", ["cat", "dog", "dog"])})
    second = part("b", {"owl": 5, "cat": 1}, {"2.png": ("blue", ["cat", "owl"])})
    merged, notes = merge_annotations([first, second])
    assert merged.classes == ["dog", "cat", "owl"] and notes == []
    assert classes_of(merged) == {"a/1.png": ["cat", "dog", "dog"], "b/2.png": ["cat", "owl"]}
    assert [r["image_id"] for r in merged.records] == [1, 2]
    assert merged.findings.instances == 5
    again = merged.to_coco()
    assert [c["name"] for c in again["categories"]] == merged.classes
    assert merge_annotations([first]) == (first, [])


def test_an_image_of_several_files_is_the_last_ones(part):
    """2.png is a copy of the first file's b.png; c.png is another picture than the first's."""
    old = {"a.png": ("red", ["cat"]), "b.png": ("blue", ["cat"]), "c.png": ("lime", ["cat"])}
    new = {"2.png": ("blue", ["cat", "cat"]), "c.png": ("gray", [])}
    merged, (again, alike) = merge_annotations([part("a", {"cat": 1}, old),
                                                part("b", {"cat": 9}, new)])  # fmt: skip
    assert classes_of(merged) == {
        "a/a.png": ["cat"], "a/c.png": ["cat"], "b/2.png": ["cat", "cat"], "b/c.png": []
    }  # fmt: skip
    assert "1 labeled" in again and "b.png of" in again and "a.json" in again
    assert "1 labeled" in alike and "c.png" in alike
    turned, _ = merge_annotations([part("b", {"cat": 9}, new), part("a", {"cat": 1}, old)])
    assert classes_of(turned)["a/b.png"] == ["cat"] and "b/2.png" not in classes_of(turned)


def test_two_spellings_of_a_class_are_refused_unless_a_file_has_both(part):
    def files(*categories):
        return [
            part(name, dict.fromkeys(c, 0) | {c[-1]: 1}, {f"{name}.png": (name, [c[-1]])})
            for name, c in zip(("red", "blue"), categories, strict=True)
        ]

    with pytest.raises(DatasetError, match=r"'traffic light' of .*red.json.*'Traffic_light' in"):
        merge_annotations(files(["traffic light"], ["Traffic_light"]))
    parts = files(["A"], ["A", "a"])
    for given in (parts, parts[1:]):
        both, [note] = merge_annotations(given)
        assert both.classes == ["A", "a"] and "'A' and 'a' of" in note
