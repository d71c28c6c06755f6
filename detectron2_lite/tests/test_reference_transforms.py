"""Augmentations and annotations against what Detectron2 draws and computes."""

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from PIL import Image

SIZES = [(37, 61), (64, 48), (20, 100), (50, 50)]
AUGMENTATIONS = {
    "flip": lambda: T.RandomFlip(prob=0.4),
    "flip_vertical": lambda: T.RandomFlip(prob=0.7, horizontal=False, vertical=True),
    "shortest_range": lambda: T.ResizeShortestEdge((20, 60), 90),
    "shortest_choice": lambda: T.ResizeShortestEdge((16, 0, 40), 70, "choice"),
    "shortest_nearest": lambda: T.ResizeShortestEdge(33, interp=Image.NEAREST),
    "crop_relative": lambda: T.RandomCrop("relative", (0.51, 0.77)),
    "crop_relative_range": lambda: T.RandomCrop("relative_range", (0.3, 0.6)),
    "crop_absolute": lambda: T.RandomCrop("absolute", (30, 50)),
    "crop_absolute_range": lambda: T.RandomCrop("absolute_range", (15, 45)),
    "scale": lambda: T.ResizeScale(0.1, 2.0, 64, 80),
    "fixed_crop": lambda: T.FixedSizeCrop((48, 56)),
    "fixed_crop_unpadded": lambda: T.FixedSizeCrop((48, 56), pad=False),
    "fixed_crop_values": lambda: T.FixedSizeCrop((48, 56), True, 3.0, 7),
}


def describe(transform):
    """Name and numbers of a transform."""
    if isinstance(transform, T.TransformList):
        return [describe(t) for t in transform.transforms]
    numbers = {k: v for k, v in vars(transform).items() if isinstance(v, (int, float, np.generic))}
    return [type(transform).__name__, numbers]


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentations_draw_the_same_transforms(reference, name):
    """For several images one after the other; the last number shows how much was drawn."""
    augmentation = AUGMENTATIONS[name]()
    np.random.seed(2026)
    images = [np.zeros((*size, 3), np.uint8) for size in SIZES * 2]
    drawn = [describe(augmentation.get_transform(image)) for image in images]
    reference(f"transforms/{name}", [*drawn, np.random.rand()])


@pytest.mark.parametrize(
    "crop, size",
    [("relative", (0.5, 0.5)), ("relative_range", (0.2, 0.9)), ("absolute_range", (5, 30))],
)
def test_crop_sizes(reference, crop, size):
    np.random.seed(7)
    sizes = [T.RandomCrop(crop, size).get_crop_size(image) for image in SIZES * 3]
    reference(f"transforms/crop_size/{crop}", sizes)


def test_output_shapes(reference):
    shapes = [
        T.ResizeShortestEdge.get_output_shape(h, w, short, longest)
        for h, w in [(480, 640), (427, 640), (1024, 2048), (500, 333), (1, 7), (33, 33)]
        for short, longest in [(800, 1333), (640, 640), (31, 50), (1, 9)]
    ]
    reference("transforms/output_shapes", shapes)


@pytest.mark.parametrize(
    "dtype, channels",
    [
        ("uint8", None),
        ("uint8", 1),
        ("uint8", 3),
        ("float32", 2),
        ("float32", 1),
        ("float64", None),
    ],
)
def test_resized_pixels(reference, dtype, channels):
    """Of uint8 images up to one level, because Pillow's rounding is its own matter."""
    random = np.random.RandomState(3)
    image = random.randint(0, 256, (7, 5) + ((channels,) if channels else ())).astype(dtype)
    resized = [
        T.ResizeTransform(7, 5, *size, interp).apply_image(image)
        for size in [(4, 8), (11, 3)]
        for interp in (None, Image.NEAREST, Image.BILINEAR, Image.BICUBIC)
    ]
    assert all(r.dtype == dtype for r in resized)
    tolerance = {"abs": 1} if dtype == "uint8" else {"rel": 1e-5, "abs": 1e-4}
    reference(f"transforms/resized/{dtype}/{channels}", resized, **tolerance)


def annotation(segmentation):
    box = [6.0, 4.0, 20.0, 15.0]
    mode = BoxMode.XYWH_ABS
    return {"bbox": box, "bbox_mode": mode, "category_id": 3, "segmentation": segmentation}


CHAIN = {
    "resize": [T.ResizeTransform(30, 40, 45, 50)],
    "flip_resize": [T.HFlipTransform(40), T.ResizeTransform(30, 40, 60, 20)],
    "crop": [T.CropTransform(10, 6, 12, 8)],
    "crop_away": [T.CropTransform(0, 0, 5, 3)],
    "resize_crop_pad": [
        T.ResizeTransform(30, 40, 60, 80), T.CropTransform(20, 0, 48, 40),
        T.PadTransform(0, 0, 16, 24, 48, 40), T.VFlipTransform(64),
    ],
}  # fmt: skip
FINAL_SIZE = {
    "resize": (45, 50), "flip_resize": (60, 20), "crop": (8, 12), "crop_away": (3, 5),
    "resize_crop_pad": (64, 64),
}  # fmt: skip
POLYGONS = [
    [6.0, 4.0, 26.0, 6.5, 22.5, 19.0, 8.0, 17.25],
    [7.0, 5.0, 12.0, 5.0, 12.0, 18.0, 25.0, 18.0, 25.0, 7.0, 14.0, 7.0],
]


@pytest.mark.parametrize("name", CHAIN)
def test_transformed_annotations(reference, name):
    transforms, size = T.TransformList(CHAIN[name]), FINAL_SIZE[name]
    mask = np.zeros((30, 40), np.uint8, order="F")
    mask[5:17, 8:25] = 1
    segmentations = [[list(p) for p in POLYGONS], mask_util.encode(mask)]
    done = [
        utils.transform_instance_annotations(annotation(s), transforms, size) for s in segmentations
    ]
    reference(
        f"transforms/annotations/{name}",
        {
            "boxes": [a["bbox"] for a in done],
            "modes": [int(a["bbox_mode"]) for a in done],
            "polygons": done[0]["segmentation"],
            "mask_rows": done[1]["segmentation"].sum(axis=1),
            "mask_columns": done[1]["segmentation"].sum(axis=0),
        },
    )
    instances = utils.annotations_to_instances(done[:1], size, "polygon")
    masks = utils.annotations_to_instances(done, size, "bitmask").gt_masks
    reference(
        f"transforms/instances/{name}",
        {
            "boxes": instances.gt_boxes.tensor,
            "classes": instances.gt_classes,
            "areas": masks.tensor.flatten(1).sum(1),
            "mask_boxes": masks.get_bounding_boxes().tensor,
            "kept": len(utils.filter_empty_instances(instances)),
        },
    )


def test_representations(reference):
    """What a log shows of the augmentations."""
    augmentations = [make() for make in AUGMENTATIONS.values()]
    reference("transforms/repr", [repr(T.AugmentationList(augmentations)), str(augmentations[0])])
