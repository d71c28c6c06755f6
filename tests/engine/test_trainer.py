"""The stages on a very small data set: how they start, states, what is saved and logged."""

import copy
import itertools
import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.engine import HookBase
from helpers import json_lines, logged
from PIL import Image

from s4m_d2.engine import FineTuneTrainer, S4MCheckpointer, S4MTrainer, TeacherTrainer, stage_config
from s4m_d2.engine.figures.figure_set import FIGURES
from s4m_d2.engine.labeling.quality import RECORDS
from s4m_d2.engine.training.build import build_labeled_loader
from s4m_d2.errors import ConfigError, WeightsError
from s4m_d2.sepl.refiner import SEPLRefiner
from s4m_d2.structures import RLEMasks

from .sameness import assert_same

ITERATIONS, BURN_IN = 4, 2
BARE = {"S4M__REFINE__ENABLED": False, "S4M__DISTILL__ENABLED": False, "DATASETS__TEST": "()"}
BEYOND_THE_PAPER = {
    "S4M__PSEUDO_LABEL__SCORE_THRESH": 0.1,
    "S4M__PSEUDO_LABEL__CLASS_THRESH": "auto",
    "S4M__PSEUDO_LABEL__LABEL_WEIGHT": True,
    "S4M__PSEUDO_LABEL__PIXEL_WEIGHT": True,
}
WATCHED = {"S4M__QUALITY__PERIOD": 1, "S4M__QUALITY__MAX_IMAGES": 1}
WATCHED |= {"S4M__FIGURES__PERIOD": 3, "S4M__FIGURES__IMAGES": 1}
SEPL = {
    "S4M__REFINE__METHOD": "sepl",
    "S4M__REFINE__SEPL__O_S_THRESH": 0.3,
    "S4M__REFINE__SEPL__POINTS_PER_SIDE": 4,
    "S4M__REFINE__SEPL__PRED_IOU_THRESH": 0.3,
    "S4M__REFINE__SEPL__STABILITY_SCORE_THRESH": 0.3,
}


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


@pytest.fixture(scope="module")
def configs(shared_config):
    """(stage, folder, more overrides) → config of that stage."""

    def make(stage, folder, **changes):
        changes = {
            "SOLVER__MAX_ITER": ITERATIONS,
            "SOLVER__CHECKPOINT_PERIOD": 2,
            "S4M__TEACHER__MAX_ITER": ITERATIONS,
            "S4M__BURN_IN": BURN_IN,
            "S4M__EMA_DECAY": 0.5,
        } | changes
        return stage_config(shared_config(folder, **changes), stage)

    return make


@pytest.fixture(scope="module")
def teacher_weights(configs) -> str:
    """An untrained stage-1 checkpoint: whatever it labels will do here."""
    cfg = configs("student", "untrained", SEED=5)
    model = S4MTrainer.build_model(cfg)
    S4MCheckpointer(model, cfg.OUTPUT_DIR).save("model_final")
    return os.path.join(cfg.OUTPUT_DIR, "model_final.pth")


@pytest.fixture(scope="module")
def whole(configs, teacher_weights):
    """An unbroken run of stage 2, with SAM and evaluation."""
    return run(S4MTrainer(configs("student", "whole", **BEYOND_THE_PAPER), teacher_weights))


def test_a_run_that_is_measured_and_drawn_is_the_run_without_it_even_if_it_is_stopped(
    configs, teacher_weights, whole
):
    """The state that a stopped run continues from is the same too, and no line comes twice."""

    def make():
        cfg = configs("student", "watched", **BEYOND_THE_PAPER, **WATCHED)
        return S4MTrainer(cfg, teacher_weights)

    with pytest.raises(Killed):
        run(make(), kill_after=2)  # saved after iteration 1
    resumed = run(make(), resume=True)
    assert resumed.start_iter == 2
    states = final_state(whole), final_state(resumed)
    for state in states:
        state["trainer"]["hooks"].pop("UnwrittenMetricsHook")  # has what was measured
    assert states[0]["trainer"]["class_thresholds"]["batches"].max() == 4  # not labelings
    assert_same(*states)

    without, folder = (Path(trainer.cfg.OUTPUT_DIR) for trainer in (whole, resumed))
    assert not (without / RECORDS).exists() and not (without / "figures").exists()
    lines = json_lines(folder / RECORDS)
    assert [entry["iteration"] for entry in lines] == [0, 1, 2, 3]  # the third was measured anew
    measured, last = logged(folder), lines[-1]["after"]["overall"]
    for name in ("class_accuracy", "sq", "precision", "recall", "pq"):
        assert measured.get(f"pseudo_label_quality/after/{name}") == last[name]
    drawn = {path.name for path in (folder / "figures").iterdir()}
    assert drawn == {f"{name}_0000003.png" for name in FIGURES}
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    shown, picture = events.Images("figures/arp")[-1], folder / "figures" / "arp_0000003.png"
    assert (shown.width, shown.height) == Image.open(picture).size


