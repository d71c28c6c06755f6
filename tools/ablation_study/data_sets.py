"""What a study trains and evaluates on: generated toyscapes, or a set of real images."""

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from make_toyscapes import read_parameters
from prepare_nuclei import part

from ablation_study import ROOT
from ablation_study.runs import FULL_PERCENT, Run
from s4m_d2.errors import DatasetError
from s4m_d2.files import write_json

# Of the data set that is made where none is given. So few that a run goes through the labeled ones
# a few hundred times (in the paper thousands), and more labels would help.
TRAIN_IMAGES, VAL_IMAGES = 100, 100
# Trained by the recipe of the packaged SAM, but without photographs of facades.
SAMS = {"facades": Path(__file__).parent / "tiny_without_facades.pth"}
DEV_SHARE = 0.2  # of a real set's training images: labels of the choices, in no run


def write_part(path: Path, content: dict, names: Iterable[str]) -> None:
    """Write a json with the images of these names and their labels, once."""
    if path.exists():
        return
    wanted = set(names)
    images = [image for image in content["images"] if image["file_name"] in wanted]
    write_json(path, part(content, images))


def link_images(folder: Path, names: Iterable[str], source: Path) -> None:
    """Links to images of ``source``, where there are none."""
    for name in names:
        link = folder / name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(source / name)


def real_folder(name: str, folder: Path | None) -> Path:
    """The folder of a real set; DatasetError: a file is missing."""
    of_set = (folder or ROOT / "datasets").absolute() / name
    for file in ("train.json", "val.json"):
        if not (of_set / file).is_file():
            raise DatasetError(
                f"There is no '{of_set / file}': --data names the folder that holds '{name}'. "
                "datasets/README.md says where to get it and how to convert it."
            )
    return of_set


class Toyscapes:
    """Toyscapes in ``folder``/toyscapes; without a folder, made in ``output``/data."""

    def __init__(self, folder: Path | None, output: Path) -> None:
        self._folder = (output / "data" if folder is None else folder.absolute()) / "toyscapes"
        if folder is not None and read_parameters(self._folder) is None:
            raise DatasetError(
                f"--data names '{folder}', but there is no toyscapes in it. Make it with: python "
                f"datasets/make_toyscapes.py --output '{self._folder}'; or leave --data out."
            )
        self.environment = {"DETECTRON2_DATASETS": str(self._folder.parent)}

    def prepare(self) -> None:
        if self.facts() is None:
            command = [sys.executable, str(ROOT / "datasets" / "make_toyscapes.py"), "--output"]
            counts = ["--train", str(TRAIN_IMAGES), "--val", str(VAL_IMAGES)]
            if subprocess.run([*command, str(self._folder), *counts]).returncode:
                raise DatasetError(f"toyscapes cannot be made in '{self._folder}': see above.")

    def facts(self) -> dict[str, Any] | None:
        """What it was made from; None before that."""
        return read_parameters(self._folder)

    def overrides(self, run: Run) -> dict[str, str]:
        share = "" if run.percent == FULL_PERCENT else f"_{run.percent}pct"
        return {"DATASETS.TRAIN": f"('toyscapes_train{share}',)"}


class RealSet:
    """``train.json`` and ``val.json`` in COCO's format beside folders ``train`` and ``val``.

    A fifth of the training images is set aside for choices, and evaluated instead of ``val`` if
    ``dev``. Of the others, each seed draws its labeled images; the rest is unlabeled. Lists of
    images and links to them come into ``output``/data.
    """

    environment: dict[str, str] = {}

    def __init__(self, name: str, folder: Path | None, output: Path, *, dev: bool) -> None:
        self._name, self._dev, self._output = name, dev, output / "data"
        self._folder = real_folder(name, folder)
        self._train = json.loads((self._folder / "train.json").read_text())
        names = sorted(image["file_name"] for image in self._train["images"])
        order = np.random.default_rng(0).permutation(len(names))
        count = round(DEV_SHARE * len(names))
        self._aside = [names[i] for i in order[:count]]
        self._names = sorted(names[i] for i in order[count:])

    def prepare(self) -> None:
        """Write the images that are set aside, and link the others into a folder."""
        write_part(self._output / "dev.json", self._train, self._aside)
        link_images(self._output / "unlabeled", self._names, self._folder / "train")

    def facts(self) -> dict[str, Any]:
        counts = {"train": len(self._names), "dev": len(self._aside)}
        return {"set": self._name, **counts, "evaluated on": "dev" if self._dev else "val"}

    def overrides(self, run: Run) -> dict[str, str]:
        """Labels of the seed's draw; a share is one of all training images."""
        count = round(len(self._train["images"]) * run.percent / 100)
        drawn = np.random.default_rng(run.seed).permutation(len(self._names))[:count]
        labeled = self._output / f"{run.percent}pct-seed{run.seed}.json"
        write_part(labeled, self._train, [self._names[i] for i in drawn])
        train = str(self._folder / "train")
        val = (self._folder / "val.json", self._folder / "val")
        evaluated, its_images = (self._output / "dev.json", train) if self._dev else val
        # Nothing uses unlabeled images where all are labeled; what is set aside stands for them.
        unlabeled = train if run.percent == FULL_PERCENT else str(self._output / "unlabeled")
        return {
            "S4M.DATA.LABELED": str(labeled),
            "S4M.DATA.IMAGES": train,
            "S4M.DATA.UNLABELED": unlabeled,
            "S4M.DATA.VAL": str(evaluated),
            "S4M.DATA.VAL_IMAGES": str(its_images),
            "S4M.SAM.CHECKPOINT": str(SAMS.get(self._name, "")),
        }
