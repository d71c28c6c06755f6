"""SAM measured on labeled images before training, and what follows from it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from s4m_d2.engine.checks.resource_checks import sam_blueprint
from s4m_d2.engine.labeling import sam_quality
from s4m_d2.engine.labeling.gate import decide_by_sam, labeling_of_run
from s4m_d2.engine.labeling.sam_quality import labeled_quality, sam_findings
from s4m_d2.engine.stages import stage_config
from s4m_d2.semi.refinement import TeacherMasks

from .test_quality import Oracle


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
def test_a_sam_whose_masks_are_poor_is_not_used(small_config, monkeypatch, gate, useful, stays):
    """Refinement is decided so with the three labeled images that there are."""
    monkeypatch.setattr(sam_quality, "USEFUL_IOU", useful)
    cfg = small_config(S4M__REFINE__GATE=gate)
    teacher, student = (
        decide_by_sam(stage_config(cfg, stage), stage, resume=False).S4M
        for stage in ("teacher", "student")
    )
    assert teacher.DISTILL.ENABLED == stays and teacher.REFINE.ENABLED
    assert (student.REFINE.ENABLED, student.ARP.ENABLED) == (stays, stays)
    assert cfg.S4M.DISTILL.ENABLED and cfg.S4M.REFINE.ENABLED  # unchanged
    labeling = labeling_of_run(cfg, f"{cfg.OUTPUT_DIR}/student/model_final.pth", Oracle())
    assert isinstance(labeling.refiner, TeacherMasks) != stays and (labeling.arp is None) != stays
    assert Path(cfg.OUTPUT_DIR, "teacher", sam_quality.RESULT).is_file() == (gate != "off")
    own = small_config(S4M__REFINE__GATE=gate, S4M__ARP__GATED=False)
    assert decide_by_sam(stage_config(own, "student"), "student", resume=False).S4M.ARP.ENABLED


def test_a_continued_run_keeps_what_it_began_with(stage_1, monkeypatch):
    cfg = stage_1(S4M__REFINE__GATE="auto")
    monkeypatch.setattr(sam_quality, "USEFUL_IOU", 1.0)
    decide_by_sam(cfg, "teacher", resume=False)
    torch.save({}, Path(cfg.OUTPUT_DIR, "model_0000001.pth"))
    Path(cfg.OUTPUT_DIR, "last_checkpoint").write_text("model_0000001.pth")
    monkeypatch.setattr(sam_quality, "labeled_quality", None)  # it would be called
    assert not decide_by_sam(cfg, "teacher", resume=True).S4M.DISTILL.ENABLED
    Path(cfg.OUTPUT_DIR, sam_quality.RESULT).unlink()  # of a run that began without
    assert decide_by_sam(cfg, "teacher", resume=True).S4M.DISTILL.ENABLED


def test_the_check_measures_where_that_is_quick(small_config, monkeypatch):
    cfg = small_config()
    sam = sam_blueprint(cfg)
    assert sam_findings(cfg, None) == []
    [measured] = sam_findings(cfg, sam)
    assert f"IoU {labeled_quality(cfg)['iou']:.2f}" in measured.text
    [unread] = sam_findings(small_config(DATASETS__TRAIN=("nothing",)), sam)
    assert unread.status == "warning"
    monkeypatch.setattr(sam_quality, "labeled_quality", None)  # it would be called
    monkeypatch.setattr(sam_quality, "_QUICK_BYTES", 0)
    assert sam_findings(cfg, sam)[0].status == "ok"
