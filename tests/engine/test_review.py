"""Which images to correct first: signals by hand, order by properties, the command on a folder."""

import csv
import json
import math

import numpy as np
import pytest
from helpers import rle_of
from PIL import Image

from s4m_d2.commands import review
from s4m_d2.commands.review import review_order, review_signals


def instance(index, score, **more):
    return {"class": index, "score": score, **more}


ROWS = [
    {"instances": [instance(0, 0.9, sam_iou=0.8), instance(1, 0.7)]},
    {"instances": [instance(0, 1.0, sam_iou=1.0)]},
    {"instances": []},
]


def test_signals_by_hand():
    found = review_signals(ROWS)
    assert found["class"] == pytest.approx([0.2, 0.0, 1.0])
    assert found["mask"] == pytest.approx([0.6, 0.0, 1.0])
    assert found["number"] == pytest.approx([math.log(3 / 2), 0.0, math.log(2)])  # median 1
    assert found["rare"] == pytest.approx([math.log(3), math.log(3 / 2), 0.0])


def test_uncertain_images_come_first_and_copies_late():
    signals = {"class": np.array([0.9, 0.8, 0.7, 0.1])}
    alike = np.zeros((4, 2))
    order, value = review_order(signals, ["class"], alike, 4)
    assert order.tolist() == [0, 1, 2, 3] and value.tolist() == [1.0, 0.75, 0.5, 0.25]
    features = np.array([[0.0, 0.0], [0.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    assert review_order(signals, ["class"], features, 4)[0].tolist() == [0, 2, 1, 3]
    assert review_order(signals, ["class"], features, 0)[0].tolist() == [0, 1, 2, 3]


def test_the_command_ranks_a_labeled_folder(tmp_path, capsys):
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    out.mkdir()
    mask = np.zeros((40, 60), np.uint8)
    mask[5:20, 10:30] = 1
    rle = rle_of(mask)
    scores = {"good.png": 0.99, "bad <i>.png": 0.6, "gone.png": 0.5}
    with open(out / "labels-0.jsonl", "w") as file:
        for name, score in scores.items():
            found = [instance(0, score, sam_iou=score, segmentation=rle)]
            row = {"file_name": name, "height": 40, "width": 60, "instances": found}
            file.write(json.dumps(row) + "\n")
            if name != "gone.png":
                Image.new("RGB", (60, 40), (90, 90, 90)).save(images / name)
    (out / ".label.json").write_text(json.dumps({"images": str(images), "names": ["cell"]}))
    (out / "review").mkdir()
    for name in ("0002.png", "corrected.json"):  # of an earlier call; of an image review/corrected
        (out / "review" / name).touch()
    assert review.main([str(out), "--count", "1"]) == 1  # one image cannot be read
    assert "gone.png" in capsys.readouterr().err
    table = list(csv.DictReader(open(out / "review.csv")))
    assert [row["file_name"] for row in table] == ["bad <i>.png", "good.png"]
    page = (out / "review.html").read_text()
    assert "bad &lt;i&gt;.png" in page and "good.png" not in page
    rows = (out / "labels-0.jsonl").read_text()
    unrated = json.loads(rows.splitlines()[0])  # as without refinement
    del unrated["instances"][0]["sam_iou"]
    for text, by in ((rows, "mask"), (json.dumps(unrated) + "\n", "class")):
        (out / "labels-0.jsonl").write_text(text)
        review.main([str(out), "--count", "1"])
        assert f"by {by}:" in capsys.readouterr().out
    found = sorted(path.name for path in (out / "review").iterdir())
    assert found == ["0001.png", "corrected.json"]
    assert review.main([str(images)]) == 1 and "s4m-label" in capsys.readouterr().err
