"""The command export: what it writes is Mask2Former's, and gives the same predictions."""

import json
import sys
from collections import OrderedDict

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer

from s4m_d2.commands import export
from s4m_d2.engine import S4MCheckpointer, TeacherTrainer, stage_config

from .checkpoint_files import same
from .published_files import KEYS, early_name, ensemble, mask2former, renamed


@pytest.fixture
def checkpoint(tmp_path):
    """A stage-2 checkpoint of ours: (path, student, teacher)."""
    student, teacher = mask2former(1), mask2former(2)
    hooks = {"EMATeacherHook": {"teacher": teacher.state_dict()}}
    trainer = {"iteration": 7, "hooks": hooks}
    content = {"model": student.state_dict(), "trainer": trainer, "iteration": 7}
    torch.save(content, tmp_path / "model_final.pth")
    return str(tmp_path / "model_final.pth"), student, teacher


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_the_asked_model_is_written_and_read_back(tmp_path, checkpoint, capsys, ending):
    if ending == "safetensors":
        pytest.importorskip("safetensors")
    path, *models = checkpoint
    for branch, expected in zip(("student", "teacher"), models, strict=True):
        output = str(tmp_path / f"{branch}.{ending}")
        export.main([path, output, "--model", branch])
        said = capsys.readouterr().out
        assert all(word in said for word in (output, branch, "611", "iteration 7"))
        loaded = mask2former(3)
        S4MCheckpointer(loaded).load(output, require=True)
        assert same(loaded, expected)
    if ending == "pth":
        content = torch.load(output, weights_only=True)
        assert content.keys() == {"model"}
        assert content["model"].keys() == json.loads(KEYS.read_text()).keys()


class Mask2FormerHead(torch.nn.Module):
    """Loads as Mask2Former's head does: a file without a version has no pixel decoder."""

    _version = 2

    def __init__(self):
        super().__init__()
        self.pixel_decoder = torch.nn.Linear(2, 2)
        self.predictor = torch.nn.Linear(2, 2)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        if local_metadata.get("version", 1) >= 2:
            return
        for name in [n for n in state_dict if n.startswith(prefix) and "predictor" not in n]:
            state_dict[name.replace(prefix, f"{prefix}pixel_decoder.")] = state_dict.pop(name)


def test_mask2former_itself_does_not_rename_what_it_reads(tmp_path):
    model, loaded = torch.nn.Module(), torch.nn.Module()
    model.sem_seg_head, loaded.sem_seg_head = Mask2FormerHead(), Mask2FormerHead()
    torch.save({"model": dict(model.state_dict())}, tmp_path / "plain.pth")
    DetectionCheckpointer(loaded).load(str(tmp_path / "plain.pth"))
    assert not same(loaded, model)  # the trap: names alone are not enough

    export.main([str(tmp_path / "plain.pth"), str(tmp_path / "out.pth")])
    DetectionCheckpointer(loaded).load(str(tmp_path / "out.pth"))
    assert same(loaded, model)


def test_our_own_checkpoints_state_mask2formers_version(small_config, tmp_path):
    model = TeacherTrainer.build_model(stage_config(small_config(), "teacher"))
    S4MCheckpointer(model, str(tmp_path)).save("model")
    saved = torch.load(tmp_path / "model.pth", weights_only=True)["model"]
    assert isinstance(saved, OrderedDict)
    assert saved._metadata["sem_seg_head"]["version"] == 2


def test_published_checkpoints_are_exported_with_current_names(tmp_path):
    student = mask2former(1).state_dict()
    torch.save({"model": renamed(student, early_name)}, tmp_path / "early.pth")
    export.main([str(tmp_path / "early.pth"), str(tmp_path / "out.pth")])
    content = torch.load(tmp_path / "out.pth", weights_only=True)["model"]
    assert content.keys() == student.keys()


MISTAKES = {  # arguments, and a word of the message
    "exists": (["model_final.pth", "there.pth"], "--force"),
    "itself": (["model_final.pth", "model_final.pth", "--force"], "itself"),
    "folder": (["model_final.pth", "folder.pth"], "folder"),
    "ending": (["model_final.pth", "out.pkl"], ".safetensors"),
    "under a file": (["model_final.pth", "there.pth/out.pth"], "cannot be written"),
    "missing": (["none.pth", "out.pth"], "no such file"),
    "no student": (["teacher.pth", "out.pth"], "--model teacher"),
    "no package": (["model_final.pth", "out.safetensors"], "pip install safetensors"),
}


def test_a_mistake_is_one_message_and_writes_nothing(tmp_path, checkpoint, monkeypatch, capsys):
    torch.save(ensemble(teacher=checkpoint[2]), tmp_path / "teacher.pth")
    (tmp_path / "there.pth").write_bytes(b"old")
    (tmp_path / "folder.pth").mkdir()
    before = {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for arguments, word in MISTAKES.values():
        assert export.main(arguments) == 1 and word in capsys.readouterr().err
        assert {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == before
    export.main(["model_final.pth", "there.pth", "--force"])
    assert "model" in torch.load(tmp_path / "there.pth", weights_only=True)
