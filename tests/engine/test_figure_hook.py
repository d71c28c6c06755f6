"""Figures while training goes on: what is drawn, and that training does not notice."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.engine import TrainerBase
from PIL import Image
from torch import nn

from s4m_d2.engine import S4MCheckpointer, S4MTrainer, TeacherTrainer, stage_config
from s4m_d2.engine.figures.figure_set import FIGURES, FiguresHook, figure_hooks, undisturbed
from s4m_d2.engine.rng import default_generator_states
from s4m_d2.errors import DatasetError

from .sameness import assert_same
from .test_quality import Every

WITH = {"S4M__FIGURES__PERIOD": 2, "S4M__FIGURES__IMAGES": 1}


@pytest.fixture
def train(small_config, tmp_path):
    """(folder, more overrides) → what was logged; the trainer's final state; its folder."""

    def run(folder, **changes):
        changes |= {"SOLVER__MAX_ITER": 3, "S4M__BURN_IN": 1, "S4M__EMA_DECAY": 0.5}
        cfg = small_config(OUTPUT_DIR=str(tmp_path / folder), **changes)
        cfg = stage_config(cfg, "student")
        S4MCheckpointer(S4MTrainer.build_model(cfg), str(tmp_path)).save("teacher")
        trainer = S4MTrainer(cfg, str(tmp_path / "teacher.pth"))
        os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
        trainer.evaluate = dict  # it has tests of its own
        trainer.register_hooks([every := Every()])
        trainer.train()
        state = torch.load(Path(cfg.OUTPUT_DIR, "model_final.pth"), weights_only=True)
        return every.seen, state, Path(cfg.OUTPUT_DIR)

    return run


def test_a_student_with_figures_is_the_one_without_and_so_are_its_checkpoints(train):
    losses, state, folder = train("without")
    assert not (folder / "figures").exists()
    seen, other, folder = train("with", **WITH)
    assert len(seen) == 3 and seen == losses
    assert_same(state, other)  # what a run is continued from

    assert {path.name for path in (folder / "figures").iterdir()} == {
        f"{name}_0000002.png" for name in FIGURES
    }

    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    last = events.Images("figures/arp")[-1]
    picture = Image.open(folder / "figures" / "arp_0000002.png")
    assert (last.width, last.height) == picture.size


def test_a_teacher_has_the_figures_that_it_can_have(small_config):
    cfg = stage_config(small_config(**WITH), "teacher")
    [hook] = figure_hooks(cfg, TeacherTrainer.build_model(cfg))
    assert hook.names == ["labeled", "views", "similarity", "predictions"]  # none pseudo-labeled
    assert figure_hooks(stage_config(small_config(), "teacher"), nn.Identity()) == []


def test_a_figure_that_cannot_be_drawn_leaves_modes_and_random_states():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout())
    model[0].eval()
    before = default_generator_states()
    with pytest.raises(DatasetError), undisturbed(model):
        assert not model[1].training and not model[1](torch.ones(3, 2)).requires_grad
        torch.rand(5)
        np.random.rand(5)
        raise DatasetError("a.png does not exist.")
    assert [module.training for module in model.modules()] == [True, False, True]
    assert_same(before, default_generator_states())
    assert torch.is_grad_enabled()


class Painter:
    """Figures of one color; what is named "broken" cannot be drawn."""

    def __init__(self):
        self.drawn = []

    def draw(self, name):
        self.drawn.append(name)
        if name == "broken":
            raise DatasetError("a.png does not exist.")
        return np.full((4, 6, 3), (10, 20, 30), dtype=np.uint8)


def test_figures_come_every_period_and_one_that_cannot_be_drawn_is_left_out(tmp_path, caplog):
    painter, trainer = Painter(), TrainerBase()
    trainer.run_step = lambda: None
    hook = FiguresHook(painter, ["broken", "views", "arp"], 3, str(tmp_path))
    trainer.register_hooks([hook])
    trainer.train(0, 8)
    assert painter.drawn == ["broken", "views", "arp", "arp"]
    assert caplog.text.count("a.png does not exist") == 1
    images = trainer.storage._vis_data
    names = [("figures/views", 2), ("figures/arp", 2), ("figures/arp", 5)]
    assert [(name, step) for name, _, step in images] == names
    assert images[0][1].shape == (3, 4, 6) and (images[0][1][1] == 20).all()
    files = {"views_0000003.png", "arp_0000003.png", "arp_0000006.png"}
    assert {path.name for path in tmp_path.iterdir()} == files
    assert (np.asarray(Image.open(tmp_path / "arp_0000006.png")) == [10, 20, 30]).all()
