"""A study's configuration and data; its runs, each a process in a folder of its own; results."""

import contextlib
import fcntl
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import detectron2
import torch
import yaml
from quickstart import KEEP_MEMORY

from ablation_study import ROOT
from ablation_study.data_sets import RealSet, Toyscapes
from ablation_study.runs import EMA, TEACHER, Run
from s4m_d2.engine.config_file import load_config
from s4m_d2.engine.stages import run_config
from s4m_d2.engine.training.stop_signals import EXIT_STOPPED
from s4m_d2.errors import ConfigError, S4MError
from s4m_d2.files import write_json

LABELING = ("pseudo_label", "refinement/")  # how the scalars on pseudo-labels begin
OUTPUT = "output.txt"  # of a run: all that it printed


class RunFailed(S4MError):
    """A training ended with an error or left no results."""


class RunStopped(S4MError):
    """A training was asked to save itself and to end."""


class Study:
    """A configuration, and an output folder that holds runs of no other.

    ``OUTPUT/runs`` has a folder for each run, ``OUTPUT/results`` a file for each finished one.
    """

    def __init__(
        self, output: Path, data: Toyscapes | RealSet, config_file: str, overrides: Sequence[str]
    ) -> None:
        self.output = output.absolute()
        self.runs, self.results = self.output / "runs", self.output / "results"
        self._config_file = str(Path(config_file).absolute())
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._overrides = ["MODEL.DEVICE", device, *overrides]
        self._cfg = run_config(load_config(config_file, self._overrides))
        self._data = data
        self._check_same()

    def iterations(self, run: Run) -> int:
        teachers = self._cfg.S4M.TEACHER.MAX_ITER if run.method.is_teacher else 0
        return teachers or self._cfg.SOLVER.MAX_ITER

    @contextlib.contextmanager
    def begin(self) -> Iterator[int]:
        """Make the data where there are none; a handle that keeps the folder for this process.

        Trainings inherit it: one that outlives this process keeps the folder too.
        """
        self.output.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.output, os.O_RDONLY)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConfigError(
                    f"Another process trains in '{self.output}'; once it has ended, run this again."
                ) from error
            except OSError:  # network file systems lock no folders
                pass
            self._data.prepare()
            write_json(self.output / "study.json", self._settings(), indent=1)
            yield handle
        finally:
            os.close(handle)

    def train(
        self, run: Run, results: Mapping[str, Any], handle: int, seconds: float | None = None
    ) -> dict[str, Any]:
        """Train a run, or the rest of it; write and return its result.

        After ``seconds`` it is asked to save itself and to end; ``handle``: of :meth:`begin`.
        """
        folder = self.runs / run.name
        folder.mkdir(parents=True, exist_ok=True)
        attempts = folder / "attempts.json"
        times = json.loads(attempts.read_text()) if attempts.exists() else []
        start = time.monotonic()
        try:
            status = self._run(run, folder, handle, seconds)
        finally:
            times.append(round(time.monotonic() - start, 1))
            write_json(attempts, times)
        if status == EXIT_STOPPED:
            raise RunStopped("stopped and saved")
        try:
            if status:
                raise ValueError(f"exit status {status}")
            result = self._collect(run, results, times)
        except (OSError, ValueError, LookupError, TypeError) as error:
            path = folder / OUTPUT
            tail = path.read_text(errors="replace").splitlines()[-12:]
            raise RunFailed(
                f"no complete results: {error!r}; all of its output is in '{path}', the end:",
                *(f"    {line}" for line in tail),
            ) from error
        write_json(self.results / f"{run.name}.json", result, indent=1)
        for checkpoint in (folder / run.stage).glob("model_[0-9]*.pth"):
            checkpoint.unlink()  # there is nothing left to continue
        return result

    def _run(self, run: Run, folder: Path, handle: int, seconds: float | None) -> int:
        """The exit status of the training, as one that was stopped if it was asked to end."""
        values = self._data.overrides(run) | run.overrides(self.runs)
        options = [text for pair in values.items() for text in pair]
        command = [sys.executable, str(ROOT / "train_net.py"), "--config-file", self._config_file]
        command += ["--resume", *self._overrides, *options]
        own = KEEP_MEMORY | {"OMP_NUM_THREADS": str(cores())}
        own |= os.environ | self._data.environment
        with open(folder / OUTPUT, "ab") as output:
            streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
            process = subprocess.Popen(command, env=own, pass_fds=(handle,), **streams)
            try:
                return process.wait(seconds)
            except subprocess.TimeoutExpired:
                process.terminate()
                return EXIT_STOPPED if process.wait() else 0
            except BaseException:
                process.terminate()
                process.wait()
                raise

    def _collect(self, run: Run, results: Mapping[str, Any], times: list[float]) -> dict[str, Any]:
        """The result of a run whose training has ended, from what it has written."""
        folder = self.runs / run.name / run.stage
        final = json.loads((folder / "results.json").read_text())
        lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
        models = {}
        if run.teacher is not None:
            models[TEACHER] = results[run.teacher.name]["models"][TEACHER]
        elif run.method.has_student:
            teacher = json.loads((self.runs / run.name / "teacher" / "results.json").read_text())
            models[TEACHER] = _figures(teacher)
        models[run.method.model] = _figures(final)
        if "teacher" in final:
            models[EMA] = _figures(final["teacher"])
        frozen = [line for line in lines if line.get("teacher/phase") == 0]
        device = self._cfg.MODEL.DEVICE
        name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "CPU"
        return {
            "name": run.name,
            "method": run.method.slug,
            "percent": run.percent,
            "seed": run.seed,
            "models": models,
            "pseudo-labels": {"burn-in": _at_end(frozen), "end": _at_end(lines)},
            "iterations": max((x["iteration"] + 1 for x in lines if "total_loss" in x), default=0),
            "seconds": sum(times),
            "attempts": len(times),
            "settings": run.overrides(Path()),
            "config": Path(self._config_file).name,
            "overrides": self._overrides,
            "data": self._data.facts(),
            "device": f"{name}, {cores()} cores",
            "engine": f"detectron2 {detectron2.__version__}",
            "torch": torch.__version__,
            "commit": _commit(),
        }

    def _settings(self) -> dict[str, Any]:
        return {"config": yaml.safe_load(self._cfg.dump()), "data": self._data.facts()}

    def _check_same(self) -> None:
        path = self.output / "study.json"
        before = dict(_flat(json.loads(path.read_text()))) if path.exists() else {}
        # Keys that only one of them has are of another version of the code.
        now = {key: value for key, value in _flat(self._settings()) if key in before}
        changed = [f"{k} was {before[k]} and is {v}" for k, v in now.items() if v != before[k]]
        if changed:
            raise ConfigError(
                f"'{self.output}' holds runs of other settings: {', '.join(changed)}. Choose "
                "another --output, or give the same settings again."
            )


