"""Records of the configured data sets, and loaders over them."""

from __future__ import annotations

import itertools
import logging
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.utils.data as torchdata
from detectron2.config import configurable
from detectron2.utils.comm import get_world_size
from detectron2.utils.env import seed_all_rng
from tabulate import tabulate

from .catalog import DatasetCatalog, MetadataCatalog
from .common import AspectRatioGroupedDataset, DatasetFromList, MapDataset
from .dataset_mapper import DatasetMapper
from .detection_utils import check_metadata_consistency
from .samplers import InferenceSampler, RepeatFactorTrainingSampler, TrainingSampler

logger = logging.getLogger(__name__)


def filter_images_with_only_crowd_annotations(dataset_dicts: list[dict]) -> list[dict]:
    """Keep the images with at least one annotation that is no crowd."""
    kept = [d for d in dataset_dicts if any(a.get("iscrowd", 0) == 0 for a in d["annotations"])]
    removed = len(dataset_dicts) - len(kept)
    logger.info(f"Removed {removed} images with no usable annotations. {len(kept)} images left.")
    return kept


def print_instances_class_histogram(dataset_dicts: list[dict], class_names: list[str]) -> None:
    """Log how many instances, crowds apart, each class has.

    Raises AssertionError for a category id outside [0, number of classes).
    """
    annos = itertools.chain.from_iterable(d["annotations"] for d in dataset_dicts)
    counts = Counter(a["category_id"] for a in annos if not a.get("iscrowd", 0))
    for category in counts:
        assert 0 <= category < len(class_names), (
            f"Got an invalid category_id={category} for a dataset of {len(class_names)} classes"
        )
    rows = [(name, counts[i]) for i, name in enumerate(class_names)]
    rows.append(("total", sum(counts.values())))
    table = tabulate(rows, headers=["category", "#instances"], tablefmt="pipe")
    logger.info(f"Distribution of instances among all {len(class_names)} categories:\n{table}")


def get_detection_dataset_dicts(
    names: str | Sequence[str], filter_empty: bool = True
) -> list[dict]:
    """Load the records of one or several data sets, whose classes must be the same.

    ``filter_empty`` drops images without annotations other than crowds. Raises KeyError for an
    unknown name, AssertionError for an empty data set or if nothing is left.
    """
    names = [names] if isinstance(names, str) else list(names)
    assert len(names), "No dataset name was given."
    loaded = [DatasetCatalog.get(name) for name in names]
    for name, dicts in zip(names, loaded, strict=True):
        assert len(dicts), f"Dataset '{name}' is empty!"

    dataset_dicts = list(itertools.chain.from_iterable(loaded))
    has_instances = "annotations" in dataset_dicts[0]
    if filter_empty and has_instances:
        dataset_dicts = filter_images_with_only_crowd_annotations(dataset_dicts)
    class_names = MetadataCatalog.get(names[0]).get("thing_classes")
    if has_instances and class_names is not None:
        check_metadata_consistency("thing_classes", names)
        print_instances_class_histogram(dataset_dicts, class_names)
    assert len(dataset_dicts), f"No valid data found in {','.join(names)}."
    return dataset_dicts


class _InterleavedSampler(torchdata.Sampler):
    """The order of ``num_workers`` workers that take turns, each with whole batches of indices."""

    def __init__(self, sampler: torchdata.Sampler, num_workers: int, batch_size: int):
        self._sampler, self._num_workers, self._batch_size = sampler, num_workers, batch_size

    def __iter__(self) -> Iterator[int]:
        indices = iter(self._sampler)
        while block := list(itertools.islice(indices, self._num_workers * self._batch_size)):
            for i in range(self._batch_size):
                yield from block[i :: self._batch_size]


