import os
import shutil

import numpy as np
import pycocotools.mask as mask_util
import pytest
from data_scenes import HEIGHT, WIDTH
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from helpers import save_image

from s4m_d2.data import (
    CityscapesFormat,
    CocoFormat,
    labeled_dataset_names,
    register_splits,
    register_unlabeled_folder,
    stable_subset,
)
from s4m_d2.errors import ConfigError, DatasetError

CITYSCAPES = "cityscapes_fine_instance_seg_train"


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
    DatasetCatalog.register(name, lambda: [{"file_name": f"x/{i}.png"} for i in range(3)])
    MetadataCatalog.get(name).set(thing_classes=["thing"])
    path = tmp_path / "mine.txt"
    path.write_text("2\n")
    (listed,) = labeled_dataset_names([name], str(path), 0)
    assert DatasetCatalog.get(listed) == [{"file_name": "x/2.png"}]
    assert MetadataCatalog.get(listed).thing_classes == ["thing"]
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
        (["toyscapes_trian"], "x\n", 0, DatasetError, "'toyscapes_trian'"),
    ):
        path.write_text(content or "")
        with pytest.raises(error, match=message):
            labeled_dataset_names(names, "" if content is None else str(path), seed)
