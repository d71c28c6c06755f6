"""Both stages with predictions that are not finite in chosen iterations."""

import json
import os
from pathlib import Path

import pytest
import torch
from detectron2.engine import HookBase

from s4m_d2.engine import S4MCheckpointer, S4MTrainer, TeacherTrainer, stage_config
from s4m_d2.errors import DivergenceError

ITERATIONS, BURN_IN = 4, 1


class Diverge(HookBase):
    """Spoils what the model predicts in some iterations, and remembers states and files."""

    def __init__(self, trainer, iterations, entry="pred_logits") -> None:
        self.iterations, self.entry = set(iterations), entry
        self.states: list[list[torch.Tensor]] = []
        self.files: list[set[str]] = []
        trainer.trained_model.sem_seg_head.register_forward_hook(self.spoil)
        trainer.trained_model.register_forward_pre_hook(self.note)

    def spoil(self, module, inputs, outputs):
        if self.trainer.iter in self.iterations:
            return {**outputs, self.entry: outputs[self.entry] * float("nan")}
        return outputs

    def note(self, module, parts):
        self.files[-1] |= {sample["file_name"] for part in parts for sample in part}

    def before_step(self) -> None:
        self.files.append(set())
        self.states.append(self.state())

    def state(self) -> list[torch.Tensor]:
        """Weights, buffers, optimizer and, in stage 2, the teacher."""
        optimizer = self.trainer.optimizer.state_dict()["state"].values()
        models = [self.trainer.trained_model]
        models += [self.trainer.teacher.model] if self.trainer.has_teacher else []
        tensors = [value for entry in optimizer for value in entry.values()]
        tensors += [value for model in models for value in model.state_dict().values()]
        return [value.clone() for value in tensors]


def same(first, second) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


@pytest.fixture
def config(small_config, tmp_path):
    def make(stage, folder="run", **changes):
        changes = {
            "SOLVER__MAX_ITER": ITERATIONS,
            "S4M__TEACHER__MAX_ITER": ITERATIONS,
            "SOLVER__CHECKPOINT_PERIOD": 2,
            "S4M__BURN_IN": BURN_IN,
            "S4M__EMA_DECAY": 0.5,
            "DATASETS__TEST": "()",
        } | changes
        return stage_config(small_config(OUTPUT_DIR=str(tmp_path / folder), **changes), stage)

    return make


@pytest.fixture
def student(config):
    """Builds trainers of stage 2 on an untrained teacher."""
    cfg = config("student", "untrained", SEED=5)
    S4MCheckpointer(S4MTrainer.build_model(cfg), cfg.OUTPUT_DIR).save("model_final")
    weights = os.path.join(cfg.OUTPUT_DIR, "model_final.pth")
    return lambda folder, **changes: S4MTrainer(config("student", folder, **changes), weights)


def run(trainer, bad, until=None, resume=False, **options) -> Diverge:
    os.makedirs(trainer.cfg.OUTPUT_DIR, exist_ok=True)
    trainer.resume_or_load(resume=resume)
    diverge = Diverge(trainer, bad, **options)
    trainer.register_hooks([diverge])
    trainer.max_iter = until or trainer.max_iter
    trainer.train()
    return diverge


def records(trainer) -> list[dict]:
    folder = Path(trainer.cfg.OUTPUT_DIR, "bad_batches")
    return [json.loads(path.read_text()) for path in sorted(folder.iterdir())]


def test_a_student_skips_bad_steps_and_continues_exactly_between_them(student):
    """Iterations 1 and 2 are bad, a checkpoint is written between them, and one run ends there."""
    whole = student("whole")
    seen = run(whole, bad=[1, 2])
    # A state is taken after the teacher's update; iteration 1 begins with the copy.
    assert not same(seen.states[0], seen.states[1])
    assert same(seen.states[1], seen.states[2]) and same(seen.states[2], seen.states[3])
    assert not same(seen.states[3], seen.state())
    assert whole.scheduler.last_epoch == ITERATIONS
    assert whole.bad_steps.state_dict() == {"in_a_row": 0, "total": 2}

    [first, second] = records(whole)
    assert (first["iteration"], second["iteration"], first["seed"]) == (1, 2, whole.cfg.SEED)
    assert first["reason"] == "the loss 'loss_ce' is nan"
    files = first["processes"][0]["files"]
    assert set(files["labeled"]) | set(files["unlabeled"]) == seen.files[1]
    assert len(files["labeled"]) == len(files["unlabeled"]) == 2
    assert "unsup/loss_ce" in first["processes"][0]["losses"]
    lines = Path(whole.cfg.OUTPUT_DIR, "metrics.json").read_text().splitlines()
    assert json.loads(lines[-1])["train/bad_steps"] == 2

    run(student("broken"), bad=[1, 2], until=2)
    resumed = student("broken")
    run(resumed, bad=[1, 2], resume=True)
    assert resumed.start_iter == 2
    states = [
        torch.load(os.path.join(trainer.cfg.OUTPUT_DIR, "model_final.pth"), weights_only=True)
        for trainer in (whole, resumed)
    ]
    for name, value in states[0]["model"].items():
        assert torch.equal(value, states[1]["model"][name]), name
    hooks = [state["trainer"]["hooks"] for state in states]
    assert hooks[0]["BadSteps"] == hooks[1]["BadSteps"] == {"in_a_row": 0, "total": 2}
    for name, value in hooks[0]["EMATeacherHook"]["teacher"].items():
        assert torch.equal(value, hooks[1]["EMATeacherHook"]["teacher"][name]), name


@pytest.mark.parametrize("entry", ["pred_logits", "pred_masks"])
def test_a_teacher_that_diverges_stops_with_the_weights_before(config, entry):
    trainer = TeacherTrainer(config("teacher", S4M__MAX_BAD_STEPS=1))
    with pytest.raises(DivergenceError, match="iteration 2: 2 steps in a row") as stop:
        run(trainer, bad=[1, 2, 3], entry=entry)
    loss = "loss_ce" if entry == "pred_logits" else "loss_mask"
    assert f"the loss '{loss}' is nan" in str(stop.value)
    [seen] = [hook for hook in trainer._hooks if isinstance(hook, Diverge)]
    assert len(seen.states) == 3 and same(seen.states[1], seen.states[2])
    assert same(seen.states[1], seen.state())
    assert not same(seen.states[0], seen.states[1])
    assert all(Path(name).name in str(stop.value) for name in seen.files[2])
