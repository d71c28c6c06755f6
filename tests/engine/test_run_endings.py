"""How runs end: one in a folder at a time, mistakes in one message, names that cannot act."""

import errno
import logging
import multiprocessing
import os
import time

import pytest

from s4m_d2.engine.command.launch import EXIT_INTERRUPTED, plain_endings
from s4m_d2.engine.command.run import LOCK, lock_run
from s4m_d2.errors import ConfigError, DatasetError, OutputError, WorkerError

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
