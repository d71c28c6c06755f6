"""Layouts of checkpoints and of backbones, and which model of a file is loaded."""

import numpy as np
import pytest

from s4m_d2.engine.checkpointing.checkpoint import S4MCheckpointer
from s4m_d2.errors import WeightsError

from .checkpoint_files import Model, arrays, backbone_by, caffe2_name, same, save, torchvision_name

FORMATS = {
    "bare": lambda sd: sd,
    "entry model": lambda sd: {"model": sd, "iteration": 3},
    "entry state_dict": lambda sd: {"state_dict": sd, "epoch": 3},
    "DDP": lambda sd: {"model": {f"module.{k}": v for k, v in sd.items()}},
    "student branch": lambda sd: {"model": {f"modelStudent.{k}": v for k, v in sd.items()}},
    "DDP and branch": lambda sd: {
        "model": {f"module.modelStudent.module.{k}": v for k, v in sd.items()}
    },
}


@pytest.mark.parametrize("layout", FORMATS)
def test_every_layout_of_a_checkpoint_loads_completely(tmp_path, layout):
    saved, loaded = Model(seed=1), Model(seed=2)
    path = save(tmp_path, FORMATS[layout](saved.state_dict()))
    S4MCheckpointer(loaded).load(path, require=True)
    assert same(loaded, saved)


def two_branches(student, teacher):
    return {"model": {f"modelStudent.{k}": v for k, v in student.state_dict().items()}
            | {f"modelTeacher.{k}": v for k, v in teacher.state_dict().items()}}  # fmt: skip


def hook_state(student, teacher):
    hooks = {"EMATeacherHook": {"teacher": teacher.state_dict()}}
    return {"model": student.state_dict(), "trainer": {"iteration": 1, "hooks": hooks}}


def own_entry(student, teacher):
    return {"model": student.state_dict(), "teacher": teacher.state_dict()}


def nested_entry(student, teacher):
    return {"model": student.state_dict(), "teacher": {"model": teacher.state_dict(), "decay": 0.9}}


@pytest.mark.parametrize("layout", [two_branches, hook_state, own_entry, nested_entry])
@pytest.mark.parametrize("branch", ["student", "teacher"])
def test_the_wanted_branch_is_loaded(tmp_path, layout, branch):
    models = {"student": Model(seed=1), "teacher": Model(seed=2)}
    path = save(tmp_path, layout(models["student"], models["teacher"]))
    loaded = Model(seed=3)
    S4MCheckpointer(loaded).load(path, branch=branch, require=True)
    assert same(loaded, models[branch])


@pytest.mark.parametrize("branch", ["student", "teacher"])
def test_a_file_with_one_model_serves_for_either_branch(tmp_path, branch):
    saved = Model(seed=1)
    for prefix in ("", "modelTeacher.", "modelStudent."):
        path = save(tmp_path, {"model": {f"{prefix}{k}": v for k, v in saved.state_dict().items()}})
        loaded = Model(seed=3)
        S4MCheckpointer(loaded).load(path, branch=branch, require=True)
        assert same(loaded, saved)


BACKBONES = {
    "Caffe2 names": ("b.pkl", lambda m: backbone_by(caffe2_name, m)),
    "Caffe2 blobs": (
        "b.pkl",
        lambda m: {
            "blobs": backbone_by(caffe2_name, m) | {"conv1_w_momentum": np.zeros(3)},
            "cfg": "text",
        },
    ),
    "model zoo": (
        "b.pkl",
        lambda m: {
            "model": backbone_by(str, m),
            "__author__": "torchvision",
            "matching_heuristics": True,
        },
    ),
    "pycls": ("b.pyth", lambda m: {"model_state": {
        k.removeprefix("backbone."): v for k, v in m.state_dict().items() if "backbone" in k}}),
    "torchvision": ("b.pth", lambda m: {
        torchvision_name(k.removeprefix("backbone.")): v
        for k, v in m.state_dict().items() if "backbone" in k}),
}  # fmt: skip


@pytest.mark.parametrize("kind", BACKBONES)
def test_a_backbone_finds_its_place_in_the_model(tmp_path, kind):
    name, content = BACKBONES[kind]
    saved, loaded, start = Model(seed=1), Model(seed=2), Model(seed=2)
    S4MCheckpointer(loaded).load(save(tmp_path, content(saved), name))
    assert same(loaded, saved, "backbone.")
    assert same(loaded, start, "head.")


def test_heuristics_can_be_asked_for_behind_the_file_name(tmp_path):
    saved, loaded = Model(seed=1), Model(seed=2)
    bare = {k.removeprefix("backbone."): v for k, v in saved.state_dict().items()}
    path = save(tmp_path, bare)
    with pytest.raises(WeightsError, match="backbone"):
        S4MCheckpointer(loaded).load(path, require=True)
    S4MCheckpointer(loaded).load(f"{path}?matching_heuristics=True")
    assert same(loaded, saved, "backbone.")


def test_a_model_zoo_detector_loads_with_its_own_names(tmp_path):
    saved, loaded = Model(seed=1), Model(seed=2)
    path = save(tmp_path, {"model": arrays(saved), "__author__": "Somebody"}, "model_final.pkl")
    S4MCheckpointer(loaded).load(path, require=True)
    assert same(loaded, saved)


def test_frozen_norms_that_never_had_counters_lack_nothing(tmp_path):
    saved, loaded = Model(seed=1), Model(seed=2)
    state = {k: v for k, v in saved.state_dict().items() if "num_batches" not in k}
    del state["pixel_mean"]
    checkpointer = S4MCheckpointer(loaded)
    checkpointer.load(save(tmp_path, state), require=True)
    assert checkpointer.last_report.missing == ()
