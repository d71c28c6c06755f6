"""Registered data sets, and which of their images are labeled: shares, lists, validation splits."""

import doctest
import os
import random
import shutil
from collections import Counter

import numpy as np
import pycocotools.mask as mask_util
import pytest
from data_scenes import HEIGHT, WIDTH
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from helpers import save_image
from hypothesis import given
from hypothesis import strategies as st

from s4m_d2.data import (
    CityscapesFormat,
    CocoFormat,
    labeled_dataset_names,
    register_splits,
    register_unlabeled_folder,
    segmentations,
    splits,
    stable_subset,
)
from s4m_d2.data.splits import draw_validation, listed_subset, read_split_file
from s4m_d2.errors import ConfigError, DatasetError, InputError

CITYSCAPES = "cityscapes_fine_instance_seg_train"
NAMES = [f"city/img_{i:03d}.png" for i in range(40)]


def test_all_sets_are_registered_with_their_metadata():
    things = ["person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"]
    for base in (CITYSCAPES, "toyscapes_train"):
        for suffix in ("5pct", "10pct", "20pct", "30pct", "unlabeled"):
            meta = MetadataCatalog.get(f"{base}_{suffix}")
            assert meta.thing_classes == things and len(meta.thing_colors) == 8
            assert meta.thing_dataset_id_to_contiguous_id[33] == 7
            assert meta.evaluator_type == "cityscapes_instance"
    for suffix in ("1pct", "2pct", "5pct", "10pct", "unlabeled"):
        meta = MetadataCatalog.get(f"coco_2017_train_{suffix}")
        assert len(meta.thing_classes) == 80 and meta.thing_dataset_id_to_contiguous_id[90] == 79
        assert meta.evaluator_type == "coco"
    assert {"toyscapes_val", "toyscapes_train"} <= set(DatasetCatalog.list())


def test_a_labeled_split_reads_the_annotations_of_its_images_only(data_root):
    gt_dir = data_root / "toyscapes/gtFine/train"
    images = [record["file_name"] for record in DatasetCatalog.get("toyscapes_train")]
    assert len(images) == 20
    chosen = stable_subset(images, 0.1, 0)
    for image in set(images) - set(chosen):
        os.remove(
            image.replace("leftImg8bit", "gtFine").replace("gtFine.png", "gtFine_instanceIds.png")
        )
    assert [r["file_name"] for r in DatasetCatalog.get("toyscapes_train_10pct")] == chosen
    assert len(list(gt_dir.rglob("*.png"))) == 2


def test_an_id_map_of_noise_is_read_exactly(tmp_path):
    rng = np.random.default_rng(0)
    ids = rng.choice([0, 24, 24000, 24001, 29000, 33012], (17, 23)).astype(np.uint16)
    save_image(tmp_path / "i/c/a_leftImg8bit.png", np.zeros((17, 23, 3), np.uint8))
    save_image(tmp_path / "g/c/a_gtFine_instanceIds.png", ids)
    ((record,), _) = CityscapesFormat(str(tmp_path / "i"), str(tmp_path / "g")).load(sorted)
    assert (record["height"], record["width"]) == ids.shape
    assert record["image_id"] == "a_leftImg8bit.png"
    known = (24, 0, 1), (24000, 0, 0), (24001, 0, 0), (33012, 7, 0)  # 29: caravan, not evaluated
    for annotation, (value, label, crowd) in zip(record["annotations"], known, strict=True):
        mask = ids == value
        assert annotation["segmentation"] == mask_util.encode(np.asfortranarray(mask, np.uint8))
        assert (annotation["category_id"], annotation["iscrowd"]) == (label, crowd)
        rows, columns = np.nonzero(mask)
        box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert annotation["bbox"] == box and annotation["bbox_mode"] == BoxMode.XYXY_ABS


