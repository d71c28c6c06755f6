#!/usr/bin/env python
"""Prepare an environment: requirements, an engine, and this project in editable mode.

An environment made by this script gets the tested versions of requirements.txt, and the optional
ones of requirements-sam2.txt. In an existing environment nothing is changed, in particular not
Detectron2 and PyTorch; only missing packages of requirements.txt are added.
If run again, it does nothing unless the requirements changed, or an engine was removed. Needs only
Python's standard library.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENGINE = ROOT / "detectron2_lite"
REQUIREMENTS = ROOT / "requirements.txt"
SAM2_REQUIREMENTS = ROOT / "requirements-sam2.txt"
OLDEST_PYTHON, NEWEST_PYTHON = (3, 11), (3, 14)  # of the tested versions in requirements.txt
LIMITS = {"torch": "torch>=2.4"}  # as in setup.py
OPENCV = "opencv-python-headless"  # all distributions of OpenCV provide the same module
OURS = ".s4m_d2_made"  # in an environment that this script made
STAMP = ".s4m_d2_setup"  # what the last complete set-up was made from

NO_ENGINE = 3
ENGINE_CHECK = f"""
import sys
try:
    import detectron2
except ModuleNotFoundError as error:
    if error.name != "detectron2":
        raise
    sys.exit({NO_ENGINE})
import detectron2.config
print(f"engine: detectron2 {{detectron2.__version__}} at {{detectron2.__path__[0]}}")
"""
ENGINE_LOOKUP = """
import importlib.util, sys
sys.exit(importlib.util.find_spec("detectron2") is None)
"""  # at every make: nothing is imported


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="made if missing")
    environment = parser.parse_args().venv.resolve()
    python = environment / "bin" / "python"
    if not python.exists():
        make_environment(environment)
    stamp, wanted = environment / STAMP, fingerprint()
    if stamp.exists() and stamp.read_text() == wanted:
        if not has_engine(python):
            install_engine(python)
        return
    if (environment / OURS).exists():
        pip(python, "--no-compile", "-r", str(REQUIREMENTS))
        install_sam2(python)
        # Byte-compile with all cores; pip would use one, for a minute. Fails at a few templates.
        compile_all = ["-m", "compileall", "-qq", "-j", "0", str(environment / "lib")]
        subprocess.run([python, *compile_all])
    else:
        install_missing(python)
    install_engine(python)
    pip(python, "--no-deps", "--editable", str(ROOT))
    stamp.write_text(wanted)
    print(f"Installed. For the commands of the documentation: source {environment}/bin/activate")


def make_environment(environment: Path) -> None:
    if not OLDEST_PYTHON <= sys.version_info[:2] <= NEWEST_PYTHON:
        oldest, newest = (".".join(map(str, v)) for v in (OLDEST_PYTHON, NEWEST_PYTHON))
        sys.exit(
            f"The tested versions need Python {oldest} to {newest}; this is "
            f"{sys.version.split()[0]}.\nChoose one with: make setup PYTHON=python{newest}"
            "\nor name an environment of yours: make setup VENV=path"
        )
    print(f"making the environment {environment}")
    try:
        venv.create(environment, with_pip=True)
    except subprocess.CalledProcessError:
        sys.exit("Python's module venv lacks pip here. On Debian: apt install python3-venv")
    (environment / OURS).touch()


def fingerprint() -> str:
    files = (REQUIREMENTS, SAM2_REQUIREMENTS, ROOT / "setup.py", ENGINE / "pyproject.toml")
    contents = [str(ROOT).encode(), *(file.read_bytes() for file in files)]
    return hashlib.sha256(b"".join(contents)).hexdigest()


def pip(python: Path, *arguments: str) -> None:
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", *arguments]
    if subprocess.run(command).returncode:
        sys.exit(f"pip failed: {' '.join(command)}")


def install_sam2(python: Path) -> None:
    """Add the optional package sam2; without it only the SAM 2 backend is missing."""
    # Its build would download a PyTorch of its own, and compile CUDA code that images do not need.
    os.environ["SAM2_BUILD_CUDA"] = "0"
    files = ("--constraint", str(REQUIREMENTS), "-r", str(SAM2_REQUIREMENTS))
    try:
        pip(python, "--no-build-isolation", *files)
    except SystemExit as failed:
        print(
            "WARNING: the optional package sam2 could not be installed: S4M.SAM.BACKEND sam2 is "
            f"not available, and its tests are skipped. {failed}"
        )


def install_missing(python: Path) -> None:
    """Add what an environment lacks; every version that it has is a constraint."""
    command = [python, "-m", "pip", "list", "--disable-pip-version-check", "--format", "json"]
    listed = json.loads(subprocess.check_output(command))
    installed = {normalized(row["name"]): row["version"] for row in listed}
    names = re.findall(r"^([\w.-]+)==", REQUIREMENTS.read_text(), re.MULTILINE)
    missing = [name for name in names if normalized(name) not in installed]
    if any(name.startswith("opencv-") for name in installed):
        missing = [name for name in missing if name != OPENCV]
    if not missing:
        return
    # A local version ("2.4.0+cu121") stays a constraint: it is what is there.
    constraints = [f"{name}=={version}" for name, version in installed.items()]
    constraints += [limit for name, limit in LIMITS.items() if name not in installed]
    with tempfile.NamedTemporaryFile("w", suffix=".txt", delete=False) as file:
        file.write("\n".join(constraints))
    try:
        pip(python, "--constraint", file.name, *missing)
    finally:
        os.unlink(file.name)


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def has_engine(python: Path) -> bool:
    """Whether a package detectron2 is there, working or not."""
    return subprocess.run([python, "-c", ENGINE_LOOKUP], cwd="/").returncode == 0


def install_engine(python: Path) -> None:
    """Install the embedded engine where there is none; never over Detectron2."""
    # From the root folder: no folder of the checkout can pass for the module.
    status = subprocess.run([python, "-c", ENGINE_CHECK], cwd="/").returncode
    if status == NO_ENGINE:
        pip(python, "--no-deps", "--editable", str(ENGINE))
    elif status:
        sys.exit(
            "Detectron2 is installed but cannot be imported (see above). Repair it, or remove it "
            "(pip uninstall detectron2) to use the embedded engine."
        )


if __name__ == "__main__":
    main()
