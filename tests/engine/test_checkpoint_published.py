"""Published files, by their real names: backbones, Mask2Former, Guided Distillation and S4M."""

import logging
from collections import OrderedDict

import numpy as np
import pytest
import torch

from s4m_d2.engine.checkpointing.checkpoint import S4MCheckpointer
from s4m_d2.errors import WeightsError

from .checkpoint_files import same, save
from .published_files import (
    backbone,
    deep_name,
    early_name,
    ensemble,
    mask2former,
    msra_name,
    numpy,
    renamed,
    torchvision_name,
    without_criterion,
)

FC = {"weight": np.ones((5, 4), np.float32), "bias": np.ones(5, np.float32)}
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def model_zoo(state, flags=True):
    entries = {"matching_heuristics": True} if flags else {}
    return {"model": numpy(state), "__author__": "third_party", **entries}


def with_versions(state):
    """As modules write it: PyTorch keeps their versions beside the weights."""
    state = OrderedDict(state)
    state._metadata = OrderedDict({"": {"version": 1}, "sem_seg_head": {"version": 2}})
    return state


MODELS = {
    "released .pkl": ("m.pkl", lambda sd: model_zoo(without_criterion(sd))),
    "released .pkl, no flags": ("m.pkl", lambda sd: model_zoo(sd, flags=False)),
    "early .pkl": ("m.pkl", lambda sd: model_zoo(renamed(without_criterion(sd), early_name))),
    "early .pth": ("m.pth", lambda sd: {"model": renamed(sd, early_name)}),
    "moved twice": ("m.pth", lambda sd: {"model": renamed(sd, deep_name)}),
    "training .pth": ("m.pth", lambda sd: {"model": with_versions(sd), "iteration": 9}),
    "bare .pth": ("m.pth", with_versions),
    "DDP": ("m.pth", lambda sd: {"model": renamed(sd, "module.{}".format)}),
}


@pytest.mark.parametrize("require", [False, True], ids=["training", "evaluation"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_whole_model_loads_to_the_last_weight(tmp_path, caplog, kind, require):
    name, content = MODELS[kind]
    saved, loaded = mask2former(1), mask2former(2)
    with torch.no_grad():
        loaded.criterion.empty_weight.copy_(saved.criterion.empty_weight)
    checkpointer = S4MCheckpointer(loaded)
    with caplog.at_level(logging.WARNING):
        checkpointer.load(save(tmp_path, content(saved.state_dict()), name), require=require)
    assert same(loaded, saved)
    report = checkpointer.last_report
    assert (report.missing, report.unexpected, report.mismatched) == ((), (), ())
    assert [r for r in caplog.records if r.levelno >= logging.WARNING] == []


BACKBONES = {
    "MSRA R-50.pkl": (
        "b.pkl",
        lambda b: numpy(
            {msra_name(k): v for k, v in b.items() if not k.endswith(STATISTICS)}
        ) | {f"fc1000_{k[0]}": v for k, v in FC.items()},
    ),
    "torchvision R-50.pkl": (
        "b.pkl",
        lambda b: model_zoo(b) | {"model": numpy(b) | {f"stem.fc.{k}": v for k, v in FC.items()}},
    ),
    "torchvision .pth": (
        "b.pth",
        lambda b: renamed(b, torchvision_name) | {f"fc.{k}": torch.ones(5) for k in FC},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BACKBONES)
def test_a_backbone_loads_whole_and_the_heads_keep_their_start(tmp_path, caplog, kind):
    name, content = BACKBONES[kind]
    saved, loaded, start = mask2former(1), mask2former(2), mask2former(2)
    path = save(tmp_path, content(backbone(saved)), name)
    checkpointer = S4MCheckpointer(loaded)
    with caplog.at_level(logging.INFO):
        checkpointer.load(path)
    lost = STATISTICS if kind.startswith("MSRA") else ("num_batches_tracked",)
    for key, value in loaded.state_dict().items():
        if key.startswith("backbone.") and not key.endswith(lost):
            assert torch.equal(value, saved.state_dict()[key]), key
        elif not key.startswith("backbone."):
            assert torch.equal(value, start.state_dict()[key]), key
    unused = checkpointer.last_report.unexpected
    assert len(unused) == 2 and all("fc" in key for key in unused)
    assert [r.levelname for r in caplog.records if "parameters loaded" in r.message] == ["INFO"]
    with pytest.raises(WeightsError, match="A whole model is needed here, not a backbone"):
        S4MCheckpointer(mask2former(2)).load(path, require=True)


@pytest.mark.parametrize("branch", ["student", "teacher"])
@pytest.mark.parametrize(
    ("before", "after"), [("", ""), ("module.", ""), ("", "module."), ("module.", "module.")]
)
def test_the_student_or_the_teacher_of_a_guided_distillation_checkpoint(
    tmp_path, before, after, branch
):
    models = {"student": mask2former(1), "teacher": mask2former(2)}
    path = save(tmp_path, ensemble(**models, before=before, after=after))
    loaded = mask2former(3)
    checkpointer = S4MCheckpointer(loaded)
    checkpointer.load(path, branch=branch, require=True)
    assert same(loaded, models[branch])
    assert checkpointer.last_report.branch == branch
    assert checkpointer.last_report.unexpected == ()


def test_one_branch_may_be_wrapped_and_the_other_not(tmp_path):
    student, teacher, loaded = mask2former(1), mask2former(2), mask2former(3)
    content = ensemble(student, after="module.")
    content["model"] |= ensemble(teacher=teacher)["model"]
    for branch, expected in (("student", student), ("teacher", teacher)):
        S4MCheckpointer(loaded).load(save(tmp_path, content), branch=branch, require=True)
        assert same(loaded, expected)


def test_stage_one_of_guided_distillation_has_a_teacher_only_and_that_is_said(tmp_path, caplog):
    saved, loaded = mask2former(1), mask2former(3)
    path = save(tmp_path, ensemble(teacher=saved))
    with caplog.at_level(logging.WARNING):
        S4MCheckpointer(loaded).load(path, branch="student", require=True)
    assert same(loaded, saved)
    assert "holds a teacher and no student: the teacher is loaded" in caplog.text


def test_a_student_without_a_prefix_is_not_taken_for_the_teacher(tmp_path, caplog):
    student, teacher, loaded = mask2former(1), mask2former(2), mask2former(3)
    content = {"model": student.state_dict() | ensemble(teacher=teacher)["model"]}
    for branch, expected in (("student", student), ("teacher", teacher)):
        S4MCheckpointer(loaded).load(save(tmp_path, content), branch=branch, require=True)
        assert same(loaded, expected)
    assert "no student" not in caplog.text


def test_weights_beside_the_two_models_are_reported(tmp_path):
    content = ensemble(mask2former(1), mask2former(2))
    content["model"]["scale"] = torch.ones(1)
    checkpointer = S4MCheckpointer(mask2former(3))
    checkpointer.load(save(tmp_path, content), require=True)
    assert checkpointer.last_report.unexpected == ("scale",)
