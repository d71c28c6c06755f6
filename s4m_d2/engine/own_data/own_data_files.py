"""OUTPUT_DIR/data: what a run on own data began with, so that it can be continued and looked at."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from s4m_d2.engine.own_data.derived_settings import Derived
from s4m_d2.errors import DatasetError
from s4m_d2.files import atomic_write

FOLDER = "data"
TRAIN, VAL, EVALUATED = "train.json", "val.json", "evaluated.json"  # COCO files
UNLABELED = "unlabeled.json"  # list of paths below S4M.DATA.UNLABELED
FRAMES = "frames"  # folder of its videos' frames
SETTINGS = "settings.json"  # written last: with it, the folder is complete
_VERSION = 1


@dataclass(frozen=True)
class StoredData:
    """What the folder holds beside the annotations."""

    classes: tuple[str, ...]  #: names in the order of contiguous ids
    settings: tuple[Derived, ...]  #: that were derived
    #: paths below S4M.DATA.UNLABELED, absolute for frames; (): stage 2 was not asked for
    unlabeled: tuple[str, ...]
    labeled_digest: str  #: of the user's files when the run began
    val_digest: str  #: the same; "": drawn
    left_out: dict[str, int]  #: unlabeled images that were left out, by reason
    has_val: bool  #: whether there is a validation set
    image_root: str = ""  #: folder that the file names of TRAIN start from; "": not known


def is_stored(folder: str) -> bool:
    """Whether a run's data were stored in this folder."""
    return os.path.isfile(os.path.join(folder, SETTINGS))


def folder_of(weights: str) -> str:
    """Where the data of the run lie, if they do, that wrote a checkpoint, OUTPUT_DIR/stage/file."""
    return os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(weights))), FOLDER)


def class_lists(cfg: CfgNode) -> tuple[Sequence[str], Sequence[str]]:
    """Names of the classes of MODEL.WEIGHTS and of the run; (), if no run on own data wrote it."""
    folder = folder_of(cfg.MODEL.WEIGHTS)
    if not (cfg.MODEL.WEIGHTS and is_stored(folder)):
        return (), ()
    classes = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).get("thing_classes")
    return read_stored(folder).classes, classes or ()


def write_json(path: str, content: object, indent: int | None = None) -> None:
    """Write a JSON file."""
    with atomic_write(path) as file:
        json.dump(content, file, indent=indent)


def store(folder: str, stored: StoredData, train: dict) -> None:
    """Write what a run begins with, after VAL; ``train`` is the content of a COCO file."""
    write_json(os.path.join(folder, TRAIN), train)
    content = {"version": _VERSION, **asdict(stored)}
    write_json(os.path.join(folder, UNLABELED), content.pop("unlabeled"), indent=0)
    write_json(os.path.join(folder, SETTINGS), content, indent=2)


def _here(path: str, folder: str) -> str:
    """Path of an unlabeled image; of a frame, where the run's folder is now."""
    _, inside, name = path.partition(os.path.join(os.sep, FOLDER, FRAMES, ""))
    is_frame = os.path.isabs(path) and inside
    return os.path.join(os.path.abspath(folder), FRAMES, name) if is_frame else path


def read_stored(folder: str) -> StoredData:
    """What :func:`store` wrote; DatasetError if a file is missing or was changed."""
    try:
        with open(os.path.join(folder, SETTINGS), encoding="utf-8") as file:
            content = json.load(file)
        with open(os.path.join(folder, UNLABELED), encoding="utf-8") as file:
            content["unlabeled"] = tuple(_here(path, folder) for path in json.load(file))
        if (version := content.pop("version")) != _VERSION:
            raise ValueError(f"version {version}, expected {_VERSION}")
        content["classes"] = tuple(content["classes"])
        content["settings"] = tuple(Derived(**setting) for setting in content["settings"])
        return StoredData(**content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DatasetError(
            f"'{folder}', what the run began with, cannot be read: {error!r}. Restore the folder, "
            "or start a new run in another OUTPUT_DIR."
        ) from error
