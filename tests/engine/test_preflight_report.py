"""The report as a whole, and the command line that prints it."""

import pytest
import torch

from s4m_d2.engine.checks.findings import raise_all
from s4m_d2.engine.checks.preflight import preflight
from s4m_d2.errors import ConfigError, DatasetError

from .own_runs import TOYSCAPES, train_net


def statuses(report):
    return {finding.item: finding.status for finding in report.findings}


def test_one_error_is_raised_as_it_is_and_several_together():
    raise_all([])
    first, second = DatasetError("a"), ConfigError("b")
    with pytest.raises(DatasetError) as raised:
        raise_all([first])
    assert raised.value is first
    with pytest.raises(DatasetError, match=r"2 problems:\n1\. a\n2\. b"):
        raise_all([first, second])


def test_a_sound_run_has_a_short_report_without_problems(small_config, tmp_path):
    state = torch.get_rng_state()
    report = preflight(small_config(S4M__BURN_IN=1))
    assert not report.errors
    assert torch.equal(torch.get_rng_state(), state)
    assert list(statuses(report)) == [
        "settings", "device", "labeled data", "labeled classes", "unlabeled data", "test data",
        "test classes", "model", "SAM", "first weights", "teacher", "output", "disk", "memory",
    ]  # fmt: skip
    assert not (tmp_path / "run").exists()


WRONG = {
    "DATASETS__TRAIN": "('toyscapes_9pct',)",
    "MODEL__WEIGHTS": "nowhere.pth",
    "S4M__SAM__CHECKPOINT": "no_sam.pth",
    "S4M__TEACHER_WEIGHTS": "no_teacher.pth",
}


def test_all_wrong_settings_come_together_with_the_data_sets(small_config):
    changes = {"SOLVER__OPTIMIZER": "ADAM", "SOLVER__IMS_PER_BATCH": 3, "S4M__EMA_DECAY": 2.0}
    cfg = small_config(**WRONG, **changes, MODEL__SEM_SEG_HEAD__NUM_CLASSES=4)
    report = preflight(cfg, num_processes=2)
    words = ["SOLVER.OPTIMIZER", "SOLVER.IMS_PER_BATCH", "S4M.EMA_DECAY", "NUM_CLASSES is 4"]
    assert all(
        word in str(report)
        for word in (*words, "toyscapes_9pct", "nowhere.pth", "no_sam.pth", "no_teacher.pth")
    )
    found = statuses(report)
    assert found["model"] == found["disk"] == found["memory"] == "not checked"


def test_check_prints_the_report_and_writes_nothing(small_options, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    wrong = {"S4M__SAM__CHECKPOINT": "no_sam.pth", "S4M__TEACHER_WEIGHTS": "no_teacher.pth"}
    assert train_net("--check", *small_options(S4M__BURN_IN=1, **wrong), config=TOYSCAPES) == 1
    output = capsys.readouterr().out
    assert "toyscapes_train_30pct" in output and "1. Error: SAM weights" in output
    assert sorted(tmp_path.rglob("*")) == before


def test_training_with_errors_is_not_started(small_options, tmp_path, capsys):
    wrong = small_options(S4M__EMA_DECAY=1.0, S4M__STAGE="teacher")
    assert train_net(*wrong, config=TOYSCAPES) == 1
    output = capsys.readouterr()
    assert "S4M.EMA_DECAY" in output.err and not output.out
    assert not (tmp_path / "run").exists()


def test_other_processes_of_a_machine_leave_the_check_to_its_first(
    small_options, monkeypatch, capsys
):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert train_net("--check", *small_options(S4M__DISTILL__NAME="none"), config=TOYSCAPES) == 0
    assert not capsys.readouterr().out


def test_check_is_not_for_evaluation(capsys):
    with pytest.raises(SystemExit) as stopped:
        train_net("--check", "--eval-only")
    assert stopped.value.code == 2
    assert "--check" in capsys.readouterr().err