def test_sepl_redraws_the_masks_of_a_run(configs, teacher_weights):
    changes = SEPL | {"SOLVER__MAX_ITER": 1, "DATASETS__TEST": "()"}
    trainer = run(S4MTrainer(configs("student", "sepl", **changes), teacher_weights))
    assert isinstance(trainer.pseudo_labeling.refiner, SEPLRefiner)
    values = logged(trainer.cfg.OUTPUT_DIR)
    assert 0 <= values["refinement/fallbacks"] < 1
    assert 0.3 < values["refinement/predicted_iou"] <= 1.5


@pytest.mark.parametrize(
    ("precision", "computed"), [("float16", torch.float32), ("bfloat16", torch.bfloat16)]
)
def test_a_cpu_trains_in_bfloat16_where_that_is_asked_for(
    configs, teacher_weights, precision, computed
):
    changes = BARE | {"SOLVER__AMP__ENABLED": True, "S4M__AMP_PRECISION": precision}
    changes |= {"SOLVER__MAX_ITER": 1, "S4M__BURN_IN": 0}
    trainer = S4MTrainer(configs("student", precision, **changes), teacher_weights)
    seen = []
    predictor = trainer.trained_model.sem_seg_head.predictor
    predictor.class_embed.register_forward_hook(
        lambda layer, _, output: seen.append(output.dtype) if layer.training else None
    )
    run(trainer)
    assert set(seen) == {computed}
    assert all(p.dtype == torch.float32 for p in trainer.trained_model.parameters())


@pytest.mark.parametrize(("stage", "once"), [("teacher", True), ("student", False)])
def test_repeat_factors_are_for_the_stage_that_asks_for_them(small_config, stage, once):
    """As released: stage 2 alone, where no config says otherwise."""
    sampler = "RepeatFactorTrainingSampler"
    cfg = small_config(DATASETS__TRAIN="('toyscapes_train',)", DATALOADER__SAMPLER_TRAIN=sampler)
    batches = itertools.islice(build_labeled_loader(stage_config(cfg, stage)), 5)
    names = [sample["file_name"] for batch in batches for sample in batch]
    assert (len(set(names)) == len(names) == 10) == once


def test_a_checkpoint_holds_all_that_a_run_needs_to_continue_and_no_sam(whole):
    content, names = final_state(whole), whole.trained_model.state_dict().keys()
    state, hooks = content["trainer"], content["trainer"]["hooks"]
    assert content["iteration"] == state["iteration"] == ITERATIONS - 1
    assert content["model"].keys() == hooks["EMATeacherHook"]["teacher"].keys() == names
    assert len(state["_trainer"]["optimizer"]["state"]) > 100
    assert hooks["LRScheduler"]["last_epoch"] == ITERATIONS
    assert hooks["RunStateHook"]["settings"]["SEED"] == whole.cfg.SEED
    trained = {id(p) for group in whole.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in whole.trained_model.parameters() if p.requires_grad}


def test_what_a_step_does_is_logged_and_results_are_written(whole):
    last = logged(whole.cfg.OUTPUT_DIR)
    losses = {f"{part}loss_{name}" for part in ("", "unsup/") for name in ("ce", "mask", "dice")}
    others = {"pseudo_labels/per_image", "teacher/phase", "segm/AP", "teacher/segm/AP"}
    assert losses | others <= last.keys() and "loss_sd" not in last
    results = json.loads(Path(whole.cfg.OUTPUT_DIR, "results.json").read_text())
    assert {"AP", "AP50"} <= results["segm"].keys() & results["teacher"]["segm"].keys()