def build_batch_data_loader(
    dataset: torchdata.Dataset, sampler: torchdata.Sampler, total_batch_size: int, *,
    aspect_ratio_grouping: bool = False, num_workers: int = 0, collate_fn: Callable | None = None,
    drop_last: bool = True, seed: int | None = None, **kwargs: Any,
) -> Iterable[list]:  # fmt: skip
    """Lists of ``total_batch_size / number of processes`` elements of a map-style data set.

    aspect_ratio_grouping: wide and high images never share a batch; excludes ``collate_fn``.
    seed: of the generator that seeds the workers. kwargs: for torch's DataLoader.
    """
    world_size = get_world_size()
    assert total_batch_size > 0 and total_batch_size % world_size == 0, (
        f"Total batch size ({total_batch_size}) must be divisible by the number of gpus "
        f"({world_size})."
    )
    batch_size = total_batch_size // world_size
    kwargs.update(sampler=sampler, num_workers=num_workers, worker_init_fn=worker_init_reset_seed)
    if seed is not None:
        kwargs["generator"] = torch.Generator().manual_seed(seed)
    if aspect_ratio_grouping:
        assert drop_last and collate_fn is None, "not available with aspect_ratio_grouping"
        # This loader makes batches of one, and the collation unwraps them.
        kwargs["sampler"] = _InterleavedSampler(sampler, max(num_workers, 1), batch_size)
        single = torchdata.DataLoader(dataset, collate_fn=operator.itemgetter(0), **kwargs)
        return AspectRatioGroupedDataset(single, batch_size)
    collate_fn = collate_fn or trivial_batch_collator
    return torchdata.DataLoader(
        dataset, batch_size, drop_last=drop_last, collate_fn=collate_fn, **kwargs
    )


def _build_sampler(cfg: Any, dataset: Sequence[dict]) -> torchdata.Sampler:
    name = cfg.DATALOADER.SAMPLER_TRAIN
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
    return {
        "dataset": dataset,
        "sampler": _build_sampler(cfg, dataset) if sampler is None else sampler,
        "mapper": mapper or DatasetMapper(cfg, True),
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
    dataset: list | torchdata.Dataset, *, mapper: Callable | None,
    sampler: torchdata.Sampler | None = None, total_batch_size: int,
    aspect_ratio_grouping: bool = True, **kwargs: Any,
) -> Iterable[list]:  # fmt: skip
    """An endless loader of mapped records; see :func:`build_batch_data_loader`.

    Called as ``(cfg, mapper=None, *, dataset=None, sampler=None)``, the one of the config.
    """
    dataset = _mapped(dataset, mapper)
    kwargs["aspect_ratio_grouping"] = aspect_ratio_grouping
    sampler = TrainingSampler(len(dataset)) if sampler is None else sampler
    return build_batch_data_loader(dataset, sampler, total_batch_size, **kwargs)


def _test_loader_from_config(
    cfg: Any, dataset_name: str | Sequence[str], mapper: Callable | None = None
) -> dict[str, Any]:
    return {
        "dataset": get_detection_dataset_dicts(dataset_name, filter_empty=False),
        "mapper": mapper or DatasetMapper(cfg, False),
        "num_workers": cfg.DATALOADER.NUM_WORKERS,
    }


@configurable(from_config=_test_loader_from_config)
def build_detection_test_loader(
    dataset: list | torchdata.Dataset, *, mapper: Callable | None,
    sampler: torchdata.Sampler | None = None, batch_size: int = 1, num_workers: int = 0,
    collate_fn: Callable | None = None,
) -> torchdata.DataLoader:  # fmt: skip
    """Every record once over all processes, in order, in lists of ``batch_size``.

    Called as ``(cfg, dataset_name, mapper=None)``, for that data set.
    """
    dataset = _mapped(dataset, mapper)
    return torchdata.DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=InferenceSampler(len(dataset)) if sampler is None else sampler,
        num_workers=num_workers,
        collate_fn=collate_fn or trivial_batch_collator,
    )


def trivial_batch_collator(batch: list) -> list:
    """The batch as it is."""
    return batch


def worker_init_reset_seed(worker_id: int) -> None:
    """Seed torch, numpy and random in a worker process from torch's seed and its number."""
    seed_all_rng(torch.initial_seed() % 2**31 + worker_id)