def test_unlabeled_sets_need_no_annotations(data_root):
    labeled = [r["file_name"] for r in DatasetCatalog.get("toyscapes_train")]
    shutil.rmtree(data_root / "toyscapes/gtFine")
    records = DatasetCatalog.get("toyscapes_train_unlabeled")
    assert len(records) == 20
    assert set(records[0]) == {"file_name", "image_id", "height", "width"}
    assert (records[0]["height"], records[0]["width"]) == (HEIGHT, WIDTH)
    assert [r["file_name"] for r in records] == labeled
    with pytest.raises(DatasetError, match="gtFine/train.*make_toyscapes"):
        DatasetCatalog.get("toyscapes_train_10pct")


def test_the_root_is_looked_up_when_a_set_is_loaded(data_root, monkeypatch):
    DatasetCatalog.get("toyscapes_val")
    shutil.move(data_root / "toyscapes", data_root / "other/toyscapes")
    with pytest.raises(DatasetError, match="does not exist.*make_toyscapes"):
        DatasetCatalog.get("toyscapes_val")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(data_root / "other"))
    assert len(DatasetCatalog.get("toyscapes_val")) == 3
    assert MetadataCatalog.get("toyscapes_val").gt_dir.startswith(str(data_root / "other"))


def test_a_damaged_header_keeps_its_unlabeled_record(data_root, name):
    folder = data_root / "toyscapes/leftImg8bit/val"
    (folder / "notes.txt").write_text("not an image")
    (folder / "a.png").write_bytes(b"no png")
    register_unlabeled_folder(name, str(folder))
    records = {r["image_id"]: r for r in DatasetCatalog.get(name)}
    assert len(records) == 4
    assert "height" not in records["a.png"]
    assert records["alpha/alpha_000000_000019_leftImg8bit.png"]["height"] == HEIGHT


def test_errors_name_the_data_set_and_where_it_comes_from(data_root):
    for name, source in ((f"{CITYSCAPES}_10pct", "cityscapes"), ("coco_2017_train_1pct", "coco")):
        with pytest.raises(DatasetError, match=f"'{name}'.*prepare_{source}.py"):
            DatasetCatalog.get(name)


def test_coco_splits(coco_root, name):
    dataset = CocoFormat(str(coco_root / "instances.json"), str(coco_root / "images"))
    register_splits(name, dataset, (20, 50), full=True)
    records = DatasetCatalog.get(f"{name}_20pct")
    names = [f"{i:06d}.jpg" for i in range(10)]
    assert [os.path.basename(r["file_name"]) for r in records] == stable_subset(names, 0.2, 0)
    assert [a["category_id"] for a in records[0]["annotations"]] == [0, 1]
    assert MetadataCatalog.get(f"{name}_20pct").thing_classes == ["apple", "pear"]
    assert len(DatasetCatalog.get(name)) == 10
    os.remove(coco_root / "instances.json")
    unlabeled = DatasetCatalog.get(f"{name}_unlabeled")
    assert len(unlabeled) == 10 and "annotations" not in unlabeled[0]


def test_a_seed_draws_another_split_of_the_same_size(data_root):
    assert labeled_dataset_names(["a", "b"], "", 0) == ("a", "b")
    (seeded,) = labeled_dataset_names(["toyscapes_train_20pct"], "", 3)
    assert seeded == "toyscapes_train_20pct_seed3"
    assert labeled_dataset_names(["toyscapes_train_20pct"], "", 3) == (seeded,)
    images = [r["file_name"] for r in DatasetCatalog.get("toyscapes_train_unlabeled")]
    assert [r["file_name"] for r in DatasetCatalog.get(seeded)] == stable_subset(images, 0.2, 3)
    assert MetadataCatalog.get(seeded).evaluator_type == "cityscapes_instance"


