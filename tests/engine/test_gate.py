"""Refinement measured on labeled images that stage 1 left out."""

import itertools
from dataclasses import replace

import pytest
import torch

from s4m_d2.engine import FineTuneTrainer, PseudoLabeling, S4MTrainer, TeacherTrainer
from s4m_d2.engine.labeling.gate import apply_decision, compare_refinement
from s4m_d2.engine.labeling.quality import held_out_records
from s4m_d2.engine.own_data import load_run
from s4m_d2.semi.ema_teacher import EMATeacher
from s4m_d2.semi.refinement import TeacherMasks

from .conftest import ROOT
from .test_quality import Oracle

CONFIG = str(ROOT / "configs" / "toyscapes_10pct.yaml")
SHIFT = 3  # px


class Shifted(Oracle):
    """Its masks are right, but too far to the right."""

    def predict_queries(self, batch):
        found = super().predict_queries(batch)
        return found | {"pred_masks": found["pred_masks"].roll(SHIFT, dims=3)}


class Shift:
    """A refiner that moves masks to the left, if it is asked with a box, else to the right."""

    def __init__(self, cfg):
        self.masks, self.prompt = TeacherMasks(), "points"

    def __call__(self, *args):
        found = self.masks(*args)
        by = -SHIFT if self.prompt == "box" else SHIFT
        labels = [replace(x, masks=x.masks.roll(by, dims=2), areas=None) for x in found.labels]
        return replace(found, labels=labels, predicted_ious=torch.ones(1))


@pytest.fixture
def gate_config(small_config):
    def make(gate="auto", prompt="points", **changes):
        base = {"DATASETS__TRAIN": ("toyscapes_train",), "S4M__PSEUDO_LABEL__MIN_AREA": 0.0}
        changes = {"S4M__REFINE__GATE": gate, "S4M__REFINE__PROMPT": prompt} | changes
        return small_config(**base | changes)

    return make


@pytest.mark.parametrize(
    ("teacher", "gate", "prompt", "choice"),
    [
        (Oracle, "warn", "points", "points"),
        (Oracle, "auto", "auto", "off"),
        (Shifted, "auto", "auto", "box"),
        (Shifted, "auto", "both", "off"),
    ],
)
def test_what_makes_masks_worse_is_switched_off_and_the_best_prompt_taken(
    gate_config, teacher, gate, prompt, choice
):
    cfg = gate_config(gate, prompt)
    labeling = PseudoLabeling(cfg, EMATeacher(teacher(), 0.5))
    labeling.refiner = Shift(cfg)
    decision = compare_refinement(cfg, labeling)
    assert decision["choice"] == choice and decision["images"] == 2
    assert (decision["pq"]["before"] == 1.0) == (teacher is Oracle)
    assert len(decision["pq"]) == (4 if prompt == "auto" else 2)
    again = PseudoLabeling(cfg, EMATeacher(teacher(), 0.5))  # of a run that continues
    for part in (labeling, again):
        apply_decision(decision, part)
        assert isinstance(part.refiner, TeacherMasks) == (part.arp is None) == (choice == "off")
        assert choice == "off" or part.refiner.prompt == choice


@pytest.mark.parametrize(
    ("options", "stays"),
    [
        ([], False),
        (["S4M.ARP.ENABLED", "True"], True),
        (["S4M.ARP.ENABLED", "True", "S4M.ARP.GATED", "True"], False),
    ],
)
def test_arp_that_the_user_set_stays_without_refinement(small_options, options, stays):
    changes = {"DATASETS__TRAIN": ("toyscapes_train",), "S4M__PSEUDO_LABEL__MIN_AREA": 0.0}
    words = [*small_options(**changes), "S4M.REFINE.GATE", "auto"]
    cfg, _ = load_run(CONFIG, [*words, *options])
    labeling = PseudoLabeling(cfg, EMATeacher(Oracle(), 0.5))
    labeling.refiner = Shift(cfg)
    apply_decision(compare_refinement(cfg, labeling), labeling)
    assert isinstance(labeling.refiner, TeacherMasks) and (labeling.arp is not None) == stays


def test_stage_1_leaves_out_what_is_measured_and_later_stages_do_not(gate_config):
    cfg = gate_config()
    held_out = {record["file_name"] for record in held_out_records(cfg)}
    assert len(held_out) == 2
    seen = {}
    for trainer in (TeacherTrainer, S4MTrainer, FineTuneTrainer):
        loader = trainer.build_train_loader(cfg)
        labeled = loader.labeled if trainer is S4MTrainer else loader
        batches = itertools.islice(iter(labeled), 20 // cfg.SOLVER.IMS_PER_BATCH)
        seen[trainer] = {sample["file_name"] for batch in batches for sample in batch}
    assert not held_out & seen[TeacherTrainer]
    assert held_out <= seen[S4MTrainer] & seen[FineTuneTrainer]


def test_nothing_is_left_out_where_nothing_is_measured(gate_config):
    for changes in (
        {"gate": "off"},
        {"S4M__REFINE__ENABLED": False},
        {"S4M__STAGE": "teacher"},
        {"S4M__TEACHER_WEIGHTS": "teacher.pth"},
        {"DATASETS__TRAIN": ("toyscapes_train_30pct",)},  # 3 images
    ):
        assert held_out_records(gate_config(**changes)) == []
