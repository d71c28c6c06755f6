"""Damaged, lost and superseded checkpoints, and kills in the middle of saving one."""

import logging
import os
import random
import signal

import pytest
import torch

from s4m_d2.engine.checkpointing.checkpoint import S4MCheckpointer
from s4m_d2.engine.checkpointing.checkpoint_files import (
    is_finished,
    ranked,
    read_complete,
    superseded,
)
from s4m_d2.errors import WeightsError
from s4m_d2.files import remove_temporaries

from .checkpoint_files import Counter, Model, same
from .sameness import assert_same


def name(iteration):
    return f"model_{iteration:07d}"


def checkpointer(folder, value=0, **options):
    return S4MCheckpointer(Model(seed=value), str(folder), counter=Counter(value), **options)


def save(folder, *iterations, **options):
    """Checkpoints of these iterations; the objects of each know it."""
    for iteration in iterations:
        checkpointer(folder, iteration, **options).save(name(iteration), iteration=iteration)


def resume(folder, **options):
    """The iteration of which everything was restored."""
    new = checkpointer(folder, 99, **options)
    rest = new.resume_or_load("")
    iteration = rest["iteration"]
    assert same(new.model, Model(seed=iteration))
    assert new.checkpointables["counter"].value == iteration
    return iteration


def truncate(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def flip(path):
    """One bit of the weights."""
    content = bytearray(path.read_bytes())
    value = torch.load(path, weights_only=True)["model"]["head.weight"].numpy().tobytes()
    content[content.index(value)] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "truncated": truncate,
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a flipped bit": flip,
    "gone": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_it(tmp_path, caplog, damage):
    save(tmp_path, 1, 3, 5)
    DAMAGES[damage](tmp_path / "model_0000005.pth")
    with caplog.at_level(logging.WARNING):
        assert resume(tmp_path) == 3
    warnings = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "model_0000005.pth" in warnings[0] and "model_0000003.pth" in warnings[0]

    DAMAGES[damage](tmp_path / "model_0000003.pth")
    assert resume(tmp_path) == 1


def test_all_damaged_is_one_error_that_says_why(tmp_path):
    save(tmp_path, 1, 3)
    for path in tmp_path.glob("*.pth"):
        truncate(path)
    with pytest.raises(WeightsError, match=r"no complete checkpoint.*0003.*end early.*0001.*end"):
        resume(tmp_path)


def test_objects_that_do_not_fit_are_no_damage(tmp_path):
    save(tmp_path, 1, 3)
    content = torch.load(tmp_path / "model_0000003.pth", weights_only=True)
    del content["counter"]
    torch.save(content, tmp_path / "model_0000003.pth")
    with pytest.raises(WeightsError, match="no state of counter"):
        resume(tmp_path)


LOST = {
    "missing": lambda tag: tag.unlink(),
    "empty": lambda tag: tag.write_bytes(b""),
    "zeros": lambda tag: tag.write_bytes(bytes(17)),
    "no text": lambda tag: tag.write_bytes(b"\xff\xfe\xfd"),
}


@pytest.mark.parametrize("loss", LOST)
def test_without_the_tag_the_newest_complete_checkpoint_is_taken(tmp_path, caplog, loss):
    save(tmp_path, 1, 3, 5)
    truncate(tmp_path / "model_0000005.pth")
    LOST[loss](tmp_path / "last_checkpoint")
    assert checkpointer(tmp_path).has_checkpoint()
    with caplog.at_level(logging.WARNING):
        assert resume(tmp_path) == 3
    assert "last_checkpoint' is missing or names no file" in caplog.text


def test_an_older_checkpoint_that_the_user_tagged_is_taken_and_those_before_it_follow(tmp_path):
    save(tmp_path, 1, 3, 5, 7)
    (tmp_path / "last_checkpoint").write_text("model_0000003.pth\n")
    assert resume(tmp_path) == 3
    flip(tmp_path / "model_0000003.pth")
    assert resume(tmp_path) == 1
    flip(tmp_path / "model_0000001.pth")
    assert resume(tmp_path) == 5


def test_the_order_in_which_files_are_tried(tmp_path):
    names = ["model_0000001.pth", "model_0000010.pth", "model_10000000.pth", "model_final.pth"]
    for other in (*names, "model_1.pth", "export.pth", ".model_0000002.pth.abcdefgh.tmp"):
        (tmp_path / other).touch()
    assert ranked(tmp_path) == names[::-1]
    assert ranked(tmp_path, "model_0000010.pth") == [names[i] for i in (1, 0, 2, 3)]
    assert ranked(tmp_path, "export.pth") == ["export.pth", *names[::-1]]
    assert ranked(tmp_path, "model_0000005.pth") == [
        "model_0000005.pth", names[0], names[1], names[2], names[3],
    ]  # fmt: skip


def test_every_flipped_bit_is_found_or_changes_nothing(tmp_path):
    save(tmp_path, 1)
    path = tmp_path / "model_0000001.pth"
    whole, expected = path.read_bytes(), read_complete(str(path))
    rng, found = random.Random(0), 0
    positions = [
        *rng.sample(range(len(whole)), 150),
        *range(40),
        *range(len(whole) - 60, len(whole)),
    ]
    for position in positions:
        content = bytearray(whole)
        content[position] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        try:
            assert_same(read_complete(str(path)), expected)
        except WeightsError:
            found += 1
    assert found > len(positions) / 3


KILLS = {  # moment → what is continued
    "half of the file is written": 3,
    "before the rename": 3,
    "between the rename and the tag": 3,
    "before old files are removed": 5,
    "after one of them is": 5,
}


def save_and_die(folder, moment) -> None:
    """In a process of its own: save iteration 5, and be killed by SIGKILL at this moment."""

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def half_a_save(content, file):
        file.write(b"PK\x03\x04half")
        file.flush()
        die()

    def before(function, *last_names, then=False):
        def killed(path, *more):
            if os.path.basename(str((path, *more)[-1])) in last_names:
                if then:
                    function(path, *more)
                die()
            function(path, *more)

        return killed

    with pytest.MonkeyPatch.context() as patch:
        if moment == "half of the file is written":
            patch.setattr(torch, "save", half_a_save)
        elif moment == "before the rename":
            patch.setattr(os, "replace", before(os.replace, "model_0000005.pth"))
        elif moment == "between the rename and the tag":
            patch.setattr(os, "replace", before(os.replace, "last_checkpoint"))
        elif moment == "before old files are removed":
            patch.setattr(os, "unlink", before(os.unlink, "model_0000002.pth"))
        else:
            patch.setattr(os, "unlink", before(os.unlink, "model_0000002.pth", then=True))
        save(folder, 5, keep=2)


@pytest.mark.parametrize("moment", KILLS)
def test_a_process_killed_while_it_saves_leaves_something_to_continue(tmp_path, moment):
    save(tmp_path, 1, 2, 3)
    child = os.fork()
    if child == 0:
        try:
            save_and_die(tmp_path, moment)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    unnamed = {"half of the file is written": ".model_0000005.pth.", "before the rename": ".model_"}
    unnamed["between the rename and the tag"] = ".last_checkpoint."
    removed = remove_temporaries(tmp_path)
    assert len(removed) == (moment in unnamed)
    assert all(file.startswith(unnamed[moment]) for file in removed)
    assert not [file for file in os.listdir(tmp_path) if file.startswith(".")]
    assert resume(tmp_path) == KILLS[moment]
    save(tmp_path, 7, keep=2)  # whatever was left goes with the next one
    last = 5 if (tmp_path / "model_0000005.pth").exists() else 3
    assert sorted(path.name for path in tmp_path.glob("*.pth")) == [
        f"{name(i)}.pth" for i in (last, 7)
    ]


def checkpoints(folder):
    return sorted(path.name.removesuffix(".pth") for path in folder.glob("*.pth"))


@pytest.mark.parametrize(
    ("keep", "left"), [(0, (1, 3, 5, 7)), (1, (7,)), (2, (5, 7)), (9, (1, 3, 5, 7))]
)
def test_the_newest_checkpoints_and_the_final_one_are_kept(tmp_path, keep, left):
    (tmp_path / "model_export.pth").touch()  # not a name of ours
    save(tmp_path, 1, 3, 5, 7, keep=keep)
    checkpointer(tmp_path, 7, keep=keep).save("model_final", iteration=7)
    assert checkpoints(tmp_path) == [*map(name, left), "model_export", "model_final"]
    save(tmp_path, 9, keep=keep)  # a longer SOLVER.MAX_ITER
    assert "model_final" in checkpoints(tmp_path) and name(9) in checkpoints(tmp_path)


def test_old_files_go_only_when_the_new_one_is_complete_and_tagged(tmp_path, monkeypatch):
    save(tmp_path, 1)
    seen = []
    unlink = os.unlink

    def watched(path):
        tag = (tmp_path / "last_checkpoint").read_text()
        seen.append((os.path.basename(path), tag, read_complete(tmp_path / tag)["iteration"]))
        unlink(path)

    monkeypatch.setattr(os, "unlink", watched)
    save(tmp_path, 3, keep=1)
    assert seen == [("model_0000001.pth", "model_0000003.pth", 3)]


def test_a_failed_save_removes_nothing(tmp_path, monkeypatch):
    save(tmp_path, 1, 3)

    def full(content, file):
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 5, keep=1)
    assert checkpoints(tmp_path) == [name(1), name(3)]


