"""The ablation as users run it, of two methods and a few iterations: its form, not its AP. Slow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT

GUIDED, FULL = "10pct-seed0-gd", "10pct-seed0-gd-sd-pr-arp"
TEACHER, SD_TEACHER = "10pct-seed0-teacher", "10pct-seed0-teacher-sd"
SHORT = "MODEL.DEVICE cpu S4M.TEACHER.MAX_ITER 2 SOLVER.MAX_ITER 6 S4M.BURN_IN 3"
SHORT += " SOLVER.CHECKPOINT_PERIOD 2 DATALOADER.NUM_WORKERS 0 S4M.DISTILL.NUM_POINTS 2"
# A teacher of two iterations is sure of nothing.
SHORT += " S4M.PSEUDO_LABEL.SCORE_THRESH 0.0 S4M.PSEUDO_LABEL.MASK_THRESH 0.1"


def command(output: Path, *arguments: str) -> list[str]:
    tool = str(ROOT / "tools" / "ablation.py")
    return [sys.executable, tool, "--output", str(output), *arguments, "--", *SHORT.split()]


def results(output: Path) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in (output / "results").glob("*")}


def final_weights(output: Path) -> dict[str, torch.Tensor]:
    path = output / "runs" / FULL / "student" / "model_final.pth"
    return torch.load(path, map_location="cpu", weights_only=True)["model"]


def kill_after_checkpoint(output: Path, *arguments: str) -> None:
    """Start the full method's run and kill its training once it has saved something."""
    stage = output / "runs" / FULL / "student"
    process = subprocess.Popen(command(output, *arguments, "--only", FULL), start_new_session=True)
    while process.poll() is None and not list(stage.glob("model_0*.pth")):
        time.sleep(0.05)
    os.killpg(process.pid, 9)
    process.wait()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_methods_of_the_ablation_and_a_killed_run_that_continues(small_data, tmp_path):
    data = ["--data", str(small_data)]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(whole, *data, "--only", GUIDED, FULL), check=True)
    found = results(whole)
    assert set(found) == {TEACHER, SD_TEACHER, GUIDED, FULL}
    for result in found.values():
        assert all(figures["AP"] is not None for figures in result["models"].values())
        assert len(next(iter(result["models"].values()))["by class"]) == 8
    for name in (GUIDED, FULL):
        assert set(found[name]["models"]) == {"stage-1 teacher", "student", "EMA teacher"}
        assert found[name]["iterations"] == 6
        labels = found[name]["pseudo-labels"]["end"]
        assert labels["pseudo_labels/per_image"] > 0
        assert ("refinement/predicted_iou" in labels) == (name == FULL)
    text = (whole / "ablation.md").read_text()
    assert "4 of 48 runs." in text and "| Guided Distillation | " in text
    assert (whole / "ablation.png").stat().st_size > 0

    kill_after_checkpoint(killed, *data)
    assert FULL not in results(killed)
    subprocess.run(command(killed, *data, "--only", FULL), check=True)
    continued = results(killed)[FULL]
    assert continued["models"] == found[FULL]["models"]
    expected, weights = final_weights(whole), final_weights(killed)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
