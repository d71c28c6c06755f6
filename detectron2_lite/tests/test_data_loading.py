"""From a record to a batch: reading, annotations, the mapper and the loaders."""

import itertools

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import (
    DatasetCatalog,
    DatasetFromList,
    DatasetMapper,
    MapDataset,
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.structures import BitMasks, BoxMode, PolygonMasks
from PIL import Image

NAME = "data_loading_test"
BOX = [1.0, 2.0, 3.0, 4.0]  # XYWH
POLYGON = [1.0, 2.0, 4.0, 2.0, 4.0, 6.0, 1.0, 6.0]


def _annotation(**fields):
    default = {"bbox": BOX, "bbox_mode": BoxMode.XYWH_ABS, "category_id": 1}
    return {**default, "segmentation": [list(POLYGON)], **fields}


@pytest.fixture
def records(tmp_path):
    """Six images, wide and high by turns; the last has nothing but a crowd."""
    rng = np.random.default_rng(0)
    result = []
    for index in range(6):
        width, height = (10, 8) if index % 2 == 0 else (8, 10)
        path = str(tmp_path / f"{index}.png")
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(path)
        annotations = [_annotation(), _annotation(iscrowd=1)] if index < 5 else []
        annotations = annotations or [_annotation(iscrowd=1)]
        record = {"file_name": path, "width": width, "height": height, "image_id": index}
        result.append({**record, "annotations": annotations})
    DatasetCatalog.register(NAME, lambda: result)
    MetadataCatalog.get(NAME).thing_classes = ["cat", "dog"]
    yield result
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def _config(**options):
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = (NAME,)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.MODEL.MASK_ON = True
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (0,), 0  # no resize
    cfg.INPUT.RANDOM_FLIP = "none"
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.SEED = 3
    cfg.merge_from_list(list(itertools.chain(*options.items())))
    return cfg


def test_read_image_formats(tmp_path):
    path = str(tmp_path / "image.png")
    rgb = np.array([[[255, 0, 10], [0, 128, 20]]], np.uint8)
    Image.fromarray(rgb).save(path)
    np.testing.assert_array_equal(utils.read_image(path, "RGB"), rgb)
    np.testing.assert_array_equal(utils.read_image(path, "BGR"), rgb[:, :, ::-1])
    np.testing.assert_array_equal(utils.read_image(path), rgb)
    assert utils.read_image(path, "L").shape == (1, 2, 1)


def test_read_image_undoes_the_exif_orientation(tmp_path):
    path = str(tmp_path / "image.png")
    image = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3))
    exif = image.getexif()
    exif[274] = 6  # the camera was turned: show it rotated clockwise
    image.save(path, exif=exif)
    expected = np.array([[3, 0], [4, 1], [5, 2]])
    np.testing.assert_array_equal(utils.read_image(path, "L")[:, :, 0], expected)


def test_image_size_is_checked_or_filled_in():
    image = np.zeros((4, 6, 3))
    record = {}
    utils.check_image_size(record, image)
    assert record == {"width": 6, "height": 4}
    with pytest.raises(utils.SizeMismatchError, match=r"a\.png"):
        utils.check_image_size({"file_name": "a.png", "width": 4, "height": 6}, image)


def test_annotations_follow_the_transforms_and_stay_in_the_image():
    transforms = T.TransformList([T.HFlipTransform(10), T.CropTransform(5, 0, 3, 5)])
    result = utils.transform_instance_annotations(_annotation(), transforms, (5, 3))
    # Flipped, x goes from 6 to 9; cropped, from 1 to 4 of a 3 px wide image, and 2 to 6 of 5 in y.
    np.testing.assert_allclose(result["bbox"], [1, 2, 3, 5])
    assert result["bbox_mode"] == BoxMode.XYXY_ABS
    [polygon] = result["segmentation"]
    corners = {tuple(p) for p in np.asarray(polygon).reshape(-1, 2)}
    assert corners == {(1, 2), (3, 2), (3, 5), (1, 5)}


def test_rle_annotations_become_masks():
    mask = np.zeros((8, 10), np.uint8, order="F")
    mask[2:6, 1:4] = 1
    annotation = _annotation(segmentation=mask_util.encode(mask))
    result = utils.transform_instance_annotations(annotation, [T.HFlipTransform(10)], (8, 10))
    np.testing.assert_array_equal(result["segmentation"], mask[:, ::-1])
    with pytest.raises(ValueError):
        utils.transform_instance_annotations(_annotation(segmentation="x"), [], (8, 10))


def test_annotations_of_all_kinds_become_the_same_bitmask():
    mask = np.zeros((8, 10), np.uint8, order="F")
    mask[2:6, 1:4] = 1
    annotations = [_annotation(segmentation=s) for s in ([POLYGON], mask_util.encode(mask), mask)]
    instances = utils.annotations_to_instances(annotations, (8, 10), mask_format="bitmask")
    assert instances.image_size == (8, 10)
    assert isinstance(instances.gt_masks, BitMasks)
    for tensor in instances.gt_masks.tensor:
        np.testing.assert_array_equal(tensor.numpy(), mask)
    assert instances.gt_boxes.tensor.tolist() == [[1, 2, 4, 6]] * 3
    assert instances.gt_classes.tolist() == [1, 1, 1] and instances.gt_classes.dtype == torch.int64
    polygons = utils.annotations_to_instances([_annotation()], (8, 10)).gt_masks
    assert isinstance(polygons, PolygonMasks)
    with pytest.raises(ValueError):
        utils.annotations_to_instances(annotations, (8, 10), mask_format="polygon")


def test_no_annotations_become_instances_without_masks():
    instances = utils.annotations_to_instances([], (8, 10), mask_format="bitmask")
    assert len(instances) == 0 and instances.gt_boxes.tensor.shape == (0, 4)
    assert not instances.has("gt_masks")


