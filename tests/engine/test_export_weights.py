"""tools/export_weights.py: what it writes is Mask2Former's, and gives the same predictions."""

import importlib.util
import json
import os
import subprocess
import sys
from collections import OrderedDict

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer

from s4m_d2.engine import S4MCheckpointer, TeacherTrainer, stage_config

from .checkpoint_files import same
from .conftest import ROOT
from .published_files import KEYS, backbone, early_name, ensemble, mask2former, renamed

TOOL = ROOT / "tools" / "export_weights.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("export_weights", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def checkpoint(tmp_path):
    """A stage-2 checkpoint of ours: (path, student, teacher)."""
    student, teacher = mask2former(1), mask2former(2)
    hooks = {"EMATeacherHook": {"teacher": teacher.state_dict()}}
    content = {
        "model": student.state_dict(),
        "trainer": {"iteration": 7, "hooks": hooks},
        "iteration": 7,
    }
    torch.save(content, tmp_path / "model_final.pth")
    return str(tmp_path / "model_final.pth"), student, teacher


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@pytest.mark.parametrize("branch", ["student", "teacher"])
def test_the_asked_model_is_written_and_read_back(
    tool, tmp_path, checkpoint, capsys, branch, ending
):
    if ending == "safetensors":
        pytest.importorskip("safetensors")
    path, student, teacher = checkpoint
    output = str(tmp_path / f"out.{ending}")
    tool.main([path, output, "--model", branch])
    assert "611 tensors" in (said := capsys.readouterr().out)
    assert f"of the {branch}" in said and "after iteration 7" in said
    loaded = mask2former(3)
    S4MCheckpointer(loaded).load(output, require=True)
    assert same(loaded, {"student": student, "teacher": teacher}[branch])


def test_the_file_holds_mask2formers_names_and_nothing_else(tool, tmp_path, checkpoint):
    tool.main([checkpoint[0], str(tmp_path / "out.pth")])
    content = torch.load(tmp_path / "out.pth", weights_only=True)
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


def test_mask2former_itself_does_not_rename_what_it_reads(tool, tmp_path):
    model, loaded = torch.nn.Module(), torch.nn.Module()
    model.sem_seg_head, loaded.sem_seg_head = Mask2FormerHead(), Mask2FormerHead()
    torch.save({"model": dict(model.state_dict())}, tmp_path / "plain.pth")
    DetectionCheckpointer(loaded).load(str(tmp_path / "plain.pth"))
    assert not same(loaded, model)  # the trap: names alone are not enough

    tool.main([str(tmp_path / "plain.pth"), str(tmp_path / "out.pth")])
    DetectionCheckpointer(loaded).load(str(tmp_path / "out.pth"))
    assert same(loaded, model)


def test_our_own_checkpoints_state_mask2formers_version(small_config, tmp_path):
    model = TeacherTrainer.build_model(stage_config(small_config(), "teacher"))
    S4MCheckpointer(model, str(tmp_path)).save("model")
    saved = torch.load(tmp_path / "model.pth", weights_only=True)["model"]
    assert isinstance(saved, OrderedDict)
    assert saved._metadata["sem_seg_head"]["version"] == 2


@torch.no_grad()
def test_exported_weights_predict_the_same(tool, tmp_path, small_config):
    cfg = stage_config(small_config(), "student")
    model = TeacherTrainer.build_model(cfg).eval()
    S4MCheckpointer(model, str(tmp_path)).save("model")
    tool.main([str(tmp_path / "model.pth"), str(tmp_path / "out.pth")])
    other = TeacherTrainer.build_model(small_config(SEED=9)).eval()
    image = torch.arange(3 * 64 * 96).reshape(3, 64, 96).float() % 255
    expected = model.predict_queries([{"image": image}])
    assert not torch.equal(
        other.predict_queries([{"image": image}])["pred_masks"], expected["pred_masks"]
    )
    DetectionCheckpointer(other).load(str(tmp_path / "out.pth"))  # Detectron2's reader, not ours
    actual = other.predict_queries([{"image": image}])
    for name in ("pred_logits", "pred_masks"):
        assert torch.equal(actual[name], expected[name])


def test_published_checkpoints_are_exported_with_current_names(tool, tmp_path):
    student, teacher = mask2former(1), mask2former(2)
    torch.save(ensemble(student, teacher, before="module."), tmp_path / "gd.pth")
    tool.main([str(tmp_path / "gd.pth"), str(tmp_path / "out.pth"), "--model", "teacher"])
    loaded = mask2former(3)
    S4MCheckpointer(loaded).load(str(tmp_path / "out.pth"), require=True)
    assert same(loaded, teacher)

    torch.save({"model": renamed(student.state_dict(), early_name)}, tmp_path / "early.pth")
    tool.main([str(tmp_path / "early.pth"), str(tmp_path / "out.pth"), "--force"])
    content = torch.load(tmp_path / "out.pth", weights_only=True)["model"]
    assert content.keys() == student.state_dict().keys()


def mistakes(tmp_path, checkpoint):
    path, student, teacher = checkpoint
    only_teacher, bare = str(tmp_path / "teacher.pth"), str(tmp_path / "backbone.pth")
    torch.save(ensemble(teacher=teacher), only_teacher)
    torch.save({"model": backbone(student), "matching_heuristics": True}, bare)
    (tmp_path / "there.pth").write_bytes(b"old")
    (tmp_path / "folder.pth").mkdir()
    out = str(tmp_path / "out.pth")
    return {
        "exists": ([path, str(tmp_path / "there.pth")], "Add --force"),
        "itself": ([path, path, "--force"], "is the checkpoint itself"),
        "folder": ([path, str(tmp_path / "folder.pth")], "is a folder"),
        "ending": ([path, str(tmp_path / "out.pkl")], "expected .pth or .safetensors"),
        "under a file": ([path, str(tmp_path / "there.pth" / "out.pth")], "cannot be written"),
        "missing": ([str(tmp_path / "none.pth"), out], "no such file"),
        "no student": ([only_teacher, out], "use --model teacher"),
        "backbone": ([bare, out], "no whole model to export"),
    }


@pytest.mark.parametrize(
    "mistake",
    ["exists", "itself", "folder", "ending", "under a file", "missing", "no student", "backbone"],
)
def test_a_mistake_is_one_message_and_writes_nothing(tool, tmp_path, checkpoint, mistake):
    arguments, expected = mistakes(tmp_path, checkpoint)[mistake]
    before = {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    with pytest.raises(SystemExit) as ended:
        tool.main(arguments)
    assert expected in str(ended.value.code)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == before


def test_without_safetensors_its_name_is_given(tool, tmp_path, checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(SystemExit, match="pip install safetensors"):
        tool.main([checkpoint[0], str(tmp_path / "out.safetensors")])


def test_force_replaces_the_old_file(tool, tmp_path, checkpoint):
    (tmp_path / "out.pth").write_bytes(b"old")
    tool.main([checkpoint[0], str(tmp_path / "out.pth"), "--force"])
    assert "model" in torch.load(tmp_path / "out.pth", weights_only=True)


def test_the_command_line(tmp_path, checkpoint):
    output = str(tmp_path / "out.pth")
    run = [sys.executable, str(TOOL), checkpoint[0], output]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(run, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stdout.startswith(output), done.stderr
