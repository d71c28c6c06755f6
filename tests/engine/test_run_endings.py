"""How runs end: one in a folder at a time, mistakes in one message, processes together."""

import errno
import logging
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from detectron2.engine import default_argument_parser
from helpers import QUICKSTART, ROOT, signals_and_logging_kept
from torch.multiprocessing import ProcessExitedException

from s4m_d2.engine.command import launch
from s4m_d2.engine.command.launch import EXIT_INTERRUPTED, plain_endings
from s4m_d2.engine.command.run import LOCK, lock_run
from s4m_d2.engine.training.stop_signals import EXIT_STOPPED, STOP_SIGNALS, listen
from s4m_d2.errors import ConfigError, DatasetError, OutputError, WorkerError
from s4m_d2.report import read_results

from .process_endings import SIGNALED_ITERATION, WORLD_SIZE, main

FORKS = multiprocessing.get_context("fork")


def holder(folder):
    """A process that tries to lock a folder and lives on; "held" if another has the lock."""
    answers = FORKS.SimpleQueue()

    def hold():
        try:
            lock_run(str(folder))
            answers.put("free")
        except ConfigError:
            answers.put("held")
        time.sleep(60)

    process = FORKS.Process(target=hold)
    process.start()
    return process, answers.get()


def test_a_second_run_names_the_first_and_takes_over_from_a_killed_one(tmp_path):
    first, answer = holder(tmp_path)
    try:
        assert answer == "free"
        named = f"process {first.pid} on .*since {time.strftime('%Y')}"
        with pytest.raises(ConfigError, match=named):
            lock_run(str(tmp_path))
    finally:
        first.kill()
        first.join()
    lock_run(str(tmp_path))
    second, answer = holder(tmp_path)  # a forked process does not have its parent's lock
    second.kill()
    second.join()
    assert answer == "held"
    assert f"process {os.getpid()} " in (tmp_path / LOCK).read_text()  # which frees it


def test_a_folder_that_takes_no_lock_is_left_alone(tmp_path):
    lock_run(str(tmp_path / "missing"))
    assert not (tmp_path / "missing").exists()


def wrapped(error):
    try:
        raise RuntimeError("the writer failed") from error
    except RuntimeError as outer:
        return outer


def test_what_users_can_mend_ends_in_one_message_and_bugs_keep_their_traceback():
    for error, kind, named in (
        (OSError(errno.ENOSPC, "No space left", "m.json"), OutputError, "m.json"),
        (wrapped(OSError(errno.ENOSPC, "No space")), OutputError, "No space"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal"), WorkerError, "pid 7"),
        (RuntimeError("[gloo] Connection closed by peer [::1]"), WorkerError, "--resume"),
        (DatasetError("a.json is cut."), DatasetError, "a.json"),
    ):
        with pytest.raises(SystemExit) as ended, plain_endings("[rank 1] "):
            raise error
        assert ended.value.code.startswith(f"[rank 1] {kind.__name__}: ")
        assert named in ended.value.code
    for bug in (RuntimeError("shapes differ"), KeyError("x"), OSError("odd")):
        with pytest.raises(type(bug)), plain_endings():
            raise bug


def test_ctrl_c_has_its_exit_status(capsys):
    with pytest.raises(SystemExit) as ended, plain_endings():
        raise KeyboardInterrupt
    assert ended.value.code == EXIT_INTERRUPTED == 130
    assert "--resume" in capsys.readouterr().err


NASTY = "a\x1b[31m\nb\r\udcff.png"


def test_names_in_messages_cannot_act_on_a_terminal(caplog):
    assert str(DatasetError(f"{NASTY} is damaged.", "Second line.")).count("\n") == 1
    factory = logging.getLogRecordFactory()
    try:
        with plain_endings(), caplog.at_level(logging.WARNING):
            logging.getLogger("s4m_d2.test").warning("Skipped %s", NASTY)
            logging.getLogger("s4m_d2.test").warning("Table:\n%s", "a\tb\nc")
            logging.getLogger("s4m_d2.test").warning("Lost: %s", "weight, " * 1000)
            for error in (DatasetError("a.json is cut."), KeyError("a bug")):
                logging.getLogger("s4m_d2.test").error("Ended", exc_info=error)
    finally:
        logging.setLogRecordFactory(factory)
    first, second, third, *_ = (record.getMessage() for record in caplog.records)
    assert [bool(record.exc_info) for record in caplog.records[-2:]] == [False, True]
    assert first.isprintable() and second == "Table:\na\tb\nc"
    assert third.count("weight") == 1000


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
def test_torchrun_trains_both_stages_and_any_launcher_evaluates_alike(small_options, tmp_path):
    train_net(small_options(**SHORT), start=TORCHRUN)
    results = [
        read_results(str(tmp_path / "run" / stage / "results.json"))["segm"]
        for stage in ("teacher", "student")
    ]
    weights = str(tmp_path / "run" / "student" / "model_final.pth")
    changes = {"OUTPUT_DIR": str(tmp_path / "eval"), "MODEL__WEIGHTS": weights}
    for start, flags in (((), LAUNCH), (TORCHRUN, ())):
        done = train_net(small_options(**changes), "--eval-only", *flags, start=start)
        found = re.findall(r"copypaste: ([\d.]+,[\d.]+)", done.stdout)
        assert found == [f"{results[1]['AP']:.4f},{results[1]['AP50']:.4f}"]


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
    ready = FORKS.Event()

    def wait_for_a_signal():
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        ready.set()
        number = signal.sigwait(STOP_SIGNALS)
        os._exit(EXIT_STOPPED if number == signal.SIGUSR1 else 1)

    rank = FORKS.Process(target=wait_for_a_signal)

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