def test_empty_instances_are_dropped_by_box_and_by_mask():
    full, empty = np.ones((8, 10), np.uint8), np.zeros((8, 10), np.uint8)
    annotations = [
        _annotation(segmentation=full),
        _annotation(segmentation=empty),
        _annotation(segmentation=full, bbox=[1.0, 2.0, 0.0, 4.0]),
    ]
    instances = utils.annotations_to_instances(annotations, (8, 10), mask_format="bitmask")
    instances.index = torch.arange(3)
    assert utils.filter_empty_instances(instances).index.tolist() == [0]
    instances.remove("gt_masks")
    assert utils.filter_empty_instances(instances).index.tolist() == [0, 1]


@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_the_training_mapper_makes_instances_without_crowds(records, mask_format):
    cfg = _config(**{"INPUT.MASK_FORMAT": mask_format})
    sample = DatasetMapper(cfg, is_train=True)(records[0])
    expected = utils.read_image(records[0]["file_name"], "BGR").transpose(2, 0, 1)
    np.testing.assert_array_equal(sample["image"].numpy(), expected)
    instances = sample["instances"]
    assert len(instances) == 1 and "annotations" not in sample
    assert instances.gt_boxes.tensor.tolist() == [[1, 2, 4, 6]]
    assert instances.gt_masks.get_bounding_boxes().tensor.tolist() == [[1, 2, 4, 6]]
    assert len(records[0]["annotations"]) == 2  # the record itself is left as it was


def test_the_crop_of_the_config_comes_first_and_boxes_fit_what_it_leaves(records):
    triangle = [0.0, 0.0, 8.0, 0.0, 0.0, 8.0]
    records[0]["annotations"] = [_annotation(bbox=[0, 0, 8, 8], segmentation=[triangle])]
    crop = {"INPUT.CROP.ENABLED": True, "INPUT.CROP.TYPE": "absolute", "INPUT.CROP.SIZE": [6, 8]}
    mapper = DatasetMapper(_config(**crop), is_train=True)
    for seed in range(8):
        np.random.seed(seed)
        sample = mapper(records[0])
        np.random.seed(seed)
        y0, x0 = np.random.randint(8 - 6 + 1), np.random.randint(10 - 8 + 1)
        assert sample["image"].shape == (3, 6, 8)
        leg = 8 - x0 - y0  # what is left of the triangle's; the box would be 8 - x0 wide
        np.testing.assert_allclose(
            sample["instances"].gt_boxes.tensor.tolist(), [[0, 0, leg, min(leg, 6)]]
        )


def test_the_test_mapper_drops_annotations(records):
    sample = DatasetMapper(_config(), is_train=False)(records[0])
    assert "instances" not in sample and "annotations" not in sample
    assert (sample["width"], sample["height"]) == (10, 8)


def test_records_are_filtered_and_checked(records):
    assert [r["image_id"] for r in get_detection_dataset_dicts(NAME)] == [0, 1, 2, 3, 4]
    assert len(get_detection_dataset_dicts([NAME], filter_empty=False)) == 6
    assert len(get_detection_dataset_dicts([NAME, NAME], filter_empty=False)) == 12
    with pytest.raises(KeyError, match="no_such"):
        get_detection_dataset_dicts("no_such")
    records[0]["annotations"][0]["category_id"] = 2
    with pytest.raises(AssertionError, match="category_id=2"):
        get_detection_dataset_dicts(NAME)
    records.clear()
    with pytest.raises(AssertionError, match=NAME):
        get_detection_dataset_dicts(NAME)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_train_loader_follows_its_sampler(records, num_workers):
    options = {"DATALOADER.ASPECT_RATIO_GROUPING": False, "DATALOADER.NUM_WORKERS": num_workers}
    batches = itertools.islice(build_detection_train_loader(_config(**options)), 5)
    ids = [[sample["image_id"] for sample in batch] for batch in batches]
    generator = torch.Generator().manual_seed(3)  # SEED
    stream = torch.cat([torch.randperm(5, generator=generator) for _ in range(2)]).tolist()
    assert ids == [stream[i : i + 2] for i in range(0, 10, 2)]


def test_grouped_batches_hold_one_orientation(records):
    loader = build_detection_train_loader(_config(), mapper=lambda record: record)
    for batch in itertools.islice(loader, 10):
        assert len(batch) == 2
        assert len({sample["width"] > sample["height"] for sample in batch}) == 1


def test_the_test_loader_gives_every_record_once_in_order(records):
    loader = build_detection_test_loader(_config(), NAME)
    assert [[s["image_id"] for s in batch] for batch in loader] == [[i] for i in range(6)]
    loader = build_detection_test_loader(records, mapper=lambda r: r["image_id"], batch_size=4)
    assert list(loader) == [[0, 1, 2, 3], [4, 5]]


def test_a_refused_element_is_replaced_by_another():
    dataset = MapDataset(list(range(10)), lambda x: None if x % 2 else x)
    assert len(dataset) == 10
    assert [dataset[i] for i in range(0, 10, 2)] == [0, 2, 4, 6, 8]
    assert {dataset[i] for i in range(1, 10, 2)} <= {0, 2, 4, 6, 8}


@pytest.mark.parametrize("copy, serialize", [(True, True), (False, True), (True, False)])
def test_changing_an_element_leaves_the_list_as_it_was(copy, serialize):
    dataset = DatasetFromList([{"a": [1]}, {"a": [2]}], copy=copy, serialize=serialize)
    dataset[1]["a"].append(3)
    assert [dataset[i] for i in range(len(dataset))] == [{"a": [1]}, {"a": [2]}]
