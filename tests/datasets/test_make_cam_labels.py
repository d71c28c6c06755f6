"""CAM-like labels: the failures do what they say, one parameter leads to them, files are whole."""

from __future__ import annotations

from pathlib import Path

import make_cam_labels as command
import numpy as np
import pytest
from cam_like import cam_label
from helpers import content
from make_toyscapes import make_toyscapes
from PIL import Image
from toyscapes_scene import render_scene

from s4m_d2.sepl.files import class_names, read_label

STRENGTHS = (0.0, 0.2, 0.35, 0.5, 0.7, 1.0)
SCENES = 12


@pytest.fixture(scope="module")
def scenes():
    """(label, instance ids) of scenes."""
    ids = [render_scene(21, "val", index).instance_ids for index in range(SCENES)]
    return [(command.class_map(instance_ids), instance_ids) for instance_ids in ids]


def spoilt(scenes, strength, **options):
    draws = map(np.random.default_rng, range(len(scenes)))
    pairs = zip(scenes, draws, strict=True)
    return [cam_label(of, rng, strength, instances=ids, **options) for (of, ids), rng in pairs]


def mean_iou(labels, truths):
    """Over the classes of all images together, in percent; written out."""
    ious = []
    for index in range(len(command.CLASS_NAMES)):
        pairs = [(a == index, b == index) for a, b in zip(labels, truths, strict=True)]
        union = sum(int((a | b).sum()) for a, b in pairs)
        ious.append(sum(int((a & b).sum()) for a, b in pairs) / union)
    return 100 * np.mean(ious)


def test_the_mean_iou_falls_with_the_strength_and_passes_published_cam_quality(scenes):
    truths = [truth for truth, _ in scenes]
    labels = [spoilt(scenes, strength) for strength in STRENGTHS]
    for of_strength in labels:  # no class appears that the image lacks
        pairs = zip(of_strength, truths, strict=True)
        assert all(set(np.unique(a)) <= set(np.unique(b)) for a, b in pairs)
    scores = [mean_iou(of_strength, truths) for of_strength in labels]
    assert scores[0] == 100 and (np.diff(scores) < -2).all()  # 0 gives the ground truth
    assert 45 < scores[STRENGTHS.index(0.5)] < 60
    assert scores[-1] < 40


@pytest.fixture
def data(tmp_path) -> Path:
    make_toyscapes(tmp_path / "toyscapes", seed=4, counts={"train": 1, "val": 3}, size=(96, 64))
    return tmp_path / "toyscapes"


def run(data, output, *options) -> int:
    return command.main(["--data", str(data), "--output", str(output), *options])


def test_the_files_are_the_images_their_truth_and_labels_of_it(data, tmp_path):
    output = tmp_path / "cam"
    assert run(data, output, "--strength", "0.6", "--seed", "3") == 0
    classes = class_names(file=output / "classes.txt")
    assert classes[1:] == tuple("person rider car truck bus train motorcycle bicycle".split())
    images = sorted((output / "images").iterdir())
    assert len(images) == 3
    for path in images:
        source = next(data.glob(f"leftImg8bit/val/*/{path.stem}_leftImg8bit.png"))
        np.testing.assert_array_equal(np.asarray(Image.open(path)), np.asarray(Image.open(source)))
        ids = np.asarray(Image.open(next(data.glob(f"gtFine/val/*/{path.stem}_*instanceIds.png"))))
        truth = read_label(output / "ground-truth" / path.name, len(classes))
        order = [0, 24, 25, 26, 27, 28, 31, 32, 33]  # Cityscapes' label ids
        np.testing.assert_array_equal(np.array(order)[truth], np.where(ids >= 1000, ids // 1000, 0))
        rng = command.label_generator(3, path.stem)
        expected = cam_label(truth, rng, 0.6, instances=ids)
        label = read_label(output / "pseudo-labels" / path.name, len(classes))
        np.testing.assert_array_equal(label, expected)


def test_bad_options_are_refused_and_nothing_is_written(data, tmp_path):
    for options in ("--strength 1.5", "--seed -1", "--split test", "--data nowhere"):
        assert run(data, tmp_path / "cam", *options.split()) == 1
        assert not (tmp_path / "cam").exists()


def test_folders_that_hold_something_else_are_left_alone(data, tmp_path):
    output, mine = tmp_path / "cam", tmp_path / "mine"
    assert run(data, output) == 0
    mine.mkdir()
    (mine / "notes.txt").write_text("precious")
    before = content(output), content(data)
    assert run(data, output, "--strength", "0.2") == 1
    for folder in (mine, data, data / "cam", data / "leftImg8bit" / "val" / "cam", data.parent):
        assert run(data, folder) == 1
    assert (content(output), content(data)) == before
    assert [p.name for p in mine.iterdir()] == ["notes.txt"]
