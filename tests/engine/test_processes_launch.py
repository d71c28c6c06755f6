"""Commands in two processes, which torchrun starts or Detectron2."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys

import pytest
from detectron2.engine import default_argument_parser
from helpers import QUICKSTART, ROOT, signals_and_logging_kept
from torch.multiprocessing import ProcessExitedException

from s4m_d2.engine.command import launch
from s4m_d2.engine.training.stop_signals import EXIT_STOPPED, STOP_SIGNALS, listen
from s4m_d2.errors import ConfigError
from s4m_d2.report import read_results

from .process_endings import SIGNALED_ITERATION, WORLD_SIZE, main

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
TRAIN_NET = str(ROOT / "train_net.py")
ENDINGS = str(ROOT / "tests" / "engine" / "process_endings.py")
LAUNCH = ("--num-gpus", str(WORLD_SIZE), "--dist-url", "auto")
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
    train_net(small_options(**SHORT), *LAUNCH)
    student = tmp_path / "run" / "student"
    expected = read_results(str(student / "results.json"))["segm"]
    changes = {"OUTPUT_DIR": str(tmp_path / "eval")}
    changes["MODEL__WEIGHTS"] = str(student / "model_final.pth")
    for start, flags in (((), LAUNCH), (TORCHRUN, ())):
        done = train_net(small_options(**changes), "--eval-only", *flags, start=start)
        found = re.findall(r"copypaste: ([\d.]+,[\d.]+)", done.stdout)
        assert found == [f"{expected['AP']:.4f},{expected['AP50']:.4f}"]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["mistake", "bug", "killed"])
@pytest.mark.parametrize("start", ["launch", "torchrun"])
def test_any_failure_of_a_process_ends_the_run_with_its_error(start, how):
    by_launch = (ENDINGS, *LAUNCH, how)
    ended = command(*by_launch) if start == "launch" else command(*TORCHRUN, ENDINGS, how)
    killed = "SIGKILL" if start == "launch" else "Signal 9 (SIGKILL)"
    shown = {"mistake": "[rank 1] DatasetError: frank", "bug": "ZeroDivisionError: the second"}
    assert ended.returncode != 0
    assert shown.get(how, killed) in ended.stderr
    if start == "torchrun":
        cause = ended.stderr.partition("Root Cause (first observed failure)")[2]
        assert re.search(r"rank\s*: 1 ", cause)


@pytest.mark.slow
def test_all_processes_stop_together_when_one_gets_a_signal(tmp_path):
    ended = command(ENDINGS, *LAUNCH, "stopped", str(tmp_path), GLOO_SOCKET_IFNAME="lo")
    assert ended.returncode == EXIT_STOPPED, ended.stderr
    assert "Traceback" not in ended.stderr
    for rank in range(WORLD_SIZE):
        assert (tmp_path / f"rank_{rank}.txt").read_text() == str(SIGNALED_ITERATION)
    assert [path.stem for path in tmp_path.glob("*.pth")] == [f"model_{SIGNALED_ITERATION:07d}"]


def test_an_incomplete_environment_of_a_launcher_is_refused(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    with pytest.raises(ConfigError, match="MASTER_ADDR"):
        launch.launch(main, default_argument_parser().parse_args(["mistake"]))


def test_the_launcher_hands_signals_on_and_ends_as_the_processes_do(monkeypatch):
    context = multiprocessing.get_context("fork")
    ready = context.Event()

    def wait_for_a_signal():
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        ready.set()
        number = signal.sigwait(STOP_SIGNALS)
        os._exit(EXIT_STOPPED if number == signal.SIGUSR1 else 1)

    rank = context.Process(target=wait_for_a_signal)

    def two_ranks(*args, **options):
        rank.start()
        ready.wait()
        signal.raise_signal(signal.SIGUSR1)
        rank.join()
        raise ProcessExitedException("", 0, rank.pid, exit_code=rank.exitcode)

    monkeypatch.setattr(launch, "launch_here", two_ranks)
    with signals_and_logging_kept():
        with pytest.raises(SystemExit) as ended:
            launch.launch(None, default_argument_parser().parse_args(["--num-gpus", "2"]))
        listen()  # forgets what was received
    assert ended.value.code == EXIT_STOPPED
