"""Files of weights of every origin, and what is said or refused where they do not fit."""

import logging
from collections import OrderedDict

import numpy as np
import pytest
import torch

from s4m_d2.engine.checkpointing.checkpoint import S4MCheckpointer
from s4m_d2.errors import WeightsError

from . import published_files as files
from .checkpoint_files import Model, same, save
from .published_files import backbone, ensemble, mask2former, numpy, renamed, without_criterion

FC = {"weight": np.ones((5, 4), np.float32), "bias": np.ones(5, np.float32)}
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def load(model, path, **options):
    """Load a file; the report."""
    checkpointer = S4MCheckpointer(model)
    checkpointer.load(path, **options)
    return checkpointer.last_report


def warnings_in(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def model_zoo(state):
    return {"model": numpy(state), "__author__": "third_party", "matching_heuristics": True}


def with_versions(state):
    """As modules write it: PyTorch keeps their versions beside the weights."""
    state = OrderedDict(state)
    state._metadata = OrderedDict({"": {"version": 1}, "sem_seg_head": {"version": 2}})
    return state


MODELS = {
    "released .pkl": ("m.pkl", lambda sd: model_zoo(without_criterion(sd))),
    "early .pkl": ("m.pkl", lambda sd: model_zoo(renamed(without_criterion(sd), files.early_name))),
    "moved twice": ("m.pth", lambda sd: {"model": renamed(sd, files.deep_name)}),
    "training .pth": ("m.pth", lambda sd: {"model": with_versions(sd), "iteration": 9}),
    "bare .pth": ("m.pth", with_versions),
    "other entry": ("m.pth", lambda sd: {"state_dict": sd, "epoch": 3}),
    "DDP and branch": (
        "m.pth", lambda sd: {"model": renamed(sd, "module.modelStudent.module.{}".format)}
    ),
    "safetensors": ("m.safetensors", dict),
    "safetensors, other name": ("m.pth", None),
}  # fmt: skip


@pytest.mark.parametrize("kind", MODELS)
def test_a_whole_model_loads_to_the_last_weight(tmp_path, caplog, kind):
    name, content = MODELS[kind]
    saved, loaded = mask2former(1), mask2former(2)
    with torch.no_grad():
        loaded.criterion.empty_weight.copy_(saved.criterion.empty_weight)
    if "safetensors" in kind:
        save_file = pytest.importorskip("safetensors.torch").save_file
        save_file(saved.state_dict(), path := str(tmp_path / name))
    else:
        path = save(tmp_path, content(saved.state_dict()), name)
    report = load(loaded, path, require=True)
    assert same(loaded, saved)
    assert not (report.missing or report.unexpected or report.mismatched)
    assert warnings_in(caplog) == []


def msra(state):
    """A file of Caffe2, which has no running statistics."""
    arrays = numpy({files.msra_name(k): v for k, v in state.items() if not k.endswith(STATISTICS)})
    return arrays | {f"fc1000_{k[0]}": v for k, v in FC.items()}


MOMENTUM = {"conv1_w_momentum": np.zeros(3)}
BACKBONES = {
    "MSRA R-50.pkl": ("b.pkl", msra),
    "MSRA, blobs": ("b.pkl", lambda b: {"blobs": msra(b) | MOMENTUM, "cfg": "text"}),
    "torchvision R-50.pkl": (
        "b.pkl",
        lambda b: model_zoo(b) | {"model": numpy(b) | {f"stem.fc.{k}": v for k, v in FC.items()}},
    ),
    "torchvision .pth": (
        "b.pth",
        lambda b: renamed(b, files.torchvision_name) | {f"fc.{k}": torch.ones(5) for k in FC},
    ),
    "pycls .pyth": ("b.pyth", lambda b: {"model_state": b}),
    "bare .pth": ("b.pth", dict),
}  # fmt: skip


@pytest.mark.parametrize("kind", BACKBONES)
def test_a_backbone_loads_whole_and_the_heads_keep_their_start(tmp_path, caplog, kind):
    name, content = BACKBONES[kind]
    saved, loaded, start = mask2former(1), mask2former(2), mask2former(2)
    path = save(tmp_path, content(backbone(saved)), name)
    report = load(loaded, path)
    lost = STATISTICS if kind.startswith("MSRA") else ("num_batches_tracked",)
    for key, value in loaded.state_dict().items():
        if key.startswith("backbone.") and not key.endswith(lost):
            assert torch.equal(value, saved.state_dict()[key]), key
    assert same(loaded, start, "sem_seg_head.") and not report.is_surprising
    assert warnings_in(caplog) == []
    with pytest.raises(WeightsError, match="lack"):
        load(loaded, path, require=True)


def in_hook(student, teacher):
    hooks = {"EMATeacherHook": {"teacher": teacher.state_dict()}}
    return {"model": student.state_dict(), "trainer": {"iteration": 1, "hooks": hooks}}


def in_entry(student, teacher):
    return {"model": student.state_dict(), "teacher": {"model": teacher.state_dict(), "decay": 0.9}}


def one_wrapped(student, teacher):
    content = ensemble(student, after="module.")
    return {"model": content["model"] | ensemble(teacher=teacher)["model"]}


def student_bare(student, teacher):
    return {"model": student.state_dict() | ensemble(teacher=teacher)["model"]}


def ddp_ensemble(student, teacher):
    return ensemble(student, teacher, before="module.", after="module.")


@pytest.mark.parametrize(
    "layout", [in_hook, in_entry, ensemble, ddp_ensemble, one_wrapped, student_bare]
)
def test_student_and_teacher_of_one_file(tmp_path, caplog, layout):
    models = {"student": Model(seed=1), "teacher": Model(seed=2)}
    path = save(tmp_path, layout(**models))
    for branch, expected in models.items():
        loaded = Model(seed=3)
        report = load(loaded, path, branch=branch, require=True)
        assert same(loaded, expected) and report.unexpected == []
        assert report.branch == branch
    assert warnings_in(caplog) == []


def test_a_file_with_one_model_serves_for_either_and_that_is_said(tmp_path, caplog):
    saved = Model(seed=1)
    for prefix, found in (("", None), ("modelTeacher.", "teacher"), ("modelStudent.", "student")):
        path = save(tmp_path, {"model": renamed(saved.state_dict(), (prefix + "{}").format)})
        for branch in ("student", "teacher"):
            loaded = Model(seed=3)
            caplog.clear()
            assert load(loaded, path, branch=branch, require=True).branch == found
            assert same(loaded, saved)
            assert bool(warnings_in(caplog)) == (found not in (None, branch))


def test_the_report_says_what_became_of_each_weight(tmp_path, caplog):
    state = Model(seed=1, classes=5).state_dict()
    state["extra"] = state.pop("backbone.res2.0.shortcut.norm.running_mean")
    report = load(loaded := Model(seed=2), save(tmp_path, state))
    assert report.unexpected == ["extra"]
    assert report.missing == ["backbone.res2.0.shortcut.norm.running_mean"]
    assert [found.split()[0] for found in report.mismatched] == ["head.weight", "head.bias"]
    assert len(report.matched) == len(state) - 3 and report.is_surprising
    (warning,) = warnings_in(caplog)
    assert all(word in warning for word in ("extra", "head.weight", "(5, 4)", "(3, 4)"))
    assert same(loaded, Model(seed=2), "head.")


def test_entries_that_published_files_may_lack(tmp_path):
    state = {k: v for k, v in Model(seed=1).state_dict().items() if "num_batches" not in k}
    del state["pixel_mean"]
    assert load(Model(seed=2), save(tmp_path, state), require=True).missing == []


def test_a_weight_that_the_config_sets_otherwise_is_reported(tmp_path, caplog):
    path = save(tmp_path, {"model": mask2former(1).state_dict()})
    report = load(mask2former(2), path, require=True)
    assert report.overridden == ["criterion.empty_weight"]
    assert "criterion.empty_weight" in "".join(warnings_in(caplog))


LAYERS = {
    "decoder": r"predictor\.transformer_\w+_layers\.[78]\.",
    "backbone": r"backbone\.res4\.[345]\.",
}


@pytest.mark.parametrize("part", LAYERS)
def test_other_numbers_of_layers_are_refused_either_way(tmp_path, part):
    whole = mask2former(1)
    short = mask2former(2, LAYERS[part])
    path = save(tmp_path, {"model": whole.state_dict()}, "whole.pth")
    with pytest.raises(WeightsError, match=LAYERS[part]):
        load(short, path, require=True)
    if part == "backbone":  # although all shapes fit
        bare = save(tmp_path, model_zoo(backbone(whole)), "R-101.pkl")
        for file in (path, bare):
            with pytest.raises(WeightsError, match=r"res4\.3\."):
                load(short, file)
    else:
        assert load(short, path).is_surprising
    path = save(tmp_path, {"model": short.state_dict()}, "short.pth")
    with pytest.raises(WeightsError, match=LAYERS[part]):
        load(whole, path, require=True)


STEM = {"backbone.stem.conv1.weight": torch.zeros(8, 3, 3, 3)}
OTHER_STEM = r"backbone\.stem\.conv1\.weight is \(8, 3, 3, 3\)"


@pytest.mark.parametrize(
    ("change", "require", "named"),
    [
        (lambda s: {k: s[k] for k in s if k != "head.bias"}, True, r"head\.bias"),
        (lambda s: s | {"head.bias": torch.zeros(9)}, True, r"head\.bias is \(9,\).*\(3,\)"),
        (lambda s: s | STEM, False, OTHER_STEM),
        (lambda s: renamed(s | STEM, lambda k: k.removeprefix("backbone.")), False, OTHER_STEM),
        (lambda s: {k: s[k] for k in s if "res2" not in k}, False, r"6 of the backbone's 9"),
        (lambda s: {f"other.{k}": s[k] for k in s}, False, r"other\."),
    ],
)
def test_weights_of_another_model_are_refused_and_change_nothing(tmp_path, change, require, named):
    path, loaded = save(tmp_path, change(dict(Model(seed=1).state_dict()))), Model(seed=2)
    with pytest.raises(WeightsError, match=named):
        load(loaded, path, require=require)
    assert same(loaded, Model(seed=2))


def test_callers_mistakes_and_addresses():
    checkpointer = S4MCheckpointer(Model())
    assert checkpointer.load("") == {}
    with pytest.raises(WeightsError, match=r"MODEL\.WEIGHTS"):
        checkpointer.load("", require=True)

    class Offline:
        @staticmethod
        def get_local_path(path):
            raise OSError("Name or service not known")

    checkpointer.path_manager = Offline
    with pytest.raises(WeightsError, match="R-50.pkl' cannot be fetched"):
        checkpointer.load("detectron2://ImageNetPretrained/torchvision/R-50.pkl")
