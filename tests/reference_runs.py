"""Runs with stored values (tests/data_reference): the proof that a change of the code changes none.

    python tests/reference_runs.py                      # compare every run with its stored values
    python tests/reference_runs.py quickstart           # this one
    python tests/reference_runs.py --record quickstart  # and store what it gives now

A run is a sequence of documented commands, each a process of its own with one thread, on generated
data. Losses are read where Detectron2's event storage gets them: no module of the package is named.
An untrained teacher is certain of nothing, so any score is enough for a pseudo-label.

On the machine and PyTorch that recorded the values (the fingerprint) all must be bit-equal: losses
of each iteration, checksums of the final weights, and what is printed. Elsewhere sums are rounded
in another order (1e-7), which AdamW's first steps enlarge to the size of the learning rate: there
the losses of the first iteration must agree to 1e-4, and those of all where SGD trains. A change of
arithmetic that is meant to keep the values moves their last digits in the same way: look at what
the first command prints (1e-6 in the first iteration, and in all of r50's), then record anew.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import multiprocessing
import os
import platform
import re
import runpy
import signal
import sys
import tempfile
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from detectron2.utils.events import EventStorage
from helpers import ROOT, SMALL_RUN, json_lines, key_values

STORED = ROOT / "tests" / "data_reference"
QUICKSTART, R50 = (f"configs/{name}_10pct.yaml" for name in ("toyscapes", "cityscapes"))
TOYSCAPES = ("--train", 20, "--val", 4, "--size", 128, 64, "--seed", 3, "--workers", 1)
SETTINGS = SMALL_RUN | {
    "MODEL.WEIGHTS": "",
    "DATASETS.TRAIN": ("toyscapes_train_10pct",),
    "DATASETS.UNLABELED": ("toyscapes_train_unlabeled",),
    "DATASETS.TEST": (),
    "S4M.SAM.BACKEND": "tiny_toyscapes",
    "S4M.SAM.CHECKPOINT": "",
}


def quickstart(folder: Path) -> dict[str, Any]:
    """20 iterations of both stages, the second killed and resumed; AP; quality of pseudo-labels."""
    values = train(folder, QUICKSTART, 20, kill_at=14)
    config = ("--config-file", ROOT / QUICKSTART)
    words = key_values(SETTINGS, OUTPUT_DIR=folder / "tested")
    weights = folder / "run" / "student" / "model_final.pth"
    tested = ("DATASETS.TEST", ("toyscapes_val",), "MODEL.WEIGHTS", weights, "S4M.EVAL", "both")
    quality = ("--weights", weights, "--teacher", "--images", 2)
    values["printed"] = [
        *command(folder, "train_net.py", *config, "--eval-only", *words, *tested),
        *command(folder, "tools/pseudo_label_quality.py", *config, *quality, *words),
    ]
    return values


def r50(folder: Path) -> dict[str, Any]:
    """Two iterations of both stages of the published model, on a small crop, with SGD."""
    # Without a weight of "no object", it finds objects although it is untrained.
    changes = {"MODEL.MASK_FORMER.NO_OBJECT_WEIGHT": 0.0, "SOLVER.OPTIMIZER": "SGD"}
    return train(folder, R50, 2, **changes)


def sepl(folder: Path) -> dict[str, Any]:
    """Labels enhanced with masks of the tiny SAM, and how good they are."""
    make_toyscapes(folder)
    command(folder, "datasets/make_cam_labels.py", "--data", "toyscapes", "--output", "cam")
    labels = ("--class-names", "cam/classes.txt", "--pseudo-labels", "cam/pseudo-labels")
    sam = ("--sam", "tiny_toyscapes", "--points-per-side", 6, "--pred-iou-thresh", 0.6)
    images = ("--images", "cam/images", "--output", "out", "--device", "cpu")
    command(folder, "tools/sepl.py", *labels, *images, *sam, "--stability-score-thresh", 0.7)
    compared = ("--enhanced", "out", "--ground-truth", "cam/ground-truth")
    return {"printed": command(folder, "tools/sepl.py", "evaluate", *labels, *compared)}


RUNS = {run.__name__: run for run in (quickstart, r50, sepl)}
STEADY = ("r50",)  # near the stored values wherever they run, to the end


def train(folder, config, iterations, *, kill_at=None, **options) -> dict[str, Any]:
    """Both stages; the second kills itself in the iteration ``kill_at`` and is resumed."""
    make_toyscapes(folder)
    lengths = {"SOLVER.MAX_ITER": iterations, "S4M.TEACHER.MAX_ITER": iterations}
    lengths |= {"S4M.BURN_IN": iterations // 2, "SOLVER.CHECKPOINT_PERIOD": iterations // 2 + 1}
    words = ["--config-file", ROOT / config, "--resume"]
    words += key_values(SETTINGS | options | lengths, OUTPUT_DIR=folder / "run")
    values: dict[str, Any] = {"losses": {}, "weights": {}}
    final = {stage: folder / "run" / stage / "model_final.pth" for stage in ("teacher", "student")}
    for stage in final:
        words += ["S4M.STAGE", stage]
        if stage == "student":
            words += ["S4M.TEACHER_WEIGHTS", final["teacher"]]
            if kill_at is not None:
                command(folder, "train_net.py", *words, losses=stage, kill_at=kill_at)
        command(folder, "train_net.py", *words, losses=stage)
        values["losses"][stage] = read_losses(folder / stage)
        values["weights"][stage] = checksum(final[stage])
    return values


def make_toyscapes(folder: Path) -> None:
    command(folder, "datasets/make_toyscapes.py", "--output", "toyscapes", *TOYSCAPES)


def command(folder: Path, *words: Any, losses: str = "", kill_at: int | None = None) -> list[str]:
    """Run a script of the project in ``folder``; the numbers in rows of tables that it prints.

    Args:
        losses: file in ``folder`` that gets the losses of each iteration.
        kill_at: the process kills itself when it logs this iteration.
    """
    log = folder / "log.txt"
    log.unlink(missing_ok=True)
    target = folder / losses if losses else None
    arguments = ([*map(str, words)], log, target, kill_at)
    process = multiprocessing.get_context("fork").Process(target=_run, args=arguments)
    process.start()
    process.join()
    if process.exitcode != (0 if kill_at is None else -signal.SIGKILL):
        raise RuntimeError(f"{' '.join(arguments[0])}: {process.exitcode}\n{log.read_text()}")
    rows = re.findall(r"^\|.*|copypaste:.*", log.read_text(), re.MULTILINE)
    return [numbers for row in rows if (numbers := " ".join(re.findall(r"-?\d+(?:\.\d+)?", row)))]


def _run(words: list[str], log: Path, losses: Path | None, kill_at: int | None) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    os.chdir(log.parent)
    os.environ["DETECTRON2_DATASETS"] = str(log.parent)
    put = EventStorage.put_scalar

    def recorded(self, name, value, smoothing_hint=True, cur_iter=None):
        iteration = self.iter if cur_iter is None else cur_iter
        if iteration == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if losses and "loss" in name:
            with losses.open("a") as file:
                file.write(json.dumps([iteration, name, float(value)]) + "\n")
        return put(self, name, value, smoothing_hint, cur_iter)

    EventStorage.put_scalar = recorded
    sys.argv = [str(ROOT / words[0]), *words[1:]]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


def read_losses(path: Path) -> dict[str, list[float]]:
    """name → value of each iteration; one that a resumed run repeats must have the same value."""
    found: dict[str, dict[int, float]] = {}
    for iteration, name, value in json_lines(path):
        first = found.setdefault(name, {}).setdefault(iteration, value)
        assert value == first, f"{name} in iteration {iteration}: {first}, resumed: {value}"
    return {name: [values[i] for i in sorted(values)] for name, values in sorted(found.items())}


def checksum(path: Path) -> str:
    """Of the weights of a checkpoint by name, the EMA teacher's too."""
    content = torch.load(path, weights_only=True)
    teacher = content["trainer"]["hooks"].get("EMATeacherHook", {}).get("teacher", {})
    digest = hashlib.sha256()
    for weights in (content["model"], teacher):
        for name, value in sorted(weights.items()):
            digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


