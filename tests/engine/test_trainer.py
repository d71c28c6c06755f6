"""Both stages on a very small data set: continuing exactly, states, what is saved and logged."""

import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.engine import HookBase

from s4m_d2.engine import S4MCheckpointer, S4MTrainer, TeacherTrainer, stage_config
from s4m_d2.engine.training.build import build_labeled_loader

from .sameness import assert_same

ITERATIONS = 4
BURN_IN = 2


class Killed(Exception):
    """Stands for whatever ends a run."""


class KillAfter(HookBase):
    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def after_step(self) -> None:
        if self.trainer.iter == self.iteration:
            raise Killed


def run(trainer, resume=False, kill_after=None):
    os.makedirs(trainer.cfg.OUTPUT_DIR, exist_ok=True)
    trainer.resume_or_load(resume=resume)
    if kill_after is not None:
        trainer.register_hooks([KillAfter(kill_after)])
    trainer.train()
    return trainer


def final_state(trainer) -> dict:
    path = os.path.join(trainer.cfg.OUTPUT_DIR, "model_final.pth")
    return torch.load(path, weights_only=True)


def logged(trainer) -> dict[str, float]:
    """The last value of everything that the run logged."""
    lines = Path(trainer.cfg.OUTPUT_DIR, "metrics.json").read_text().splitlines()
    return {key: value for line in lines for key, value in json.loads(line).items()}


@pytest.fixture
def configs(small_config, tmp_path):
    """(stage, folder, more overrides) → config of that stage."""

    def make(stage, folder, **changes):
        changes = {
            "SOLVER__MAX_ITER": ITERATIONS,
            "SOLVER__CHECKPOINT_PERIOD": 2,
            "S4M__TEACHER__MAX_ITER": ITERATIONS,
            "S4M__BURN_IN": BURN_IN,
            "S4M__EMA_DECAY": 0.5,
        } | changes
        return stage_config(small_config(OUTPUT_DIR=str(tmp_path / folder), **changes), stage)

    return make


@pytest.fixture
def teacher_weights(configs) -> str:
    """An untrained stage-1 checkpoint: whatever it labels will do here."""
    cfg = configs("student", "untrained", SEED=5)
    model = S4MTrainer.build_model(cfg)
    S4MCheckpointer(model, cfg.OUTPUT_DIR).save("model_final")
    return os.path.join(cfg.OUTPUT_DIR, "model_final.pth")


@pytest.mark.parametrize(("stage", "once"), [("teacher", True), ("student", False)])
def test_repeat_factors_are_for_the_stage_that_asks_for_them(small_config, stage, once):
    """As released: stage 2 alone, where no config says otherwise."""
    sampler = "RepeatFactorTrainingSampler"
    cfg = small_config(DATASETS__TRAIN="('toyscapes_train',)", DATALOADER__SAMPLER_TRAIN=sampler)
    batches = itertools.islice(build_labeled_loader(stage_config(cfg, stage)), 5)
    names = [sample["file_name"] for batch in batches for sample in batch]
    assert (len(set(names)) == len(names) == 10) == once


def test_a_teacher_continued_after_a_kill_is_the_teacher_of_an_unbroken_run(configs):
    whole = run(TeacherTrainer(configs("teacher", "whole", DATALOADER__NUM_WORKERS=1)))
    with pytest.raises(Killed):
        run(TeacherTrainer(configs("teacher", "broken")), kill_after=2)
    torch.manual_seed(99)  # whatever the new process drew before
    resumed = run(TeacherTrainer(configs("teacher", "broken")), resume=True)
    assert resumed.start_iter == 2
    assert_same(final_state(whole), final_state(resumed))


@pytest.mark.parametrize("last_saved", [1, 2], ids=["before-burn-in-ends", "after"])
def test_a_student_continued_after_a_kill_is_the_student_of_an_unbroken_run(
    configs, teacher_weights, last_saved
):
    changes = {"SOLVER__CHECKPOINT_PERIOD": last_saved + 1}
    whole = run(S4MTrainer(configs("student", "whole", **changes), teacher_weights))
    torch.manual_seed(98)
    with pytest.raises(Killed):
        run(
            S4MTrainer(configs("student", "broken", **changes), teacher_weights),
            kill_after=last_saved,
        )
    torch.manual_seed(99)
    resumed = S4MTrainer(configs("student", "broken", **changes), teacher_weights)
    run(resumed, resume=True)
    assert resumed.start_iter == last_saved + 1
    first, second = final_state(whole), final_state(resumed)
    assert_same(first["model"], second["model"])
    assert_same(first["trainer"]["hooks"], second["trainer"]["hooks"])


def test_the_student_starts_afresh_and_the_teacher_from_stage_one(configs, teacher_weights):
    trainer = S4MTrainer(configs("student", "run"), teacher_weights)
    stage_one = torch.load(teacher_weights, weights_only=True)["model"]
    own = trainer.trained_model.state_dict()
    teacher = trainer.teacher.model.state_dict()
    assert all(torch.equal(teacher[name], value) for name, value in stage_one.items())
    name = "sem_seg_head.predictor.query_feat.weight"
    assert not torch.equal(own[name], stage_one[name])


