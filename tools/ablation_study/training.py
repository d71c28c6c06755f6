"""One run at a time as a process of its own, in a folder of its own, continued where it stopped."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ablation_study.results import collect, write_result
from ablation_study.runs import Run
from s4m_d2.engine.checkpointing.checkpoint_files import FINAL_CHECKPOINT
from s4m_d2.engine.training.stop_signals import EXIT_STOPPED
from s4m_d2.files import atomic_write

ATTEMPTS = "attempts.json"
OUTPUT = "output.txt"  # what the training has printed, all attempts
_TAIL_LINES = 12

DONE, FAILED, STOPPED, BUSY = "done", "failed", "stopped", "busy"


@dataclass(frozen=True)
class Outcome:
    """How a run went: DONE, FAILED, STOPPED (asked to save and end) or BUSY (another process)."""

    state: str
    result: dict[str, Any] | None = None
    message: str = ""


@dataclass(frozen=True)
class Trainer:
    """Trains runs and writes their results.

    Attributes:
        output: of the study: ``runs`` has a folder a run, ``results`` a file a finished run.
        command: the program, its config file and the overrides of all runs.
        code: names the code that trains.
        about: what else a result says of how it was made.
        environment: of the process.
    """

    output: Path
    command: Sequence[str]
    code: str
    about: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def runs(self) -> Path:
        return self.output / "runs"

    def has_weights(self, run: Run) -> bool:
        """Whether the last checkpoint of a run is there, as other runs need a teacher's."""
        return has_weights(self.runs, run)

    def train(
        self, run: Run, teacher: Mapping[str, Any] | None, seconds: float | None = None
    ) -> Outcome:
        """Train a run, or the rest of it, and write its result once it is complete.

        Args:
            teacher: the result of its stage 1, where that is another run.
            seconds: after which it is asked to save itself and to end; None: never.
        """
        folder = self.runs / run.name
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder) as handle:
            if handle is None:
                text = f"another process trains in '{folder}'; once it has ended, run this again"
                return Outcome(BUSY, message=text)
            attempts = read_attempts(folder)
            status = self._attempt(run, attempts, handle, seconds)
            if status == EXIT_STOPPED:
                return Outcome(STOPPED, message="stopped and saved")
            if status:
                return Outcome(FAILED, message=_failure(folder, f"exit status {status}"))
            try:
                result = collect(run, self.runs, teacher, attempts, self.about)
            except (OSError, ValueError, LookupError, TypeError) as error:
                return Outcome(FAILED, message=_failure(folder, f"no complete results: {error!r}"))
            write_result(result, self.output / "results")
            for checkpoint in (folder / run.stage).glob("model_[0-9]*.pth"):
                checkpoint.unlink()  # there is nothing left to continue
            return Outcome(DONE, result)

    def _attempt(
        self, run: Run, attempts: list[dict[str, Any]], handle: int, seconds: float | None
    ) -> int:
        """Run the program until it ends; ``attempts`` get another one. The exit status."""
        folder = self.runs / run.name
        options = [text for pair in run.overrides(self.runs).items() for text in pair]
        command = [sys.executable, *self.command, *options]
        start = time.monotonic()
        attempt = {"started": _now().isoformat(timespec="seconds"), "code": self.code}
        attempts.append(attempt)
        _write_attempts(folder, attempts)
        with open(folder / OUTPUT, "ab") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.environment},
                pass_fds=(handle,),  # the folder stays locked as long as the training lives
            )
            try:
                status = _wait(process, seconds)
            finally:
                attempt["seconds"] = round(time.monotonic() - start, 1)
                _write_attempts(folder, attempts)
        return status


def _wait(process: subprocess.Popen, seconds: float | None) -> int:
    """The exit status; after ``seconds``, or if this process is to end, the other is asked to.

    Whichever way it ended then (it may have had nothing to save yet), it was stopped.
    """
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.terminate()
        return EXIT_STOPPED if process.wait() else 0
    except BaseException:
        process.terminate()
        process.wait()
        raise


@contextmanager
def _alone(folder: Path) -> Iterator[int | None]:
    """A handle that keeps a folder for this process and those that inherit it; None: it is kept."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        yield handle if _lock(handle) else None
    finally:
        os.close(handle)


def _lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # network file systems lock no folders
        pass
    return True


def read_attempts(folder: Path) -> list[dict[str, Any]]:
    """The times that a run was started, each with its seconds.

    Of one whose end nobody noted, they are those until it last printed something.
    """
    try:
        attempts = json.loads((folder / ATTEMPTS).read_text())
        for attempt in attempts:
            if "seconds" not in attempt:
                start = datetime.fromisoformat(attempt["started"]).timestamp()
                last = (folder / OUTPUT).stat().st_mtime
                attempt["seconds"] = round(max(0.0, last - start), 1)
        return attempts
    except (OSError, ValueError, LookupError, TypeError):
        return []


def _write_attempts(folder: Path, attempts: Sequence[Mapping[str, Any]]) -> None:
    with atomic_write(folder / ATTEMPTS) as file:
        json.dump(attempts, file, indent=1)


def _now() -> datetime:
    return datetime.now(timezone.utc)


def _failure(folder: Path, what: str) -> str:
    """What happened, where to read of it, and the last lines."""
    path = folder / OUTPUT
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    tail = "".join(f"\n    {line}" for line in lines[-_TAIL_LINES:])
    return f"{what}; all of its output is in '{path}', the end:{tail}"


def has_weights(runs: Path, run: Run) -> bool:
    """Whether the last checkpoint of a run is in the folder of all runs."""
    return (runs / run.name / run.stage / FINAL_CHECKPOINT).is_file()


def progress(runs: Path, run: Run, iterations: int) -> float:
    """The share of a run's iterations that is trained and saved, by the checkpoint's name."""
    folder = runs / run.name / run.stage
    if (folder / FINAL_CHECKPOINT).exists():
        return 1.0
    done = [int(path.stem.split("_")[1]) + 1 for path in folder.glob("model_[0-9]*.pth")]
    return min(1.0, max(done, default=0) / iterations)
