# ruff: noqa: F401
"""Catalogs, loading, augmentation and batching. Importing it registers the builtin data sets."""

from . import transforms  # isort: skip

from .build import (
    build_batch_data_loader,
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
    print_instances_class_histogram,
)
from .catalog import DatasetCatalog, Metadata, MetadataCatalog
from .common import DatasetFromList, MapDataset, ToIterableDataset
from .dataset_mapper import DatasetMapper

from . import datasets, samplers  # isort: skip

__all__ = [name for name in globals() if not name.startswith("_")]