def read_results(folder: Path, runs: Iterable[Run]) -> dict[str, dict[str, Any]]:
    """The results there are, by the name of the run."""
    paths = {run.name: folder / f"{run.name}.json" for run in runs}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


def _figures(results: Mapping[str, Any]) -> dict[str, Any]:
    """AP, AP50 and AP by class, in percent."""
    segm = results["segm"]
    by_class = {k.removeprefix("AP-"): v for k, v in segm.items() if k.startswith("AP-")}
    return {"AP": segm["AP"], "AP50": segm["AP50"], "by class": by_class}


def _at_end(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means of the scalars on pseudo-labels over the last tenth of the lines that have them."""
    chosen = [{k: v for k, v in line.items() if k.startswith(LABELING)} for line in lines]
    chosen = [values for values in chosen if values]
    last = chosen[-max(1, round(0.1 * len(chosen))) :]
    keys = dict.fromkeys(key for values in last for key in values)
    return {key: statistics.mean(v[key] for v in last if key in v) for key in keys}


def _flat(settings: Mapping[str, Any], start: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{start}{key}.")
        else:
            yield f"{start}{key}".removeprefix("config."), value


def cores() -> int:
    """Those that this process may use, where the system tells."""
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def _commit() -> str | None:
    """The commit of a checkout, with "+" where files differ from it; None elsewhere."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(git, capture_output=True, check=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
