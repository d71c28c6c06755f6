"""Records of the configured data sets, and loaders over them."""

from __future__ import annotations

import itertools
import logging
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.utils.data as torchdata
from tabulate import tabulate

from detectron2.config import configurable
from detectron2.utils.comm import get_world_size
from detectron2.utils.env import seed_all_rng

from .catalog import DatasetCatalog, MetadataCatalog
from .common import AspectRatioGroupedDataset, DatasetFromList, MapDataset, ToIterableDataset
from .dataset_mapper import DatasetMapper
from .detection_utils import check_metadata_consistency
from .samplers import InferenceSampler, RepeatFactorTrainingSampler, TrainingSampler

__all__ = [
    "build_batch_data_loader",
    "build_detection_test_loader",
    "build_detection_train_loader",
    "filter_images_with_only_crowd_annotations",
    "get_detection_dataset_dicts",
    "print_instances_class_histogram",
    "trivial_batch_collator",
    "worker_init_reset_seed",
]

logger = logging.getLogger(__name__)

_HISTOGRAM_COLUMNS = 6
_HISTOGRAM_NAME_LENGTH = 13


def filter_images_with_only_crowd_annotations(dataset_dicts: list[dict]) -> list[dict]:
    """Keep the images with at least one annotation that is no crowd."""
    kept = [d for d in dataset_dicts if any(a.get("iscrowd", 0) == 0 for a in d["annotations"])]
    removed = len(dataset_dicts) - len(kept)
    logger.info(f"Removed {removed} images with no usable annotations. {len(kept)} images left.")
    return kept


def print_instances_class_histogram(dataset_dicts: list[dict], class_names: list[str]) -> None:
    """Log how many instances, crowds apart, each class has.

    Raises:
        AssertionError: a category id is outside [0, number of classes).
    """
    counts = np.zeros(len(class_names), dtype=int)
    for anno in itertools.chain.from_iterable(d["annotations"] for d in dataset_dicts):
        if anno.get("iscrowd", 0):
            continue
        category = anno["category_id"]
        assert 0 <= category < len(class_names), (
            f"Got an invalid category_id={category} for a dataset of {len(class_names)} classes"
        )
        counts[category] += 1

    limit = _HISTOGRAM_NAME_LENGTH
    cells = []
    for name, count in zip(class_names, counts, strict=True):
        cells += [name if len(name) <= limit else name[: limit - 2] + "..", int(count)]
    cells += ["total", int(counts.sum())]
    columns = min(_HISTOGRAM_COLUMNS, len(cells))
    rows = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    table = tabulate(
        rows, headers=["category", "#instances"] * (columns // 2), tablefmt="pipe", numalign="left"
    )
    logger.info(f"Distribution of instances among all {len(class_names)} categories:\n{table}")


def get_detection_dataset_dicts(
    names: str | Sequence[str], filter_empty: bool = True, *, check_consistency: bool = True
) -> list[dict] | torchdata.Dataset:
    """Load the records of one or several data sets, one after the other.

    Args:
        filter_empty: drop images without annotations other than crowds, if there are annotations.
        check_consistency: all data sets must agree on their classes, if they state any.

    Raises:
        KeyError: a name is not registered.
        AssertionError: no name, an empty data set, or nothing left after filtering.
    """
    names = [names] if isinstance(names, str) else list(names)
    assert len(names), "No dataset name was given."
    loaded = [DatasetCatalog.get(name) for name in names]
    if isinstance(loaded[0], torchdata.Dataset):
        return torchdata.ConcatDataset(loaded) if len(loaded) > 1 else loaded[0]
    for name, dicts in zip(names, loaded, strict=True):
        assert len(dicts), f"Dataset '{name}' is empty!"

    dataset_dicts = list(itertools.chain.from_iterable(loaded))
    has_instances = "annotations" in dataset_dicts[0]
    if filter_empty and has_instances:
        dataset_dicts = filter_images_with_only_crowd_annotations(dataset_dicts)
    class_names = MetadataCatalog.get(names[0]).get("thing_classes")
    if check_consistency and has_instances and class_names is not None:
        check_metadata_consistency("thing_classes", names)
        print_instances_class_histogram(dataset_dicts, class_names)
    assert len(dataset_dicts), f"No valid data found in {','.join(names)}."
    return dataset_dicts


def build_batch_data_loader(
    dataset: torchdata.Dataset,
    sampler: torchdata.Sampler | None,
    total_batch_size: int | None,
    *,
    aspect_ratio_grouping: bool = False,
    num_workers: int = 0,
    collate_fn: Callable | None = None,
    drop_last: bool = True,
    single_gpu_batch_size: int | None = None,
    seed: int | None = None,
    **kwargs: Any,
) -> Iterable[list]:
    """Batches as plain lists, ``total_batch_size / number of processes`` long.

    Args:
        sampler: indices into a map-style ``dataset``; None for an iterable one.
        aspect_ratio_grouping: wide and high images are never in one batch.
        collate_fn: called with the list; none by default.
        single_gpu_batch_size: the batch size of a process, instead of ``total_batch_size``.
        seed: of the generator that seeds the workers.
        kwargs: passed on to :class:`torch.utils.data.DataLoader`.
    """
    if single_gpu_batch_size:
        if total_batch_size:
            raise ValueError("Give either total_batch_size or single_gpu_batch_size, not both.")
        batch_size = single_gpu_batch_size
    else:
        world_size = get_world_size()
        assert total_batch_size > 0 and total_batch_size % world_size == 0, (
            f"Total batch size ({total_batch_size}) must be divisible by the number of gpus "
            f"({world_size})."
        )
        batch_size = total_batch_size // world_size
    logger.info(f"Making batched data loader with batch_size={batch_size}")

    if isinstance(dataset, torchdata.IterableDataset):
        assert sampler is None, "sampler must be None if dataset is IterableDataset"
    else:
        dataset = ToIterableDataset(dataset, sampler, shard_chunk_size=batch_size)
    kwargs.update(num_workers=num_workers, worker_init_fn=worker_init_reset_seed)
    if seed is not None:
        kwargs["generator"] = torch.Generator().manual_seed(seed)
    if not aspect_ratio_grouping:
        collate = collate_fn or trivial_batch_collator
        return torchdata.DataLoader(
            dataset, batch_size=batch_size, drop_last=drop_last, collate_fn=collate, **kwargs
        )
    assert drop_last, "Aspect ratio grouping will drop incomplete batches."
    # The inner loader has batches of one, which the collation unwraps.
    single = torchdata.DataLoader(dataset, collate_fn=operator.itemgetter(0), **kwargs)
    batches = AspectRatioGroupedDataset(single, batch_size)
    return batches if collate_fn is None else MapDataset(batches, collate_fn)


def _build_sampler(cfg: Any, dataset: Sequence[dict]) -> torchdata.Sampler:
    name = cfg.DATALOADER.SAMPLER_TRAIN
    logger.info(f"Using training sampler {name}")
    if name == "TrainingSampler":
        return TrainingSampler(len(dataset), seed=cfg.SEED)
    if name == "RepeatFactorTrainingSampler":
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            dataset, cfg.DATALOADER.REPEAT_THRESHOLD, sqrt=cfg.DATALOADER.REPEAT_SQRT
        )
        return RepeatFactorTrainingSampler(factors, seed=cfg.SEED)
    raise ValueError(f"Unknown training sampler: {name}")


