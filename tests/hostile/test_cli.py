"""The command line: one message, exit status 1 or 2, nothing written."""

import errno
import os
import re
import runpy
import sys

import pytest
from helpers import QUICKSTART, ROOT

from s4m_d2.engine.checks.resource_checks import check_output_dir
from s4m_d2.engine.config_file import load_config
from s4m_d2.errors import ConfigError

from .rows import one_error

TRAIN_NET = str(ROOT / "train_net.py")
CONFIG = ["--config-file", QUICKSTART]
CPU = ["MODEL.DEVICE", "cpu"]


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """What a command writes in spite of its mistake would be seen."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "no_data"))
    return tmp_path


def in_this_process(arguments, monkeypatch, capsys):
    """Exit status and stderr of train_net.py, as the interpreter would give them."""
    monkeypatch.setattr(sys, "argv", [TRAIN_NET, *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(TRAIN_NET, run_name="__main__")
    code = ended.value.code
    stderr = capsys.readouterr().err
    return (1, f"{stderr}{code}\n") if isinstance(code, str) else (code, stderr)


def refused(status, stderr, *expected):
    """One message that has all of ``expected``."""
    assert status not in (0, None)
    assert "Traceback" not in stderr
    errors = re.findall(r"^(?:\w+Error|train_net\.py: error): .*", stderr, re.MULTILINE)
    assert len(errors) == 1, stderr
    for pattern in expected:
        assert re.search(pattern, stderr), stderr
    assert os.listdir() == []


COMMANDS = {
    "unknown option": (["--bogus"], "unrecognized arguments: --bogus"),
    "option without a value": (["--config-file"], "--config-file: expected one argument"),
    "no process": (["--num-gpus", "0"], "--num-gpus is 0; expected 1 or more"),
    "machine that is not there": (["--machine-rank", "1"], "--machine-rank is 1; expected .* 0 to"),
    "option after overrides": ([*CONFIG, *CPU, "--num-gpus", "2"], "'--num-gpus' comes after over"),
    "no config": ([*CPU], "--config-file is missing"),
    "unknown key": ([*CONFIG, *CPU, "S4M.BURNIN", "3"], "Did you mean S4M.BURN_IN"),
    "evaluation into a file": (
        [*CONFIG, "--eval-only", *CPU, "MODEL.WEIGHTS", "a.pth", "OUTPUT_DIR", TRAIN_NET],
        "OUTPUT_DIR .* cannot be made"),
    "check of an evaluation": ([*CONFIG, "--check", "--eval-only"], "--check is for training runs"),
    "evaluation of nothing": ([*CONFIG, "--eval-only", *CPU], "MODEL.WEIGHTS is empty"),
}  # fmt: skip


def test_commands_are_refused_with_one_message(monkeypatch, capsys):
    for arguments, says in COMMANDS.values():
        refused(*in_this_process(arguments, monkeypatch, capsys), says)


def refuse(*args, **kwargs):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


@pytest.mark.parametrize(
    ("function", "answer", "says"),
    [
        ("access", lambda path, mode: not mode & os.W_OK, "'{}' is not writable"),
        ("makedirs", refuse, "cannot be made.*Read-only"),
    ],
)
def test_an_output_folder_that_may_not_be_written(tmp_path, monkeypatch, function, answer, says):
    """Through the system's answer, as the superuser may write everywhere."""
    cfg = load_config("", ["OUTPUT_DIR", str(tmp_path / "run")])
    monkeypatch.setattr(os, function, answer)
    with one_error(ConfigError, "OUTPUT_DIR '.*/run'", says.format(tmp_path)):
        check_output_dir(cfg, resume=False)
