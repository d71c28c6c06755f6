"""Embeddings kept on disk: a hit is what was computed for the same pixels, or it is none."""

from __future__ import annotations

import copy
import logging
import threading
from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from sam_cases import batch_of, build_smallest, image_of, needs_sam2

from s4m_d2.config import add_s4m_config
from s4m_d2.errors import ConfigError, InputError
from s4m_d2.sam import EncodedImages, SamBackend, build_sam_backend, cache_folder
from s4m_d2.sam.cache import CachedBackend

PLENTY = 10**9


class Counting:
    """A backend that notes how many images each call encodes."""

    def __init__(self, backend):
        self.backend, self.encoded = backend, []

    def __getattr__(self, name):
        return getattr(self.backend, name)

    def encode(self, images, sizes):
        self.encoded.append(len(images))
        return self.backend.encode(images, sizes)


@pytest.fixture(params=["segment_anything", pytest.param("sam2", marks=needs_sam2)], scope="module")
def models(request):
    return build_smallest(request.param)


@pytest.fixture
def cached(models, tmp_path):
    return CachedBackend(Counting(models), tmp_path / "cache", max_bytes=PLENTY)


def again(cached, **changes) -> CachedBackend:
    """Another process's view of the same folder."""
    options = {"max_bytes": PLENTY, "settings": cached.settings} | changes
    backend = options.pop("backend", cached.backend.backend)
    return CachedBackend(Counting(backend), cached._folder.folder, **options)


def entries(cached) -> list[Path]:
    return sorted(cached._folder.folder.iterdir())


def assert_equal(one: EncodedImages, other: EncodedImages) -> None:
    assert one.image_sizes == other.image_sizes
    for a, b in zip(
        (one.embeddings, *one.finer_maps), (other.embeddings, *other.finer_maps), strict=True
    ):
        assert torch.equal(a, b)


def three_images():
    return batch_of(image_of(96, 128, 1), image_of(64, 64, 2), image_of(50, 100, 3))


def test_a_hit_has_every_bit_of_what_was_computed_and_encodes_nothing(cached):
    first = cached.encode(*three_images())
    second = again(cached)
    assert_equal(second.encode(*three_images()), first)
    assert (cached.backend.encoded, second.backend.encoded) == ([3], [])


def test_only_images_that_are_not_known_are_encoded_in_one_call(cached):
    images, sizes = three_images()
    known = cached.encode(images[1:2, :, :64, :64], sizes[1:2])
    mixed = cached.encode(images, sizes)
    assert cached.backend.encoded == [1, 2]
    assert_equal(mixed.select([1]), known)
    assert_equal(again(cached).encode(images, sizes), mixed)


def test_an_image_that_is_twice_in_a_batch_is_encoded_once(cached):
    batch, sizes = batch_of(image_of(64, 64, 2), image_of(96, 128, 1), image_of(64, 64, 2))
    encoded = cached.encode(batch, sizes)
    assert cached.backend.encoded == [2] and len(encoded) == 3
    assert_equal(encoded.select([0]), encoded.select([2]))
    direct = cached.backend.backend.encode(batch, sizes)
    torch.testing.assert_close(encoded.embeddings, direct.embeddings, atol=2e-5, rtol=1e-4)


def test_the_padding_of_the_batch_is_no_part_of_an_image(cached):
    images = [image_of(96, 128, 1), image_of(64, 64, 2)]
    first = cached.encode(*batch_of(*images))
    assert_equal(cached.encode(*batch_of(*images, fill=255)), first)
    assert cached.backend.encoded == [2]


def test_other_pixels_sizes_weights_precision_or_settings_are_no_hit(cached, models):
    image = image_of(64, 64, 2)
    cached.encode(*batch_of(image))
    changed = image.clone()
    changed[2, 63, 63] ^= 1
    cached.encode(*batch_of(changed))
    cached.encode(*batch_of(image.reshape(3, 32, 128)))  # the same bytes
    cached.encode(image[None], [(64, 63)])
    assert cached.backend.encoded == [1] * 4

    coarse = again(cached, backend=type(models)(models.sam, precision="bfloat16"))
    other_settings = again(cached, settings="sam vit_h")
    copies = [copy.deepcopy(models.sam) for _ in range(2)]
    next(iter(copies[0].state_dict().values())).view(-1)[-1] += 1e-6
    other_weights, same = (again(cached, backend=type(models)(sam)) for sam in copies)
    for view in (coarse, other_settings, other_weights):
        view.encode(*batch_of(image))
        assert view.backend.encoded == [1], view
    assert len(entries(cached)) == 4 + 3
    same.encode(*batch_of(image))
    assert same.backend.encoded == []


