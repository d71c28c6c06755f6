"""Own data: classes, split, settings and what is refused, before training starts."""

import os
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from s4m_d2.data.images import read_image
from s4m_d2.engine.config_file import load_config
from s4m_d2.engine.derived_settings import SET_BY_USER
from s4m_d2.engine.labeling.sam_quality import split_labeled
from s4m_d2.errors import ConfigError, DatasetError
from s4m_d2.visualization import write_video

from . import own_runs
from .own_runs import CONFIG, change_json, copied, make_data, only, overrides, own_options

CLASSES = ["bicycle", "bus", "car", "motorcycle", "person", "rider", "train", "truck"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("own") / "data")


@pytest.fixture
def changed(data, tmp_path):
    return copied(data, tmp_path / "changed")


@pytest.fixture
def read(tmp_path):
    """(options, overrides) → config and own data, as train_net.py reads them."""

    def of(options, config_file=CONFIG, flags=(), **changes):
        words = overrides(tmp_path / "run", **changes)
        return own_runs.read(*options, *flags, *words, config=config_file)

    return of


def names(data_set):
    return {record["file_name"].rsplit("/", 1)[-1] for record in DatasetCatalog.get(data_set)}


def test_options_and_config_keys_do_the_same(data, read, tmp_path):
    by_option, own = read(own_options(data))
    sets = by_option.DATASETS
    assert by_option.MODEL.SEM_SEG_HEAD.NUM_CLASSES == len(CLASSES)
    assert [*sets.TRAIN, *sets.UNLABELED, *sets.TEST] == ["own_labeled", "own_unlabeled", "own_val"]
    assert MetadataCatalog.get("own_val").thing_classes == CLASSES
    assert f"8 classes: {', '.join(CLASSES)}" in own.findings()[0].text
    config = tmp_path / "mine.yaml"
    config.write_text(
        f"_BASE_: {CONFIG}\nS4M:\n  DATA:\n    LABELED: [{data}/annotations.json]\n"
        f"    IMAGES: {data}/labeled\n    UNLABELED: {data}/unlabeled\n"
    )
    assert read([], config_file=str(config))[0] == by_option
    other = load_config(
        str(config), ["S4M.DATA.LABELED", "a.json", "S4M.DATA.IMAGES", "('b', 'c')"]
    )
    assert (other.S4M.DATA.LABELED, other.S4M.DATA.IMAGES) == (("a.json",), ("b", "c"))
    assert read([])[1] is None  # DATASETS names the data sets


def test_paths_are_made_absolute_and_read_as_text(changed, read, monkeypatch):
    monkeypatch.chdir(changed)
    (changed / "unlabeled").rename(changed / "2024")
    cfg, _ = read(own_options(changed, labeled="annotations.json", unlabeled="2024"))
    assert (f"{changed}/annotations.json",) == cfg.S4M.DATA.LABELED
    assert f"{changed}/2024" == cfg.S4M.DATA.UNLABELED


def write_clip(path, frames=7):
    """A video whose n-th frame is a gray of 20 · n."""
    with write_video(path, fps=5) as write:
        for index in range(frames):
            write(np.full((64, 128, 3), 20 * index, np.uint8))


def test_every_nth_frame_of_a_video_is_an_unlabeled_image(changed, read, tmp_path):
    folder, run = changed / "unlabeled", tmp_path / "data" / "frames" / "run"
    (folder / "day").mkdir()
    write_clip(folder / "day" / "clip.mp4")
    images = sorted(p.name for p in folder.glob("*.*"))
    options = [*own_options(changed), "--every", "3"]
    cfg, own = read(options, OUTPUT_DIR=run)
    frames = [run / "data/frames/day/clip.mp4" / f"clip_00000{n}.jpg" for n in (0, 3, 6)]
    assert sorted(own.stored.unlabeled) == sorted([*map(str, frames), *images])
    for record in DatasetCatalog.get("own_unlabeled"):
        if "clip_" in record["file_name"]:
            number = int(record["file_name"][-5])
            assert abs(read_image(record["file_name"], "RGB").astype(int) - 20 * number).max() < 6
            assert (record["height"], record["width"]) == (64, 128)

    times = [frame.stat().st_mtime_ns for frame in frames]
    own.save()
    (folder / "day" / "clip.mp4").write_bytes(b"")  # what is written is not decoded again
    _, resumed = read(options, flags=["--resume"], OUTPUT_DIR=run)
    assert resumed.stored == own.stored
    assert [frame.stat().st_mtime_ns for frame in frames] == times
    moved = run.rename(tmp_path / "moved")
    (moved / "config.yaml").write_text(cfg.dump())
    (moved / "run.json").write_text("{}")
    file = str(moved / "config.yaml")
    assert read([], file, ["--resume"], OUTPUT_DIR=None)[1].folder == str(moved / "data")
    assert all(Path(r["file_name"]).is_file() for r in DatasetCatalog.get("own_unlabeled"))


