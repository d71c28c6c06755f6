"""Saving at once, and continuing: damaged, lost and superseded checkpoints, kills while saving."""

import os
import random
import signal
from types import SimpleNamespace

import pytest
import torch

from s4m_d2.engine.checkpointing import checkpoint as files
from s4m_d2.engine.checkpointing.checkpoint import S4MCheckpointer
from s4m_d2.engine.stages import last_weights, stage_is_finished
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
    iteration = rest.pop("iteration")
    assert same(new.model, Model(seed=iteration)) and not rest
    assert new.checkpointables["counter"].value == iteration
    return iteration


def checkpoints(folder):
    return sorted(path.name.removesuffix(".pth") for path in folder.glob("*.pth"))


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
    assert resume(tmp_path) == 3
    assert "model_0000005.pth" in caplog.text and "model_0000003.pth" in caplog.text
    DAMAGES[damage](tmp_path / "model_0000003.pth")
    assert resume(tmp_path) == 1
    DAMAGES[damage](tmp_path / "model_0000001.pth")
    with pytest.raises(WeightsError) as refused:
        resume(tmp_path)
    assert all(f"{name(i)}.pth" in str(refused.value) or damage == "gone" for i in (1, 3, 5))


def test_objects_that_do_not_fit_are_no_damage(tmp_path):
    save(tmp_path, 1)
    S4MCheckpointer(Model(), str(tmp_path)).save(name(3))
    with pytest.raises(WeightsError, match="counter"):
        resume(tmp_path)


def test_without_the_tag_the_newest_complete_checkpoint_is_taken(tmp_path):
    save(tmp_path, 1, 3, 5)
    truncate(tmp_path / "model_0000005.pth")
    for content in (None, b"", bytes(17), b"\xff\xfe\xfd"):
        (tmp_path / "last_checkpoint").unlink(missing_ok=True)
        if content is not None:
            (tmp_path / "last_checkpoint").write_bytes(content)
        assert checkpointer(tmp_path).has_checkpoint()
        assert resume(tmp_path) == 3


def test_the_order_in_which_files_are_tried_and_given_up(tmp_path):
    names = ["model_0000001.pth", "model_0000010.pth", "model_10000000.pth", "model_final.pth"]
    for other in (*names, "model_1.pth", "export.pth", ".model_0000002.pth.abcdefgh.tmp"):
        (tmp_path / other).touch()
    assert files.ranked(tmp_path) == names[::-1]
    assert files.ranked(tmp_path, names[1]) == [names[i] for i in (1, 0, 2, 3)]
    assert files.ranked(tmp_path, "export.pth") == ["export.pth", *names[::-1]]
    assert files.ranked(tmp_path, "model_0000005.pth") == ["model_0000005.pth", *names]
    # After going back to 4, what was abandoned goes first.
    assert files.superseded(tmp_path, "model_0000004.pth", keep=2) == [names[1], names[2]]


def test_every_flipped_bit_is_found_or_changes_nothing(tmp_path):
    save(tmp_path, 1)
    path = tmp_path / "model_0000001.pth"
    whole, expected = path.read_bytes(), files.read_weight_file(str(path), verified=True)
    rng, found, size = random.Random(0), 0, path.stat().st_size
    positions = [*rng.sample(range(size), 100), *range(40), *range(size - 60, size)]
    for position in positions:
        content = bytearray(whole)
        content[position] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        try:
            assert_same(files.read_weight_file(str(path), verified=True), expected)
        except WeightsError:
            found += 1
    assert found > len(positions) / 3


KILLS = {  # moment → what is continued, and the name that a half-written file is for
    "before the rename": (3, "model_0000005.pth"),
    "between the rename and the tag": (3, "last_checkpoint"),
    "before old files are removed": (5, ""),
    "after one of them is": (5, ""),
}


def save_and_die(folder, moment) -> None:
    """In a process of its own: save iteration 5, and be killed by SIGKILL at this moment."""

    def before(function, last_name, then=False):
        def killed(path, *more):
            dies = os.path.basename(str((path, *more)[-1])) == last_name
            if then or not dies:
                function(path, *more)
            if dies:
                os.kill(os.getpid(), signal.SIGKILL)

        return killed

    target = KILLS[moment][1]
    with pytest.MonkeyPatch.context() as patch:
        if target:
            patch.setattr(os, "replace", before(os.replace, target))
        else:
            then = moment.startswith("after")
            patch.setattr(os, "unlink", before(os.unlink, "model_0000002.pth", then))
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
    continued, target = KILLS[moment]
    removed = remove_temporaries(tmp_path)
    assert [file[1 : len(target) + 1] for file in removed] == [target] * bool(target)
    assert resume(tmp_path) == continued
    save(tmp_path, 7, keep=2)  # whatever was left goes with the next one
    last = 5 if (tmp_path / "model_0000005.pth").exists() else 3
    assert checkpoints(tmp_path) == [name(last), name(7)]


