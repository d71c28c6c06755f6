"""Make example data as most users have: a few labeled images, and a folder of unlabeled ones.

    python datasets/make_own_data.py --output datasets/own --labeled 40 --unlabeled 200

Writes ``annotations.json`` (COCO's polygons) with the pictures ``labeled/``, and ``unlabeled/``.
``--format via`` or ``labelme`` writes the files of these annotation tools instead. The pictures are
toyscapes'; image ``i`` depends on (seed, i, size) only.
"""

import argparse
import json
import sys
from pathlib import Path

import cv2
import numpy as np
from make_toyscapes import MIN_SIDE, whole_folder
from PIL import Image
from toyscapes_scene import INSTANCES_PER_LABEL, LABEL_IDS, THING_CLASSES, Scene, render_scene

CLASSES = tuple(sorted(THING_CLASSES))
CLASS_OF_LABEL = {LABEL_IDS[name]: name for name in CLASSES}
ENLARGED = 4  # times, before outlines are traced: they run through the centers of edge pixels
OUTLINE_TOLERANCE = 0.25  # px by which a polygon may differ from the mask's outline
FEWEST_CORNERS = 3
FORMATS = ("coco", "via", "labelme")

Shape = tuple[str, list[list[list[float]]]]  # class, polygons of [x, y]


def scene_shapes(scene: Scene) -> list[Shape]:
    """The visible outlines of a scene's instances, in the order of their ids."""
    shapes = []
    for instance in np.unique(scene.instance_ids).tolist():
        name = CLASS_OF_LABEL.get(instance // INSTANCES_PER_LABEL)
        if name is None:
            continue
        mask = (scene.instance_ids == instance).astype(np.uint8)
        large = mask.repeat(ENLARGED, 0).repeat(ENLARGED, 1)
        outlines, _ = cv2.findContours(large, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        tolerance = ENLARGED * OUTLINE_TOLERANCE
        corners = [cv2.approxPolyDP(line, tolerance, True)[:, 0] for line in outlines]
        # From indices of pixels to COCO's coordinates, which begin at the image's corner.
        polygons = [((c + 0.5) / ENLARGED).tolist() for c in corners if len(c) >= FEWEST_CORNERS]
        if polygons:
            shapes.append((name, polygons))
    return shapes


def coco_content(names: list[str], size: tuple[int, int], shapes: list[list[Shape]]) -> dict:
    """A COCO file; ``size`` is (width, height)."""
    images = [
        {"id": i, "file_name": name, "width": size[0], "height": size[1]}
        for i, name in enumerate(names, start=1)
    ]
    annotations = []
    for image, of_image in zip(images, shapes, strict=True):
        for name, polygons in of_image:
            points = np.concatenate([np.asarray(polygon) for polygon in polygons])
            low, high = points.min(0), points.max(0)
            annotation = {
                "id": len(annotations) + 1,
                "image_id": image["id"],
                "category_id": CLASSES.index(name) + 1,
                "segmentation": [np.ravel(polygon).tolist() for polygon in polygons],
                "bbox": [*low.tolist(), *(high - low).tolist()],
                "area": float(sum(cv2.contourArea(np.float32(p)) for p in polygons)),
                "iscrowd": 0,
            }
            annotations.append(annotation)
    categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES, start=1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def via_content(names: list[str], size: tuple[int, int], shapes: list[list[Shape]]) -> dict:
    """A project of VGG Image Annotator 2; each polygon becomes a region of its own."""
    images = {}
    for name, of_image in zip(names, shapes, strict=True):
        regions = [
            {
                "shape_attributes": {
                    "name": "polygon",
                    "all_points_x": [point[0] for point in polygon],
                    "all_points_y": [point[1] for point in polygon],
                },
                "region_attributes": {"class": label},
            }
            for label, polygons in of_image
            for polygon in polygons
        ]
        images[name] = {"filename": name, "size": -1, "regions": regions, "file_attributes": {}}
    return images


def labelme_content(name: str, size: tuple[int, int], shapes: list[Shape]) -> dict:
    """LabelMe's file of an image; polygons of an instance share a group."""
    return {
        "version": "5.5.0",
        "flags": {},
        "shapes": [
            {"label": label, "points": polygon, "group_id": number, "shape_type": "polygon",
             "flags": {}}
            for number, (label, polygons) in enumerate(shapes)
            for polygon in polygons
        ],
        "imagePath": name,
        "imageData": None,
        "imageHeight": size[1],
        "imageWidth": size[0],
    }  # fmt: skip


def make_own_data(
    output: Path, *, labeled: int, unlabeled: int, seed: int, size: tuple[int, int], kind: str
) -> None:
    """Write the folder, all of it or nothing.

    Raises:
        ValueError: a number is out of range.
        FileExistsError: ``output`` exists.
    """
    if labeled < 1 or unlabeled < 0 or seed < 0 or min(size) < MIN_SIDE:
        raise ValueError(
            f"expected at least one labeled image, no negative number and sides of {MIN_SIDE} px "
            f"and more, got {labeled} labeled, {unlabeled} unlabeled, seed {seed}, size {size}"
        )
    if output.exists():
        raise FileExistsError(f"{output} exists; remove it or choose another --output")
    with whole_folder(output) as new:
        _write(new, labeled, unlabeled, seed, size, kind)


def _write(root: Path, labeled: int, unlabeled: int, seed: int, size, kind: str) -> None:
    for folder in ("labeled", "unlabeled"):
        (root / folder).mkdir()
    names, shapes = [], []
    for index in range(labeled + unlabeled):
        scene = render_scene(seed, "train", index, size)
        folder, name = "labeled" if index < labeled else "unlabeled", f"street_{index:05d}.png"
        Image.fromarray(scene.image).save(root / folder / name)
        if index < labeled:
            names.append(name)
            shapes.append(scene_shapes(scene))
    if kind == "labelme":
        for name, of_image in zip(names, shapes, strict=True):
            text = json.dumps(labelme_content(name, size, of_image))
            (root / "labeled" / name).with_suffix(".json").write_text(text)
        return
    content = coco_content if kind == "coco" else via_content
    file = "annotations.json" if kind == "coco" else "via.json"
    (root / file).write_text(json.dumps(content(names, size, shapes)))


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("datasets/own"))
    parser.add_argument("--labeled", type=int, default=40, help="labeled images")
    parser.add_argument("--unlabeled", type=int, default=200, help="unlabeled images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, nargs=2, default=(256, 128),
                        metavar=("WIDTH", "HEIGHT"))  # fmt: skip
    parser.add_argument("--format", choices=FORMATS, default="coco", help="of the annotations")
    args = parser.parse_args(arguments)
    try:
        make_own_data(
            args.output,
            labeled=args.labeled,
            unlabeled=args.unlabeled,
            seed=args.seed,
            size=tuple(args.size),
            kind=args.format,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.output}: {args.labeled} labeled and {args.unlabeled} unlabeled images")
    return 0


if __name__ == "__main__":
    sys.exit(main())