def test_a_video_alone_is_a_data_set_and_a_broken_one_is_named(changed, read):
    write_clip(changed / "clip.mp4", frames=12)
    _, own = read(own_options(changed, unlabeled=changed / "clip.mp4"))
    assert [name[-10:] for name in own.stored.unlabeled] == ["000000.jpg", "000010.jpg"]
    write_clip(changed / "clip.mp4", frames=5)  # another video of that name, made long ago
    os.utime(changed / "clip.mp4", (0, 0))
    _, own = read(own_options(changed, unlabeled=changed / "clip.mp4"))
    assert [name[-10:] for name in own.stored.unlabeled] == ["000000.jpg"]
    (changed / "broken.mp4").write_bytes(b"no video")
    with pytest.raises(DatasetError, match=r"broken\.mp4 cannot be read as a video"):
        read(own_options(changed, unlabeled=changed / "broken.mp4"))


def test_an_image_is_labeled_unlabeled_or_of_the_drawn_split(data, read):
    cfg, own = read(own_options(data, unlabeled=data))  # the labeled images are in it
    labeled, val, unlabeled = (names(s) for s in ("own_labeled", "own_val", "own_unlabeled"))
    assert labeled | val == {f"street_{i:05d}.png" for i in range(8)}
    assert not labeled & val and not unlabeled & (val | labeled) and len(unlabeled) == 4
    assert own.stored.left_out == {"in the validation set": len(val), "labeled": len(labeled)}
    assert all(reason in own.findings()[0].text for reason in own.stored.left_out)
    read(own_options(data))
    assert names("own_val") == val


def test_augmented_copies_of_a_photograph_are_on_one_side_of_each_split(changed, read):
    """As Roboflow names them; here two of each photograph."""

    def rename(content):
        for number, image in enumerate(content["images"]):
            old = changed / "labeled" / image["file_name"]
            image["file_name"] = f"p{number // 2}_png.rf.{number:032x}.png"
            old.rename(old.with_name(image["file_name"]))

    change_json(changed / "annotations.json", rename)
    cfg, _ = read(own_options(changed))
    trained, held_out = split_labeled(cfg)
    paths = [{r["file_name"].rsplit("/", 1)[-1] for r in part} for part in (trained, held_out)]
    for parts in ((names("own_labeled"), names("own_val")), paths):
        first, second = ({name.partition("_")[0] for name in part} for part in parts)
        assert first and second and not first & second

    images = sorted((changed / "labeled").glob("*.png"))
    for path in images[1:]:
        path.write_bytes(images[0].read_bytes())
    notes = " ".join(read(own_options(changed))[1].notes)
    assert "images of the drawn validation set are copies of labeled ones" in notes


def test_a_given_validation_set_leaves_all_labeled_images(changed, read):
    val = changed / "val.json"
    val.write_text((changed / "annotations.json").read_text())
    change_json(val, only(slice(-2, None)))
    change_json(changed / "annotations.json", only(slice(-2)))
    _, own = read(own_options(changed, val=val, val_images=changed / "labeled"))
    assert [len(names(data_set)) for data_set in ("own_labeled", "own_val")] == [6, 2]
    assert not any("copies" in note for note in own.notes)
    copied(changed / "labeled", changed / "copies")
    options = {"val": changed / "annotations.json", "val_images": changed / "copies"}
    _, own = read(own_options(changed, **options))
    assert any("6 images" in note and "copies" in note for note in own.notes)
    own.save()  # a continued run and an evaluation look there again
    for flags in (["--resume"], ["--eval-only"]):
        _, again = read(own_options(changed), flags=flags)
        assert again.validation.records == own.validation.records
        assert not any(" is not what " in note for note in again.notes)


def test_validation_images_are_known_in_the_unlabeled_folder_by_their_names_in_their_files(
    changed, read
):
    """Encoded anew there; two files, each with a folder of its own."""
    for part, chosen in (("a", slice(0, None, 2)), ("b", slice(1, None, 2))):
        copied(changed / "labeled", changed / part)
        (changed / f"{part}.json").write_text((changed / "annotations.json").read_text())
        change_json(changed / f"{part}.json", only(chosen))
    for path in (changed / "labeled").glob("*.png"):
        with Image.open(path) as image:
            image.save(changed / "unlabeled" / path.name, compress_level=1)
    options = own_options(changed, labeled=changed / "a.json", images=changed / "a")
    _, own = read([*options, "--labeled", changed / "b.json", "--images", changed / "b"])
    assert len(names("own_val")) == 2 == own.stored.left_out["in the validation set"]
    assert not names("own_val") & names("own_unlabeled")


