"""Figures: pictures of known pixels in the right columns; drawn while training does not notice."""

import errno
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import visualize as tool
from detectron2.data import DatasetCatalog
from detectron2.engine import TrainerBase
from detectron2.structures import BitMasks, Instances
from helpers import QUICKSTART
from PIL import Image
from torch import nn

from s4m_d2.data import StrongView
from s4m_d2.engine import TeacherTrainer, stage_config
from s4m_d2.engine.command.arguments import split_overrides
from s4m_d2.engine.figures import figure_set
from s4m_d2.engine.labeling.pseudo_labeling import UnlabeledViews
from s4m_d2.engine.rng import default_generator_states
from s4m_d2.errors import ConfigError, DatasetError
from s4m_d2.semi.pseudo_labels import Selection
from s4m_d2.semi.refinement import TeacherMasks
from s4m_d2.structures import PseudoLabels, sample_generators

from .sameness import assert_same

SIZE = 320, 400  # readable: drawn as it is
NAMES = ["ant", "bee"]
LEFT, RIGHT, TOP = np.s_[150:310, 10:150], np.s_[150:310, 250:390], np.s_[10:100, 10:390]
PLACES = {"left": LEFT, "right": RIGHT, "top": TOP}


def masks_of(place):
    masks = torch.zeros(1, *SIZE, dtype=torch.bool)
    masks[0][place] = True
    return masks


def labels_of(place):
    return PseudoLabels(torch.zeros(1).long(), masks_of(place), torch.full((1,), 0.75))


def truth_of(place):
    masks = BitMasks(masks_of(place))
    return Instances(SIZE, gt_masks=masks, gt_classes=torch.zeros(1).long())


def image_of(level):
    return torch.full((3, *SIZE), level, dtype=torch.uint8)


def drawn_places(picture, level):
    """Which of the three places are filled; the rest of the picture must be as it was."""
    changed = (picture != level).any(2)
    shares = {name: changed[p].mean() for name, p in PLACES.items()}
    assert not changed[110:140].any(), "between the places"
    assert all(share > 0.99 or share == 0 for share in shares.values()), shares
    return {name for name, share in shares.items() if share}


def selection_of(labels):
    logits = torch.where(labels.masks, 9.0, -9.0)
    logits[:, TOP[0], TOP[1]] = 1.0  # probability 0.73
    return Selection(labels, logits, SIZE, {}, logit_thresh=2.0)


class Labeling(SimpleNamespace):
    """What labels, with the attributes of PseudoLabeling that figures look at."""

    def __init__(self, label=None, **attributes):  # copy.copy gives none
        super().__init__(label=label, **attributes)

    def __call__(self, samples):
        return self.label(samples)


@pytest.fixture
def figures(small_config):
    """Figures of samples that are given."""

    def make(samples, models=None, order="RGB", labeling=None, **changes):
        made = figure_set.FigureSet(small_config(INPUT__FORMAT=order, **changes), 2, models)
        made.names = lambda: NAMES
        made._whole = made._validation = lambda: samples
        made._labeled = lambda: [samples]
        made.labeling = labeling
        return made

    return make


def test_the_way_of_an_image_from_the_truth_to_what_the_student_predicts(figures):
    """Labeled in pairs, which exchange instances: more would take the memory of more."""
    batches = []

    def label(samples):
        batches.append(len(samples))
        refined = [labels_of(place) for place in (TOP, RIGHT)[: len(samples)]]
        selections = [selection_of(labels_of(LEFT)) for _ in samples]
        exchanged = [labels_of(RIGHT) for _ in samples]
        student = [{"image": image_of(90)} for _ in samples]
        return UnlabeledViews(student, selections, refined, [], exchanged, {})

    def model(samples):
        assert (samples[0]["height"], samples[0]["width"]) == SIZE
        found = {"pred_classes": torch.zeros(1).long(), "scores": torch.full((1,), 0.9)}
        return [{"instances": Instances(SIZE, pred_masks=masks_of(TOP), **found)}]

    sample = {"image": image_of(50), "image_weak": image_of(80), "instances": truth_of(TOP)}
    labeling = Labeling(label, refiner=None, arp=SimpleNamespace(pair_fraction=0.25))
    panels = figures([sample] * 3, {"student": model}, labeling=labeling).pseudo_labels_panels()
    assert batches == [2, 1] and len(panels.columns) == 6
    for row, refined in zip(panels.rows, ("top", "right", "top"), strict=True):
        shown = [drawn_places(picture, 80) for picture in row[:4]]
        assert shown == [set(), {"top"}, {"left"}, {refined}]
        assert drawn_places(row[4], 90) == {"right"} and drawn_places(row[5], 50) == {"top"}
    assert labeling.arp.pair_fraction == 0.25, "the training's stays"
    labeling = Labeling(label, refiner=TeacherMasks(), arp=None)  # as the gate decided
    plain = figures([sample], labeling=labeling).pseudo_labels_panels()
    assert plain.rows[0][3:] == [None, None]
    assert plain.draw().shape[1] == panels.draw().shape[1] * 3 // 6