def _train_loader_from_config(
    cfg: Any, mapper: Callable | None = None, *, dataset: Any = None, sampler: Any = None
) -> dict[str, Any]:
    if dataset is None:
        dataset = get_detection_dataset_dicts(
            cfg.DATASETS.TRAIN, filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
        )
    if sampler is None and not isinstance(dataset, torchdata.IterableDataset):
        sampler = _build_sampler(cfg, dataset)
    return {
        "dataset": dataset,
        "sampler": sampler,
        "mapper": DatasetMapper(cfg, True) if mapper is None else mapper,
        "total_batch_size": cfg.SOLVER.IMS_PER_BATCH,
        "aspect_ratio_grouping": cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        "num_workers": cfg.DATALOADER.NUM_WORKERS,
    }


def _mapped(dataset: list | torchdata.Dataset, mapper: Callable | None) -> torchdata.Dataset:
    if isinstance(dataset, list):
        dataset = DatasetFromList(dataset, copy=False)
    return dataset if mapper is None else MapDataset(dataset, mapper)


@configurable(from_config=_train_loader_from_config)
def build_detection_train_loader(
    dataset: list | torchdata.Dataset,
    *,
    mapper: Callable | None,
    sampler: torchdata.Sampler | None = None,
    total_batch_size: int,
    aspect_ratio_grouping: bool = True,
    num_workers: int = 0,
    collate_fn: Callable | None = None,
    **kwargs: Any,
) -> Iterable[list]:
    """An endless loader of mapped records, or, called as ``(cfg, mapper=None, *, dataset=None,
    sampler=None)``, the one that the config describes.

    The sampler is a :class:`TrainingSampler` by default; for the rest see
    :func:`build_batch_data_loader`.
    """
    dataset = _mapped(dataset, mapper)
    if isinstance(dataset, torchdata.IterableDataset):
        assert sampler is None, "sampler must be None if dataset is IterableDataset"
    else:
        sampler = TrainingSampler(len(dataset)) if sampler is None else sampler
        assert isinstance(sampler, torchdata.Sampler), f"Expect a Sampler, got {type(sampler)}"
    return build_batch_data_loader(
        dataset,
        sampler,
        total_batch_size,
        aspect_ratio_grouping=aspect_ratio_grouping,
        num_workers=num_workers,
        collate_fn=collate_fn,
        **kwargs,
    )


def _test_loader_from_config(
    cfg: Any, dataset_name: str | Sequence[str], mapper: Callable | None = None
) -> dict[str, Any]:
    return {
        "dataset": get_detection_dataset_dicts(dataset_name, filter_empty=False),
        "mapper": DatasetMapper(cfg, False) if mapper is None else mapper,
        "num_workers": cfg.DATALOADER.NUM_WORKERS,
    }


@configurable(from_config=_test_loader_from_config)
def build_detection_test_loader(
    dataset: list | torchdata.Dataset,
    *,
    mapper: Callable | None,
    sampler: torchdata.Sampler | None = None,
    batch_size: int = 1,
    num_workers: int = 0,
    collate_fn: Callable | None = None,
) -> torchdata.DataLoader:
    """Every record once over all processes, in order, as lists of ``batch_size``; or, called as
    ``(cfg, dataset_name, mapper=None)``, a loader of that data set.
    """
    dataset = _mapped(dataset, mapper)
    if isinstance(dataset, torchdata.IterableDataset):
        assert sampler is None, "sampler must be None if dataset is IterableDataset"
    elif sampler is None:
        sampler = InferenceSampler(len(dataset))
    return torchdata.DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=collate_fn or trivial_batch_collator,
    )


def trivial_batch_collator(batch: list) -> list:
    """The batch as it is."""
    return batch


def worker_init_reset_seed(worker_id: int) -> None:
    """Seed torch, numpy and random in a worker process from torch's seed and its number."""
    seed_all_rng(torch.initial_seed() % 2**31 + worker_id)
