"""The evaluation of a SAM against answers of known IoU, and what trains the packaged one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import sam_eval
import tiny_sam_data
import torch
import train_tiny_sam
from PIL import Image

from s4m_d2.engine.labeling.sam_quality import measure_sam
from s4m_d2.errors import DatasetError
from s4m_d2.sam import EncodedImages, PromptOutput

SIDE = 128
SQUARES = {1: (40, 40, 20), 2: (70, 44, 10), 3: (0, 0, 30), 4: (50, 80, 1)}  # x, y, side by class


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """(json, folder) of ten images; a window of 64 px at their center has two large squares."""
    root = tmp_path_factory.mktemp("squares")
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    for key, (x, y, side) in SQUARES.items():
        image[y : y + side, x : x + side] = 60 * key
    for i in range(10):
        Image.fromarray(image).save(root / f"{i}.png")
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "height": SIDE, "width": SIDE}
                   for i in range(10)],
        "annotations": [
            {"id": 10 * i + key, "image_id": i, "category_id": key, "iscrowd": 0, "area": s * s,
             "bbox": [x, y, s, s], "segmentation": [[x, y, x + s, y, x + s, y + s, x, y + s]]}
            for i in range(10) for key, (x, y, s) in SQUARES.items()
        ],
        "categories": [{"id": key, "name": f"class {key}"} for key in SQUARES],
    }  # fmt: skip
    (root / "labels.json").write_text(json.dumps(content))
    return str(root / "labels.json"), str(root)


class Oracle:
    """Answers with the pixels of the clicked value; rates them best without their last column."""

    device = torch.device("cpu")

    def encode(self, images, image_sizes):
        return EncodedImages(images.float(), list(image_sizes))

    def prompt(self, encoded, points):
        value = encoded.embeddings[0, 0]
        height, width = value.shape
        x, y = (points[0] * torch.tensor([width, height])).long().unbind(dim=-1)
        clicked = value[y, x]
        assert (clicked == clicked[:, :1]).all() and (clicked > 0).all()  # all inside the mask
        exact = value == clicked[:, :1, None]
        less = exact & exact.roll(-1, dims=2)
        masks = torch.stack([less, exact, torch.ones_like(exact)], dim=1)
        ratings = torch.tensor([0.9, 0.2, 0.1]).expand(len(masks), 3)
        return [PromptOutput(masks.float() - 0.5, ratings)]

    def upscale(self, logits, image_size):
        return logits


def test_the_best_rated_and_the_best_answer_are_compared_in_the_window(data):
    records = sam_eval.load_records(*data)[1]
    answers = measure_sam(Oracle(), records[:2], clicks=3, crop=64)
    assert answers.categories.tolist() == [0, 1, 0, 1]
    assert answers.sides.tolist() == [80, 40, 80, 40]  # a window of 64 px counts 256
    np.testing.assert_allclose(answers.best, 1)
    np.testing.assert_allclose(answers.rated, [19 / 20, 9 / 10] * 2)
    groups = answers.groups(["big", "small", "none"])
    rows = {group.pop("name"): list(group.values()) for group in groups}
    assert set(rows) == {"all", "32 to 64 px", "64 px and more", "big", "small"}
    assert rows["all"] == pytest.approx([4, 0.925, 1.0]) and rows["small"][0] == 2


def test_tiles_are_measured_and_crowds_are_not(data):
    record = sam_eval.load_records(*data)[1][0]
    crowd = {**record["annotations"][0], "iscrowd": 1}
    tile = {**record, "annotations": [*record["annotations"], crowd], "tile": (50, 40, 90, 60)}
    answers = measure_sam(Oracle(), [tile], clicks=3)
    assert answers.categories.tolist() == [0, 1]
    np.testing.assert_allclose(answers.sides, np.sqrt([200, 100]) * 256 / 40)
    np.testing.assert_allclose(answers.rated, [0.9, 0.9])
    with pytest.raises(DatasetError):  # no mask is that small
        measure_sam(Oracle(), [record], clicks=1, crop=6)
    box = {**record, "annotations": [{"bbox": [0, 0, 9, 9], "category_id": 0}]}
    with pytest.raises(DatasetError, match=os.path.basename(record["file_name"])):
        measure_sam(Oracle(), [box], clicks=1)


def test_the_command_prints_the_table_of_a_packaged_sam(data, capsys):
    labeled, images = data
    arguments = ["--labeled", labeled, "--images", images, "--held-out", "--sam", "tiny_toyscapes"]
    sam_eval.main(arguments)
    printed = capsys.readouterr().out
    assert printed.startswith("2 images") and "class 1" in printed and "class 4" not in printed


def test_views_keep_image_and_masks_together(data, monkeypatch):
    _, trained, held_out = tiny_sam_data.load_records(*data)
    assert [Path(r["file_name"]).stem for r in held_out] == ["8", "9"] and len(trained) == 8
    monkeypatch.setattr(tiny_sam_data, "PLAIN_CHANCE", 1)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        view = tiny_sam_data.sample_photograph(trained, rng)
        assert max(view[0].shape) == 256
        image, masks = tiny_sam_data.augment(view, rng)
        assert len(masks) and masks.shape[1:] == image.shape[:2]
        for mask in masks:  # one value inside, apart from the resampled border
            inner = cv2.erode(mask.astype(np.uint8), np.ones((7, 7))) > 0
            assert (np.ptp(image[inner], axis=0) <= 2).all() and image[inner].min() > 50


def test_composites_have_disjoint_masks_of_what_was_drawn(tmp_path):
    Image.fromarray(np.zeros((SIDE, SIDE, 3), np.uint8)).save(tmp_path / "blank.png")
    composites = tiny_sam_data.Composites([], [{"file_name": str(tmp_path / "blank.png")}])
    composites._icon = lambda kind, side: np.full((side, side, 4), 255, np.float32)
    drawn = 0
    for seed in range(15):
        image, masks = composites.sample(np.random.default_rng(seed))
        assert image.shape == (256, 256, 3) and masks.shape[1:] == (256, 256)
        assert masks.sum(0).max(initial=0) <= 1
        drawn += len(masks)
    assert drawn > 50


def test_clicks_lie_in_the_masks_and_corrections_where_the_answer_is_wrong(monkeypatch):
    masks = np.zeros((2, 40, 60), bool)
    masks[0, 5:15, 10:30] = masks[1, 20:30, 40:50] = True
    monkeypatch.setattr(train_tiny_sam, "BOX_CHANCE", 0)
    rng = np.random.default_rng(0)
    prompts = train_tiny_sam.Prompts(masks, rng)
    x, y = prompts.points.long().unbind(dim=-1)
    assert (prompts.labels == 1).all() and torch.from_numpy(masks)[[[0], [1]], y, x].all()

    def answer(*_):
        everything_or_nothing = torch.tensor([9.0, -9.0])[:, None, None, None]
        return everything_or_nothing.expand(2, 4, 128, 128), torch.zeros(2, 4)

    monkeypatch.setattr(train_tiny_sam, "decode", answer)
    before = prompts.points.shape[1]
    train_tiny_sam.correct(None, None, prompts, rng)
    assert prompts.labels[:, before:].unique(dim=1).tolist() == [[0], [1]]
    for x, y in prompts.points[:, before:].long().permute(1, 2, 0):
        assert masks[[0, 1], y, x].tolist() == [False, True]