def test_labeled_images_come_as_they_are_and_in_draws_of_training(small_config):
    cfg = small_config()
    rows = figure_set.labeled_samples(cfg, 2, draws=2)
    assert [len(row) for row in rows] == [3, 3]
    for plain, first, second in rows:
        pixels = np.asarray(Image.open(plain["file_name"]).convert("RGB"))
        assert (plain["image"].permute(1, 2, 0).numpy() == pixels).all()
        assert first["file_name"] == second["file_name"] == plain["file_name"]
        assert not torch.equal(first["image"], second["image"])
    again = figure_set.labeled_samples(cfg, 2, draws=2)
    for one, other in zip(sum(rows, []), sum(again, []), strict=True):
        assert torch.equal(one["image"], other["image"])
    labeled = {record["file_name"] for record in DatasetCatalog.get("toyscapes_train_30pct")}
    assert {row[0]["file_name"] for row in rows} <= labeled


def test_fewer_images_than_asked_for_are_all_drawn(small_config):
    assert len(figure_set.validation_samples(small_config(), 5)) == 2
    with pytest.raises(ConfigError, match="DATASETS.TEST"):
        figure_set.validation_samples(small_config(DATASETS__TEST="()"), 2)


def test_validation_images_keep_their_size_or_get_that_of_evaluation(small_config):
    cfg = small_config(INPUT__MIN_SIZE_TEST=32, INPUT__MAX_SIZE_TEST=48)
    for sample in figure_set.validation_samples(cfg, 2):
        assert sample["image"].shape[1:] == (64, 128)
    for sample in figure_set.validation_samples(cfg, 2, resized=True):
        assert sample["image"].shape[1:] == sample["image_weak"].shape[1:] == (24, 48)
        assert sample["instances"].gt_masks.tensor.shape[1:] == (24, 48)
    cfg = small_config(INPUT__TILE__SIZE=40, INPUT__MIN_SIZE_TEST=32)
    for sample in figure_set.validation_samples(cfg, 4, tiles=True, resized=True):
        assert sample["image"].shape[1:] == sample["instances"].image_size == (32, 32)
    assert figure_set.FigureSet(cfg, 2, resized=True)._whole()[0]["height"] == 64


@pytest.mark.parametrize("tile", [0, 48])
def test_views_are_those_of_the_training(small_config, tile):
    cfg = small_config(INPUT__TILE__SIZE=tile)
    panels = figure_set.FigureSet(cfg, 2).views_panels()
    samples = figure_set.unlabeled_samples(cfg, 2)
    generators = sample_generators(samples, "strong_view", "cpu")
    strong = StrongView(cfg).batch([sample["image"] for sample in samples], generators)
    for row, sample, view in zip(panels.rows, samples, strong, strict=True):
        for picture, image in zip(row, (sample["image"], sample["image_weak"], view), strict=True):
            assert (picture == image.permute(1, 2, 0).numpy()).all()


def test_the_tool_writes_what_was_asked_for(small_options, tmp_path, capsys):
    words = ["--config-file", QUICKSTART]
    words += ["--output", str(tmp_path / "figures"), "--images", "1"]
    assert tool.main([*words, "--what", "views", *small_options()]) == 0
    path = tmp_path / "figures" / "views.png"
    assert capsys.readouterr().out.split() == [str(path)]
    assert [entry.name for entry in path.parent.iterdir()] == ["views.png"]
    assert Image.open(path).size[0] == 3 * 360  # 3 inches a column
    assert tool.main([*words, "--what", "views", "arp", *small_options()]) == 1
    assert "--weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (["--input", "a.jpg", "IMG_1.JPG", "MODEL.DEVICE", "cpu"], 3),
        (["--input", "a.jpg", "SEED", "3", "S4M.BURN_IN", "1"], 2),
        (["--point", "3", "4"], 3),
    ],
)
def test_overrides_begin_at_the_first_key_and_no_option_follows(words, options):
    assert split_overrides(words) == (words[:options], words[options:])
    with pytest.raises(ConfigError, match="--images"):
        split_overrides([*words, "SEED", "3", "--images", "3"])


def test_a_teacher_has_the_figures_that_it_can_have(small_config):
    cfg = stage_config(small_config(S4M__FIGURES__PERIOD=2, S4M__FIGURES__IMAGES=1), "teacher")
    [hook] = figure_set.figure_hooks(cfg, TeacherTrainer.build_model(cfg))
    assert hook.names == ["labeled", "views", "similarity", "predictions"]  # none pseudo-labeled
    assert figure_set.figure_hooks(stage_config(small_config(), "teacher"), nn.Identity()) == []


def test_a_figure_that_cannot_be_drawn_leaves_modes_and_random_states():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout())
    model[0].eval()
    before = default_generator_states()
    with pytest.raises(DatasetError), figure_set.undisturbed(model):
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
    hook = figure_set.FiguresHook(painter, ["broken", "views", "arp"], 3, str(tmp_path))
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


def test_a_disk_that_takes_no_figure_does_not_end_the_training(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("s4m_d2.files.os.replace", full_disk)
    trainer = TrainerBase()
    trainer.run_step = lambda: None
    trainer.register_hooks([figure_set.FiguresHook(Painter(), ["arp"], 2, str(tmp_path))])
    trainer.train(0, 4)
    assert caplog.text.count("No space") == 2 and not [*tmp_path.iterdir()]


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")