def test_the_predictions_that_stay_are_the_students(whole, monkeypatch, tmp_path):
    file = tmp_path / "predictions"

    def write(cfg, model):
        file.write_text("student" if model is whole.trained_model else "teacher")
        return {"segm": {}}

    monkeypatch.setattr(S4MTrainer, "test", staticmethod(write))
    assert list(whole.evaluate()) == ["segm", "teacher"] and file.read_text() == "student"


@pytest.mark.parametrize("copies", [True, False])
def test_a_student_may_start_as_a_copy_of_the_teacher(configs, teacher_weights, copies):
    changes = BARE | {"S4M__STUDENT_FROM_TEACHER": copies}
    trainer = S4MTrainer(configs("student", "start", **changes), teacher_weights)
    trainer.resume_or_load(resume=False)
    models = trainer.trained_model, trainer.teacher.model
    pairs = zip(*(model.state_dict().values() for model in models), strict=True)
    assert all(torch.equal(*pair) for pair in pairs) == copies


def test_fine_tuning_starts_with_the_student(configs, whole):
    """Not with the EMA teacher."""
    cfg = configs("finetune", "tuned", S4M__FINETUNE__MAX_ITER=3)
    shutil.copytree(whole.cfg.OUTPUT_DIR, Path(cfg.OUTPUT_DIR).with_name("student"))
    tuned = FineTuneTrainer(cfg)
    tuned.resume_or_load()
    assert_same(dict(tuned.trained_model.state_dict()), dict(final_state(whole)["model"]))
    assert tuned.optimizer.defaults["lr"] == pytest.approx(0.1 * whole.cfg.SOLVER.BASE_LR)


def test_without_its_components_it_is_guided_distillation_which_needs_no_sam(
    configs, teacher_weights
):
    changes = {f"S4M__{name}__ENABLED": False for name in ("DISTILL", "REFINE", "ARP")}
    changes |= {"S4M__SAM__CHECKPOINT": "missing.pth"}
    teacher = TeacherTrainer(configs("teacher", "run", **changes))
    assert teacher.trained_model.distillation is None
    labeling = S4MTrainer(configs("student", "run", **changes), teacher_weights).pseudo_labeling
    assert labeling.arp is None and not hasattr(labeling.refiner, "backend")


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

    changes = BARE | {"SOLVER__MAX_ITER": 1, "S4M__UNLABELED_IMS_PER_BATCH": 10}  # all images
    trainer = run(S4MTrainer(configs("student", "skip", **changes), teacher_weights))
    assert logged(trainer.cfg.OUTPUT_DIR)["data/skipped_images"] == 1
    assert damaged in caplog.text
    resumed = S4MTrainer(configs("student", "skip", **changes), teacher_weights)
    resumed.resume_or_load(resume=True)
    assert list(resumed.data_loader.unlabeled.skipped_images) == [damaged]


def test_single_images_and_a_teacher_without_pseudo_labels_train(configs, teacher_weights):
    changes = BARE | {"SOLVER__MAX_ITER": 1, "SOLVER__IMS_PER_BATCH": 1}
    changes |= {"S4M__PSEUDO_LABEL__SCORE_THRESH": 1.0}  # nothing is that certain
    trainer = S4MTrainer(configs("student", "single", **changes), teacher_weights)
    before = [p.clone() for p in trainer.trained_model.backbone.parameters()]
    run(trainer)
    assert not all(map(torch.equal, before, trainer.trained_model.backbone.parameters()))
    assert all(torch.isfinite(p).all() for p in trainer.trained_model.parameters())


