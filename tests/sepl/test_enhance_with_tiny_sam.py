"""`sepl enhance` with masks that the tiny SAM makes of toyscapes scenes."""

import sys
from pathlib import Path

import numpy as np
import pytest
from enhance_folders import content, enhance, label, report
from PIL import Image

from s4m_d2.sam.automatic_masks import AutomaticMasks
from s4m_d2.sepl import mask_sources
from s4m_d2.sepl.labels import read_label, write_label
from s4m_d2.sepl.mask_files import read_masks

ROOT = Path(__file__).resolve().parents[2]
SIZE = (64, 128)
THING_IDS = (24, 25, 26, 27, 28, 31, 32, 33)
FEW_POINTS = (
    "--points-per-side",
    "8",
    "--pred-iou-thresh",
    "0.6",
    "--stability-score-thresh",
    "0.8",
)
SAM = ("--sam", "tiny_toyscapes", "--device", "cpu", "--num-classes", "9", *FEW_POINTS)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Two scenes, and labels with half of each object."""
    sys.path.insert(0, str(ROOT / "datasets"))
    from toyscapes_scene import render_scene

    root = tmp_path_factory.mktemp("scenes")
    (root / "images").mkdir()
    for index in range(2):
        scene = render_scene(5, "val", index, SIZE[::-1])
        Image.fromarray(scene.image).save(root / "images" / f"{index}.png")
        things = scene.instance_ids // 1000
        cam = np.zeros(SIZE, dtype=np.uint8)
        for number, label_id in enumerate(THING_IDS, 1):
            cam[things == label_id] = number
        cam[::2] = 0
        write_label(root / "cam" / f"{index}.png", cam)
    return root


@pytest.fixture
def generated(monkeypatch):
    """The sizes of the images that SAM is asked about."""
    original, sizes = AutomaticMasks.generate, []

    def generate(self, image, encoded=None):
        sizes.append(image.shape[:2])
        return original(self, image, encoded)

    monkeypatch.setattr(AutomaticMasks, "generate", generate)
    return sizes


def run(root, *more, output):
    return enhance(root, "--images", str(root / "images"), *SAM, *more, output=output)


def test_sams_masks_are_made_once_and_kept(scenes, generated):
    """The kept ones serve other thresholds, and are read as another program's are."""
    assert run(scenes, output="out") == 0
    assert generated == [SIZE, SIZE]
    found = report(scenes)
    assert (
        found["settings"]["sam"] == "tiny_toyscapes" and found["settings"]["points_per_side"] == 8
    )
    assert found["settings"]["images"] == str(scenes / "images")
    kept = scenes / "out" / "masks"
    assert sorted(content(kept)) == ["0.json.gz", "1.json.gz"]
    for name in "01":
        record = found["images"][name]
        assert record["masks"] == len(read_masks(kept / f"{name}.json.gz", SIZE)) > 0
        assert record["selected"] > 0 and record["changed_pixels"] > 0

    cache = ("--mask-cache", str(kept))
    assert run(scenes, *cache, "--o-s-thresh", "1", "--o-p-thresh", "1", output="none") == 0
    assert run(scenes, *cache, output="again") == 0
    assert len(generated) == 2
    masks = ("--num-classes", "9", "--masks", str(kept))
    assert enhance(scenes, *masks, output="given") == 0
    for name in "01":
        for other in ("again", "given"):
            np.testing.assert_array_equal(label(scenes, name), label(scenes, name, other))
        cam = read_label(scenes / "cam" / f"{name}.png")
        np.testing.assert_array_equal(label(scenes, name, "none"), cam)


def test_kept_masks_of_another_image_or_setting_are_made_anew(scenes, generated, tmp_path):
    cache = ("--mask-cache", str(tmp_path / "cache"))
    assert run(scenes, *cache, output="first") == 0
    image = scenes / "images" / "0.png"
    before = image.read_bytes()
    try:
        Image.fromarray(255 - np.asarray(Image.open(image))).save(image)
        assert run(scenes, *cache, output="second") == 0
    finally:
        image.write_bytes(before)
    assert len(generated) == 3
    assert run(scenes, *cache, "--box-nms-thresh", "0.6", output="third") == 0
    assert len(generated) == 5


def test_other_settings_of_sam_are_refused(scenes, capsys):
    assert run(scenes, output="mine") == 0
    assert run(scenes, "--box-nms-thresh", "0.6", output="mine") == 1
    assert "box_nms_thresh was 0.7, now 0.6. Choose" in capsys.readouterr().err
    assert run(scenes, "--points-per-batch", "16", output="mine") == 0  # memory alone


def test_bad_images_are_named_and_sam_is_not_asked(scenes, generated, tmp_path):
    root = tmp_path / "data"
    (root / "images").mkdir(parents=True)
    for name in "abc":
        write_label(root / "cam" / f"{name}.png", np.zeros(SIZE, dtype=np.uint8))
    Image.new("RGB", (64, 128)).save(root / "images" / "a.png")
    (root / "images" / "b.png").write_bytes(b"no image")
    assert run(root, output="out") == 1
    found = report(root)
    assert "a.png has (height, width) (64, 128), but" in found["failed"]["a"]
    assert "b.png cannot be read" in found["failed"]["b"]
    assert found["missing"] == {"c": "there is no image of it"}
    assert not generated


@pytest.mark.gpu
def test_masks_of_a_gpu(scenes):
    words = ["cuda" if word == "cpu" else word for word in SAM]
    words += ["--images", str(scenes / "images"), "--workers"]
    assert enhance(scenes, *words, "1", output="gpu") == 0
    assert enhance(scenes, *words, "2", output="gpu2") == 0
    for name in "01":
        np.testing.assert_array_equal(label(scenes, name, "gpu"), label(scenes, name, "gpu2"))
        assert report(scenes, "gpu")["images"][name]["masks"] > 0


def test_the_model_is_built_once(scenes, monkeypatch, tmp_path):
    mask_sources._generator.cache_clear()
    original, built = mask_sources.build_sam_backend, []
    monkeypatch.setattr(
        mask_sources, "build_sam_backend", lambda cfg: built.append(cfg) or original(cfg)
    )
    assert run(scenes, "--mask-cache", str(tmp_path / "cache"), output="once") == 0
    assert len(built) == 1
    assert built[0].S4M.SAM.BACKEND == "tiny_toyscapes" and built[0].MODEL.DEVICE == "cpu"