def test_a_damaged_checkpoint_goes_before_a_complete_one(tmp_path):
    save(tmp_path, 1, 3, 4)
    flip(tmp_path / "model_0000004.pth")
    run = checkpointer(tmp_path, keep=2)
    assert run.resume_or_load("")["iteration"] == 3
    run.save(name(5), iteration=5)
    assert checkpoints(tmp_path) == [name(3), name(5)]


def test_after_going_back_the_abandoned_checkpoints_go_first(tmp_path):
    save(tmp_path, 1, 3, 5, 7)
    left = superseded(tmp_path, "model_0000004.pth", keep=2)
    assert left == ["model_0000001.pth", "model_0000005.pth", "model_0000007.pth"]


def test_a_file_that_cannot_be_removed_does_not_end_the_run(tmp_path, monkeypatch, caplog):
    save(tmp_path, 1)

    def refused(path):
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr(os, "unlink", refused)
    save(tmp_path, 3, keep=1)
    assert "model_0000001.pth' cannot be removed" in caplog.text


@pytest.mark.parametrize(
    ("final", "results", "damaged", "asked", "expected"),
    [
        (None, None, False, 8, False),
        (5, None, False, 8, False),  # killed before its evaluation
        (5, 4, False, 8, False),  # killed within it; the results are an earlier iteration's
        (5, 5, False, 8, True),
        (5, 6, False, 8, True),
        (5, 6, True, 8, False),
        (5, 6, False, 7, True),
        (5, 6, False, 9, False),  # longer than it was
    ],
)
def test_a_stage_is_finished_when_it_is_saved_and_evaluated(
    tmp_path, caplog, final, results, damaged, asked, expected
):
    """Times of the two files, None: there is none; of 8 iterations."""
    for name, written in (("model_final", final), ("results", results)):
        path = tmp_path / f"{name}.pth"
        if written is not None:
            checkpointer(tmp_path).save(name, iteration=7)
            if damaged:
                truncate(path)
            os.utime(path, ns=(written, written))
    assert is_finished(str(tmp_path), asked, "results.pth") is expected
    is_trained = final is not None and not damaged and asked <= 8
    assert is_finished(str(tmp_path), asked, None) is is_trained
    assert ("result is unusable" in caplog.text) is damaged
