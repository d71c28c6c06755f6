import copy
from pathlib import Path

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from data_scenes import CAR, GREEN, HEIGHT, PERSON, RED, WIDTH, save, scene, truncate
from detectron2.data import DatasetCatalog, build_detection_train_loader
from detectron2.data import transforms as T
from test_transforms import config

from s4m_d2.data import (
    DATASET_MAPPER_REGISTRY,
    ARPDatasetMapper,
    LabeledDatasetMapper,
    TrueLabelsMapper,
)
from s4m_d2.data.images import image_size, read_image
from s4m_d2.data.masks import transform_masks
from s4m_d2.engine.config_file import load_config
from s4m_d2.engine.rng import sample_seeds
from s4m_d2.errors import DatasetError, InputError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
BLENDED = 3  # px along a figure's border whose colors are mixed, at the largest scale
SQUARE = [[2.0, 2.0, 10.0, 2.0, 10.0, 10.0, 2.0, 10.0]]


def record_of(name, position=0):
    record = DatasetCatalog.get(name)[0]
    return {**record, "seeds": sample_seeds(7, "labeled", position), "stream_position": position}


def labeled_mapper(keep_empty=False, **inputs):
    cfg = config(FORMAT="RGB", **inputs)
    cfg.S4M.KEEP_EMPTY_INSTANCES = keep_empty
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 8
    return DATASET_MAPPER_REGISTRY.get(cfg.INPUT.DATASET_MAPPER_NAME)(cfg, True)


def arp_mapper(**inputs):
    return DATASET_MAPPER_REGISTRY.get("ARPDatasetMapper")(config(FORMAT="RGB", **inputs), True)


def near(image, color):
    """(H, W) bool: where a (3, H, W) image shows a color, away from blended borders."""
    difference = image.int() - torch.tensor(color)[:, None, None]
    return (difference.abs() <= 30).all(0)


def grown(mask, pixels):
    """A mask whose border moves outward, or inward where ``pixels`` is negative."""
    kernel = np.ones((2 * abs(pixels) + 1,) * 2)
    change = cv2.dilate if pixels > 0 else cv2.erode
    outside = {"borderType": cv2.BORDER_CONSTANT, "borderValue": 0}
    return torch.from_numpy(change(mask.numpy().astype(np.uint8), kernel, **outside)).bool()


@pytest.mark.parametrize("name", ["mask_former_instance", "coco_instance_lsj"])
def test_masks_move_with_the_image(data_root, name):
    mapper = labeled_mapper(DATASET_MAPPER_NAME=name, IMAGE_SIZE=64, MIN_SCALE=0.8)
    seen = set()
    for position in range(30):
        sample = mapper(record_of("toyscapes_train", position))
        instances = sample["instances"]
        assert instances.image_size == tuple(sample["image"].shape[1:])
        for mask, class_id in zip(instances.gt_masks.tensor, instances.gt_classes, strict=True):
            shows = near(sample["image"], {0: RED, 2: GREEN}[int(class_id)])
            assert shows[grown(mask, -BLENDED)].all()
            assert not shows[~grown(mask, BLENDED)].any()
            seen.add(int(class_id))
    assert seen == {0, 2}


def test_instances_have_tight_boxes_and_no_crowds(data_root):
    for position in range(10):
        instances = labeled_mapper()(record_of("toyscapes_train", position))["instances"]
        assert len(instances) <= 2 and instances.gt_classes.dtype == torch.int64
        for mask, box in zip(instances.gt_masks.tensor, instances.gt_boxes.tensor, strict=True):
            rows, columns = mask.nonzero(as_tuple=True)
            edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert box.tolist() == [float(edge) for edge in edges]


def test_instances_outside_the_crop_go_or_stay_with_an_empty_mask(data_root):
    outside = 0
    for position in range(10):
        record = record_of("toyscapes_train", position)
        seen, every = (labeled_mapper(keep)(record)["instances"] for keep in (False, True))
        assert every.gt_classes.tolist() == [0, 2]
        shown = every.gt_masks.tensor.flatten(1).any(1)
        assert seen.gt_classes.tolist() == every.gt_classes[shown].tolist()
        assert torch.equal(seen.gt_masks.tensor, every.gt_masks.tensor[shown])
        assert not every.gt_boxes.tensor[~shown].any()
        outside += int((~shown).sum())
    assert outside


