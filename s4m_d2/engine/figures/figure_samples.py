"""The images of figures: fixed ones of a data set, with their labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.data import transforms as T

from s4m_d2.data import DATASET_MAPPER_REGISTRY, LabeledDatasetMapper, labeled_dataset_names
from s4m_d2.engine.rng import sample_seeds
from s4m_d2.errors import ConfigError
from s4m_d2.tiling import build_tiling
from s4m_d2.visualization import evenly_spaced

Record = Mapping[str, Any]
SEED_STREAM = "overview"


def validation_samples(
    cfg: CfgNode, count: int, *, tiles: bool = False, resized: bool = False
) -> list[dict]:
    """The validation images with most instances of evenly spaced groups, unaugmented.

    Args:
        tiles: where INPUT.TILE cuts images, tiles are chosen in place of images.
        resized: as evaluation does (INPUT.MIN_SIZE_TEST, INPUT.MAX_SIZE_TEST); False: they have
            their own sizes, which may be those of a camera.

    Returns:
        samples with "image", the same as "image_weak", "instances" and "seeds".
    """
    if not cfg.DATASETS.TEST:
        raise ConfigError("DATASETS.TEST is empty: name the data set whose images are drawn.")
    records = DatasetCatalog.get(cfg.DATASETS.TEST[0])
    records = build_tiling(cfg).records(records) if tiles else records
    group = max(1, len(records) // count)
    chosen = [
        max(records[start : start + group], key=lambda record: len(record["annotations"]))
        for start in range(0, min(group * count, len(records)), group)
    ]
    sizes = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
    mapper = _plain_mapper(cfg, [T.ResizeShortestEdge(*sizes, "choice")] if resized else [])
    samples = [mapper(record) for record in _seeded(cfg, chosen)]
    return [{**sample, "image_weak": sample["image"]} for sample in samples]


def labeled_samples(cfg: CfgNode, count: int, draws: int) -> list[list[dict]]:
    """Labeled images or tiles: each as it is, then in ``draws`` of the training's augmentations."""
    names = labeled_dataset_names(cfg.DATASETS.TRAIN, cfg.S4M.SPLIT_FILE, cfg.S4M.SPLIT_SEED)
    records = [record for name in names for record in DatasetCatalog.get(name)]
    chosen = evenly_spaced(build_tiling(cfg).records(records, filter_empty=True), count)
    plain = _plain_mapper(cfg, geometry=[])
    augmented = DATASET_MAPPER_REGISTRY.get(cfg.INPUT.DATASET_MAPPER_NAME)(cfg, True)
    rows = [[plain(record)] for record in _seeded(cfg, chosen)]
    for draw in range(draws):
        for row, record in zip(rows, _seeded(cfg, chosen, f"draw {draw}"), strict=True):
            row.append(augmented(record))
    return rows


def unlabeled_samples(cfg: CfgNode, count: int) -> list[dict]:
    """Unlabeled images or tiles in the training's views: "image", "image_weak" and "seeds"."""
    records = [record for name in cfg.DATASETS.UNLABELED for record in DatasetCatalog.get(name)]
    if not records:
        raise ConfigError("DATASETS.UNLABELED is empty: name the unlabeled set that is drawn.")
    chosen = evenly_spaced(build_tiling(cfg).records(records), count)
    views = DATASET_MAPPER_REGISTRY.get(cfg.S4M.UNLABELED_MAPPER)(cfg, True)
    return [views(record) for record in _seeded(cfg, chosen, "unlabeled")]


def _seeded(cfg: CfgNode, records: Sequence[Record], stream: str = SEED_STREAM) -> list[dict]:
    return [
        {**record, "seeds": sample_seeds(cfg.SEED, stream, position)}
        for position, record in enumerate(records)
    ]


def _plain_mapper(cfg: CfgNode, geometry: Sequence[Any]) -> LabeledDatasetMapper:
    return LabeledDatasetMapper(
        geometry=geometry,
        color=None,
        image_format=cfg.INPUT.FORMAT,
        num_classes=cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
    )