def test_a_list_takes_the_place_of_the_fraction(data_root, tmp_path):
    path = tmp_path / "mine.txt"
    images = [f"{name}_000019_leftImg8bit.png" for name in ("alpha_000004", "beta_000001")]
    path.write_text(f"alpha_000004_000019\n{images[1]}\n")
    for spelling in ("toyscapes_train_10pct", "toyscapes_train"):
        (listed,) = labeled_dataset_names([spelling], str(path), 0)
        assert listed.startswith("toyscapes_train_list_")
        assert [os.path.basename(r["file_name"]) for r in DatasetCatalog.get(listed)] == images
    path.write_text("alpha_000004_000019\n")
    assert labeled_dataset_names(["toyscapes_train"], str(path), 0) != (listed,)


def test_a_list_chooses_from_any_registered_set(name, tmp_path):
    def load():  # classes are known with the file, as of Detectron2's register_coco_instances
        MetadataCatalog.get(name).set(thing_classes=["thing"])
        return [{"file_name": f"x/{i}.png"} for i in range(3)]

    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(evaluator_type="coco")
    path = tmp_path / "mine.txt"
    path.write_text("2\n")
    (listed,) = labeled_dataset_names([name], str(path), 0)
    assert DatasetCatalog.get(listed) == [{"file_name": "x/2.png"}]
    metadata = MetadataCatalog.get(listed)
    assert (metadata.thing_classes, metadata.evaluator_type) == (["thing"], "coco")
    path.write_text("2\n3\n")
    (listed,) = labeled_dataset_names([name], str(path), 0)
    with pytest.raises(DatasetError, match="3"):
        DatasetCatalog.get(listed)


def test_bad_choices_of_labels(tmp_path):
    path = tmp_path / "list.txt"
    for names, content, seed, error, message in (
        (["toyscapes_train_10pct"], "x\n", 3, ConfigError, "SPLIT_FILE and S4M.SPLIT_SEED"),
        (["toyscapes_train", "coco_2017_train"], "x\n", 0, ConfigError, "toyscapes_train, coco_2"),
        (["toyscapes_train"], None, 3, ConfigError, "'toyscapes_train'"),
        (["toyscapes_train"], "", 0, DatasetError, "list.txt"),
        (["toyscapes_trian"], "x\n", 0, DatasetError, "'toyscapes_trian' is not registered"),
    ):
        path.write_text(content or "")
        with pytest.raises(error, match=message):
            for name in labeled_dataset_names(names, "" if content is None else str(path), seed):
                DatasetCatalog.get(name)


def test_a_draw_is_the_same_on_every_machine():
    for seed, expected in ((0, "000 009 017 026"), (3, "014 025 031 037")):
        assert stable_subset(NAMES, 0.1, seed) == [f"city/img_{i}.png" for i in expected.split()]
    assert draw_validation(cats(10), 0.3) == ["0.png", "5.png", "9.png"]


@given(seed=st.integers(-(2**70), 2**70), shuffle=st.randoms(use_true_random=False))
def test_a_split_depends_on_base_names_alone(seed, shuffle: random.Random):
    moved = [name.replace("city", "/elsewhere") for name in NAMES]
    shuffle.shuffle(moved)
    expected = [name.replace("city", "/elsewhere") for name in stable_subset(NAMES, 0.3, seed)]
    assert stable_subset(moved, 0.3, seed) == expected


@given(st.lists(st.floats(0.001, 1), min_size=2, max_size=2).map(sorted), st.integers(0, 1000))
def test_smaller_fractions_are_part_of_larger_ones(fractions, seed):
    small, large = (stable_subset(NAMES, fraction, seed) for fraction in fractions)
    assert set(small) <= set(large)


def test_the_number_of_images_is_the_fraction_rounded():
    rows = (2975, 0.05, 149), (2975, 0.1, 298), (2975, 0.3, 893), (3, 0.01, 1), (7, 1.0, 7)
    for count, fraction, expected in rows:
        assert len(stable_subset([f"{i}.png" for i in range(count)], fraction, 0)) == expected
    for count, fraction, expected in ((2, 0.2, 1), (8, 0.2, 2), (10, 0.25, 3), (10, 0.99, 9)):
        assert len(draw_validation(cats(count), fraction)) == expected


