"""The commands of `s4m-sepl` and `tools/sepl.py`."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from enhance_folders import arguments, content, enhance, make_folders

from s4m_d2.errors import DatasetError
from s4m_d2.sepl import cli

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def asked(monkeypatch):
    """The commands that are run, which do nothing."""
    names = []
    for name, (module, _) in cli.COMMANDS.items():
        monkeypatch.setattr(module, "run", lambda args, name=name: names.append(name) or 0)
    return names


def test_without_a_name_labels_are_enhanced(asked):
    words = ["--pseudo-labels", "a", "--masks", "b", "--output", "c"]
    assert cli.main(words) == 0 and cli.main(["enhance", *words]) == 0
    assert asked == ["enhance", "enhance"]


def test_evaluate_is_a_command(asked):
    assert cli.main(["evaluate", "--enhanced", "a", "--ground-truth", "b"]) == 0
    assert asked == ["evaluate"]


def test_arguments_come_from_the_command_line(asked, monkeypatch):
    words = ["s4m-sepl", "--pseudo-labels", "a", "--masks", "b", "--output", "c"]
    monkeypatch.setattr(sys, "argv", words)
    assert cli.main() == 0
    assert asked == ["enhance"] and len(words) == 7


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["evaluate", "-h"], ["visualize", "--help"]])
def test_help_tells_of_commands(words, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    if len(words) == 1:
        assert all(re.search(rf"^ +{name}\b", printed, re.MULTILINE) for name in cli.COMMANDS)
    else:
        assert f"s4m-sepl {words[0]}" in printed


def test_without_anything_the_options_are_named(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([])
    assert ended.value.code == 2
    assert "required: --pseudo-labels, --output" in capsys.readouterr().err


def test_users_mistakes_are_one_line_and_bugs_keep_their_traceback(monkeypatch, capsys):
    def fail(error):
        def run(args):
            raise error

        return run

    words = ["--pseudo-labels", "a", "--masks", "b", "--output", "c"]
    module, _ = cli.COMMANDS["enhance"]
    monkeypatch.setattr(module, "run", fail(DatasetError("a is empty. Give another folder.")))
    assert cli.main(words) == 1
    assert capsys.readouterr().err == "error: a is empty. Give another folder.\n"
    monkeypatch.setattr(module, "run", fail(KeyError("bug")))
    with pytest.raises(KeyError):
        cli.main(words)


def test_the_script_from_another_folder(tmp_path):
    """With processes of its own: they import the script's module."""
    root = make_folders(tmp_path / "data")
    (root / "masks" / "b.json").unlink()
    words = [sys.executable, str(ROOT / "tools" / "sepl.py"), *arguments(root, "--workers", "2")]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert "  b: " in done.stderr and "Traceback" not in done.stderr
    assert enhance(root, output="serial") == 1
    assert content(root / "out") == content(root / "serial")
