"""Catalogs, loading, augmentation and batching. Importing it registers the builtin data sets."""
# ruff: noqa: F401

from . import datasets, samplers, transforms
from .build import (
    build_batch_data_loader,
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
    print_instances_class_histogram,
)
from .catalog import DatasetCatalog, Metadata, MetadataCatalog
from .common import DatasetFromList, MapDataset
from .dataset_mapper import DatasetMapper

__all__ = [name for name in globals() if not name.startswith("_")]
