"""The wheels of both packages, built as `python -m build --no-isolation` builds them."""

import email
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from helpers import ROOT

MAX_WHEEL_BYTES = 12 * 2**20
FOLDERS = ("configs", "docs", "examples", "s4m_d2", "tests", "tools", "detectron2_lite")
BUILD = """
import sys
from setuptools import build_meta
getattr(build_meta, "build_" + sys.argv[1])(sys.argv[2])
"""

pytest.importorskip("setuptools", minversion="70.1", reason="builds no wheels by itself")


def build(kind: str, source: Path, output: Path) -> Path:
    """Build a "wheel" or an "sdist" from a folder; its file."""
    output.mkdir(exist_ok=True)
    before = set(output.iterdir())
    command = [sys.executable, "-c", BUILD, kind, str(output)]
    result = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (built,) = set(output.iterdir()) - before
    return built


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the project, as building leaves files behind."""
    copy = tmp_path_factory.mktemp("source")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "*.png")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignored)
    (copy / "datasets").mkdir()
    for file in (*ROOT.glob("*"), ROOT / ".pre-commit-config.yaml", *ROOT.glob("datasets/*.*")):
        if file.is_file():
            shutil.copy(file, copy / file.relative_to(ROOT))
    return copy


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("built")


@pytest.fixture(scope="module")
def wheel(source, output) -> Path:
    return build("wheel", source, output)


@pytest.fixture(scope="module")
def lite_wheel(source, output) -> Path:
    return build("wheel", source / "detectron2_lite", output)


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def modules(wheel: Path) -> dict[str, bytes]:
    return {name: text for name, text in contents(wheel).items() if ".dist-info/" not in name}


def metadata(wheel: Path):
    (text,) = (text for name, text in contents(wheel).items() if name.endswith("/METADATA"))
    return email.message_from_bytes(text)


def package_files(folder: Path, *endings: str) -> dict[str, bytes]:
    files = (file for ending in endings for file in folder.rglob(ending))
    return {file.relative_to(folder.parent).as_posix(): file.read_bytes() for file in files}


def test_the_wheels_hold_code_weights_and_types_as_they_are_and_nothing_else(wheel, lite_wheel):
    kinds = ("*.py", "*.pth", "*.html", "*.css", "py.typed", "README.md")
    expected = package_files(ROOT / "s4m_d2", *kinds)
    configs = package_files(ROOT / "configs", "*.yaml")
    expected |= {f"s4m_d2/{name}": text for name, text in configs.items()}
    assert modules(wheel) == expected
    assert {"s4m_d2/py.typed", "s4m_d2/sam/weights/tiny_sam.pth"} <= set(expected)
    assert wheel.stat().st_size < MAX_WHEEL_BYTES
    assert modules(lite_wheel) == package_files(ROOT / "detectron2_lite" / "detectron2", "*.py")


def version_in(module: Path) -> str:
    return re.search(r'^__version__ = "(.+)"', (module / "__init__.py").read_text(), re.M)[1]


def test_versions_are_those_of_the_modules(wheel, lite_wheel):
    assert metadata(wheel)["Version"] == version_in(ROOT / "s4m_d2")
    assert metadata(lite_wheel)["Version"] == version_in(ROOT / "detectron2_lite" / "detectron2")
    assert re.fullmatch(r"\d+\.\d+\.\d+", metadata(wheel)["Version"])  # semantic
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {version_in(ROOT / 's4m_d2')}\n" in citation
    for file in ("setup.py", "pyproject.toml"):
        assert metadata(wheel)["Version"] not in (ROOT / file).read_text()


def test_the_wheel_needs_no_engine_and_offers_the_commands(wheel):
    needed = metadata(wheel).get_all("Requires-Dist")
    assert needed and not [line for line in needed if line.startswith("detectron2")]
    [scripts] = [x for name, x in contents(wheel).items() if name.endswith("entry_points.txt")]
    for name in ("export", "label", "predict", "report", "review", "sepl", "train"):
        assert f"s4m-{name} = s4m_d2.commands.{name}:main\n".encode() in scripts


def test_the_source_distribution_is_whole_and_builds_the_same_wheel(
    source, output, wheel, tmp_path
):
    archive = build("sdist", source, output)
    with tarfile.open(archive) as file:
        file.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    needed = "CHANGELOG.md CITATION.cff LICENSE configs/Base-Cityscapes.yaml train_net.py "
    needed += "datasets/make_toyscapes.py detectron2_lite/pyproject.toml tools/slurm/train.sbatch "
    needed += "tests/data_reference/mask2former_tiny_fixture.npz tools/ablation_study/nuclei.yaml"
    assert not [name for name in needed.split() if not (unpacked / name).is_file()]
    assert not list(unpacked.rglob("*.pyc"))
    again = build("wheel", unpacked, tmp_path / "again")
    assert again.name == wheel.name
    assert contents(again) == contents(wheel)