@pytest.mark.parametrize(("keep", "left"), [(0, (1, 3, 5, 7)), (1, (7,)), (2, (5, 7))])
def test_the_newest_checkpoints_and_the_final_one_are_kept(tmp_path, keep, left):
    (tmp_path / "model_export.pth").touch()  # not a name of ours
    save(tmp_path, 1, 3, 5, 7, keep=keep)
    checkpointer(tmp_path, 7, keep=keep).save("model_final", iteration=7)
    assert checkpoints(tmp_path) == [*map(name, left), "model_export", "model_final"]
    modes = [(tmp_path / f"model_{file}.pth").stat().st_mode for file in ("final", "export")]
    assert modes[0] == modes[1], "of the user's umask"
    save(tmp_path, 9, keep=keep)  # a longer SOLVER.MAX_ITER
    assert {"model_final", name(9)} < {*checkpoints(tmp_path)}


def test_a_file_that_cannot_be_removed_does_not_end_the_run(tmp_path, monkeypatch, caplog):
    def refused(path):
        raise PermissionError("Operation not permitted")

    save(tmp_path, 1)
    monkeypatch.setattr(os, "unlink", refused)
    save(tmp_path, 3, keep=1)
    assert "model_0000001.pth" in caplog.text and checkpoints(tmp_path) == [name(1), name(3)]


def test_a_final_checkpoint_is_whole_or_the_run_continues_from_the_one_before(
    tmp_path, monkeypatch
):
    save(tmp_path, 5)
    assert not files.has_final(str(tmp_path))
    run = checkpointer(tmp_path)
    run.resume_or_load("")
    run.finish()  # killed before the final checkpoint was complete
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", None)  # nothing of it is loaded
        assert files.has_final(str(tmp_path))
    run = checkpointer(tmp_path)
    run.resume_or_load("")
    run.reopen(5)  # the run goes on
    assert not files.has_final(str(tmp_path)) and resume(tmp_path) == 5
    checkpointer(tmp_path, 8).save("model_final", iteration=8)
    assert files.has_final(str(tmp_path))
    truncate(tmp_path / "model_final.pth")
    assert not files.has_final(str(tmp_path)) and resume(tmp_path) == 5


def test_the_last_weights_of_a_run_are_of_its_last_stage_or_none(tmp_path):
    with pytest.raises(WeightsError, match="teacher/model_final.pth"):
        last_weights(str(tmp_path))
    for stage in ("teacher", "student"):
        (tmp_path / stage).mkdir()
        save(tmp_path / stage, 4)
        with pytest.raises(WeightsError, match=f"{stage}/model_final.pth"):  # not stage 1's
            last_weights(str(tmp_path))
        checkpointer(tmp_path / stage).save("model_final", iteration=7)
        assert last_weights(str(tmp_path)) == str(tmp_path / stage / "model_final.pth")
    assert last_weights("of.pth") == "of.pth"


def test_a_stage_is_finished_when_it_is_saved_and_evaluated(tmp_path):
    cfg = SimpleNamespace(OUTPUT_DIR=str(tmp_path), SOLVER=SimpleNamespace(MAX_ITER=8))
    (tmp_path / "results.json").write_text('{"iterations": 8}')  # of another run
    assert not stage_is_finished(cfg)
    (tmp_path / "results.json").unlink()
    checkpointer(tmp_path).save("model_final", iteration=7)
    assert not stage_is_finished(cfg)  # killed before its evaluation
    for results, length, expected in (
        ('{"iterations": 4}', 8, False),  # killed within it
        ('{"iterations": 8', 8, False),
        ('{"iterations": 8}', 8, True),
        ('{"iterations": 8}', 7, True),
        ('{"iterations": 8}', 9, False),  # longer than it was
    ):
        (tmp_path / "results.json").write_text(results)
        assert stage_is_finished(cfg, length) is expected
