"""The study of SEPL on toyscapes: its masks, its figures, and a small run with its resumption."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "datasets")]

import sepl_evidence  # noqa: E402
from cam_like import FAILURES  # noqa: E402
from make_cam_labels import CLASS_NAMES  # noqa: E402
from sepl_study import cases, report, scenes  # noqa: E402

from s4m_d2.sam.automatic_masks import AutomaticMasks, AutomaticMaskSettings  # noqa: E402
from s4m_d2.sepl import enhance  # noqa: E402

SEED = 31  # not one of the reported ones
FEW_POINTS = AutomaticMaskSettings(
    points_per_side=4, pred_iou_thresh=0.5, stability_score_thresh=0.5
)


@pytest.fixture(scope="module")
def some():
    return scenes.render_scenes(SEED, 8)


def drawn_scene(*boxes: tuple[int, int, int, int, int]) -> scenes.StudyScene:
    """Boxes (instance id, top, bottom, left, right) of Cityscapes' ids on a road."""
    ids = np.full((20, 40), 7, np.uint16)
    for instance, top, bottom, left, right in boxes:
        ids[top:bottom, left:right] = instance
    truth = scenes.class_map(ids)
    return scenes.StudyScene("drawn", np.zeros((20, 40, 3), np.uint8), truth, ids)


def test_the_studys_scenes_are_no_data_sets(some):
    from toyscapes_scene import render_scene

    for split in ("train", "val", "held-out"):  # the quickstart's, the tiny SAM's
        assert (render_scene(SEED, split, 0).image != some[0].image).mean() > 0.5


def test_exact_masks_are_the_visible_instances(some):
    for scene in some:
        masks = scenes.exact_masks(scene)
        np.testing.assert_array_equal(masks.sum(0), (scene.truth > 0).astype(int))
        for mask in masks:
            assert len(np.unique(scene.truth[mask])) == 1


def test_exact_masks_restore_what_kept_most_of_every_instance(some):
    for scene in some:
        label = scene.cam_label(SEED, 0.15, FAILURES)
        assert (label != scene.truth).any()
        np.testing.assert_array_equal(enhance(label, scenes.exact_masks(scene)), scene.truth)


def test_pairs_that_touch_and_differ_in_class_are_fused():
    #  car 0 | truck 0 | car 1   a gap   person 0, and car 2 beside car 3
    scene = drawn_scene(
        (26000, 2, 8, 2, 8), (27000, 2, 8, 8, 14), (26001, 2, 8, 15, 20), (24000, 2, 8, 25, 30),
        (26002, 12, 18, 2, 8), (26003, 12, 18, 8, 14),
    )  # fmt: skip
    fused = scenes.fused_masks(scene, 1.0, seed=0)
    areas = sorted(int(mask.sum()) for mask in fused)
    assert areas == [30, 36, 36, 36 + 36 + 30]
    np.testing.assert_array_equal(fused.sum(0), scene.truth > 0)


def test_a_larger_share_fuses_more_and_none_fuses_nothing(some):
    for scene in some:
        exact = scenes.exact_masks(scene)
        np.testing.assert_array_equal(scenes.fused_masks(scene, 0.0, seed=0), exact)
    shares = (0.0, 0.25, 0.5, 1.0)
    counts = [sum(len(scenes.fused_masks(s, share, seed=0)) for s in some) for share in shares]
    assert (np.diff(counts) < 0).all()
    for scene in some:  # whatever a share fused stays so
        small, large = (scenes.fused_masks(scene, share, seed=0) for share in (0.25, 0.5))
        for mask in small:
            assert any((mask <= other).all() for other in large)


def test_background_masks_are_regions_without_instances(some):
    for scene in some:
        masks = scenes.background_masks(scene)
        assert len(masks) > 1 and masks.sum(0).max() == 1
        assert not masks[:, scene.truth > 0].any()
        for mask in masks:
            assert len(np.unique(scene.instance_ids[mask])) == 1


def test_the_best_iou_of_an_instance():
    scene = drawn_scene((26000, 0, 10, 0, 10), (24000, 15, 16, 0, 5))  # the second is small
    half, most, other = np.zeros((3, 20, 40), bool)
    half[:5, :10] = most[:8, :10] = other[12:, 20:] = True
    assert scenes.best_ious(scene, np.stack([half, other, most])) == [0.8]
    assert scenes.best_ious(scene, np.zeros((0, 20, 40), bool)) == [0.0]


def test_ious_are_those_of_all_images_together(some):
    masks = {cases.EXACT: [scenes.exact_masks(scene) for scene in some]}
    variants = {
        cases.EXACT: cases.Variant(cases.EXACT),
        "off": cases.Variant(cases.EXACT, {"o_p_thresh": 1.0, "o_s_thresh": 1.0}),
    }
    found = cases.measure(some, masks, variants, SEED, 0.5)
    labels = {cases.BEFORE: [scene.cam_label(SEED, 0.5, FAILURES) for scene in some]}
    labels[cases.EXACT] = [
        enhance(label, of) for label, of in zip(labels[cases.BEFORE], *masks.values(), strict=True)
    ]
    truth = np.stack([scene.truth for scene in some])
    for name, maps in labels.items():
        for index, iou in enumerate(found[name]):
            predicted, true = np.stack(maps) == index, truth == index
            union = (predicted | true).sum()
            expected = (predicted & true).sum() / union if union else None
            assert iou == expected
    assert found["off"] == found[cases.BEFORE]  # without a selected mask a class stays


