"""A disk that fills up, or refuses, while a file is written."""

import builtins
import contextlib
import errno
import os
import resource
from unittest import mock

import pytest
import torch
from helpers import content

from s4m_d2.engine.checkpointing.checkpoint import S4MCheckpointer
from s4m_d2.errors import OutputError
from s4m_d2.files import atomic_write, remove_temporaries

from .rows import one_error


@contextlib.contextmanager
def room_for(size):
    """The system lets no file grow beyond this many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def fails_in(module, function, code):
    return mock.patch.object(module, function, side_effect=OSError(code, os.strerror(code)))


FULL = {
    "at once": (lambda: room_for(0), "File too large"),
    "in the tensors": (lambda: room_for(20_000), "File too large"),
    "with the last bytes": (lambda: room_for(41_000), "File too large"),
    "disk that fails": (lambda: fails_in(os, "fsync", errno.EIO), "Input/output error"),
    "in the folder": (lambda: fails_in(builtins, "open", errno.ENOSPC), "No space left"),
    "when it is renamed": (lambda: fails_in(os, "replace", errno.ENOSPC), "No space left"),
}


def checkpointer(folder, value):
    model = torch.nn.Linear(100, 100)
    torch.nn.init.constant_(model.weight, value)
    return S4MCheckpointer(model, str(folder))


@pytest.mark.parametrize("name", ["model_0000009", "model_0000004"], ids=["new", "over the old"])
@pytest.mark.parametrize("row", FULL)
def test_a_full_disk_leaves_the_checkpoint_before_and_nothing_else(tmp_path, row, name):
    broken, says = FULL[row]
    folder = tmp_path / "run"
    folder.mkdir()
    checkpointer(folder, 4.0).save("model_0000004")
    before = content(folder)
    more = checkpointer(folder, 9.0)
    with one_error(OutputError, rf"{folder}/{name}\.pth' cannot be written", says), broken():
        more.save(name)
    assert content(folder) == before
    resumed = checkpointer(folder, 0.0)
    resumed.resume_or_load("", resume=True)
    assert (resumed.model.weight == 4.0).all()
    resumed.save(name)  # as soon as there is room
    assert set(content(folder)) == {"model_0000004.pth", f"{name}.pth", "last_checkpoint"}


def test_what_is_being_written_is_what_would_be_left_and_nothing_else_is_removed(tmp_path):
    for name in ("model_final.pth", ".hidden", ".env.tmp", "notes.abcdefgh.tmp"):
        (tmp_path / name).touch()
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "results.json") as file:
        file.write("half")
        (removed,) = remove_temporaries(tmp_path)
        assert removed.startswith(".results.json.")
        assert not os.path.exists(file.name)
    assert sorted(os.listdir(tmp_path)) == before
    assert remove_temporaries(tmp_path) == [] == remove_temporaries(tmp_path / "nowhere")


def test_a_folder_in_the_place_of_the_file(tmp_path):
    (tmp_path / "model.pth").mkdir()
    with one_error(OutputError, "model.pth' cannot be written: Is a directory"):
        with atomic_write(tmp_path / "model.pth", "wb"):
            pass
    assert os.listdir(tmp_path) == ["model.pth"]


def test_errors_of_the_writer_itself_stay_as_they_are(tmp_path):
    for error in (FileNotFoundError(errno.ENOENT, "gone"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught, atomic_write(tmp_path / "file"):
            raise error
        assert caught.value is error and os.listdir(tmp_path) == []
