"""The cache's folder: its bound, who goes first, and what it leaves alone."""

from __future__ import annotations

import multiprocessing
import os

import pytest

from s4m_d2.sam.cache_folder import CacheFolder

CHECKSUM = 32  # bytes


def key(number: int) -> str:
    return f"{number:064x}"


def used_at(folder: CacheFolder, number: int, second: int) -> None:
    os.utime(folder.path(key(number)), (second, second))


def held(folder: CacheFolder) -> list[int]:
    return [number for number in range(100) if folder.path(key(number)).exists()]


def test_the_least_recently_used_entries_go_first_and_the_bound_holds(tmp_path):
    folder = CacheFolder(tmp_path, max_bytes=4 * (CHECKSUM + 100))
    for number in range(4):
        folder.write(key(number), bytes(100))
        used_at(folder, number, 1000 + number)
    assert held(folder) == [0, 1, 2, 3]
    assert folder.read(key(0)) == bytes(100)  # now the latest
    folder.write(key(4), bytes(100))
    used_at(folder, 4, 1004)
    assert held(folder) == [0, 2, 3, 4]
    folder.write(key(5), bytes(250))  # needs the room of three
    assert held(folder) == [0, 5]
    for number in range(6, 30):
        folder.write(key(number), bytes(number))
        total = sum(file.stat().st_size for file in tmp_path.iterdir())
        assert total <= folder.max_bytes
    assert 29 in held(folder)


def test_entries_of_earlier_runs_and_other_processes_count(tmp_path):
    size = CHECKSUM + 100
    one, other = (CacheFolder(tmp_path, max_bytes=3 * size) for _ in range(2))
    for number in range(4):
        (one, other)[number % 2].write(key(number), bytes(100))
        used_at(one, number, 1000 + number)
    assert held(one) == [1, 2, 3]


def test_the_bound_holds_between_the_listings_of_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("s4m_d2.files.os.fsync", lambda handle: None)
    folder = CacheFolder(tmp_path, max_bytes=64 * 210)
    listings = []
    files = folder._files
    monkeypatch.setattr(folder, "_files", lambda: listings.append(1) or files())
    total = 0
    for number in range(330):  # 320 fit
        folder.write(key(number), bytes(10))
        if number % 3 == 0:
            total = sum(file.stat().st_size for file in tmp_path.iterdir())
            assert total <= folder.max_bytes
    assert total == folder.max_bytes
    assert 64 <= len(listings) <= 64 + 10  # every fifth write, and where something has to go


def test_files_of_others_are_left_alone_and_old_temporaries_go(tmp_path):
    mine = tmp_path / f".sam_{key(7)}.pt.abcd1234.tmp"
    foreign = [tmp_path / name for name in ("notes.txt", "sam_vit_l.pt", ".other.abcd1234.tmp")]
    for file in (mine, *foreign):
        file.write_bytes(bytes(500))
        os.utime(file, (1, 1))
    folder = CacheFolder(tmp_path, max_bytes=600)
    folder.write(key(1), bytes(300))
    assert not mine.exists() and all(file.exists() for file in foreign)
    assert held(folder) == [1]


def test_an_entry_above_the_bound_is_not_written_and_told_once(tmp_path, caplog):
    folder = CacheFolder(tmp_path / "new", max_bytes=100)
    folder.write(key(1), bytes(100))
    folder.write(key(2), bytes(100))
    assert not (tmp_path / "new").exists()
    assert len(caplog.records) == 1 and "the bound is 100" in caplog.text


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_only_be_read_is_read(tmp_path, caplog):
    CacheFolder(tmp_path, max_bytes=10_000).write(key(1), b"content")
    tmp_path.chmod(0o500)
    try:
        folder = CacheFolder(tmp_path, max_bytes=10_000)
        assert folder.read(key(1)) == b"content"
        folder.write(key(2), b"content")
        folder.write(key(3), b"content")
    finally:
        tmp_path.chmod(0o700)
    assert held(folder) == [1] and len(caplog.records) == 1


def test_a_folder_whose_files_keep_their_times_is_read(tmp_path, monkeypatch, caplog):
    folder = CacheFolder(tmp_path, max_bytes=10_000)
    folder.write(key(1), b"content")

    def refused(*args, **kwargs):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("s4m_d2.sam.cache_folder.os.utime", refused)
    monkeypatch.setattr("s4m_d2.files.tempfile.mkstemp", refused)
    assert folder.read(key(1)) == b"content"
    folder.write(key(2), b"content")
    folder.write(key(3), b"content")
    assert held(folder) == [1] and len(caplog.records) == 1
    assert "not permitted" in caplog.text


def write_many(folder):
    cache = CacheFolder(folder, max_bytes=12_000)
    for step in range(30):
        number = step * 7 % 17
        content = bytes([number]) * 1000
        assert cache.read(key(number)) in (None, content)
        cache.write(key(number), content)
    assert cache._writes and not cache._warned_of_damage


def test_processes_that_share_a_full_folder_keep_it_sound(tmp_path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_many, args=(tmp_path,)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    folder = CacheFolder(tmp_path, max_bytes=12_000)
    assert len(held(folder)) >= 8
    assert all(folder.read(key(number)) == bytes([number]) * 1000 for number in held(folder))
