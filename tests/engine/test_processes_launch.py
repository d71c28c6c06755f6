"""Commands in two processes, which torchrun starts or Detectron2."""

import os
import re
import signal
import subprocess
import sys

import pytest

from s4m_d2.engine.launch import launch
from s4m_d2.report import read_results

from .conftest import ROOT
from .process_failures import arguments, main

CONFIG = str(ROOT / "configs" / "toyscapes_10pct.yaml")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
TRAIN_NET = str(ROOT / "train_net.py")
FAILURES = str(ROOT / "tests" / "engine" / "process_failures.py")
SECONDS = 100  # more than any of these takes, less than the 30 minutes of a collective's time-out


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | environment,
    )


def test_torchrun_trains_both_stages_and_detectron2s_launch_evaluates_the_result(
    small_options, tmp_path
):
    short = {"SOLVER__MAX_ITER": 2, "S4M__TEACHER__MAX_ITER": 2, "S4M__BURN_IN": 1}
    run = ("--config-file", CONFIG)
    trained = command(*TORCHRUN, TRAIN_NET, *run, *small_options(**short))
    assert trained.returncode == 0, trained.stderr
    assert "World size: 2" in trained.stdout
    student = tmp_path / "run" / "student"
    expected = read_results(str(student / "results.json"))["segm"]

    changes = {"OUTPUT_DIR": str(tmp_path / "eval")}
    changes["MODEL__WEIGHTS"] = str(student / "model_final.pth")
    options = ("--eval-only", "--num-gpus", "2", "--dist-url", "auto", *small_options(**changes))
    evaluated = command(TRAIN_NET, *run, *options)
    assert evaluated.returncode == 0, evaluated.stderr
    assert "World size: 2" in evaluated.stdout
    found = re.findall(r"copypaste: ([\d.]+,[\d.]+)", evaluated.stdout)
    assert found == [f"{expected['AP']:.4f},{expected['AP50']:.4f}"]


def test_detectron2s_launch_ends_when_a_process_fails_and_the_mistake_is_shown(capfd, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(SystemExit) as ended:
        launch(main, arguments("mistake", num_gpus=2))
    assert ended.value.code == 1
    shown = capfd.readouterr().err
    assert "[rank 1] DatasetError: frankfurt_000000_000294.png is truncated." in shown
    assert "process 1 terminated with exit code 1" in shown


def test_torchrun_ends_when_a_process_fails_and_its_error_is_shown():
    ended = command(*TORCHRUN, FAILURES, "bug")
    assert ended.returncode != 0
    assert "ZeroDivisionError: the second process cannot go on" in ended.stderr
    cause = ended.stderr.partition("Root Cause (first observed failure)")[2]
    assert re.search(r"rank\s*: 1 ", cause) and "ZeroDivisionError" in cause


@pytest.mark.slow
@pytest.mark.parametrize("how", ["mistake", "bug", "killed"])
@pytest.mark.parametrize("start", ["launch", "torchrun"])
def test_any_failure_of_a_process_ends_the_run_with_its_error(start, how):
    ours = (FAILURES, how, "--num-gpus", "2")
    ended = command(*ours) if start == "launch" else command(*TORCHRUN, FAILURES, how)
    killed = "SIGKILL" if start == "launch" else f"exitcode  : -{signal.SIGKILL:d}"
    shown = {"mistake": "[rank 1] DatasetError: frank", "bug": "ZeroDivisionError: the second"}
    assert ended.returncode != 0
    assert shown.get(how, killed) in ended.stderr
    if how == "mistake" and start == "launch":
        assert "Traceback" not in ended.stderr.partition("[rank 0]")[0]


BAD_ENVIRONMENTS = {
    "a variable is missing": (
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
        1,
        "MASTER_ADDR",
    ),
    "two launchers": (
        {
            "RANK": "0",
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": "29500",
        },
        2,
        "--nproc-per-node",
    ),
}


@pytest.mark.parametrize("case", BAD_ENVIRONMENTS)
def test_contradictory_ways_to_start_processes_are_refused(monkeypatch, case):
    environment, num_gpus, expected = BAD_ENVIRONMENTS[case]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=f"ConfigError: .*{expected}"):
        launch(main, arguments("mistake", num_gpus))
