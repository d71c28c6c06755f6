"""Environments, and the wheels of both packages, built as by python -m build --no-isolation."""

import email
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import install
import pytest
from helpers import ROOT

LITE = ROOT / "detectron2_lite"
BY_HAND = {"build", "pre-commit"}  # for commits and releases: neither tests nor code need them

BLOCK_ENGINE = "import sys; sys.modules['detectron2'] = None\n"


def run(code, *paths):
    """Run Python code in a fresh process that finds modules in ``paths`` first."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (*paths, ROOT)))}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


def fake_engine(folder, content):
    (folder / "detectron2").mkdir()
    (folder / "detectron2" / "__init__.py").write_text(content)
    return folder


@pytest.fixture
def installer(monkeypatch):
    """tools/install.py; ``calls``: what its pip was called with."""
    monkeypatch.setattr(install, "calls", calls := [], raising=False)
    monkeypatch.setattr(install, "pip", lambda *arguments: calls.append(arguments))
    return install


def test_without_an_engine_one_error_names_both():
    result = run(BLOCK_ENGINE + "import s4m_d2")
    assert result.returncode == 1
    error = result.stderr[result.stderr.rindex("\nImportError: ") :]
    assert "detectron2_lite" in error and "https://detectron2.readthedocs.io" in error
    assert "ModuleNotFoundError" not in result.stderr  # one error, no chain


def test_a_broken_engine_shows_its_own_error(tmp_path):
    result = run("import s4m_d2", fake_engine(tmp_path, "import no_such_extension"))
    assert result.returncode == 1
    assert "no_such_extension" in result.stderr
    assert "detectron2_lite" not in result.stderr


def requirement_names(lines):
    names = (re.match(r"[\w.-]+", line) for line in lines)
    return {re.sub(r"[-_.]+", "-", name[0]).lower() for name in names if name}


def test_every_dependency_is_pinned_and_none_is_an_engine(monkeypatch):
    arguments = {}
    monkeypatch.setattr("setuptools.setup", arguments.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    texts = ((ROOT / f"requirements{of}.txt").read_text() for of in ("", "-sam2"))
    pins, optional = (re.findall("^[^#\n].*", text, re.MULTILINE) for text in texts)
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in pins + optional)
    assert requirement_names(arguments["extras_require"]["sam2"]) <= requirement_names(optional)
    pinned = requirement_names(pins)
    assert not pinned & requirement_names(optional)
    project = (LITE / "pyproject.toml").read_text()
    lite = re.findall(r'"(.+?)"', re.search(r"dependencies = \[(.+?)\]", project, re.DOTALL)[1])
    assert "torch>=2.4" in lite
    needed = requirement_names(arguments["install_requires"] + arguments["extras_require"]["dev"])
    assert needed - BY_HAND <= pinned
    assert requirement_names(lite) <= pinned
    assert "detectron2" not in pinned | needed


def test_setup_leaves_a_working_engine_alone_and_refuses_a_broken_one(
    installer, tmp_path, monkeypatch
):
    monkeypatch.setenv("PYTHONPATH", str(fake_engine(tmp_path, "__version__ = '0.6'")))
    (tmp_path / "detectron2" / "config.py").touch()
    installer.install_engine(Path(sys.executable))
    (tmp_path / "detectron2" / "__init__.py").write_text("import no_such_extension")
    with pytest.raises(SystemExit, match="pip uninstall detectron2"):
        installer.install_engine(Path(sys.executable))
    assert installer.calls == []


def test_setup_installs_the_embedded_engine_where_there_is_none(installer, monkeypatch):
    monkeypatch.setattr(installer, "ENGINE_CHECK", BLOCK_ENGINE + installer.ENGINE_CHECK)
    installer.install_engine(Path(sys.executable))
    assert [call[1:] for call in installer.calls] == [("--no-deps", "--editable", str(LITE))]


@pytest.mark.parametrize("is_there", [True, False])
def test_a_second_setup_only_brings_an_engine_back_that_was_removed(
    installer, tmp_path, monkeypatch, is_there
):
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (tmp_path / "venv" / installer.STAMP).write_text(installer.fingerprint())
    # Broken or not: a second set-up must not import the engine, which takes seconds.
    monkeypatch.setenv("PYTHONPATH", str(fake_engine(tmp_path, "raise SystemExit(1)")))
    if not is_there:
        for name in ("ENGINE_LOOKUP", "ENGINE_CHECK"):
            monkeypatch.setattr(installer, name, BLOCK_ENGINE + getattr(installer, name))
    monkeypatch.setattr(sys, "argv", ["install.py", "--venv", str(tmp_path / "venv")])
    installer.main()
    engine = (python, "--no-deps", "--editable", str(LITE))
    assert installer.calls == ([] if is_there else [engine])


def test_an_existing_environment_gets_only_what_it_lacks(installer, tmp_path, monkeypatch):
    import numpy

    requirements = tmp_path / "requirements.txt"
    text = "# a comment\nno-such-thing==1.0\nnumpy==0.1\nopencv-python-headless==0.1\n"
    requirements.write_text(text)
    calls = []

    def pip(python, *arguments):
        calls.append((arguments, Path(arguments[1]).read_text().splitlines()))

    monkeypatch.setattr(installer, "pip", pip)
    monkeypatch.setattr(installer, "REQUIREMENTS", requirements)
    installer.install_missing(Path(sys.executable))
    ((arguments, constraints),) = calls
    assert arguments[0] == "--constraint" and arguments[2:] == ("no-such-thing",)
    assert f"numpy=={numpy.__version__}" in constraints


MAX_WHEEL_BYTES = 12 * 2**20
FOLDERS = ("configs", "docs", "examples", "s4m_d2", "tests", "tools", "detectron2_lite")
BUILD = """
import sys
from setuptools import build_meta
getattr(build_meta, "build_" + sys.argv[1])(sys.argv[2])
"""


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
    pytest.importorskip("setuptools", minversion="70.1", reason="builds no wheels by itself")
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
    needed += "tests/data_reference/mask2former_tiny_fixture.npz tests/simulated_gpu/library.c "
    needed += "tools/ablation_study/nuclei.yaml"
    assert not [name for name in needed.split() if not (unpacked / name).is_file()]
    assert not list(unpacked.rglob("*.pyc"))
    again = build("wheel", unpacked, tmp_path / "again")
    assert again.name == wheel.name
    assert contents(again) == contents(wheel)
