"""Make CAM-like pseudo-labels of toyscapes, to try SEPL without a WSSS method.

    python datasets/make_cam_labels.py --data datasets/toyscapes --output cam --strength 0.5

Written below ``--output``, each file named after its image: ``images/``, ``ground-truth/`` and
``pseudo-labels/`` (indexed PNGs: 0 background, 1 to 8 the thing classes in Cityscapes' order), and
``classes.txt``. How the ground truth is corrupted: ``cam_like.py``. The same command continues an
interrupted run. A label depends on (seed, name of the image, strength) only.
"""

import argparse
import json
import os
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from cam_like import cam_label
from make_toyscapes import CITIES, read_parameters
from toyscapes_scene import INSTANCES_PER_LABEL, LABEL_IDS, THING_CLASSES
from tqdm import tqdm

from s4m_d2.data.images import open_image
from s4m_d2.engine.command.launch import exit_status
from s4m_d2.errors import DatasetError
from s4m_d2.files import atomic_write
from s4m_d2.sepl.files import write_label

CLASS_NAMES = ("background", *sorted(THING_CLASSES, key=LABEL_IDS.__getitem__))
IMAGE_SUFFIX = "_leftImg8bit.png"
PARAMETERS_FILE = "cam-labels.json"
GENERATOR_VERSION = 1  # raise it when the same parameters give other labels


def class_map(instance_ids: np.ndarray) -> np.ndarray:
    """(H, W) uint8 indices into ``CLASS_NAMES`` of Cityscapes' instanceIds; stuff is background."""
    indices = np.zeros(int(instance_ids.max()) // INSTANCES_PER_LABEL + 1, dtype=np.uint8)
    for index, name in enumerate(CLASS_NAMES[1:], start=1):
        if LABEL_IDS[name] < len(indices):
            indices[LABEL_IDS[name]] = index
    return indices[instance_ids // INSTANCES_PER_LABEL]


def label_generator(seed: int, name: str) -> np.random.Generator:
    """What an image's label is drawn from, at every strength."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def make_cam_labels(
    data: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    split: str = "val",
    strength: float = 0.5,
    seed: int = 0,
) -> list[str]:
    """Write what of the images, ground truth and pseudo-labels of a split is not there yet.

    Args:
        data: folder of toyscapes, or of another data set in Cityscapes' layout.
        output: folder of its own; one that another call began with other parameters is refused.
        split: of the data.
        strength: see :func:`cam_like.cam_label`.
        seed: labels of different seeds have different failures.

    Returns:
        What is wrong with the images that could not be done, one line each; the others are done.

    Raises:
        DatasetError: a folder or a parameter is not as expected; nothing was written.
        OutputError: the system refuses to write.
    """
    data, output = Path(data), Path(output)
    images = _images(data, split)
    if not 0 <= strength <= 1:
        raise DatasetError(f"strength is {strength}; expected 0 (ground truth) to 1 (very bad)")
    if seed < 0:
        raise DatasetError(f"seed is {seed}; it must not be negative")
    _claim(output, data, {"generator": GENERATOR_VERSION, "split": split, "strength": strength,
                          "seed": seed, "data": read_parameters(data)})  # fmt: skip
    problems = []
    for name, path in tqdm(images.items(), desc="CAM-like labels", unit="image"):
        try:
            _make_one(path, data, output, name, strength, seed)
        except DatasetError as error:
            problems.append(str(error))
    return problems


def _images(data: Path, split: str) -> dict[str, Path]:
    """The images of a split by the stem of their files."""
    folder = data / "leftImg8bit" / split
    paths = sorted(folder.glob(f"*/*{IMAGE_SUFFIX}"))
    if not paths:
        raise DatasetError(
            f"{folder} holds no CITY/*{IMAGE_SUFFIX}. --data names the folder with leftImg8bit and "
            f"gtFine (datasets/make_toyscapes.py makes one), --split one of its splits "
            f"({', '.join(CITIES)})."
        )
    return {path.name.removesuffix(IMAGE_SUFFIX): path for path in paths}


def _claim(output: Path, data: Path, parameters: dict) -> None:
    """Begin an output folder, or go on in one that has the same parameters."""
    inside, around = output.resolve(), data.resolve()
    if around in (inside, *inside.parents):
        raise DatasetError(
            f"--output {output} lies in --data {data}, which is only read; choose another folder"
        )
    saved = output / PARAMETERS_FILE
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        try:
            same = json.loads(saved.read_text()) == parameters
        except (OSError, ValueError):
            same = False
        if not same:
            raise DatasetError(
                f"{output} exists and was not made with these parameters ({parameters}). Choose "
                "another --output."
            )
    with atomic_write(saved) as file:
        json.dump(parameters, file, indent=2)
    with atomic_write(output / "classes.txt") as file:
        file.write("\n".join(CLASS_NAMES) + "\n")


def _make_one(path: Path, data: Path, output: Path, name: str, strength: float, seed: int) -> None:
    target = output / "pseudo-labels" / f"{name}.png"
    if target.exists():  # the last of an image's files
        return
    annotation = f"{name}_gtFine_instanceIds.png"
    annotation = data / "gtFine" / path.parent.relative_to(data / "leftImg8bit") / annotation
    instance_ids = _read(annotation)
    size = _read(path).shape[:2]
    if instance_ids.ndim != 2 or instance_ids.dtype.kind not in "iu" or instance_ids.min() < 0:
        raise DatasetError(f"{annotation}: expected Cityscapes' instanceIds, a gray 16-bit PNG")
    if instance_ids.shape != size:
        raise DatasetError(
            f"{annotation} is of {instance_ids.shape} px, its image {path} of {size}"
        )
    label = class_map(instance_ids)
    spoilt = cam_label(label, label_generator(seed, name), strength, instances=instance_ids)
    with atomic_write(output / "images" / f"{name}.png", "wb") as file:
        file.write(path.read_bytes())
    write_label(output / "ground-truth" / f"{name}.png", label)
    write_label(target, spoilt)


def _read(path: Path) -> np.ndarray:
    with open_image(path) as image:
        return np.asarray(image)


@exit_status
def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("datasets/toyscapes"))
    parser.add_argument("--split", default="val", help="of the data")
    parser.add_argument("--output", type=Path, required=True, help="a folder of its own")
    parser.add_argument("--strength", type=float, default=0.5, help="0: ground truth, 1: very bad")
    parser.add_argument("--seed", type=int, default=0, help="of the failures")
    args = parser.parse_args(arguments)
    problems = make_cam_labels(
        args.data, args.output, split=args.split, strength=args.strength, seed=args.seed
    )
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    count = len(list((args.output / "pseudo-labels").glob("*.png")))
    print(f"{args.output}: {count} labels, {len(problems)} images failed")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
