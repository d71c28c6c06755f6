"""The command line, as a user types it."""

import os
import re
import subprocess
import sys

import pytest
import torch

from s4m_d2 import __version__
from s4m_d2.report import read_results

from .conftest import ROOT

CONFIG = str(ROOT / "configs" / "toyscapes_10pct.yaml")
ITERATIONS = {"SOLVER__MAX_ITER": 2, "S4M__TEACHER__MAX_ITER": 2, "S4M__BURN_IN": 1}


def train_net(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "train_net.py"), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.fixture
def command(small_options):
    """Overrides → the arguments of a small run on the quickstart's config."""

    def arguments(*flags: str, **changes) -> list[str]:
        return ["--config-file", CONFIG, *flags, *small_options(**(ITERATIONS | changes))]

    return arguments


def test_both_stages_train_then_resume_has_nothing_to_do_and_both_models_evaluate(
    command, tmp_path
):
    first = train_net(*command())
    assert first.returncode == 0, first.stderr
    output = tmp_path / "run"
    weights = [output / stage / "model_final.pth" for stage in ("teacher", "student")]
    written = [path.stat().st_mtime_ns for path in weights]
    check_report(output)

    again = train_net(*command())
    assert again.returncode != 0 and "--resume" in again.stderr
    resumed = train_net(*command("--resume"))
    assert resumed.returncode == 0, resumed.stderr
    assert [path.stat().st_mtime_ns for path in weights] == written

    results = read_results(str(output / "student" / "results.json"))
    changes = {"MODEL__WEIGHTS": str(weights[1]), "S4M__EVAL": "both"}
    evaluated = train_net(*command("--eval-only", OUTPUT_DIR=str(tmp_path / "eval"), **changes))
    assert evaluated.returncode == 0, evaluated.stderr
    assert not (tmp_path / "eval" / "report.html").exists()
    found = re.findall(r"copypaste: ([\d.]+,[\d.]+)", evaluated.stdout)
    expected = [results["segm"], results["teacher"]["segm"]]
    assert found == [f"{segm['AP']:.4f},{segm['AP50']:.4f}" for segm in expected]


def check_report(output):
    """What the run's page holds: both stages, facts of the log, the final models' pictures."""
    page = (output / "report.html").read_text()
    for said in ("Every stage was trained", "EMA teacher", "toyscapes_val: ", f">{__version__}"):
        assert said in page
    for name in ("student · predictions", "student · pseudo-labels", "teacher · predictions"):
        assert f"{name} after 2 iterations" in page


@pytest.mark.slow
def test_stage_two_alone_takes_a_teacher_from_elsewhere(command, tmp_path):
    done = train_net(*command(S4M__STAGE="teacher", OUTPUT_DIR=str(tmp_path / "first")))
    assert done.returncode == 0, done.stderr
    teacher = tmp_path / "first" / "teacher" / "model_final.pth"
    done = train_net(*command(S4M__TEACHER_WEIGHTS=str(teacher), S4M__BURN_IN=2))
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "run" / "teacher").exists()
    student = torch.load(tmp_path / "run" / "student" / "model_final.pth", weights_only=True)
    labeled_with = student["trainer"]["hooks"]["EMATeacherHook"]["teacher"]
    stage_one = torch.load(teacher, weights_only=True)["model"]
    assert all(torch.equal(labeled_with[name], value) for name, value in stage_one.items())


MISTAKES = {
    "too few classes": ({"MODEL__SEM_SEG_HEAD__NUM_CLASSES": 4}, "NUM_CLASSES"),
    "no data": ({"DETECTRON2_DATASETS": "empty"}, "make_toyscapes.py"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_users_mistake_ends_with_one_message_and_no_traceback(
    command, tmp_path, monkeypatch, mistake
):
    changes, expected = MISTAKES[mistake]
    arguments = command(**changes)
    if "DETECTRON2_DATASETS" in changes:
        monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "empty"))
        arguments = command()
    result = train_net(*arguments)
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    assert expected in result.stderr
    assert not (tmp_path / "run" / "teacher" / "model_final.pth").exists()
