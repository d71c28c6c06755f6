"""Saving at once, and continuing."""

import os

import pytest
import torch

from s4m_d2.engine.checkpointing import weight_names
from s4m_d2.engine.checkpointing.checkpoint import S4MCheckpointer
from s4m_d2.errors import WeightsError

from .checkpoint_files import Counter, Model, same


def test_what_is_saved_is_loaded_again(tmp_path):
    saved, counter = Model(seed=1), Counter(7)
    S4MCheckpointer(saved, str(tmp_path), counter=counter).save("model_0000009", iteration=9)

    loaded, restored = Model(seed=2), Counter()
    checkpointer = S4MCheckpointer(loaded, str(tmp_path), counter=restored)
    rest = checkpointer.resume_or_load("", resume=True)

    assert same(loaded, saved)
    assert restored.value == 7
    assert rest == {"iteration": 9}
    assert checkpointer.last_report.missing == () and checkpointer.last_report.mismatched == ()


def test_a_failed_save_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    checkpointer = S4MCheckpointer(Model(seed=1), str(tmp_path))
    checkpointer.save("model")
    before = (tmp_path / "model.pth").read_bytes()

    def half_a_save(content, file):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", half_a_save)
    with pytest.raises(OSError, match="No space left"):
        checkpointer.save("model")
    with pytest.raises(OSError, match="No space left"):
        checkpointer.save("later")
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model.pth"]
    assert (tmp_path / "model.pth").read_bytes() == before
    assert (tmp_path / "last_checkpoint").read_text() == "model.pth"


def test_a_file_has_its_name_only_once_it_is_complete(tmp_path, monkeypatch):
    seen = []
    original = os.replace
    monkeypatch.setattr(
        os,
        "replace",
        lambda src, dst: (
            (seen.append((os.path.basename(dst), os.path.exists(dst)))) or original(src, dst)
        ),
    )
    S4MCheckpointer(Model(), str(tmp_path)).save("model")
    assert seen == [("model.pth", False), ("last_checkpoint", False)]


def test_saved_files_have_the_users_permissions(tmp_path):
    previous = os.umask(0o022)
    try:
        S4MCheckpointer(Model(), str(tmp_path)).save("model")
    finally:
        os.umask(previous)
    assert (tmp_path / "model.pth").stat().st_mode & 0o777 == 0o644


def test_continuing_needs_the_state_of_every_object(tmp_path):
    S4MCheckpointer(Model(), str(tmp_path)).save("model")
    with pytest.raises(WeightsError, match="no state of counter"):
        S4MCheckpointer(Model(), str(tmp_path), counter=Counter()).resume_or_load("")


def test_a_damaged_last_checkpoint_names_the_way_out(tmp_path):
    checkpointer = S4MCheckpointer(Model(), str(tmp_path))
    checkpointer.save("model")
    content = (tmp_path / "model.pth").read_bytes()
    (tmp_path / "model.pth").write_bytes(content[: len(content) // 2])
    with pytest.raises(WeightsError, match=r"truncated.*older checkpoint.*last_checkpoint"):
        checkpointer.resume_or_load("")


def test_addresses_that_cannot_be_fetched_are_named(monkeypatch):
    checkpointer = S4MCheckpointer(Model())

    class Offline:
        @staticmethod
        def get_local_path(path):
            raise OSError("Name or service not known")

    checkpointer.path_manager = Offline
    with pytest.raises(WeightsError, match="cannot be fetched.*Download the file by other means"):
        checkpointer.load("detectron2://ImageNetPretrained/torchvision/R-50.pkl")


def test_a_branch_that_does_not_exist_is_the_callers_mistake():
    assert set(weight_names.BRANCHES) == {"student", "teacher"}
    with pytest.raises(ValueError, match="branch"):
        S4MCheckpointer(Model()).load("x", branch="ema")
