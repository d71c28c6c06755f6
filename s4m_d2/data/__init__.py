"""Data sets, views and loaders; importing it registers the data sets and the mappers."""

from s4m_d2.data.build import DATASET_MAPPER_REGISTRY, StreamLoader
from s4m_d2.data.cityscapes import CityscapesFormat
from s4m_d2.data.mappers import ARPDatasetMapper, LabeledDatasetMapper, TrueLabelsMapper
from s4m_d2.data.splits import (
    CocoFormat,
    labeled_dataset_names,
    register_splits,
    register_unlabeled_folder,
    stable_subset,
    true_records,
)
from s4m_d2.data.strong_view import StrongView
from s4m_d2.data.transforms import GEOMETRY_REGISTRY, ColorDistortion

__all__ = [
    "DATASET_MAPPER_REGISTRY",
    "GEOMETRY_REGISTRY",
    "ARPDatasetMapper",
    "CityscapesFormat",
    "CocoFormat",
    "ColorDistortion",
    "LabeledDatasetMapper",
    "StreamLoader",
    "StrongView",
    "TrueLabelsMapper",
    "labeled_dataset_names",
    "register_splits",
    "register_unlabeled_folder",
    "stable_subset",
    "true_records",
]
