"""Make toyscapes: street-like toy scenes in Cityscapes' own layout.

    python datasets/make_toyscapes.py --output datasets/toyscapes --seed 0 --train 100 --val 100

Cityscapes' tools and Detectron2's Cityscapes loader read the result unchanged. Image ``i`` of a
split depends on (seed, split, i, size) only, so a larger data set begins with the smaller one.
"""

import argparse
import contextlib
import functools
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from multiprocessing import get_context
from pathlib import Path

import cv2
from PIL import Image
from toyscapes_scene import Scene, render_scene
from tqdm import tqdm

CITIES = {"train": ("blockburg", "puppenheim", "tintown"), "val": ("kitehaven", "marbleton")}
FRAME = 19  # Cityscapes annotates the twentieth frame of each sequence
PARAMETERS_FILE = "toyscapes.json"
GENERATOR_VERSION = 5  # raise it when the same parameters give other pictures
MIN_SIDE = 64


def image_name(split: str, index: int) -> str:
    """``CITY/CITY_SEQUENCE_FRAME`` of an image, the stem of all its files."""
    cities = CITIES[split]
    city = cities[index % len(cities)]
    return f"{city}/{city}_{index // len(cities):06d}_{FRAME:06d}"


def write_scene(scene: Scene, root: Path, split: str, name: str) -> None:
    """Write a scene's picture, its instanceIds, labelIds and polygons below ``root``."""
    height, width = scene.instance_ids.shape
    ground_truth = root / "gtFine" / split / name
    Image.fromarray(scene.image).save(root / "leftImg8bit" / split / f"{name}_leftImg8bit.png")
    Image.fromarray(scene.instance_ids).save(f"{ground_truth}_gtFine_instanceIds.png")
    Image.fromarray(scene.label_ids).save(f"{ground_truth}_gtFine_labelIds.png")
    objects = [{"label": item.label, "polygon": item.polygon.tolist()} for item in scene.objects]
    annotation = {"imgHeight": height, "imgWidth": width, "objects": objects}
    Path(f"{ground_truth}_gtFine_polygons.json").write_text(json.dumps(annotation))


def make_toyscapes(
    output: str | os.PathLike[str],
    *,
    seed: int = 0,
    counts: Mapping[str, int],
    size: tuple[int, int] = (256, 128),
    workers: int = 1,
    overwrite: bool = False,
) -> bool:
    """Write a data set, all of it or nothing.

    Args:
        output: folder of the data set; with the same parameters inside it is left as it is.
        seed: data sets of different seeds share no scene.
        counts: number of images of the splits ``train`` and ``val``.
        size: (width, height) in pixels, at least 64 each.
        workers: processes that draw.
        overwrite: replace a folder that holds something else.

    Returns:
        Whether anything was written.

    Raises:
        ValueError: a parameter is out of range.
        FileExistsError: ``output`` holds something else and ``overwrite`` is off.
    """
    output = Path(output)
    parameters = _parameters(seed, counts, size)
    if output.exists():
        if read_parameters(output) == parameters:
            return False
        if not overwrite:
            raise FileExistsError(
                f"{output} exists and was not made with these parameters ({parameters}). Choose "
                "another --output, or replace it with --overwrite."
            )
    with whole_folder(output) as new:
        _write_splits(new, seed, counts, size, workers)
        (new / PARAMETERS_FILE).write_text(json.dumps(parameters, indent=2) + "\n")
    return True


@contextlib.contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """A new folder that takes the place of ``output`` if the block succeeds, or else is removed."""
    output.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}."))
    try:
        yield new
        new.chmod(0o755)
        _replace(output, new)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def _replace(output: Path, new: Path) -> None:
    """Put ``new`` in the place of ``output``; what was there goes only after that worked."""
    if not output.exists():
        new.rename(output)
        return
    old = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}.old.")) / output.name
    output.rename(old)
    new.rename(output)
    shutil.rmtree(old.parent)


def _parameters(seed: int, counts: Mapping[str, int], size: tuple[int, int]) -> dict:
    if seed < 0:
        raise ValueError(f"seed is {seed}; it must not be negative")
    unknown = sorted(set(counts) - set(CITIES))
    if unknown or any(count < 0 for count in counts.values()) or not sum(counts.values()):
        raise ValueError(f"counts are {dict(counts)}; expected at least one image in train or val")
    if min(size) < MIN_SIDE:
        raise ValueError(f"size is {tuple(size)}; width and height must be at least {MIN_SIDE}")
    return {"generator": GENERATOR_VERSION, "seed": seed, "counts": dict(counts),
            "size": list(size)}  # fmt: skip


def read_parameters(folder: Path) -> dict | None:
    """The parameters a toyscapes folder was made with, or None where there are none to read."""
    try:
        return json.loads((folder / PARAMETERS_FILE).read_text())
    except (OSError, ValueError):
        return None


def _write_splits(
    root: Path, seed: int, counts: Mapping[str, int], size: tuple[int, int], workers: int
) -> None:
    jobs = [(split, i) for split, count in counts.items() for i in range(count)]
    for split in counts:
        for kind in ("leftImg8bit", "gtFine"):
            for city in CITIES[split]:
                (root / kind / split / city).mkdir(parents=True, exist_ok=True)
    draw = functools.partial(_write_one, root, seed, tuple(size))
    for _ in tqdm(_each(draw, jobs, workers), total=len(jobs), desc="toyscapes", unit="image"):
        pass


def _each(draw: functools.partial, jobs: list[tuple[str, int]], workers: int) -> Iterator[None]:
    if workers <= 1:
        yield from map(draw, jobs)
        return
    with get_context("spawn").Pool(workers) as pool:
        yield from pool.imap_unordered(draw, jobs, chunksize=8)


def _write_one(root: Path, seed: int, size: tuple[int, int], job: tuple[str, int]) -> None:
    cv2.setNumThreads(1)
    split, index = job
    write_scene(render_scene(seed, split, index, size), root, split, image_name(split, index))


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("datasets/toyscapes"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=100, help="images of the training split")
    parser.add_argument("--val", type=int, default=100, help="images of the validation split")
    parser.add_argument("--size", type=int, nargs=2, default=(256, 128),
                        metavar=("WIDTH", "HEIGHT"))  # fmt: skip
    parser.add_argument("--workers", type=int, default=1, help="processes that draw")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing folder")
    args = parser.parse_args(arguments)
    try:
        written = make_toyscapes(
            args.output,
            seed=args.seed,
            counts={"train": args.train, "val": args.val},
            size=tuple(args.size),
            workers=args.workers,
            overwrite=args.overwrite,
        )
    except (ValueError, FileExistsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    done = "written" if written else "already there with these parameters, left as it is"
    print(f"{args.output}: {done}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