@pytest.mark.parametrize("damage", ["truncated", "a bit", "empty", "foreign", "of another image"])
def test_a_damaged_entry_is_computed_and_written_anew_and_told_once(cached, damage, caplog):
    first = cached.encode(*three_images())
    contents = [path.read_bytes() for path in entries(cached)]
    for i, path in enumerate(entries(cached)):
        data = bytearray(contents[i])
        data[len(data) // 2] ^= 1
        path.write_bytes({
            "truncated": contents[i][:-100],
            "a bit": bytes(data),
            "empty": b"",
            "foreign": b"<html>" * 100,
            "of another image": contents[i - 1],
        }[damage])  # fmt: skip
    second = again(cached)
    with caplog.at_level(logging.WARNING):
        found = second.encode(*three_images())
    assert len(caplog.records) == 1 and "checksum" in caplog.text
    assert second.backend.encoded == [3]
    assert_equal(found, first)  # of the same batch
    assert_equal(again(cached).encode(*three_images()), first)
    assert len(entries(cached)) == 3


def test_a_sound_file_with_something_else_in_it_is_not_used(cached, caplog):
    image = batch_of(image_of(64, 64, 2))
    first = cached.encode(*image)
    (path,) = entries(cached)
    key = path.stem.removeprefix("sam_")
    cached._folder.write(key, b"no tensors")
    second = again(cached)
    assert_equal(second.encode(*image), first)
    assert second.backend.encoded == [1] and "something else" in caplog.text


def test_writers_at_the_same_time_do_no_harm(cached):
    views = [again(cached) for _ in range(4)]
    direct = cached.backend.backend.encode(*three_images())
    results = [None] * len(views)

    def work(i):
        for _ in range(3):
            results[i] = views[i].encode(*three_images())

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(views))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        torch.testing.assert_close(result.embeddings, direct.embeddings, atol=2e-5, rtol=1e-4)
    last = again(cached)
    last.encode(*three_images())
    assert last.backend.encoded == [] and len(entries(cached)) == 3


def test_a_full_disk_ends_writing_and_not_the_run(cached, monkeypatch, caplog):
    images, sizes = three_images()
    known = cached.encode(images[1:2], sizes[1:2])

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_folder.os, "fsync", full)
    second = again(cached)
    direct = cached.backend.backend.encode(images[[0, 2]], [sizes[0], sizes[2]])
    for _ in range(2):
        found = second.encode(images, sizes)
        assert_equal(found.select([1]), known)
        assert_equal(found.select([0, 2]), direct)
    assert second.backend.encoded == [2, 2]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "No space left" in caplog.text and "only read" in caplog.text
    assert len(entries(cached)) == 1  # no temporary file either


def test_everything_else_is_the_backends(cached):
    direct = cached.backend.backend
    size, points = (96, 128), [torch.rand(2, 1, 2)]
    assert (cached.image_side, cached.grid_side) == (direct.image_side, direct.grid_side)
    assert cached.device == direct.device and cached.grid_scale(size) == direct.grid_scale(size)
    assert torch.equal(cached.content_mask(size), direct.content_mask(size))
    encoded = cached.encode(*batch_of(image_of(*size)))
    (one,) = cached.prompt(encoded, points, multimask=False, features=True)
    (other,) = direct.prompt(encoded, points, multimask=False, features=True)
    assert torch.equal(one.mask_logits, other.mask_logits)
    assert torch.equal(one.features, other.features)
    logits = one.mask_logits[:, 0]
    assert torch.equal(cached.upscale(logits, size), direct.upscale(logits, size))


def test_wrong_sizes_are_refused_and_no_images_are_none(cached):
    image = image_of(64, 64)
    cached.encode(image[None], [(64, 64)])
    with pytest.raises(InputError, match="does not fit"):
        cached.encode(image[None], [(64, 65)])
    assert len(cached.encode(torch.zeros(0, 3, 64, 64), [])) == 0


def test_a_backend_without_fingerprint_cannot_be_cached(tmp_path):
    class Own(SamBackend):
        image_side = grid_side = 8

        def encode(self, images, image_sizes): ...
        def prompt(self, encoded, points, labels=None, **asked): ...
        def grid_scale(self, image_size): ...
        def upscale(self, mask_logits, image_size): ...

    cached = CachedBackend(Own(), tmp_path, max_bytes=PLENTY)
    with pytest.raises(ConfigError, match="Own has no fingerprint"):
        cached.encode(*batch_of(image_of(8, 8)))


def test_only_who_asks_for_it_gets_the_configured_cache(tmp_path):
    cfg = get_cfg()
    add_s4m_config(cfg)
    cfg.MODEL.DEVICE, cfg.S4M.SAM.BACKEND, cfg.S4M.SAM.CHECKPOINT = "cpu", "tiny_toyscapes", ""
    assert not isinstance(build_sam_backend(cfg, cached=True), CachedBackend)
    cfg.S4M.SAM.CACHE, cfg.S4M.SAM.CACHE_SIZE_GB = str(tmp_path / "cache"), 0.25
    cfg.S4M.SAM.MAX_IMAGES, cfg.S4M.SAM.PRECISION = 3, "bfloat16"
    assert not isinstance(build_sam_backend(cfg), CachedBackend)  # refinement's
    cached = build_sam_backend(cfg, cached=True)
    assert isinstance(cached, CachedBackend)
    assert (cached._folder.folder, cached._folder.max_bytes) == (tmp_path / "cache", 250_000_000)
    assert cached.backend._budget.max_images == 3 and cached.backend.precision == "bfloat16"
    assert not (tmp_path / "cache").exists()  # before anything is kept