def test_bad_subsets():
    for names, fraction, error, message in (
        ([], 0.1, DatasetError, "no images"),
        (["a/1.png", "b/1.png"], 0.5, DatasetError, "1.png"),
        (["1.png"], 0, InputError, "fraction"),
        (["1.png"], 1.1, InputError, "1.1"),
    ):
        with pytest.raises(error, match=message):
            stable_subset(names, fraction, 0)


def test_a_list_names_images_in_any_spelling(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text(
        "x_1_leftImg8bit.png\n# published split\n\ntrain/x/x_3.png  # with a comment\nx_4\n"
        "x_5_gtFine_instanceIds.png\nframe.0001\n9\n",
        encoding="utf-8-sig",  # as Windows' Notepad does
    )
    names = [f"root/x/x_{i}_leftImg8bit.png" for i in range(6)] + ["y/9.jpg", "y/frame.0001"]
    chosen = listed_subset(names[::-1], read_split_file(str(path)), str(path))
    assert chosen == [names[i] for i in (1, 3, 4, 5, 6, 7)]


def test_bad_lists(tmp_path):
    path = tmp_path / "list.txt"
    with pytest.raises(DatasetError, match=r"list\.txt"):
        read_split_file(str(path))
    repeated = b"x_1\nx_2\ny/x_1_leftImg8bit.png\n"
    for content, named in ((b"# no\n \n", ""), (repeated, "x_1"), (b"\xff\xfe\x00", "")):
        path.write_bytes(content)
        with pytest.raises(DatasetError, match=f"list.txt.*{named}"):
            read_split_file(str(path))
    for names, listed, named in (
        (["1.png"], ["1", "nor", "no"], "2 of the 3 .*no, nor"),
        (["a/1.png", "b/1.png"], ["1"], "1"),
    ):
        with pytest.raises(DatasetError, match=named):
            listed_subset(names, listed, "my.txt")


CLASSES = ("apple", "pear", "plum")
images_with_classes = st.dictionaries(
    st.integers(0, 10_000).map("{:05d}.png".format), st.sets(st.sampled_from(CLASSES)), max_size=30
)


def cats(count):
    return {f"{i}.png": {"cat"} for i in range(count)}


@given(images_with_classes, st.floats(0.05, 0.9), st.randoms(use_true_random=False))
def test_every_class_keeps_an_image_and_the_order_of_the_file_does_not_matter(
    classes_of, fraction, rng
):
    try:
        chosen = draw_validation(classes_of, fraction)
    except DatasetError:
        images = Counter(name for found in classes_of.values() for name in found)
        spare = [f for f in classes_of.values() if f and all(images[name] > 1 for name in f)]
        assert not spare
        return
    kept = [found for name, found in classes_of.items() if name not in chosen]
    assert set().union(*kept) == set().union(*classes_of.values())
    assert set(chosen) < set(classes_of)
    shuffled = list(classes_of.items())
    rng.shuffle(shuffled)
    assert draw_validation(dict(shuffled), fraction) == chosen


def test_a_rare_class_is_in_both_parts_for_which_the_split_may_double_up_to_half():
    classes_of = cats(60) | {"a.png": {"cat", "dog"}, "b.png": {"dog"}}
    chosen = draw_validation(classes_of, 0.1)
    assert len(chosen) == 6
    assert len({"a.png", "b.png"} & set(chosen)) == 1
    rare = {f"{i}.png": {f"class {i % 15}"} for i in range(30)}  # two images of each class
    assert len(draw_validation(rare, 0.1)) == 6
    assert len(draw_validation(rare, 0.4)) == 15


def test_where_no_image_can_be_spared_the_ways_out_are_named():
    with pytest.raises(DatasetError, match="--val.*VAL_FRACTION 0"):
        draw_validation({"1.png": {"cat"}, "2.png": {"dog"}}, 0.5)
    with pytest.raises(ConfigError):
        draw_validation(cats(5), 1.0)


def test_doctests():
    for module in (segmentations, splits):
        assert doctest.testmod(module).failed == 0
