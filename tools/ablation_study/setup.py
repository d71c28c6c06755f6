"""What all runs of a study have in common: configuration, data, environment, and what made them."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import detectron2
import torch
import yaml
from detectron2.config import CfgNode
from make_toyscapes import read_parameters
from quickstart import KEEP_MEMORY

from ablation_study.training import Trainer
from s4m_d2.engine.config_file import load_config
from s4m_d2.engine.stages import run_config
from s4m_d2.errors import ConfigError, DatasetError
from s4m_d2.files import atomic_write

ROOT = Path(__file__).resolve().parents[2]
STUDY_FILE = "study.json"
# Of the data set that is made where none is given. So few that a run goes through the labeled ones
# a few hundred times (in the paper thousands), and more labels would help.
TRAIN_IMAGES, VAL_IMAGES = 100, 100
_SHOWN = 5  # settings that an error message lists


@dataclass(frozen=True)
class Study:
    """A configuration, checked, and an output folder that holds runs of no other.

    Attributes:
        data: the toyscapes that is trained on.
        iterations: of the stage-1 teachers, and of all other runs.
    """

    output: Path
    data: Path
    config_file: str
    options: tuple[str, ...]
    cfg: CfgNode

    @classmethod
    def read(
        cls, output: Path, data: Path | None, config_file: str, overrides: Sequence[str]
    ) -> Study:
        """
        Args:
            data: a folder that holds toyscapes; None: ``output``/data, where it is made.

        Raises:
            ConfigError: an override does not fit, or ``output`` holds runs of other settings.
            DatasetError: ``data`` holds no toyscapes.
        """
        device = "cuda" if torch.cuda.is_available() else "cpu"
        options = ("MODEL.DEVICE", device, *overrides)
        cfg = run_config(load_config(config_file, options))
        output = output.absolute()
        folder = (output / "data" if data is None else data.absolute()) / "toyscapes"
        if data is not None and read_parameters(folder) is None:
            raise DatasetError(
                f"--data names '{data}', but there is no toyscapes in it. Make it with: python "
                f"datasets/make_toyscapes.py --output '{folder}'; or leave --data out."
            )
        study = cls(output, folder, str(Path(config_file).absolute()), options, cfg)
        study._check_same()
        return study

    @property
    def iterations(self) -> tuple[int, int]:
        longer = self.cfg.SOLVER.MAX_ITER
        return self.cfg.S4M.TEACHER.MAX_ITER or longer, longer

    def trainer(self, train_net: Path) -> Trainer:
        """Make the data set where there is none, and note the settings in the output folder."""
        if read_parameters(self.data) is None:
            _make_data(self.data)
        with atomic_write(self.output / STUDY_FILE) as file:
            json.dump(self._settings(), file, indent=1)
        options = ("--config-file", self.config_file, "--resume", *self.options)
        environment = {
            **KEEP_MEMORY,
            "OMP_NUM_THREADS": str(_cores()),
        }
        environment |= {key: os.environ[key] for key in environment if key in os.environ}
        return Trainer(
            self.output,
            (str(train_net), *options),
            code_version(),
            self._about(),
            environment | {"DETECTRON2_DATASETS": str(self.data.parent)},
        )

    def _about(self) -> dict[str, Any]:
        device = self.cfg.MODEL.DEVICE
        name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "CPU"
        return {
            "config": Path(self.config_file).name,
            "overrides": list(self.options),
            "data": read_parameters(self.data),
            "device": f"{name}, {_cores()} cores",
            "engine": f"detectron2 {detectron2.__version__}",
            "torch": torch.__version__,
            "commit": _commit(),
        }

    def _settings(self) -> dict[str, Any]:
        config = yaml.safe_load(self.cfg.dump())
        return {"config": config, "data": read_parameters(self.data)}

    def _check_same(self) -> None:
        path = self.output / STUDY_FILE
        try:
            before = dict(_flat(json.loads(path.read_text())))
        except FileNotFoundError:
            return
        except (OSError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"'{path}' should say which settings the runs beside it have, but cannot be read: "
                f"{error!r}. Choose another --output."
            ) from error
        # Keys that only one of them has are of another version of the code.
        now = {key: value for key, value in _flat(self._settings()) if key in before}
        changed = [key for key, value in now.items() if value != before[key]]
        if changed:
            shown = ", ".join(f"{k} was {before[k]} and is {now[k]}" for k in changed[:_SHOWN])
            more = f" (and {len(changed) - _SHOWN} more)" if len(changed) > _SHOWN else ""
            raise ConfigError(
                f"'{self.output}' holds runs of other settings: {shown}{more}. Choose another "
                "--output, or give the same settings again."
            )


def _flat(settings: Mapping[str, Any], start: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{start}{key}.")
        else:
            yield f"{start}{key}".removeprefix("config."), value


def _make_data(folder: Path) -> None:
    command = [sys.executable, str(ROOT / "datasets" / "make_toyscapes.py"), "--output"]
    counts = ["--train", str(TRAIN_IMAGES), "--val", str(VAL_IMAGES)]
    if subprocess.run([*command, str(folder), *counts]).returncode:
        raise DatasetError(f"toyscapes cannot be made in '{folder}', for the reason above.")


def _cores() -> int:
    """Those that this process may use, where the system tells."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def code_version() -> str:
    """Names the code that trains, and the packaged SAM's weights."""
    package = ROOT / "s4m_d2"
    sources = [*package.rglob("*.py"), *(package / "sam" / "weights").iterdir()]
    digest = hashlib.sha256()
    for path in sorted({*sources, ROOT / "train_net.py"}):
        if path.is_file():
            digest.update(f"|{path.relative_to(ROOT).as_posix()}|".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _commit() -> str | None:
    """The commit of a checkout, with "+" where files differ from it; None elsewhere."""
    try:
        git = ["git", "-C", str(ROOT)]
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True)
        changes = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True)
    except OSError:
        return None
    if head.returncode or changes.returncode:
        return None
    return head.stdout.decode().strip() + ("+" if changes.stdout.strip() else "")
