"""The report as a whole, and the command line that prints it."""

import importlib
import os
import subprocess
import sys

import pytest
import torch

from s4m_d2.engine.checks.findings import Finding, PreflightReport, in_units, raise_all
from s4m_d2.engine.checks.preflight import preflight
from s4m_d2.errors import ConfigError, DatasetError

from .conftest import ROOT

CONFIG = str(ROOT / "configs" / "toyscapes_10pct.yaml")


@pytest.fixture
def start(monkeypatch):
    """Arguments -> exit status of the command line, in this process."""
    monkeypatch.syspath_prepend(str(ROOT))
    command = importlib.import_module("train_net")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["train_net.py", "--config-file", CONFIG, *arguments])
        return command.start(command.parse_args())

    return run


def statuses(report):
    return {finding.item: finding.status for finding in report.findings}


def test_the_table_and_then_every_problem_with_its_number():
    report = PreflightReport(
        (
            Finding("data", "3 images"),
            Finding("SAM", "x.pth", (ConfigError("A is wrong. Do B."),), ("C is odd.",)),
            Finding("disk", "full", (DatasetError("D is wrong. Do E."),)),
        )
    )
    lines = str(report).splitlines()
    assert lines[0].split() == ["item", "finding", "status"]
    assert [line.split()[-1] for line in lines[2:5]] == ["ok", "error", "error"]
    assert lines[5:] == [
        "1. Error: A is wrong. Do B.",
        "2. Error: D is wrong. Do E.",
        "3. Warning: C is odd.",
    ]


def test_one_error_is_raised_as_it_is_and_several_together():
    raise_all([])
    first, second = DatasetError("a"), ConfigError("b")
    with pytest.raises(DatasetError) as raised:
        raise_all([first])
    assert raised.value is first
    with pytest.raises(DatasetError, match=r"2 problems:\n1\. a\n2\. b"):
        raise_all([first, second])


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (5 * 2**40, "5.0 TiB"), (2**21, "2.0 MiB")],
)
def test_sizes_for_people(size, text):
    assert in_units(size) == text


def test_a_sound_run_has_a_short_report_without_problems(small_config, tmp_path):
    state = torch.get_rng_state()
    report = preflight(small_config(S4M__BURN_IN=1))
    assert not report.errors
    assert torch.equal(torch.get_rng_state(), state)
    assert list(statuses(report)) == [
        "settings", "device", "labeled data", "labeled classes", "unlabeled data", "test data",
        "test classes", "model", "SAM", "first weights", "teacher", "output", "disk", "memory",
    ]  # fmt: skip
    assert "10 images; 8 decoded" in str(report)
    assert not (tmp_path / "run").exists()


def test_problems_of_every_kind_come_together(small_config, tmp_path):
    (tmp_path / "file").touch()
    cfg = small_config(
        DATASETS__TRAIN="('toyscapes_9pct',)",
        MODEL__WEIGHTS="nowhere.pth",
        S4M__SAM__CHECKPOINT="no_sam.pth",
        S4M__TEACHER_WEIGHTS="no_teacher.pth",
        OUTPUT_DIR=str(tmp_path / "file" / "run"),
    )
    report = preflight(cfg)
    words = ["toyscapes_9pct", "no_sam.pth", "nowhere.pth", "no_teacher.pth", "is a file"]
    assert len(report.errors) == len(words)
    assert "labeled data    toyscapes_9pct: cannot be loaded" in str(report)
    assert all(word in str(error) for word, error in zip(words, report.errors, strict=True))


def test_all_wrong_settings_come_together_with_the_data_sets(small_config):
    cfg = small_config(
        SOLVER__OPTIMIZER="ADAM",
        SOLVER__IMS_PER_BATCH=3,
        S4M__EMA_DECAY=2.0,
        MODEL__SEM_SEG_HEAD__NUM_CLASSES=4,
        MODEL__WEIGHTS="nowhere.pth",
        S4M__SAM__CHECKPOINT="no_sam.pth",
    )
    report = preflight(cfg, num_processes=2)
    found = statuses(report)
    assert found["settings"] == found["labeled data"] == found["test data"] == "error"
    text = str(report)
    for key in ("SOLVER.OPTIMIZER", "IMS_PER_BATCH is 3", "S4M.EMA_DECAY", "NUM_CLASSES is 4"):
        assert key in text
    assert "no_sam.pth" in text and "nowhere.pth': no such file" in text
    assert found["model"] == found["disk"] == found["memory"] == "not checked"


def test_check_prints_the_report_and_writes_nothing(start, small_options, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    assert start("--check", *small_options(S4M__BURN_IN=1)) == 0
    output = capsys.readouterr().out
    assert "error" not in output and "toyscapes_train_30pct" in output
    assert sorted(tmp_path.rglob("*")) == before

    wrong = {"S4M__SAM__CHECKPOINT": "no_sam.pth", "S4M__TEACHER_WEIGHTS": "no_teacher.pth"}
    assert start("--check", *small_options(S4M__BURN_IN=1, **wrong)) == 1
    output = capsys.readouterr().out
    assert "1. Error: S4M.SAM.CHECKPOINT: 'no_sam.pth'" in output
    assert "2. Error: " in output and "'no_teacher.pth'" in output
    assert sorted(tmp_path.rglob("*")) == before


def test_training_with_errors_is_not_started(start, small_options, tmp_path, capsys):
    assert start(*small_options(S4M__DISTILL__NAME="none", S4M__STAGE="teacher")) == 1
    output = capsys.readouterr()
    assert "Training was not started" in output.err and "S4M.DISTILL.NAME" in output.err
    assert not output.out
    assert not (tmp_path / "run").exists()


def test_other_processes_of_a_machine_leave_the_check_to_its_first(
    start, small_options, monkeypatch, capsys
):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert start("--check", *small_options(S4M__DISTILL__NAME="none")) == 0
    assert not capsys.readouterr().out


def test_check_is_not_for_evaluation(start, capsys):
    with pytest.raises(SystemExit) as stopped:
        start("--check", "--eval-only")
    assert stopped.value.code == 2
    assert "--check is for training runs" in capsys.readouterr().err


def test_the_command_checks_first_and_its_log_holds_the_report(small_options, tmp_path):
    options = small_options(S4M__STAGE="teacher", S4M__TEACHER__MAX_ITER=1)
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_net.py"), "--config-file", CONFIG, *options],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.index("labeled classes") < log.index("Starting training")
    assert (tmp_path / "run" / "teacher" / "model_final.pth").exists()
