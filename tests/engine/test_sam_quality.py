"""SAM measured on labeled images before training, and what follows from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from s4m_d2.engine.checks.resource_checks import sam_blueprint
from s4m_d2.engine.labeling import sam_quality
from s4m_d2.engine.labeling.sam_quality import decide_distillation, labeled_quality, sam_findings
from s4m_d2.engine.stages import stage_config


@pytest.fixture
def stage_1(small_config):
    return lambda **changes: stage_config(small_config(**changes), "teacher")


def test_groups_are_parts_of_all_masks_of_images_or_tiles(small_config):
    whole = labeled_quality(small_config())
    everything, *parts = whole["groups"]
    sizes = [group for group in parts if group["name"].split()[1:]]
    classes = [group for group in parts if group not in sizes]
    assert whole["images"] == 3 and everything["iou"] == whole["iou"] > 0.6
    for groups in (sizes, classes):
        assert sum(group["masks"] for group in groups) == everything["masks"]
        total = sum(group["masks"] * group["iou"] for group in groups)
        assert total == pytest.approx(everything["masks"] * everything["iou"])
    state = torch.get_rng_state()
    tiled = labeled_quality(small_config(INPUT__TILE__SIZE=48))
    assert tiled["images"] > 3 and tiled["groups"][0]["masks"] > everything["masks"]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("gate", "useful", "stays"),
    [("auto", 1.0, False), ("auto", 0.1, True), ("warn", 1.0, True), ("off", 1.0, True)],
)
def test_a_sam_whose_masks_are_poor_is_not_distilled(stage_1, monkeypatch, gate, useful, stays):
    monkeypatch.setattr(sam_quality, "USEFUL_IOU", useful)
    cfg = stage_1(S4M__REFINE__GATE=gate)
    decided = decide_distillation(cfg, resume=False)
    assert cfg.S4M.DISTILL.ENABLED and decided.S4M.DISTILL.ENABLED == stays
    path = Path(cfg.OUTPUT_DIR, sam_quality.RESULT)
    assert path.is_file() == (gate != "off")
    assert gate == "off" or json.loads(path.read_text())["distillation"] == stays


def test_a_continued_run_keeps_what_it_began_with(stage_1, monkeypatch):
    cfg = stage_1(S4M__REFINE__GATE="auto")
    monkeypatch.setattr(sam_quality, "USEFUL_IOU", 1.0)
    decide_distillation(cfg, resume=False)
    monkeypatch.setattr(sam_quality, "USEFUL_IOU", 0.1)
    torch.save({}, Path(cfg.OUTPUT_DIR, "model_0000001.pth"))
    Path(cfg.OUTPUT_DIR, "last_checkpoint").write_text("model_0000001.pth")
    assert not decide_distillation(cfg, resume=True).S4M.DISTILL.ENABLED
    Path(cfg.OUTPUT_DIR, sam_quality.RESULT).unlink()  # of a run that began without
    assert decide_distillation(cfg, resume=True).S4M.DISTILL.ENABLED


def test_the_check_measures_where_that_is_quick(small_config, monkeypatch):
    cfg = small_config()
    sam = sam_blueprint(cfg)
    assert sam_findings(cfg, None) == []
    [measured] = sam_findings(cfg, sam)
    assert f"IoU {labeled_quality(cfg)['iou']:.2f}" in measured.text
    [unread] = sam_findings(small_config(DATASETS__TRAIN=("nothing",)), sam)
    assert unread.status == "not checked"
    monkeypatch.setattr(sam_quality, "labeled_quality", None)  # it would be called
    monkeypatch.setattr(sam_quality, "_QUICK_BYTES", 0)
    assert sam_findings(cfg, sam)[0].status == "ok"