@pytest.fixture
def continued(configs, teacher_weights, whole, tmp_path):
    """(edit, more overrides) → a trainer that is to continue an edited copy of the whole run."""

    def make(edit=lambda state: None, **changes):
        folder = tmp_path / "run" / "student"
        shutil.copytree(whole.cfg.OUTPUT_DIR, folder, dirs_exist_ok=True)
        content = final_state(whole)
        edit(content["trainer"])
        torch.save(content, folder / "model_final.pth")
        changes = BARE | {"OUTPUT_DIR": str(tmp_path / "run")} | changes
        return S4MTrainer(configs("student", "run", **changes), teacher_weights)

    return make


def without(*hooks):
    return lambda state: [state["hooks"].pop(hook) for hook in hooks]


def test_a_checkpoint_without_the_teacher_is_refused_once_it_cannot_be_made_again(continued):
    with pytest.raises(WeightsError, match="EMA teacher"):
        continued(without("EMATeacherHook")).resume_or_load(resume=True)
    longer = {"S4M__BURN_IN": ITERATIONS, "SOLVER__MAX_ITER": ITERATIONS + 1}
    with pytest.raises(ConfigError, match="S4M.BURN_IN"):
        continued(**longer).resume_or_load(resume=True)
    # Of a program that does not write its settings; the student is copied at this iteration.
    resumed = continued(without("EMATeacherHook", "RunStateHook"), **longer)
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == ITERATIONS
    assert "model_final.pth" not in os.listdir(resumed.cfg.OUTPUT_DIR)


def test_a_continued_student_is_not_copied_again(continued, whole):
    resumed = continued(S4M__STUDENT_FROM_TEACHER=True, SOLVER__MAX_ITER=ITERATIONS + 1)
    resumed.resume_or_load(resume=True)
    assert_same(dict(resumed.trained_model.state_dict()), dict(final_state(whole)["model"]))


def test_another_seed_and_batch_are_noticed(continued, caplog):
    with caplog.at_level(logging.WARNING):
        continued(SEED=77, SOLVER__IMS_PER_BATCH=4).resume_or_load(resume=True)
    for name in ("SEED", "SOLVER.IMS_PER_BATCH", "S4M.UNLABELED_IMS_PER_BATCH"):
        assert f"{name} was" in caplog.text
    assert "S4M.BURN_IN was" not in caplog.text


def test_a_student_skips_a_step_whose_losses_are_not_finite(configs, teacher_weights):
    """Weights, buffers, optimizer and teacher stay; what a state is, is taken before each step."""
    changes = BARE | {"SOLVER__MAX_ITER": 3, "S4M__BURN_IN": 1}
    trainer = S4MTrainer(configs("student", "skips", **changes), teacher_weights)
    states = []

    def state():
        optimizer = [dict(entry) for entry in trainer.optimizer.state_dict()["state"].values()]
        models = trainer.trained_model, trainer.teacher.model
        return copy.deepcopy([optimizer, *(dict(model.state_dict()) for model in models)])

    def spoil(module, inputs, outputs):
        if trainer.iter == 1:
            return {**outputs, "pred_logits": outputs["pred_logits"] * float("nan")}
        return outputs

    class Watch(HookBase):
        def before_step(self):  # after the teacher's update, which in iteration 1 is the copy
            states.append(state())

    trainer.trained_model.sem_seg_head.register_forward_hook(spoil)
    trainer.register_hooks([Watch()])
    run(trainer)
    assert_same(states[1], states[2])
    for first, second in ((states[0], states[1]), (states[2], state())):
        with pytest.raises(AssertionError):
            assert_same(first, second)
    assert trainer.scheduler.last_epoch == 3
    assert logged(trainer.cfg.OUTPUT_DIR)["train/bad_steps"] == trainer.bad_steps.total == 1


def test_trainers_evaluate_with_encoded_masks_and_leave_the_model_as_it_was(
    small_config, monkeypatch
):
    """Dense ones, which a model returns to anyone else, have the same results: test_evaluators."""
    cfg = stage_config(small_config(), "student")
    model = S4MTrainer.build_model(cfg).eval()
    forward, returned = model.forward, []

    def watched(samples):
        outputs = forward(samples)
        returned.extend(type(output["instances"].pred_masks) for output in outputs)
        return outputs

    monkeypatch.setattr(model, "forward", watched)
    S4MTrainer.test(cfg, model)
    assert returned == [RLEMasks] * 2 and model.rle_masks is False
