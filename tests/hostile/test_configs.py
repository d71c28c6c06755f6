"""Config files, overrides and commands that cannot be read or do not fit."""

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

FILES = {
    "empty": (b"", ""),
    "a list": (b"- S4M\n- MODEL\n", ""),
    "binary": (bytes(range(256)), ""),
    "open bracket": (b"VERSION: 2\nS4M: [1\n", "only plain YAML"),
    "nested too deep": (b"VERSION: 2\nS4M: " + b"[" * 600, ""),
    "another version": (b"VERSION: 99\n", "99"),
    "unknown key": (b"VERSION: 2\nS4M:\n  EMADECAY: 0.9\n", r"Did you mean S4M\.EMA_DECAY\?"),
    "dotted key": (b"VERSION: 2\nS4M.BURN_IN: 3\n", r"Write it nested: S4M: \{BURN_IN: VALUE\}"),
    "section twice": (b"S4M:\n  BURN_IN: 3\nS4M:\n  SEED: 1\n", "'S4M' stands twice"),
    "section is null": (b"VERSION: 2\nS4M:\n", "S4M"),
    "number is text": (b"VERSION: 2\nS4M:\n  BURN_IN: soon\n", "S4M.BURN_IN|Type mismatch"),
    "flag is text": (b"VERSION: 2\nS4M:\n  REFINE:\n    ENABLED: maybe\n", "Type mismatch"),
    "_BASE_ missing": (b"_BASE_: none.yaml\n", r"none\.yaml'.*_BASE_"),
    "_BASE_ is a folder": (b"_BASE_: .\n", "_BASE_"),
    "_BASE_ is itself": (b"_BASE_: config.yaml\n", "leads back to the file itself"),
    "_BASE_ cycle": (b"_BASE_: other.yaml\n", "leads back to the file itself"),
    "_BASE_ is a number": (b"_BASE_: 3\n", ""),
}


def test_files_are_refused_and_named(tmp_path):
    for content, says in FILES.values():
        path = tmp_path / "config.yaml"
        path.write_bytes(content)
        (tmp_path / "other.yaml").write_text("_BASE_: config.yaml\n")
        with one_error(ConfigError, r"Config file '.*config\.yaml'", says):
            load_config(str(path))


def test_no_code_of_a_file_runs_also_through_its_base(tmp_path):
    proof = tmp_path / "proof"
    (tmp_path / "base.yaml").write_text(f"OUTPUT_DIR: !!python/object/apply:os.mkdir ['{proof}']\n")
    (tmp_path / "config.yaml").write_text("_BASE_: base.yaml\n")
    for name in ("base", "config"):
        with one_error(ConfigError, rf"{name}\.yaml", "no tags that build objects"):
            load_config(str(tmp_path / f"{name}.yaml"))
        assert not proof.exists()


def test_paths_that_are_no_files_are_refused_and_named(tmp_path):
    for path in (tmp_path, tmp_path / "none.yaml"):
        with one_error(ConfigError, rf"Config file '{path}' does not exist"):
            load_config(str(path))


OVERRIDES = {
    "unknown key": (["S4M.BURNIN", "3"], r"S4M\.BURNIN does not exist\. Did you mean S4M\.BURN_IN"),
    "misplaced": (["S4M.SCORE_THRESH", "0.5"], r"Did you mean S4M\.PSEUDO_LABEL\.SCORE_THRESH\?"),
    "below a value": (["S4M.BURN_IN.FROM", "3"], "S4M.BURN_IN.FROM 3"),
    "empty key": (["", "3"], "Override ' 3'"),
    "equals sign": (["S4M.BURN_IN=3", "4"], "S4M.BURN_IN=3"),
    "odd number": (["S4M.BURN_IN", "3", "S4M.EMA_DECAY"], "'S4M.EMA_DECAY' has no value"),
    "second word of an option": (["b", "S4M.BURN_IN", "3"], "'b' is no key"),
    "text for a number": (["S4M.BURN_IN", "soon"], "S4M.BURN_IN soon'.*Type mismatch"),
    "number for a section": (["S4M", "3"], "Override 'S4M 3'"),
    "section for a number": (["S4M.BURN_IN", "{'FROM': 3}"], "Type mismatch"),
    "name for names": (["DATASETS.TRAIN", "toys"], r"DATASETS.TRAIN is toys \(str\); .*\('a',\)"),
}


def test_overrides_are_refused_and_named():
    for words, says in OVERRIDES.values():
        with one_error(ConfigError, says):
            load_config("", words)


def test_whole_numbers_and_flags_are_taken_as_people_write_them(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("S4M:\n  EMA_DECAY: 1\n  BURN_IN: 3\n")
    overrides = ["SOLVER.BASE_LR", "-2", "S4M.REFINE.MIN_AGREEMENT", "0"]
    overrides += ["S4M.DISTILL.ENABLED", "false", "S4M.REFINE.ENABLED", "TRUE"]
    cfg = load_config(str(path), overrides)
    found = cfg.S4M.EMA_DECAY, cfg.S4M.BURN_IN, cfg.SOLVER.BASE_LR, cfg.S4M.REFINE.MIN_AGREEMENT
    assert repr(found) == "(1.0, 3, -2.0, 0.0)"
    assert cfg.S4M.DISTILL.ENABLED is False and cfg.S4M.REFINE.ENABLED is True
    with one_error(ConfigError, "Type mismatch"):
        load_config("", ["S4M.BURN_IN", "0.5"])


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