def test_a_tile_is_what_its_image_has_there(data_root):
    """Of the scene: a part of the person, nothing of the car."""
    record = {**record_of("toyscapes_train"), "tile": (2, 1, 11, 17)}
    image, ids = scene(int(Path(record["file_name"]).name.split("_")[1]))
    shown = image[1:17, 2:11].transpose(2, 0, 1)
    plain = {"geometry": [], "image_format": "RGB"}
    sample = LabeledDatasetMapper(**plain, color=None, num_classes=8)(record)
    assert np.array_equal(sample["image"], shown)
    (mask,) = sample["instances"].gt_masks.tensor
    assert np.array_equal(mask, ids[1:17, 2:11] == PERSON)
    unlabeled = ARPDatasetMapper(**plain, color=None)(record)
    assert np.array_equal(unlabeled["image"], shown)
    known = TrueLabelsMapper(**plain, num_classes=8)(record)
    assert np.array_equal(known["image"], shown) and len(known["truth"]) == 1
    assert (known["height"], known["width"]) == (16, 9)


def test_a_sample_carries_the_loader_s_keys_and_no_annotations(data_root):
    record = record_of("toyscapes_train")
    before = copy.deepcopy(record)
    sample = labeled_mapper()(record)
    assert record == before
    assert set(sample) == set(record) - {"annotations"} | {"image", "instances"}
    assert (sample["height"], sample["width"]) == (HEIGHT, WIDTH)
    assert sample["image"].dtype == torch.uint8 and sample["image"].is_contiguous()


def test_views_are_functions_of_the_seed(data_root):
    for mapper, key in ((labeled_mapper(COLOR_AUG_SSD=True), "image"), (arp_mapper(), "image")):
        images = [mapper(record_of("toyscapes_train", p))[key] for p in (1, 2, 1)]
        assert torch.equal(images[0], images[2]) and not torch.equal(images[0], images[1])


def test_weak_and_base_view_share_their_geometry(data_root):
    record = record_of("toyscapes_train_unlabeled", 3)
    plain = arp_mapper(COLOR_AUG_SSD=False)(record)
    assert torch.equal(plain["image"], plain["image_weak"])
    distorted = [
        arp_mapper(COLOR_AUG_SSD=True)(record_of("toyscapes_train_unlabeled", p)) for p in range(5)
    ]
    for position, sample in enumerate(distorted):
        record = record_of("toyscapes_train_unlabeled", position)
        assert torch.equal(sample["image"], arp_mapper(COLOR_AUG_SSD=False)(record)["image"])
        assert sample["image_weak"].shape == sample["image"].shape
    assert any(not torch.equal(s["image"], s["image_weak"]) for s in distorted)


@pytest.mark.parametrize(
    ("config_file", "size", "distorts"),
    [("cityscapes_10pct.yaml", (1024, 2048), True), ("coco_10pct.yaml", (480, 640), False)],
)
def test_labeled_and_weak_views_come_from_one_distribution(config_file, size, distorts, tmp_path):
    """With the same seeds they are the same view; only SSD's distortion changes the plain one."""
    cfg = load_config(str(CONFIGS / config_file))
    labeled, unlabeled = (
        DATASET_MAPPER_REGISTRY.get(name)(cfg, True)
        for name in (cfg.INPUT.DATASET_MAPPER_NAME, cfg.S4M.UNLABELED_MAPPER)
    )
    path = str(tmp_path / "image.png")
    cv2.imwrite(path, np.full((*size, 3), (40, 120, 200), dtype=np.uint8))
    changed = 0
    for position in range(8):
        record = {"file_name": path, "seeds": sample_seeds(7, "labeled", position)}
        views = unlabeled(record)
        assert torch.equal(labeled({**record, "annotations": []})["image"], views["image_weak"])
        changed += not torch.equal(views["image"], views["image_weak"])
    assert changed >= 5 if distorts else changed == 0  # 15 of 16 on average


def test_the_unlabeled_mapper_needs_a_file_name_only(data_root):
    record = record_of("toyscapes_train_unlabeled")
    sample = arp_mapper()({"file_name": record["file_name"], "seeds": record["seeds"]})
    assert set(sample) == {"file_name", "height", "width", "image", "image_weak", "seeds"}


def simple_mapper(num_classes=8, rng=None):
    """No augmentation at all."""
    return LabeledDatasetMapper(
        geometry=[], color=None, image_format="RGB", num_classes=num_classes, rng=rng
    )


def bitmap():
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    mask[2:10, 2:10] = 1
    return mask


