"""Pictures of annotations and predictions: what is drawn, and what is refused."""

import json

import draw_annotations
import make_own_data
import pytest
from PIL import Image
from pycocotools import mask as mask_utils

SIZE = (128, 64)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn") / "data"
    make_own_data.make_own_data(folder, labeled=2, unlabeled=0, seed=4, size=SIZE, kind="coco")
    return folder


def test_only_predictions_with_the_score_are_drawn(data, tmp_path, monkeypatch):
    content = json.loads((data / "annotations.json").read_text())
    rows = [row for row in content["annotations"] if row["image_id"] == 1][:2]
    found = []
    for row, score in zip(rows, (0.9, 0.4), strict=True):
        rle = mask_utils.merge(mask_utils.frPyObjects(row["segmentation"], 64, 128))
        rle["counts"] = rle["counts"].decode()
        common = {"image_id": 1, "category_id": row["category_id"]}
        found.append({**common, "score": score, "segmentation": rle})
    results = tmp_path / "results.json"
    results.write_text(json.dumps(found))
    drawn = []

    def note(image, masks, labels, names, scores=None):
        drawn.append(([names[label] for label in labels], scores))
        return image

    monkeypatch.setattr(draw_annotations, "overlay", note)
    arguments = [str(data / "annotations.json"), "--images", str(data / "labeled")]
    picture = tmp_path / "a.png"
    arguments += ["--output", str(picture), "--predictions", str(results), "--count", "5"]
    assert draw_annotations.main(arguments) == 0
    assert Image.open(picture).width > 0
    names = {row["id"]: row["name"] for row in content["categories"]}
    of_images = [[names[r["category_id"]] for r in content["annotations"] if r["image_id"] == i]
                 for i in (1, 2)]  # fmt: skip
    expected = [names[rows[0]["category_id"]]]
    assert drawn == [(of_images[0], None), (expected, [0.9]), (of_images[1], None), ([], [])]


def test_an_image_of_another_size_is_told_and_the_others_drawn(data, tmp_path, capsys):
    for source in (data / "labeled").iterdir():
        Image.open(source).save(tmp_path / source.name)
    first = min(path.name for path in (data / "labeled").iterdir())
    Image.new("RGB", SIZE[::-1]).save(tmp_path / first)
    picture = tmp_path / "drawn.png"
    arguments = [str(data / "annotations.json"), "--images", str(tmp_path)]
    assert draw_annotations.main([*arguments, "--output", str(picture)]) == 0
    assert first in capsys.readouterr().err and picture.exists()


def test_files_that_are_no_predictions_are_refused(data, tmp_path, capsys):
    results, picture = tmp_path / "results.json", tmp_path / "a.png"
    arguments = [str(data / "annotations.json"), "--images", str(data / "labeled")]
    arguments += ["--output", str(picture), "--predictions", str(results)]
    for text in ("{", "[1]", '[{"score": 1}]'):
        results.write_text(text)
        assert draw_annotations.main(arguments) == 1
        assert "--predictions" in capsys.readouterr().err
        assert not picture.exists()
