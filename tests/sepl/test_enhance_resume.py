"""`sepl enhance` that is ended at any point: the same command ends with the same files."""

import fcntl
import multiprocessing
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from enhance_folders import arguments, content, enhance, make_folders, report
from enhance_folders import label as read

from s4m_d2.sepl import enhance_image, enhance_report
from s4m_d2.sepl.cli import main
from s4m_d2.sepl.enhance_image import Enhancer

NAMES = "abcdef"
KILLED_AT = "c"
PATIENCE = 60.0  # seconds until a test gives up


@pytest.fixture
def root(tmp_path):
    return make_folders(tmp_path / "data", NAMES)


@pytest.fixture
def whole(root):
    """The files of a run that nothing interrupts."""
    assert enhance(root, output="whole") == 0
    return content(root / "whole")


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def before_the_image(patch):
    original = Enhancer.enhance

    def enhance_or_die(self, files):
        return die() if files.name == KILLED_AT else original(self, files)

    patch.setattr(Enhancer, "enhance", enhance_or_die)


def within_the_picture(patch):
    """A temporary file stays behind."""
    original = enhance_image.write_label

    def write_or_die(path, label):
        if path.stem == KILLED_AT:
            path.with_name(f".{path.name}.12345678.tmp").write_bytes(b"half")
            die()
        original(path, label)

    patch.setattr(enhance_image, "write_label", write_or_die)


def after_the_picture(patch):
    original = enhance_report.Report.add

    def add_or_die(self, outcome):
        return die() if outcome.name == KILLED_AT else original(self, outcome)

    patch.setattr(enhance_report.Report, "add", add_or_die)


def after_the_first_report(patch):
    original = enhance_report.Report.write

    def write_and_die(self):
        original(self)
        die()

    patch.setattr(enhance_report.Report, "write", write_and_die)


def within(kill, words):
    """The command in a process of its own that ``kill`` prepares; its exit status."""

    def run():
        with pytest.MonkeyPatch.context() as patch:
            kill(patch)
            os._exit(main(words))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(PATIENCE)
    return process.exitcode


@pytest.mark.parametrize(
    "kill", [before_the_image, within_the_picture, after_the_picture, after_the_first_report]
)
def test_a_killed_run_is_continued(kill, root, whole):
    assert within(kill, arguments(root)) == -signal.SIGKILL
    assert enhance(root) == 0
    assert content(root / "out") == whole


def test_what_a_killed_run_has_reported_is_skipped(root, whole, monkeypatch, capsys):
    monkeypatch.setattr(enhance_report, "WRITE_EVERY", 1)
    assert within(before_the_image, arguments(root)) == -signal.SIGKILL
    stamps = {name: (root / "out" / f"{name}.png").stat().st_mtime_ns for name in "ab"}
    assert enhance(root) == 0
    assert content(root / "out") == whole
    assert {n: (root / "out" / f"{n}.png").stat().st_mtime_ns for n in "ab"} == stamps
    assert "6 images enhanced (2 of them before)" in capsys.readouterr().err


def test_interrupts_leave_a_report_and_are_continued(root, whole, monkeypatch, capsys):
    original = Enhancer.enhance

    def interrupted(self, files):
        if files.name == "d":
            raise KeyboardInterrupt
        return original(self, files)

    with monkeypatch.context() as patch:
        patch.setattr(Enhancer, "enhance", interrupted)
        assert enhance(root) == 130
    assert "interrupted; the same command continues" in capsys.readouterr().err
    assert sorted(report(root)["images"]) == ["a", "b", "c"]
    assert enhance(root) == 0
    assert content(root / "out") == whole


def test_an_image_whose_label_map_was_removed_is_made_again(root, whole):
    assert enhance(root) == 0
    (root / "out" / "b.png").unlink()
    assert enhance(root) == 0
    assert content(root / "out") == whole


def test_nothing_is_left_to_do(root, whole, monkeypatch):
    assert enhance(root) == 0
    monkeypatch.setattr(Enhancer, "enhance", lambda *args: pytest.fail("there was nothing to do"))
    assert enhance(root) == 0
    assert content(root / "out") == whole


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--o-s-thresh", "0.6"], "o_s_thresh was 0.5, now 0.6"),
        (["--o-p-thresh", "0.9"], "o_p_thresh was 0.85, now 0.9"),
        (["--keep-uncovered"], "keep_uncovered was False, now True"),
        (["--num-classes", "9"], "num_classes was 21, now 9"),
        (["--pseudo-labels", "images"], "pseudo_labels was '.*cam', now '.*images'"),
        (["--background-score", "0.2"], "background_score was 0.15, now 0.2"),
        (["--masks", "images"], "masks was '.*masks', now '.*images'"),
    ],
)
def test_other_settings_are_refused(words, says, root, capsys):
    assert enhance(root) == 0
    for folder in ("cam", "masks"):  # so that these are labels and masks, too
        shutil.copytree(root / folder, root / "images", dirs_exist_ok=True)
    before = content(root)
    words = [str(root / word) if word == "images" else word for word in words]
    assert enhance(root, *words) == 1
    said = capsys.readouterr().err
    assert re.search(f"holds 6 label maps made with other settings: {says}. Choose", said), said
    assert "--overwrite" in said
    assert content(root) == before


