"""Pseudo-labels measured in training, beside it, and by the tool."""

import json
import logging
import os

import numpy as np
import pseudo_label_quality as tool
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetCatalog
from helpers import QUICKSTART

from s4m_d2.engine import PseudoLabeling, QualityMeasurement, S4MTrainer
from s4m_d2.engine.checks.preflight import preflight
from s4m_d2.engine.labeling.quality import quality_findings
from s4m_d2.engine.rng import default_generator_states
from s4m_d2.evaluation import MEASURES
from s4m_d2.semi.ema_teacher import EMATeacher

from .sameness import assert_same

UNLABELED_IMAGES = 7  # of 10, without the 3 of toyscapes_train_30pct


class Oracle(torch.nn.Module):
    """A teacher that sees the truth: of each image the file's, with certainty, some times."""

    def __init__(self, wrong=False, times=1) -> None:
        super().__init__()
        self.times = times
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.wrong = wrong
        records = DatasetCatalog.get("toyscapes_train")
        self.truth = {record["file_name"]: record["annotations"] for record in records}

    def predict_queries(self, batch):
        [sample] = batch
        size = tuple(sample["image"].shape[-2:])
        truth = [a for a in self.truth[sample["file_name"]] if not a["iscrowd"]] * self.times
        logits = torch.full((len(truth), 9), -30.0)
        for row, annotation in zip(logits, truth, strict=True):
            row[(annotation["category_id"] + self.wrong) % 8] = 30.0
        masks = [torch.from_numpy(mask_util.decode(a["segmentation"])) for a in truth]
        masks = 40.0 * torch.stack(masks) - 20.0
        return {
            "pred_logits": logits[None],
            "pred_masks": masks[None],
            "image_sizes": [size],
            "padded_size": size,
        }


@pytest.fixture
def measurement(small_config):
    """A measurement of the oracle, without SAM unless it is asked for."""

    def make(wrong=False, times=1, **changes):
        changes = {"S4M__REFINE__ENABLED": False, "S4M__PSEUDO_LABEL__MIN_AREA": 0.0} | changes
        cfg = small_config(**changes)
        labeling = PseudoLabeling(cfg, EMATeacher(Oracle(wrong, times), 0.5))
        return QualityMeasurement(cfg, labeling)

    return make


@pytest.mark.parametrize("wrong", [False, True])
def test_a_teacher_that_knows_the_masks_is_perfect_but_for_wrong_classes(measurement, wrong):
    report = measurement(wrong)()
    assert list(report.steps) == ["before"]  # nothing is refined
    quality = report.steps["before"]
    assert quality.images == UNLABELED_IMAGES and quality.overall()["instances"] > 10
    of_masks = ("sq", "mask_precision", "mask_recall")
    right = {name: float(name in of_masks or not wrong) for name in MEASURES}
    assert {name: quality.overall()[name] for name in MEASURES} == right


def test_duplicates_are_dropped_before_refinement_as_after(measurement):
    on = {"S4M__REFINE__ENABLED": True, "S4M__QUALITY__MAX_IMAGES": 3}
    report = measurement(times=2, S4M__PSEUDO_LABEL__DUPLICATE_IOU=0.7, **on)()
    before, after = (report.steps[step].overall() for step in ("before", "after"))
    assert before["precision"] == before["recall"] == 1.0
    assert after["pseudo_labels"] <= before["instances"]


def test_refinement_changes_masks_and_neither_classes_random_states_nor_modes(measurement):
    measure = measurement(S4M__REFINE__ENABLED=True, S4M__QUALITY__MAX_IMAGES=2)
    mapper = measure.mapper

    def drawing(record):
        torch.rand(3), np.random.rand(3)
        return mapper(record)

    measure.mapper = drawing
    before = default_generator_states()
    first = measure()
    assert_same(before, default_generator_states())
    assert not measure.pseudo_labeling.teacher.model.training
    torch.rand(5)  # the clicks do not depend on it
    assert first.as_dict() == measure().as_dict()
    teachers, refined = (first.steps[step].overall() for step in ("before", "after"))
    assert teachers["sq"] == 1.0
    assert 0.5 < refined["sq"] < 1.0  # SAM redraws them from three clicks
    assert 0 < refined["found"] <= teachers["found"]
    assert first.as_dict()["after"]["overall"]["class_accuracy"] == refined["class_accuracy"]


def test_an_image_that_cannot_be_read_is_left_out_with_one_warning(measurement, caplog):
    measure = measurement()
    measure.records[2] = measure.records[2] | {"file_name": "missing.png"}
    with caplog.at_level(logging.WARNING):
        reports = [measure(), measure()]
    for report in reports:
        assert report.skipped == 1 and report.as_dict()["images"] == UNLABELED_IMAGES - 1
    assert caplog.text.count("missing.png cannot") == 1


def test_the_report_says_what_will_be_measured_or_why_nothing_can_be(
    small_config, folder_without_labels
):
    def found(**changes):
        options = {"PERIOD": 50, "MAX_IMAGES": 5} | changes
        options = {k if "__" in k else f"S4M__QUALITY__{k}": v for k, v in options.items()}
        return quality_findings(small_config(**options))

    assert found(PERIOD=0) == []
    folder = {"DATASETS__UNLABELED": f"('{folder_without_labels}',)"}
    for changes, named in (
        ({}, "5 images of toyscapes_train_unlabeled"),
        (folder | {"DATASETS": "('toyscapes_val',)"}, "2 images of toyscapes_val"),
    ):
        [measured] = found(**changes)
        assert measured.status == "ok" and named in measured.text
    for changes, named in (
        ({"DATASETS": "('coco_2017_val',)"}, "S4M.QUALITY"),  # other classes
        (folder, folder_without_labels),
    ):
        [refused] = found(**changes)
        assert named in str(refused.errors[0])
    cfg = small_config(S4M__QUALITY__PERIOD=1)
    assert "label quality" in {finding.item for finding in preflight(cfg).findings}


@pytest.fixture
def checkpoint(small_config, tmp_path):
    """Two untrained models in one file; the student sees nothing."""
    models = {"model": small_config(SEED=1), "teacher": small_config(SEED=2)}
    states = {name: S4MTrainer.build_model(cfg).state_dict() for name, cfg in models.items()}
    for name, value in states["model"].items():
        if name.endswith("class_embed.bias"):
            value[-1] = 1e4  # "no object"
    path = tmp_path / "both.pth"
    torch.save(states, path)
    return str(path)


def test_the_tool_prints_tables_and_writes_json(checkpoint, small_options, tmp_path, capsys):
    arguments = ["--config-file", QUICKSTART, "--weights", checkpoint]
    output = tmp_path / "out"
    tool.main([*arguments, "--images", "2", "--output", str(output), *small_options()])
    printed = capsys.readouterr().out
    assert "teacher" in printed and "toyscapes_train_unlabeled" in printed
    found = json.loads((output / "pseudo_label_quality.json").read_text())
    assert found["model"] == "teacher" and found["images"] == 2
    assert set(found["before"]) == {"overall", "by_class", "by_size"}

    assert found["before"]["overall"]["pseudo_labels"] > 0

    tool.main([*arguments, "--images", "1", "--student", *small_options()])
    row = capsys.readouterr().out.splitlines()[4].split("|")
    assert row[2].strip() == "before" and row[4].strip() == "0"  # labels
    assert os.listdir(output) == ["pseudo_label_quality.json"]