def uncompressed():
    counts, runs = [], bitmap().T.reshape(-1)
    value = 0
    while runs.size:
        length = int(np.argmax(runs != value)) if (runs != value).any() else runs.size
        counts.append(length)
        runs, value = runs[length:], 1 - value
    return {"size": [HEIGHT, WIDTH], "counts": counts}


def compressed(text):
    rle = mask_util.encode(np.asfortranarray(bitmap()))
    return {**rle, "counts": rle["counts"].decode()} if text else rle


@pytest.mark.parametrize(
    "segmentation",
    [
        SQUARE,
        [np.array(SQUARE[0])],
        bitmap(),
        uncompressed(),
        compressed(text=True),
        compressed(text=False),
    ],
    ids=["polygon", "points", "array", "counts", "text", "bytes"],
)
def test_every_kind_of_segmentation(data_root, segmentation):
    record = record_of("toyscapes_train")
    record["annotations"] = [{"category_id": 1, "segmentation": segmentation}]
    instances = simple_mapper()(record)["instances"]
    assert np.array_equal(instances.gt_masks.tensor[0].numpy(), bitmap())
    assert instances.gt_classes.tolist() == [1]


def test_overlapping_masks_keep_all_their_pixels():
    rng = np.random.default_rng(0)
    masks = [rng.random((HEIGHT, WIDTH)) < share for share in (0.5, 0.02, 0.02, 0.3, 0.001)]
    transforms = T.TransformList(
        [T.ResizeTransform(HEIGHT, WIDTH, 50, 70), T.CropTransform(5, 6, 40, 30)]
    )
    moved = transform_masks(masks, transforms, (HEIGHT, WIDTH), (30, 40))
    for mask, result in zip(masks, moved, strict=True):
        expected = transforms.apply_segmentation(mask.astype(np.uint8))
        assert np.array_equal(result.numpy(), expected.astype(bool))


def test_more_masks_than_a_byte_can_name():
    masks = []
    for index in range(300):
        mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
        mask.reshape(-1)[index] = True
        masks.append(mask)
    moved = transform_masks(masks, T.TransformList([]), (HEIGHT, WIDTH), (HEIGHT, WIDTH))
    assert np.array_equal(moved.numpy(), np.stack(masks))


def test_polygons_that_leave_the_view_are_cut():
    polygon = [-6.0, 12.0, 30.0, -8.0, 90.0, 20.0, 20.0, 22.0]
    x, y, height, width = 10, 5, 20, 40
    transforms = T.TransformList([T.CropTransform(x, y, width, height)])
    (cut,) = transform_masks([[polygon]], transforms, (HEIGHT, WIDTH), (height, width))
    margin = 100
    shifted = [value + margin for value in polygon]
    canvas = mask_util.decode(mask_util.frPyObjects([shifted], 300, 300))[..., 0]
    window = canvas[margin + y : margin + y + height, margin + x : margin + x + width]
    assert 0 < window.sum() < window.size
    assert np.array_equal(cut.numpy(), window.astype(bool))


@pytest.mark.parametrize(
    "annotations",
    [
        [],
        [{"category_id": 0, "segmentation": SQUARE, "iscrowd": 1}],
        [{"category_id": 0, "segmentation": np.zeros((HEIGHT, WIDTH), bool)}],
    ],
    ids=["none", "crowd", "empty"],
)
def test_images_without_instances(data_root, annotations):
    record = {**record_of("toyscapes_train"), "annotations": annotations}
    instances = labeled_mapper()(record)["instances"]
    assert len(instances) == 0
    assert instances.gt_masks.tensor.shape == (0, 24, 48)
    assert instances.gt_boxes.tensor.shape == (0, 4)


def annotation(**changes):
    return {"category_id": 1, "segmentation": SQUARE, **changes}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (annotation(category_id=8), "class id 8, but the model has 8"),
        (annotation(category_id=-1), "class id -1"),
        ({"category_id": 0}, "lacks segmentation"),
        ({"segmentation": SQUARE}, "lacks category_id"),
        (annotation(segmentation=[[1, 2, 3, 4]]), "three points"),
        (annotation(segmentation=[[1, 2, 3, 4, 5, float("nan")]]), "finite"),
        (annotation(segmentation=[]), "three points"),
        (annotation(segmentation="mask"), "type str"),
        (annotation(segmentation={"counts": [1]}), "'size' and 'counts'"),
        (annotation(segmentation={"size": [4, 4], "counts": [16]}), r"\(4, 4\), but the image"),
        (annotation(segmentation={"size": [HEIGHT, WIDTH], "counts": [9]}), "counts sum to 9"),
        (annotation(segmentation=np.zeros((4, 4))), r"\(4, 4\), but the image"),
    ],
)
def test_bad_annotations_name_their_image(data_root, bad, message):
    record = {**record_of("toyscapes_train"), "annotations": [annotation(), bad]}
    with pytest.raises(DatasetError, match=message) as error:
        simple_mapper()(record)
    assert record["file_name"] in str(error.value)


