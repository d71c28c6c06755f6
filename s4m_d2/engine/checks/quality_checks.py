"""Settings of the measurement of pseudo-labels, and whether there is anything to measure on."""

from __future__ import annotations

from collections.abc import Iterator

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from s4m_d2.data import labeled_dataset_names
from s4m_d2.data.true_labels import has_true_labels, true_records
from s4m_d2.engine.checks.dataset_checks import load_records
from s4m_d2.engine.checks.findings import Finding
from s4m_d2.engine.stages import runs_stage
from s4m_d2.errors import ConfigError, DatasetError, S4MError

_OFF = "S4M.QUALITY.PERIOD 0 trains without measuring."


def quality_setting_errors(cfg: CfgNode) -> Iterator[S4MError]:
    """Values of S4M.QUALITY that are out of range."""
    quality = cfg.S4M.QUALITY
    for key in ("PERIOD", "MAX_IMAGES"):
        if quality[key] < 0:
            yield ConfigError(f"S4M.QUALITY.{key} is {quality[key]!r}; expected 0 or more.")
    limits = quality.SIZE_LIMITS
    if len(limits) != 2 or not 0 <= limits[0] <= limits[1]:
        yield ConfigError(
            f"S4M.QUALITY.SIZE_LIMITS is {limits!r}; expected two areas in pixels of at least 0, "
            "the smaller first."
        )


def quality_datasets(cfg: CfgNode) -> tuple[str, ...]:
    """Names of the data sets to measure on.

    Raises:
        DatasetError: S4M.QUALITY.DATASETS is empty, and no unlabeled set has known labels.
    """
    names = tuple(cfg.S4M.QUALITY.DATASETS) or tuple(
        filter(has_true_labels, cfg.DATASETS.UNLABELED)
    )
    if not names:
        raise DatasetError(
            "How good pseudo-labels are cannot be measured: of DATASETS.UNLABELED "
            f"({', '.join(cfg.DATASETS.UNLABELED) or 'empty'}) no labels are known. Name a labeled "
            "data set in S4M.QUALITY.DATASETS, such as the one for validation."
        )
    return names


def quality_records(cfg: CfgNode) -> list[dict]:
    """The images to measure on, with annotations, none of them of DATASETS.TRAIN.

    Raises:
        DatasetError: there are none, or annotations are missing or malformed.
    """
    return true_records(
        quality_datasets(cfg), cfg.S4M.QUALITY.MAX_IMAGES, _trained_on(cfg), load_records
    )


def _trained_on(cfg: CfgNode) -> set[str]:
    """Paths of the images whose labels training reads."""
    names = labeled_dataset_names(cfg.DATASETS.TRAIN, cfg.S4M.SPLIT_FILE, cfg.S4M.SPLIT_SEED)
    return {record["file_name"] for name in names for record in load_records(name)}


def quality_class_names(cfg: CfgNode) -> list[str]:
    """Names of the model's classes, as the data sets have them, or their numbers.

    Raises:
        ConfigError: a data set has another number of classes than the model.
    """
    count = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    names = [str(index) for index in range(count)]
    for dataset in reversed(quality_datasets(cfg)):
        found = MetadataCatalog.get(dataset).get("thing_classes")
        if found is None:
            continue
        if len(found) != count:
            raise ConfigError(
                f"S4M.QUALITY measures on '{dataset}', which has {len(found)} classes; "
                f"MODEL.SEM_SEG_HEAD.NUM_CLASSES is {count}. Name data sets of the same classes in "
                "S4M.QUALITY.DATASETS."
            )
        names = list(found)
    return names


def quality_findings(cfg: CfgNode) -> list[Finding]:
    """A line of the report before training, if pseudo-labels are to be measured."""
    period = cfg.S4M.QUALITY.PERIOD
    if period < 1 or not runs_stage(cfg, "student"):
        return []
    try:
        _trained_on(cfg)
    except S4MError:  # reported with that data set
        return [Finding("label quality", "looked at when labeled data can be read", checked=False)]
    try:
        images = len(quality_records(cfg))
        quality_class_names(cfg)
    except S4MError as error:
        error = type(error)(f"{error} {_OFF}")
        return [Finding("label quality", "cannot be measured", (error,))]
    text = f"{images:,} images of {', '.join(quality_datasets(cfg))}, every {period:,} iterations"
    return [Finding("label quality", text)]