def test_facts_are_of_tiles_and_without_a_fraction_nothing_is_held_out(data, read):
    """Images of 128 x 64 px: three tiles with an overlap of 0.5."""
    tile = {"INPUT__TILE__SIZE": 64, "INPUT__TILE__OVERLAP": 0.5}
    cfg, own = read(own_options(data), **tile, S4M__DATA__VAL_FRACTION=0.0, SOLVER__MAX_ITER=None)
    assert cfg.DATASETS.TEST == () and own.validation is None and len(names("own_labeled")) == 8
    assert (cfg.INPUT.IMAGE_SIZE, cfg.INPUT.MIN_SIZE_TEST) == (192, 192)
    reasons = {setting.key: setting.reason for setting in own.stored.settings}
    assert reasons["SOLVER.MAX_ITER"].startswith("8 times 12 unlabeled tiles")
    assert reasons["INPUT.TILE.SIZE"] == SET_BY_USER  # it would not have been derived


def test_a_users_keys_win_and_are_named(data, read, tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text(
        f"_BASE_: {CONFIG}\nINPUT:\n  IMAGE_SIZE: 96\n"
        "MODEL:\n  SEM_SEG_HEAD:\n    NUM_CLASSES: 80\n"  # of another data set
    )
    cfg, own = read(own_options(data), config_file=str(config))
    assert (cfg.INPUT.IMAGE_SIZE, cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH) == (96, 2, 2)
    kept = {s.key: s.value for s in own.stored.settings if s.reason == SET_BY_USER}
    assert kept.items() >= {"INPUT.IMAGE_SIZE": 96, "SOLVER.MAX_ITER": 2, "S4M.BURN_IN": 1}.items()
    assert "INPUT.IMAGE_SIZE" in own.findings()[-1].text
    assert cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == 8
    changed = {"MODEL__SEM_SEG_HEAD__NUM_CLASSES": 80}  # the checks before training refuse it
    assert read(own_options(data), **changed)[0].MODEL.SEM_SEG_HEAD.NUM_CLASSES == 80


def test_classes_without_an_instance_and_too_few_queries_are_named(changed, read):
    def change(content):  # a ferry has no instance at all, which another line says
        content["categories"] += [{"id": 99, "name": "tram"}, {"id": 100, "name": "ferry"}]
        content["annotations"][0]["category_id"] = 99
        content["annotations"][1]["segmentation"] = []

    change_json(changed / "annotations.json", change)
    _, own = read(own_options(changed), MODEL__MASK_FORMER__NUM_OBJECT_QUERIES=3)
    absent, queries = own.notes
    assert "without a mask" in own.labeled.findings.summary
    assert own.validation.findings.summary == ""
    assert "no instance of tram:" in absent and "NUM_OBJECT_QUERIES is 3" in queries


REFUSED = [  # paths, more options, keys
    ({"labeled": None}, (), {}, ConfigError, "--labeled"),
    ({"unlabeled": None}, (), {}, ConfigError, "--unlabeled"),
    ({"labeled": "no.json"}, (), {}, DatasetError, r"no\.json: .*--labeled"),
    ({"labeled": "none.json"}, (), {}, DatasetError, "no image to train on"),
    ({"images": "no"}, (), {}, DatasetError, "not in .*/no: .*--images"),
    ({"unlabeled": "nowhere"}, (), {}, DatasetError, "/nowhere .*--unlabeled"),
    ({"val": "x.json"}, (), {}, DatasetError, r"x\.json: .*--val "),
    ({}, ("--unlabeled", "b"), {}, ConfigError, "--unlabeled takes one value.*b"),
    ({}, ("--every", "0"), {}, ConfigError, "--every"),
    ({}, (), {"S4M__DATA__VAL_FRACTION": 1.0}, ConfigError, "VAL_FRACTION is 1.0"),
    ({}, (), {"DATASETS__TRAIN": "('x',)"}, ConfigError, "DATASETS.TRAIN and S4M.DATA"),
]


def test_options_that_cannot_work_are_named(changed, read, monkeypatch):
    monkeypatch.chdir(changed)
    (changed / "none.json").write_text((changed / "annotations.json").read_text())
    change_json(changed / "none.json", only(slice(0)))
    for paths, more, keys, error, message in REFUSED:
        with pytest.raises(error, match=message):
            read([*own_options(changed, **paths), *more], **keys)