def _resize(path):
    save(path, np.zeros((HEIGHT, WIDTH + 1, 3), np.uint8))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (truncate, "truncated"),
        (lambda path: path.write_bytes(b"GIF89a?"), "cannot be read"),
        (lambda path: path.unlink(), "does not exist"),
        (_resize, r"\(32, 65\), but its annotations say \(32, 64\)"),
    ],
    ids=["truncated", "foreign", "missing", "size"],
)
@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_bad_images_are_named(tmp_path, spoil, message, suffix):
    path = tmp_path / f"street{suffix}"
    save(path, scene(0)[0])
    record = {"file_name": str(path), "height": HEIGHT, "width": WIDTH, "annotations": []}
    simple_mapper()(record)
    spoil(path)
    with pytest.raises(DatasetError, match=message) as error:
        simple_mapper()(record)
    assert str(path) in str(error.value)


def test_records_without_annotations_are_refused(data_root):
    with pytest.raises(DatasetError, match="DATASETS.UNLABELED"):
        labeled_mapper()(record_of("toyscapes_train_unlabeled"))


def test_both_mappers_are_for_training():
    with pytest.raises(InputError, match="for training"):
        ARPDatasetMapper(config(FORMAT="RGB"), False)
    with pytest.raises(InputError, match="for training"):
        LabeledDatasetMapper(config(FORMAT="RGB"), False)


def test_bgr_images_are_rgb_images_with_swapped_channels(data_root):
    file_name = record_of("toyscapes_train")["file_name"]
    rgb, bgr = (read_image(file_name, order) for order in ("RGB", "BGR"))
    assert np.array_equal(rgb, scene(0)[0]) and np.array_equal(bgr, rgb[..., ::-1])


def test_sizes_from_headers_are_those_of_upright_images(tmp_path):
    from PIL import ExifTags, Image

    for orientation in range(1, 9):
        path = str(tmp_path / f"{orientation}.jpg")
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        Image.fromarray(scene(0)[0]).save(path, exif=exif)
        assert image_size(path) == read_image(path, "RGB").shape[:2]


def images_of(loader, count):
    stream = iter(loader)
    return [sample["image"] for _ in range(count) for sample in next(stream)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_both_mappers_work_in_detectron2_s_own_loader(data_root, num_workers):
    for mapper, name in (
        (labeled_mapper(), "toyscapes_train"),
        (arp_mapper(), "toyscapes_train_unlabeled"),
    ):
        loader = build_detection_train_loader(
            DatasetCatalog.get(name), mapper=mapper, total_batch_size=2, num_workers=num_workers
        )
        batch = next(iter(loader))
        assert len(batch) == 2 and all(s["image"].shape == (3, 24, 48) for s in batch)
        assert "seeds" not in batch[0]


def test_without_seeds_views_come_from_the_mapper_s_generator(data_root):
    (record,) = DatasetCatalog.get("toyscapes_train")[:1]

    def images(rng):
        mapper = LabeledDatasetMapper(config(FORMAT="RGB"), True, rng=rng)
        return torch.stack([mapper(record)["image"] for _ in range(6)])

    state = np.random.get_state()[1].copy()
    seeded = [images(np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert torch.equal(seeded[0], seeded[1]) and not torch.equal(seeded[0], seeded[2])
    assert not torch.equal(images(None), images(None))
    assert np.array_equal(np.random.get_state()[1], state)


def test_instance_ids_of_the_scene_are_the_masks(data_root):
    instances = simple_mapper()(record_of("toyscapes_train"))["instances"]
    ids = scene(0)[1]
    assert np.array_equal(instances.gt_masks.tensor.numpy(), [ids == PERSON, ids == CAR])


def test_polygons_of_a_record_stay_as_they_are():
    polygon = np.array(SQUARE[0])
    transforms = T.TransformList([T.ResizeTransform(HEIGHT, WIDTH, 64, 128)])
    transform_masks([[polygon]], transforms, (HEIGHT, WIDTH), (64, 128))
    assert polygon.tolist() == SQUARE[0]