def test_sam_and_the_teacher_are_not_part_of_the_student(configs, teacher_weights):
    trainer = run(S4MTrainer(configs("student", "run", S4M__BURN_IN=1), teacher_weights))
    stage_one = torch.load(teacher_weights, weights_only=True)["model"]
    saved = final_state(trainer)
    assert saved["model"].keys() == stage_one.keys()
    assert saved["trainer"]["hooks"]["EMATeacherHook"]["teacher"].keys() == stage_one.keys()
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in trainer.trained_model.parameters() if p.requires_grad}


def test_what_a_step_does_is_logged(configs, teacher_weights):
    trainer = run(S4MTrainer(configs("student", "run"), teacher_weights))
    last = logged(trainer)
    assert {
        "loss_ce",
        "loss_mask",
        "loss_dice",
        "unsup/loss_ce",
        "unsup/loss_mask",
        "unsup/loss_dice",
        "pseudo_labels/per_image",
        "pseudo_labels/dropped_no_object",
        "pseudo_labels/dropped_score",
        "pseudo_labels/dropped_area",
        "teacher/phase",
        "segm/AP",
        "teacher/segm/AP",
    } <= last.keys()
    assert "loss_sd" not in last


def test_results_are_written_when_training_ends(configs, teacher_weights):
    trainer = run(S4MTrainer(configs("student", "run"), teacher_weights))
    with open(os.path.join(trainer.cfg.OUTPUT_DIR, "results.json")) as file:
        results = json.load(file)
    assert {"AP", "AP50"} <= results["segm"].keys()
    assert {"AP", "AP50"} <= results["teacher"]["segm"].keys()


@pytest.mark.parametrize(
    "switched_off",
    [("DISTILL",), ("REFINE",), ("ARP",), ("DISTILL", "REFINE", "ARP")],
    ids="+".join,
)
def test_each_component_switches_off_by_one_key(configs, teacher_weights, switched_off):
    changes = {f"S4M__{name}__ENABLED": False for name in switched_off}
    changes |= {"SOLVER__MAX_ITER": 1, "S4M__TEACHER__MAX_ITER": 1, "S4M__BURN_IN": 1}
    if len(switched_off) == 3:  # nothing is left that needs SAM
        changes |= {"S4M__SAM__CHECKPOINT": "missing.pth"}
    teacher = TeacherTrainer(configs("teacher", "run", **changes))
    assert (teacher.trained_model.distillation is None) == ("DISTILL" in switched_off)
    student = S4MTrainer(configs("student", "run", **changes), teacher_weights)
    assert student.trained_model.distillation is None
    labeling = student.pseudo_labeling
    assert (labeling.arp is None) == ("ARP" in switched_off)
    assert hasattr(labeling.refiner, "backend") != ("REFINE" in switched_off)


def test_a_corrupt_unlabeled_image_is_skipped_counted_and_training_goes_on(
    configs, teacher_weights, small_data, monkeypatch, tmp_path, caplog
):
    data = tmp_path / "damaged"
    shutil.copytree(small_data, data)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(data))
    labeled = {record["file_name"] for record in DatasetCatalog.get("toyscapes_train_30pct")}
    unlabeled = [record["file_name"] for record in DatasetCatalog.get("toyscapes_train_unlabeled")]
    damaged = next(name for name in unlabeled if name not in labeled)
    Path(damaged).write_bytes(Path(damaged).read_bytes()[:500])

    changes = {"SOLVER__MAX_ITER": 6, "S4M__BURN_IN": 6}  # 12 images: all 10 at least once
    trainer = run(S4MTrainer(configs("student", "run", **changes), teacher_weights))
    assert logged(trainer)["data/skipped_images"] == 1
    assert damaged in caplog.text
    resumed = S4MTrainer(configs("student", "run", **changes), teacher_weights)
    resumed.resume_or_load(resume=True)
    assert list(resumed.data_loader.unlabeled.skipped_images) == [damaged]


@pytest.mark.parametrize("batch", [1, 2])
def test_small_batches_and_a_teacher_without_pseudo_labels_train(configs, teacher_weights, batch):
    changes = {
        "SOLVER__MAX_ITER": 1,
        "S4M__BURN_IN": 1,
        "SOLVER__IMS_PER_BATCH": batch,
        "S4M__PSEUDO_LABEL__SCORE_THRESH": 1.0,  # nothing is that certain
    }
    trainer = S4MTrainer(configs("student", "run", **changes), teacher_weights)
    before = {name: p.clone() for name, p in trainer.trained_model.named_parameters()}
    run(trainer)
    changed = [
        name for name, p in trainer.trained_model.named_parameters() if not p.equal(before[name])
    ]
    assert any(name.startswith("backbone") for name in changed)
    assert all(torch.isfinite(p).all() for p in trainer.trained_model.parameters())
