"""The command line on the quickstart's config: both stages, again, continued, evaluated."""

import re

import pytest
import torch

from s4m_d2 import __version__
from s4m_d2.report import read_results

from .own_runs import LIGHT, TOYSCAPES, train_net

ITERATIONS = {"SOLVER__MAX_ITER": 2, "S4M__TEACHER__MAX_ITER": 2, "S4M__BURN_IN": 1}
ITERATIONS |= LIGHT


@pytest.fixture
def command(small_options):
    """Flags and overrides → the exit status of a small run."""

    def run(*flags: str, **changes) -> int:
        return train_net(*flags, *small_options(**(ITERATIONS | changes)), config=TOYSCAPES)

    return run


def test_both_stages_train_then_resume_has_nothing_to_do_and_both_models_evaluate(
    command, tmp_path, capsys
):
    assert command() == 0
    output = tmp_path / "run"
    weights = [output / stage / "model_final.pth" for stage in ("teacher", "student")]
    written = [path.stat().st_mtime_ns for path in weights]
    log = (output / "log.txt").read_text()
    assert log.index("labeled classes") < log.index("Starting training")
    check_report(output)

    capsys.readouterr()
    assert command() == 1 and "--resume" in capsys.readouterr().err
    assert command("--resume") == 0
    assert [path.stat().st_mtime_ns for path in weights] == written

    results = read_results(str(output / "student" / "results.json"))
    changes = {"MODEL__WEIGHTS": str(weights[1]), "S4M__EVAL": "both"}
    capsys.readouterr()
    assert command("--eval-only", OUTPUT_DIR=str(tmp_path / "eval"), **changes) == 0
    assert not (tmp_path / "eval" / "report.html").exists()
    found = re.findall(r"copypaste: ([\d.]+,[\d.]+)", capsys.readouterr().out)
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
    assert command(S4M__STAGE="teacher", OUTPUT_DIR=str(tmp_path / "first")) == 0
    teacher = tmp_path / "first" / "teacher" / "model_final.pth"
    assert command(S4M__TEACHER_WEIGHTS=str(teacher), S4M__BURN_IN=2) == 0
    assert not (tmp_path / "run" / "teacher").exists()
    student = torch.load(tmp_path / "run" / "student" / "model_final.pth", weights_only=True)
    labeled_with = student["trainer"]["hooks"]["EMATeacherHook"]["teacher"]
    stage_one = torch.load(teacher, weights_only=True)["model"]
    assert all(torch.equal(labeled_with[name], value) for name, value in stage_one.items())