def fingerprint() -> str:
    """What rounding depends on: the processor and its instructions, and PyTorch."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    cpu = sorted({line for line in lines if line.startswith(("model name", "flags"))})
    digest = hashlib.sha256("\n".join(cpu).encode()).hexdigest()[:16]
    return f"{platform.machine()} {digest}, PyTorch {torch.__version__}"


def differences(found: dict[str, Any], stored: dict[str, Any], part: str = "") -> list[float]:
    """The largest relative difference of each iteration's losses whose names begin with ``part``.

    Raises:
        AssertionError: the losses have other names, or are those of more or fewer iterations.
    """
    largest: list[float] = []
    for stage, losses in stored.get("losses", {}).items():
        assert found["losses"][stage].keys() == losses.keys(), stage
        for name in filter(lambda name: name.startswith(part), losses):
            pairs = zip(found["losses"][stage][name], losses[name], strict=True)
            moved = [abs(new - old) / max(abs(old), 1e-3) for new, old in pairs]
            largest = [*map(max, zip_longest(largest, moved, fillvalue=0.0))]
    return largest


def stored(name: str) -> dict[str, Any]:
    return json.loads((STORED / f"{name}.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", help=f"some of {', '.join(RUNS)}; default: all")
    parser.add_argument("--record", action="store_true", help="store the values that come out")
    words = "write the values to this file, do nothing else"
    parser.add_argument("--output", type=Path, help=words)
    args = parser.parse_args()
    importlib.import_module("s4m_d2.engine")  # once for all commands
    found = {}
    for name in args.runs or RUNS:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = values = RUNS[name](Path(folder))
        if args.record:
            values = {"fingerprint": fingerprint(), **values}
            text = re.sub(r"\n(?=[-\d\]])", " ", json.dumps(values, indent=0))
            (STORED / f"{name}.json").write_text(text + "\n")
        elif args.output is None:
            old = stored(name)
            same = all(values[key] == old[key] for key in values)
            moved = ", ".join(f"{value:.0e}" for value in differences(values, old))
            print(f"{name}: {'the same' if same else f'differs; losses by iteration: {moved}'}")
    if args.output:
        args.output.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
