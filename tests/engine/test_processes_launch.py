"""Commands in two processes, which torchrun starts or Detectron2."""

import os
import re
import subprocess
import sys

import pytest
from helpers import QUICKSTART, ROOT

from s4m_d2.engine.command.launch import launch
from s4m_d2.errors import ConfigError
from s4m_d2.report import read_results

from .process_failures import arguments, main

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
TRAIN_NET = str(ROOT / "train_net.py")
FAILURES = str(ROOT / "tests" / "engine" / "process_failures.py")
SHORT = {"SOLVER__MAX_ITER": 1, "S4M__TEACHER__MAX_ITER": 1, "S4M__BURN_IN": 0}
SECONDS = 200  # more than any of these takes, less than the 30 minutes of a collective's time-out


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | environment,
    )


def train_net(options, *flags, start=()) -> subprocess.CompletedProcess:
    done = command(*start, TRAIN_NET, "--config-file", QUICKSTART, *flags, *options)
    assert done.returncode == 0, done.stderr
    assert "World size: 2" in done.stdout
    return done


@pytest.mark.slow
def test_torchrun_trains_both_stages_and_evaluates(small_options, tmp_path):
    train_net(small_options(**SHORT), start=TORCHRUN)
    for stage in ("teacher", "student"):
        assert (tmp_path / "run" / stage / "model_final.pth").is_file()
        assert "segm" in read_results(str(tmp_path / "run" / stage / "results.json"))


@pytest.mark.slow
def test_detectron2s_launch_trains_too_and_any_launcher_gets_the_same_results(
    small_options, tmp_path
):
    launched = ("--num-gpus", "2", "--dist-url", "auto")
    train_net(small_options(**SHORT), *launched)
    student = tmp_path / "run" / "student"
    expected = read_results(str(student / "results.json"))["segm"]
    changes = {"OUTPUT_DIR": str(tmp_path / "eval")}
    changes["MODEL__WEIGHTS"] = str(student / "model_final.pth")
    for start, flags in (((), launched), (TORCHRUN, ())):
        done = train_net(small_options(**changes), "--eval-only", *flags, start=start)
        found = re.findall(r"copypaste: ([\d.]+,[\d.]+)", done.stdout)
        assert found == [f"{expected['AP']:.4f},{expected['AP50']:.4f}"]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["mistake", "bug", "killed"])
@pytest.mark.parametrize("start", ["launch", "torchrun"])
def test_any_failure_of_a_process_ends_the_run_with_its_error(start, how):
    ours = (FAILURES, how, "--num-gpus", "2")
    ended = command(*ours) if start == "launch" else command(*TORCHRUN, FAILURES, how)
    killed = "SIGKILL" if start == "launch" else "Signal 9 (SIGKILL)"
    shown = {"mistake": "[rank 1] DatasetError: frank", "bug": "ZeroDivisionError: the second"}
    assert ended.returncode != 0
    assert shown.get(how, killed) in ended.stderr
    if start == "torchrun":
        cause = ended.stderr.partition("Root Cause (first observed failure)")[2]
        assert re.search(r"rank\s*: 1 ", cause)


def test_an_incomplete_environment_of_a_launcher_is_refused(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    with pytest.raises(ConfigError, match="MASTER_ADDR"):
        launch(main, arguments("mistake", 1))
