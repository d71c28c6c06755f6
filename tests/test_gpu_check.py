"""tools/gpu_check.py: steps that fail, hang or succeed; the table of all, and its page."""

import json
import sys

import gpu_check
import pytest
import torch

STEP = """
import json, pathlib, sys, time
name, folder = sys.argv[1], pathlib.Path(sys.argv[4])
if name == "coco":
    raise MemoryError("84 GiB")
if name == "tests":
    time.sleep(600)
result = {"right": "yes", "loss": 1 / 3, "curves": {"GPU": [1.0]}}
(folder / f"{name}.json").write_text(json.dumps(result))
"""
PAGE = "before\n<!-- gpu-check -->\nNot run yet.\n<!-- end of gpu-check -->\nafter\n"


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Call the tool in tmp_path, with steps that need no GPU; its exit status."""
    (tmp_path / "step.py").write_text(STEP)
    (tmp_path / "page.md").write_text(PAGE)
    monkeypatch.setattr(gpu_check, "SCRIPT", tmp_path / "step.py")
    monkeypatch.setattr(gpu_check, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")

    def run(*words):
        arguments = ["gpu_check.py", *words, "--output", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", arguments)
        return gpu_check.main()

    return run


def test_a_step_that_fails_is_told_and_ends_no_other(call, tmp_path):
    assert call("coco", "kernels") == 1
    paths = (tmp_path / "out" / f"{name}.json" for name in ("coco", "kernels"))
    failed, done = (json.loads(path.read_text()) for path in paths)
    assert failed["right"] == "**no**" and "MemoryError: 84 GiB" in failed["error"]
    assert done["right"] == "yes" and done["curves"] == {"GPU": [1.0]}


def test_a_step_that_hangs_is_ended(tmp_path, call):
    gpu_check.start_step("tests", tmp_path, [], 0.2, None)
    assert json.loads((tmp_path / "tests.json").read_text())["right"] == "**no**"


def test_parts_add_up_to_one_table_which_a_page_takes(call, tmp_path):
    assert call("kernels") == call("evaluation") == 0
    assert call("--document") == call("--document") == 0
    page = (tmp_path / "page.md").read_text()
    assert page.startswith("before\n<!-- gpu-check -->\nA GPU, PyTorch ")
    assert page.endswith("|\n<!-- end of gpu-check -->\nafter\n") and "Not run yet" not in page
    lines = [line.split("|") for line in page.split("\n") if line.startswith("|")]
    rows = {cells[1].strip(): [cell.strip() for cell in cells[2:]] for cells in lines}
    assert rows["kernels"][0] == rows["evaluation"][0] == "yes"
    assert rows["kernels"][2] == "loss 0.333" and rows["coco"][0] == "not run"
