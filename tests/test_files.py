"""Files that are never half-written, and what killed processes leave."""

import os

import pytest

from s4m_d2.files import atomic_write, remove_temporaries


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
