"""The study of SEPL on toyscapes: its masks, its figures, and a small run."""

from __future__ import annotations

import json

import numpy as np
import pytest
import sepl_evidence
from PIL import Image
from sepl_study import report, scenes
from sepl_study.report import BEFORE, EXACT, TINY

from s4m_d2.sam.automatic_masks import AutomaticMasks, AutomaticMaskSettings

SEED = 31  # not one of the reported ones
FEW_POINTS = AutomaticMaskSettings(
    points_per_side=4, pred_iou_thresh=0.5, stability_score_thresh=0.5
)


def test_means_and_deviations_over_seeds():
    runs = [
        {BEFORE: np.array([0.5, 0.3, np.nan]), TINY: np.array([0.6, 0.4, np.nan])},
        {BEFORE: np.array([0.7, np.nan, np.nan]), TINY: np.array([0.6, np.nan, np.nan])},
    ]
    found = report.summarize(runs)
    assert found[BEFORE]["mIoU"] == pytest.approx(55)  # of 40 and 70
    assert found[BEFORE]["mIoU deviation"] == pytest.approx(30 / np.sqrt(2))
    assert found[TINY]["gain"] == pytest.approx(0)  # of +10 and -10
    assert found[TINY]["gain deviation"] == pytest.approx(20 / np.sqrt(2))
    assert found[BEFORE]["IoU"] == [pytest.approx(60), pytest.approx(30), None]
    assert report.summarize(runs[:1])[TINY]["gain deviation"] is None


def test_a_small_run_whose_masks_serve_the_next_one(tmp_path, monkeypatch):
    monkeypatch.setattr(scenes, "TINY_SAM_SETTINGS", FEW_POINTS)
    asked, generate = [], AutomaticMasks.generate
    monkeypatch.setattr(
        AutomaticMasks, "generate", lambda *args: asked.append(1) or generate(*args)
    )
    options = ["--images", "2", "--seeds", str(SEED), "--strengths", "0.5", "0.3"]
    assert sepl_evidence.main(["--output", str(tmp_path), *options]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    exact = results["strengths"]["0.3"][EXACT]
    assert list(results["strengths"]) == ["0.3", "0.5"] and exact["gain"] > 0
    # At the study's strength both tables tell the same, and fusing nothing is exact masks.
    of_strength, of_settings = results["strengths"]["0.5"], results["studies"]["settings"]
    assert all(of_strength[name] == of_settings[name] for name in of_strength)
    unfused = results["studies"]["bad masks"]["0% of touching pairs fused"]
    assert unfused == of_strength[EXACT]
    text = (tmp_path / "results.md").read_text()
    for row in (of_strength[TINY], exact):
        assert f"| {row['mIoU']:.1f} | {row['gain']:+.1f} |" in text
    for name in ("gain.png", "examples.png"):
        assert np.asarray(Image.open(tmp_path / name)).std() > 0
    assert sepl_evidence.main(["--output", str(tmp_path), *options]) == 0
    assert len(asked) == 2 and json.loads((tmp_path / "results.json").read_text()) == results


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_tiny_sams_masks_gain_where_labels_are_as_good_as_published_cams(tmp_path):
    results = sepl_evidence.run_study(tmp_path, 20, (0, 1, 2), (0.45, report.STUDY_STRENGTH))
    for row in results["strengths"].values():
        assert 50 < row[BEFORE]["mIoU"] < 62
        assert row[TINY]["gain"] > 3 * row[TINY]["gain deviation"] > 0
        assert row[EXACT]["gain"] > row[TINY]["gain"]
