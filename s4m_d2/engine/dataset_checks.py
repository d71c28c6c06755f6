"""Data sets are looked at before training starts, so that it does not stop an hour later."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from tabulate import tabulate

from s4m_d2.data import LabeledDatasetMapper, labeled_dataset_names
from s4m_d2.data.images import read_image
from s4m_d2.errors import ConfigError, DatasetError

logger = logging.getLogger(__name__)

SAMPLED_IMAGES = 8  # decoded of each data set, at equal distances
# What loaders of data sets raise when files are missing or malformed.
_LOADER_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    OSError,
    RecursionError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class DatasetCount:
    """Size of one data set; ``instances`` is None where annotations are not read."""

    role: str
    name: str
    images: int
    instances: int | None


def check_datasets(cfg: CfgNode) -> list[DatasetCount]:
    """Load every data set of a training run and look at a few images of each.

    The counts are logged as a table. Unreadable unlabeled images are training's business, which
    skips and counts them, unless no image that was looked at can be read.

    Raises:
        ConfigError: the number of classes is not the data set's.
        DatasetError: a data set is unknown, missing or empty; an image or annotation is damaged,
            of another size or of a class out of range; an image is in two sets, or twice in one.
    """
    unlabeled = () if cfg.S4M.STAGE == "teacher" else cfg.DATASETS.UNLABELED
    labeled = labeled_dataset_names(cfg.DATASETS.TRAIN, cfg.S4M.SPLIT_FILE, cfg.S4M.SPLIT_SEED)
    roles = {"labeled": labeled, "unlabeled": unlabeled, "test": cfg.DATASETS.TEST}
    counts, owners = [], {}
    for role, names in roles.items():
        for name in names:
            records = _load(name)
            _check_disjoint(owners, role, name, records)
            if role == "unlabeled":
                _check_images(cfg, name, records)
                instances = None
            else:
                instances = _check_annotations(cfg, name, records)
            counts.append(DatasetCount(role, name, len(records), instances))
    logger.info("Data sets:\n%s", summary_table(counts))
    return counts


def summary_table(counts: Sequence[DatasetCount]) -> str:
    """The counts as text, a line for each data set."""
    rows = [(c.role, c.name, c.images, c.instances) for c in counts]
    return tabulate(rows, ("role", "data set", "images", "instances"), missingval="not read")


def _load(name: str) -> list[dict]:
    if name not in DatasetCatalog.list():
        raise DatasetError(
            f"The data set '{name}' is not registered. Registered are: "
            f"{', '.join(sorted(DatasetCatalog.list()))}."
        )
    try:
        records = DatasetCatalog.get(name)
    except DatasetError:
        raise
    except _LOADER_ERRORS as error:
        raise DatasetError(
            f"The data set '{name}' cannot be loaded: {error}. Correct its files: relative paths "
            "lie under $DETECTRON2_DATASETS (default: datasets), and datasets/README.md shows the "
            "layout."
        ) from error
    if not records:
        raise DatasetError(
            f"The data set '{name}' has no images. Complete it, or take it out of DATASETS."
        )
    for index, record in enumerate(records):
        if not isinstance(record, dict) or not isinstance(record.get("file_name"), str):
            raise DatasetError(
                f"The data set '{name}': record {index} has no 'file_name'. Correct its loader, "
                "which must return Detectron2's records: dictionaries with the path of an image."
            )
    return records


def _check_disjoint(
    owners: dict[str, tuple[str, str]], role: str, name: str, records: Sequence[dict]
) -> None:
    """No image twice in a role, and no test image in training; labeled ones may be unlabeled too.

    ``owners`` maps the images seen so far to (role, data set), and takes up these.
    """
    for record in records:
        path = os.path.abspath(record["file_name"])
        other_role, other = owners.get(path, (None, None))
        if other_role == role or (other_role and role == "test"):
            raise DatasetError(
                f"{path} is in '{other}' ({other_role}) and in '{name}' ({role}). "
                "Remove it from one, or name other data sets."
            )
        owners[path] = role, name


def _sampled(records: Sequence[dict]) -> list[dict]:
    step = max(1, len(records) // SAMPLED_IMAGES)
    return list(records[::step][:SAMPLED_IMAGES])


def _check_images(cfg: CfgNode, name: str, records: Sequence[dict]) -> None:
    errors = []
    sample = _sampled(records)
    for record in sample:
        try:
            read_image(record["file_name"], cfg.INPUT.FORMAT)
        except DatasetError as error:
            errors.append(error)
    if len(errors) == len(sample):
        raise DatasetError(
            f"The unlabeled data set '{name}': none of {len(sample)} sampled images can be read. "
            f"{errors[0]}"
        )
    for error in errors:
        logger.warning("Unlabeled data set '%s': %s", name, error)


def _check_annotations(cfg: CfgNode, name: str, records: Sequence[dict]) -> int:
    """Number of instances, crowds excluded."""
    classes = MetadataCatalog.get(name).get("thing_classes")
    num_classes = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    if classes is not None and len(classes) != num_classes:
        raise ConfigError(
            f"MODEL.SEM_SEG_HEAD.NUM_CLASSES is {num_classes}; expected {len(classes)}, the "
            f"number of classes of '{name}'."
        )
    counts: Counter[int] = Counter()
    for record in records:
        for annotation in record.get("annotations", ()):
            if annotation.get("iscrowd", 0):
                continue
            label = annotation.get("category_id")
            if label not in range(num_classes):
                raise DatasetError(
                    f"Data set '{name}': an annotation of {record['file_name']} has the class id "
                    f"{label}; expected one from 0 to {num_classes - 1}. Correct the annotation, "
                    "or the map of the data set's ids to contiguous ones."
                )
            counts[label] += 1
    if not counts:
        raise DatasetError(
            f"The data set '{name}' has {len(records)} images and no instance: there is nothing to "
            "learn from or to evaluate. Choose a larger split, or check its annotations."
        )
    mapper = LabeledDatasetMapper(
        geometry=(), color=None, image_format=cfg.INPUT.FORMAT, num_classes=num_classes
    )
    for record in _sampled(records):
        mapper(record)
    return counts.total()