def test_means_and_deviations_over_seeds():
    runs = [
        {cases.BEFORE: [0.5, 0.3, None], cases.TINY: [0.6, 0.4, None]},
        {cases.BEFORE: [0.7, None, None], cases.TINY: [0.6, None, None]},
    ]
    found = report.summarize(runs)
    assert found[cases.BEFORE]["mIoU"] == pytest.approx(55)  # of 40 and 70
    assert found[cases.BEFORE]["mIoU deviation"] == pytest.approx(30 / np.sqrt(2))
    assert found[cases.TINY]["gain"] == pytest.approx(0)  # of +10 and -10
    assert found[cases.TINY]["gain deviation"] == pytest.approx(20 / np.sqrt(2))
    assert found[cases.BEFORE]["IoU"] == [pytest.approx(60), pytest.approx(30), None]
    alone = report.summarize(runs[:1])[cases.TINY]
    assert alone["gain"] == pytest.approx(10) and alone["gain deviation"] is None


@pytest.fixture
def quick(monkeypatch):
    """Fewer points for the tiny SAM; returns the sizes of the images that it was asked about."""
    monkeypatch.setattr(scenes, "TINY_SAM_SETTINGS", FEW_POINTS)
    asked = []
    generate = AutomaticMasks.generate

    def counting(self, image, *args):
        asked.append(image.shape)
        return generate(self, image, *args)

    monkeypatch.setattr(AutomaticMasks, "generate", counting)
    return asked


def run(output: Path) -> int:
    options = ["--images", "2", "--seeds", str(SEED), "--strengths", "0.5", "0.3"]
    return sepl_evidence.main(["--output", str(output), *options])


def test_a_small_run_and_its_resumption(tmp_path, quick, monkeypatch, capsys):
    output = tmp_path / "sepl"
    assert run(output) == 0
    assert len(quick) == 2
    results = json.loads((output / "results.json").read_text())
    assert list(results["strengths"]) == ["0.3", "0.5"]
    exact = results["strengths"]["0.3"][cases.EXACT]
    assert exact["gain"] > 0 and len(exact["IoU"]) == len(CLASS_NAMES)
    # At the study's strength both tables tell the same, and fusing nothing is exact masks.
    of_strength, of_settings = results["strengths"]["0.5"], results["studies"]["settings"]
    assert all(of_strength[name] == of_settings[name] for name in of_strength)
    unfused = results["studies"]["bad masks"]["0% of touching pairs fused"]
    assert unfused == of_strength[cases.EXACT]
    text = (output / "results.md").read_text()
    for row in (of_strength[cases.TINY], exact):
        assert f"| {row['mIoU']:.1f} | {row['gain']:+.1f} |" in text
    for name in ("gain.png", "examples.png"):
        assert np.asarray(Image.open(output / name)).std() > 0
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}

    (output / "runs" / f"seed-{SEED}-strength-0.5.json").write_text("{damaged")
    measured = []
    monkeypatch.setattr(
        cases, "measure", lambda *args, of=cases.measure: measured.append(args[4]) or of(*args)
    )
    assert run(output) == 0
    assert measured == [0.5] and len(quick) == 2  # no masks again
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before

    monkeypatch.setattr(cases, "code_version", lambda: "another")
    assert run(output) == 0
    assert set(measured[1:]) == {0.3, 0.5} and len(quick) == 2
    assert "results.md" in capsys.readouterr().out


def test_masks_of_other_settings_are_made_anew(tmp_path, quick, some, monkeypatch):
    masks = scenes.sam_masks(some[:1], scenes.tiny_sam(), tmp_path)
    assert scenes.sam_masks(some[:1], scenes.tiny_sam(), tmp_path) == masks and len(quick) == 1
    assert scenes.dense(masks[0], some[0].size).shape == (len(masks[0]), *some[0].size)
    fewer = AutomaticMaskSettings(points_per_side=2, pred_iou_thresh=0.0)
    monkeypatch.setattr(scenes, "TINY_SAM_SETTINGS", fewer)
    scenes.sam_masks(some[:1], scenes.tiny_sam(), tmp_path)
    assert len(quick) == 2


@pytest.mark.parametrize(
    "options", [["--images", "0"], ["--strengths", "1.5"], ["--seeds", "-1"], ["--seeds", "x"]]
)
def test_options_out_of_range_are_refused(options, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        sepl_evidence.main(["--output", str(tmp_path / "out"), *options])
    assert stopped.value.code == 2 and options[1] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_tiny_sams_masks_gain_where_labels_are_as_good_as_published_cams(tmp_path):
    strengths = (0.45, cases.STUDY_STRENGTH)
    results = sepl_evidence.run_study(tmp_path, 20, (0, 1, 2), strengths)
    for row in results["strengths"].values():
        assert 50 < row[cases.BEFORE]["mIoU"] < 62
        assert row[cases.TINY]["gain"] > 3 * row[cases.TINY]["gain deviation"] > 0
        assert row[cases.EXACT]["gain"] > row[cases.TINY]["gain"]
