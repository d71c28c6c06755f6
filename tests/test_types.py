"""Types of the package, as other people's type checkers see them."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytest.importorskip("mypy")


def mypy(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "mypy", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


@pytest.mark.slow
def test_annotations_agree(tmp_path):
    result = mypy("--cache-dir", str(tmp_path))
    assert result.returncode == 0, result.stdout
    assert "Success: no issues found" in result.stdout


@pytest.mark.slow
def test_users_see_types(tmp_path):
    """`py.typed` makes a checker read the annotations instead of taking everything for Any."""
    (tmp_path / "use.py").write_text(
        "from s4m_d2.sepl import enhance\nreveal_type(enhance)\nenhance('no array', 3)\n"
    )
    config = str(ROOT / "pyproject.toml")
    result = mypy("--config-file", config, "use.py", "--cache-dir", str(tmp_path), cwd=tmp_path)
    assert "ndarray" in result.stdout and "arg-type" in result.stdout, result.stdout
