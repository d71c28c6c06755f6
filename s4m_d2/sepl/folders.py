"""Enhancement of a folder of pseudo-labels; existing label maps count as finished."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import get_cfg
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from s4m_d2.config import add_s4m_config
from s4m_d2.data.images import read_image
from s4m_d2.errors import ConfigError, DatasetError, S4MError, WeightsError
from s4m_d2.files import write_json
from s4m_d2.sam import build_sam_backend
from s4m_d2.sam.automatic_masks import AutomaticMasks, AutomaticMaskSettings
from s4m_d2.sepl.files import BEFORE, IMAGE, ImageFiles, RLEs, kept_masks, read_masks, write_label
from s4m_d2.sepl.rule import BACKGROUND, VOID, enhance

REPORT = "sepl.json"  # in the output folder: settings of its label maps, problems of the last run
_OPTIONS = {"BACKEND": "--sam", "MODEL_TYPE": "--sam-type", "CHECKPOINT": "--sam-checkpoint"}


@dataclass(frozen=True)
class SamMasks:
    """Generates SAM's automatic masks of images by a model of each process, and stores them."""

    model: tuple[str, str, str]  #: values of --sam, --sam-type and --sam-checkpoint
    device: str  #: PyTorch's name
    cache: Path  #: folder with a file per image
    automatic: AutomaticMaskSettings

    def masks(self, name: str, image: Path, size: tuple[int, int]) -> RLEs:
        """Masks of the file ``image``, of ``size`` (H, W); stored ones if all is the same."""
        digest = hashlib.sha256(image.read_bytes()).hexdigest()
        return kept_masks(
            self.cache / f"{name}.json.gz",
            size,
            f"{self.generator.fingerprint()} {digest}",
            lambda: self.generator.generate(read_image(str(image), "RGB")),
        )

    @cached_property
    def generator(self) -> AutomaticMasks:
        cfg = get_cfg()
        add_s4m_config(cfg)
        cfg.MODEL.DEVICE = self.device
        cfg.S4M.SAM.update(zip(_OPTIONS, self.model, strict=True))
        try:
            return AutomaticMasks(build_sam_backend(cfg), self.automatic)
        except (ConfigError, WeightsError) as error:  # which name keys of the config
            text = str(error)
            for key, option in _OPTIONS.items():
                text = text.replace(f"S4M.SAM.{key}", option)
            raise type(error)(text) from error


@dataclass(frozen=True)
class Enhancement(Dataset[bool | S4MError]):
    """Enhances pseudo-labels: item i writes the label map of the i-th image."""

    names: Sequence[str]  #: of the images
    files: ImageFiles  #: with pseudo-labels; with images too if they are given
    source: Path | SamMasks  #: of the masks: a folder, or SAM, which needs the images
    output: Path  #: folder of the label maps
    options: Mapping[str, Any]  #: of :func:`~s4m_d2.sepl.enhance`

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> bool | S4MError:
        """Return whether the label map has a class, or why none was written.

        A DatasetError is a problem of this image, other errors concern all. They are returned, as a
        DataLoader adds its traceback to the message of one that is raised.
        """
        name = self.names[index]
        try:
            label = self.files.read_labels(name)[BEFORE]
            if isinstance(self.source, SamMasks):
                masks = self.source.masks(name, self.files.by_kind[IMAGE][name], label.shape)
            else:
                masks = read_masks(self.source, name, label.shape)
            write_label(self.output / f"{name}.png", enhance(label, masks, **self.options))
        except S4MError as error:
            return error
        return bool(np.setdiff1d(label, (BACKGROUND, VOID)).size)

    def run(self, workers: int) -> tuple[dict[str, str], list[bool]]:
        """Make all items, with a progress bar: problems by image; whether others have a class.

        They do not depend on the number of workers: processes with one thread each; 1: this one.
        An S4MError that concerns all images, and the end of a process by itself, are raised.
        """
        workers = min(workers, len(self)) if workers > 1 else 0
        start = "spawn" if workers else None
        loader = DataLoader(self, None, num_workers=workers, multiprocessing_context=start)
        problems: dict[str, str] = {}
        have_class: list[bool] = []
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as in a DataLoader's processes: it moves sums by rounding
        try:
            for name, item in zip(self.names, tqdm(loader, "sepl", unit="image"), strict=True):
                if isinstance(item, DatasetError):
                    problems[name] = str(item)
                elif isinstance(item, S4MError):
                    raise item
                else:
                    have_class.append(item)
        finally:
            torch.set_num_threads(threads)
        return problems, have_class


def begin(
    folder: Path,
    settings: dict[str, Any],
    labels: Mapping[str, Path],
    wanted: Iterable[str],
    overwrite: bool,
) -> set[str]:
    """Start or continue a run into a folder; returns the finished ones of the images of ``labels``
    and ``wanted``: their label maps are newer than the pseudo-labels.

    ``overwrite``: label maps of ``wanted`` are removed; all, if their settings were others.
    ConfigError: it has label maps of these images made with other or unknown settings.
    """
    maps = {name: folder / f"{name}.png" for name in {*labels, *wanted}}
    finished = {name for name, path in maps.items() if path.exists()}
    if finished:
        try:
            earlier = json.loads((folder / REPORT).read_text(encoding="utf-8"))["settings"]
        except (OSError, ValueError, LookupError):
            earlier = {REPORT: "unreadable"}
        keys = [k for k in earlier | settings if earlier.get(k) != settings.get(k)]
        if overwrite:
            removed = finished if keys else finished & {*wanted}
            for name in removed:
                maps[name].unlink()
            finished -= removed
        elif keys:
            differing = [f"{k} was {earlier.get(k)}, now {settings.get(k)}" for k in keys]
            raise ConfigError(
                f"'{folder}' has {len(finished)} label maps of other settings: "
                f"{'; '.join(differing)}. Choose another --output, or give --overwrite."
            )
    write_report(folder, settings, {})
    times = {name: maps[name].stat().st_mtime for name in finished}
    return {n for n in finished if n not in labels or labels[n].stat().st_mtime <= times[n]}


def write_report(folder: Path, settings: Mapping[str, Any], problems: Mapping[str, str]) -> None:
    """Write the settings of the label maps in a folder, and why images have none."""
    write_json(folder / REPORT, {"settings": settings, "problems": problems}, indent=1)
