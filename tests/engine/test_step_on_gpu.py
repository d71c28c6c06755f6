"""Both stages on a GPU, and how often the host waits for it. A simulated one will do."""

import warnings

import pytest
import torch

from s4m_d2.engine import S4MCheckpointer, S4MTrainer, TeacherTrainer, stage_config


@pytest.fixture(scope="module")
def config(shared_config):
    def make(stage, **changes):
        changes |= {"MODEL__DEVICE": "cuda", "DATASETS__TEST": "()", "S4M__BURN_IN": 1}
        changes |= {"SOLVER__AMP__ENABLED": True, "MODEL__MASK_FORMER__NO_OBJECT_WEIGHT": 0.0}
        changes |= {"SOLVER__MAX_ITER": 2, "S4M__TEACHER__MAX_ITER": 2}
        return stage_config(shared_config("gpu", **changes), stage)

    return make


def watched(seen, trainer, phase):
    """Note (iteration, phase, message) of each synchronization in a phase of the step."""
    owner = trainer.model if phase == "forward" else trainer._trainer
    part = getattr(owner, phase)

    def watch(*args):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                return part(*args)
            finally:
                torch.cuda.set_sync_debug_mode("default")
                messages = [text for w in caught if "synchronizing" in (text := str(w.message))]
                seen.extend((trainer.iter, phase, text) for text in messages)

    setattr(owner, phase, watch)


def run(trainer, phases):
    """Run it; no phase of the last iteration may synchronize more often than its bound."""
    seen = []
    for phase in phases:
        watched(seen, trainer, phase)
    trainer._trainer.grad_scaler._init_scale = 8.0  # a larger one would overflow: no update
    trainer.train()
    for phase, bound in phases.items():
        found = [text for i, of, text in seen if (i, of) == (trainer.max_iter - 1, phase)]
        assert 0 < len(found) <= bound, found
    return {name: value for name, (value, _) in trainer.storage.latest().items()}


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float16", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_step_of_stage_two_synchronizes_as_often_as_it_must(config, precision):
    changes = {"S4M__AMP_PRECISION": precision}
    changes["S4M__ARP__RANDOM_PLACEMENT"] = precision == "float16"  # each once
    cfg = config("student", **changes)
    teacher = S4MTrainer.build_model(cfg)
    S4MCheckpointer(teacher, cfg.OUTPUT_DIR).save("teacher")
    trainer = S4MTrainer(cfg, f"{cfg.OUTPUT_DIR}/teacher.pth")
    # What the teacher found; SAM's masks, and those in whose place the teacher's stay; what is
    # left after ARP. One matching for each loss. Losses and gradients; the loss scaler.
    latest = run(trainer, {"labeling": 4, "forward": 2, "finish": 1 + (precision == "float16")})
    assert latest["pseudo_labels/per_image_after_arp"] > 1 and latest["train/bad_steps"] == 0


@pytest.mark.gpu
def test_a_step_of_stage_one_synchronizes_as_often_as_it_must(config):
    latest = run(TeacherTrainer(config("teacher")), {"forward": 1, "finish": 2})
    assert latest["loss_sd"] > 0 and latest["train/bad_steps"] == 0
