"""What a stage-2 checkpoint holds, and continuing from one that lacks a part of it."""

import logging
import os

import pytest
import torch

from s4m_d2.engine import S4MCheckpointer, S4MTrainer, TeacherTrainer, stage_config
from s4m_d2.errors import ConfigError, WeightsError

ITERATIONS, BURN_IN = 2, 1


@pytest.fixture
def config(small_config):
    changes = {
        "SOLVER__MAX_ITER": ITERATIONS,
        "S4M__BURN_IN": BURN_IN,
        "S4M__REFINE__ENABLED": False,  # no SAM: it is not part of checkpoints
        "DATASETS__TEST": "()",
    }
    return lambda **more: stage_config(small_config(**(changes | more)), "student")


@pytest.fixture
def trainer(config):
    """Builds trainers of stage 2 on an untrained teacher."""
    cfg = config()
    folder = os.path.join(cfg.OUTPUT_DIR, "stage_one")
    S4MCheckpointer(TeacherTrainer.build_model(cfg), folder).save("model_final")
    return lambda **more: S4MTrainer(config(**more), os.path.join(folder, "model_final.pth"))


@pytest.fixture
def finished(trainer):
    """The path of the last checkpoint of a short run of stage 2, and its trainer."""
    run = trainer()
    os.makedirs(run.cfg.OUTPUT_DIR, exist_ok=True)
    run.train()
    return os.path.join(run.cfg.OUTPUT_DIR, "model_final.pth"), run


def change(path, edit):
    content = torch.load(path, weights_only=True)
    edit(content["trainer"])
    torch.save(content, path)


def test_a_checkpoint_holds_all_that_a_run_needs_to_continue(finished):
    path, run = finished
    content = torch.load(path, weights_only=True)
    names = run.trained_model.state_dict().keys()
    state, hooks = content["trainer"], content["trainer"]["hooks"]
    assert content["iteration"] == state["iteration"] == ITERATIONS - 1
    assert content["model"].keys() == hooks["EMATeacherHook"]["teacher"].keys() == names
    assert len(state["_trainer"]["optimizer"]["state"]) > 100
    assert hooks["LRScheduler"]["last_epoch"] == ITERATIONS
    assert hooks["RunStateHook"]["position"] == {
        "iteration": ITERATIONS,
        "labeled_images": 2 * ITERATIONS,
        "unlabeled_images": 2 * ITERATIONS,
        "burn_in": BURN_IN,
        "next_teacher_phase": "EMA",
    }
    assert hooks["RunStateHook"]["settings"]["SEED"] == run.cfg.SEED


def test_a_checkpoint_without_the_teacher_is_refused_once_it_cannot_be_made_again(
    finished, trainer
):
    path, _ = finished
    change(path, lambda state: state["hooks"].pop("EMATeacherHook"))
    resumed = trainer()
    with pytest.raises(WeightsError, match="past the burn-in of 1.*holds no EMA teacher"):
        resumed.resume_or_load(resume=True)
    longer = {"S4M__BURN_IN": ITERATIONS, "SOLVER__MAX_ITER": ITERATIONS + 1}
    with pytest.raises(ConfigError, match="S4M.BURN_IN is 2 and was 1"):
        trainer(**longer).resume_or_load(resume=True)
    change(path, lambda state: state["hooks"].pop("RunStateHook"))  # of a program without it
    resumed = trainer(**longer)  # the student is copied there
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == ITERATIONS
    assert "model_final.pth" not in os.listdir(resumed.cfg.OUTPUT_DIR)


def test_another_seed_and_batch_are_noticed_by_the_trainer(finished, trainer, caplog):
    with caplog.at_level(logging.WARNING):
        trainer(SEED=77, SOLVER__IMS_PER_BATCH=4).resume_or_load(resume=True)
    for name in ("SEED", "SOLVER.IMS_PER_BATCH", "S4M.UNLABELED_IMS_PER_BATCH"):
        assert f"{name} was" in caplog.text
    assert "S4M.BURN_IN was" not in caplog.text


def test_the_loss_scale_is_saved_and_starts_anew_where_it_was_not(finished, trainer, caplog):
    path, _ = finished
    resumed = trainer()
    resumed._trainer.grad_scaler = scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with caplog.at_level(logging.WARNING):
        resumed.resume_or_load(resume=True)
    assert "loss scale" in caplog.text
    assert scaler.get_scale() == 8.0

    change(path, lambda state: state["_trainer"].update(grad_scaler=scaler.state_dict()))
    change(path, lambda state: state["_trainer"]["grad_scaler"].update(scale=2.0))
    resumed.resume_or_load(resume=True)
    assert scaler.get_scale() == 2.0
    assert resumed.state_dict()["_trainer"]["grad_scaler"]["scale"] == 2.0
