"""Data sets, views and loaders; importing it registers the data sets and the mappers."""

from s4m_d2.data.build import DATASET_MAPPER_REGISTRY, StreamLoader, build_stream_loader
from s4m_d2.data.cityscapes import CityscapesFormat
from s4m_d2.data.coco import CocoFormat
from s4m_d2.data.mappers import ARPDatasetMapper, LabeledDatasetMapper
from s4m_d2.data.splits import (
    labeled_dataset_names,
    register_splits,
    register_unlabeled_folder,
)
from s4m_d2.data.strong_view import StrongView
from s4m_d2.data.subsets import stable_subset
from s4m_d2.data.transforms import GEOMETRY_REGISTRY, ColorDistortion
from s4m_d2.data.true_labels import TrueLabelsMapper, true_records

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
    "build_stream_loader",
    "labeled_dataset_names",
    "register_splits",
    "register_unlabeled_folder",
    "stable_subset",
    "true_records",
]