def test_other_settings_of_a_killed_run_are_refused_too(root, monkeypatch, capsys):
    monkeypatch.setattr(enhance_report, "WRITE_EVERY", 1)
    assert within(before_the_image, arguments(root)) == -signal.SIGKILL
    assert enhance(root, "--o-s-thresh", "0.6") == 1
    assert "holds 2 label maps made with other settings" in capsys.readouterr().err


def test_the_same_folders_by_another_path_are_the_same_settings(root, whole, monkeypatch):
    assert enhance(root) == 0
    monkeypatch.chdir(root)
    assert main(["--pseudo-labels", "cam", "--masks", "./masks", "--output", "out"]) == 0
    assert content(root / "out") == whole


def test_overwriting_gives_what_a_new_folder_gives(root, whole):
    assert enhance(root, "--o-s-thresh", "1", "--o-p-thresh", "1") == 0
    assert content(root / "out") != whole
    assert enhance(root, "--overwrite") == 0
    assert content(root / "out") == whole


@pytest.mark.parametrize("kill", [before_the_image, after_the_first_report])
def test_a_killed_overwriting_run_is_continued(kill, root, whole):
    """Records of the earlier settings must not pass for those of the new ones."""
    earlier = arguments(root, "--o-s-thresh", "1", "--o-p-thresh", "1")
    assert within(after_the_picture, earlier) == -signal.SIGKILL
    assert within(kill, [*arguments(root), "--overwrite"]) == -signal.SIGKILL
    assert enhance(root) == 0
    assert content(root / "out") == whole


def test_a_failed_image_keeps_its_label_map_when_others_are_overwritten(root, capsys):
    assert enhance(root) == 0
    before = read(root, "b")
    (root / "masks" / "b.json").write_text("{}")
    assert enhance(root, "--overwrite", "--keep-uncovered") == 1
    assert report(root)["outdated"] == ["b"]
    assert "1 of them have label maps from before, which stay" in capsys.readouterr().err
    assert (read(root, "b") == before).all()


def test_label_maps_of_another_origin_are_not_replaced(root, capsys):
    (root / "out").mkdir()
    (root / "out" / "b.png").write_text("precious")
    before = content(root)
    assert enhance(root) == 1
    assert "has 1 label maps of these images (b, ...), but no sepl.json" in capsys.readouterr().err
    assert content(root) == before
    assert enhance(root, "--overwrite") == 0
    assert report(root)["counts"]["done"] == 6


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"settings": 1, "images": {}}'])
def test_a_damaged_report_is_refused(text, root, whole, capsys):
    assert enhance(root) == 0
    (root / "out" / "sepl.json").write_text(text)
    assert enhance(root) == 1
    assert "sepl.json' is no report of this command, or damaged" in capsys.readouterr().err
    assert enhance(root, "--overwrite") == 0
    assert content(root / "out") == whole


def test_two_runs_do_not_share_a_folder(root, capsys):
    (root / "out").mkdir()
    handle = os.open(root / "out", os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        assert enhance(root) == 1
        assert "another run writes to" in capsys.readouterr().err
        assert not content(root / "out")
    finally:
        os.close(handle)
    assert enhance(root) == 0


def test_a_file_system_without_locks(root, whole, monkeypatch):
    def refuse(*args):
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert enhance(root) == 0
    assert content(root / "out") == whole


def children(pid: int) -> list[int]:
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_until(condition) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def made(root: Path) -> list[str]:
    return sorted(path.stem for path in (root / "out").glob("*.png"))


@pytest.mark.parametrize("victim", ["the run", "a worker"])
def test_processes_that_are_killed(victim, root, whole, monkeypatch, capfd):
    """One worker waits for a label that does not come, the other finishes the rest."""
    (root / "cam" / "a.png").rename(root / "a.png")
    os.mkfifo(root / "cam" / "a.png")
    fork = multiprocessing.get_context("fork")  # spawned workers would import all of PyTorch first
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: fork)
    run = fork.Process(target=lambda: os._exit(main(arguments(root, "--workers", "2"))))
    run.start()
    wait_until(lambda: made(root) == list(NAMES[1:]) or not run.is_alive())
    assert made(root) == list(NAMES[1:])
    workers = children(run.pid)
    assert len(workers) == 2
    if victim == "the run":
        run.kill()
    else:
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
    run.join(PATIENCE)
    wait_until(lambda: not any(map(is_running, workers)))
    if victim == "the run":
        assert run.exitcode == -signal.SIGKILL
    else:
        assert run.exitcode == 1
        said = capfd.readouterr().err
        assert "error: one of the 2 processes has ended by itself" in said
        assert "with fewer --workers" in said and "Traceback" not in said
        assert set(report(root)["images"]) >= set(NAMES[1:-1])  # the last may not have been told of
    (root / "cam" / "a.png").unlink()
    (root / "a.png").rename(root / "cam" / "a.png")
    assert enhance(root) == 0
    assert content(root / "out") == whole
