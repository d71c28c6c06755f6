"""Write a COCO json for the nuclei of the Data Science Bowl 2018, stage 1.

    python datasets/prepare_nuclei.py --root datasets/stage1_train --output datasets/nuclei.json
    python datasets/prepare_nuclei.py --output datasets/nuclei --val 120

Expected is the layout of the unpacked archive: ROOT/ID/images/ID.png and one mask for each nucleus,
ROOT/ID/masks/*.png. No image is copied: the json's names are relative to ROOT. With --val, OUTPUT
becomes a folder for ``make ablation-real``: train.json and val.json, that many images drawn for it,
and links to ROOT. The exit status is 0, or 1 if something is missing or damaged.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as mask_utils

from s4m_d2.files import write_json

SOURCE = "https://bbbc.broadinstitute.org/BBBC038"


def convert(root: Path) -> dict:
    """The COCO content; images and masks in the order of their names, empty masks left out.

    Raises:
        ValueError: a folder lacks its image or its masks, or a mask has another size; it is named.
        OSError: a file is no image.
    """
    folders = sorted(path for path in root.glob("*") if path.is_dir())
    if not folders:
        raise ValueError(f"{root} has no folders: unpack stage1_train.zip of {SOURCE} there")
    images, annotations = [], []
    for number, folder in enumerate(folders, start=1):
        file, masks = folder / "images" / f"{folder.name}.png", sorted(folder.glob("masks/*.png"))
        if not file.is_file() or not masks:
            raise ValueError(f"{folder} lacks images/{folder.name}.png or masks: unpack it again")
        width, height = Image.open(file).size
        name = file.relative_to(root).as_posix()
        images.append({"id": number, "file_name": name, "width": width, "height": height})
        for mask in masks:
            pixels = np.asarray(Image.open(mask).convert("L")) > 0
            if pixels.shape != (height, width):
                raise ValueError(f"{mask} is {pixels.shape[::-1]}, its image {(width, height)}")
            if pixels.any():
                annotations.append(_annotation(len(annotations) + 1, number, pixels))
    categories = [{"id": 1, "name": "nucleus"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def _annotation(number: int, image: int, pixels: np.ndarray) -> dict:
    rle = mask_utils.encode(np.asfortranarray(pixels.astype(np.uint8)))
    return {
        "id": number,
        "image_id": image,
        "category_id": 1,
        "segmentation": {"size": rle["size"], "counts": rle["counts"].decode("ascii")},
        "bbox": mask_utils.toBbox(rle).tolist(),
        "area": int(pixels.sum()),
        "iscrowd": 0,
    }


def part(content: dict, images: list[dict]) -> dict:
    """The COCO content with some of its images and their annotations alone."""
    ids = {image["id"] for image in images}
    annotations = [a for a in content["annotations"] if a["image_id"] in ids]
    return content | {"images": images, "annotations": annotations}


def split(content: dict, args: argparse.Namespace) -> None:
    """Write OUTPUT/train.json and val.json with links to the images beside them."""
    order = np.random.default_rng(0).permutation(len(content["images"]))
    args.output.mkdir(parents=True, exist_ok=True)
    for name, chosen in (("train", order[args.val :]), ("val", order[: args.val])):
        images = [content["images"][i] for i in sorted(chosen)]
        write_json(args.output / f"{name}.json", part(content, images))
        link = args.output / name
        if not link.exists():
            link.symlink_to(args.root.resolve(), target_is_directory=True)


def main(arguments: list[str] | None = None) -> int:
    """Convert; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path("datasets/stage1_train"))
    parser.add_argument("--output", type=Path, default=Path("datasets/nuclei.json"))
    parser.add_argument("--val", type=int, default=0, metavar="N", help="images of a second json")
    args = parser.parse_args(arguments)
    try:
        content = convert(args.root)
        if args.val:
            split(content, args)
        else:
            write_json(args.output, content)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.output}: {len(content['images'])} images, {len(content['annotations'])} nuclei")
    return 0


if __name__ == "__main__":
    sys.exit(main())
