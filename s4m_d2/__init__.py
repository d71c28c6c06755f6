"""S4M: semi-supervised instance segmentation with a foundation model, for Detectron2.

Importing it registers the models, data sets, mappers, refiners, SAM backends and distillation.
"""

try:
    import detectron2  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "detectron2":  # an engine is installed but broken: show its own error
        raise
    raise ImportError(
        "s4m_d2 needs an engine that provides the module 'detectron2'. Install one of the two:\n"
        "  the embedded one: pip install ./detectron2_lite   (in the checkout of s4m_d2)\n"
        "  Detectron2 itself: https://detectron2.readthedocs.io/tutorials/install.html"
    ) from None

from s4m_d2.config import add_s4m_config
from s4m_d2.data import (
    DATASET_MAPPER_REGISTRY,
    ARPDatasetMapper,
    LabeledDatasetMapper,
    register_splits,
    register_unlabeled_folder,
)
from s4m_d2.engine import EMATeacherHook, S4MCheckpointer, S4MTrainer, TeacherTrainer
from s4m_d2.engine.config_file import load_config
from s4m_d2.errors import ConfigError, DatasetError, InputError, S4MError, WeightsError
from s4m_d2.evaluation import build_evaluator
from s4m_d2.losses.structural_distillation import DISTILLATION_REGISTRY, StructuralDistillation
from s4m_d2.modeling import TRANSFORMER_DECODER_REGISTRY, S4MMaskFormer
from s4m_d2.sam import SAM_BACKEND_REGISTRY, SamBackend, build_sam_backend
from s4m_d2.semi import ARP, REFINER_REGISTRY, EMATeacher, PointRefiner, select_pseudo_labels
from s4m_d2.sepl.refiner import SEPLRefiner
from s4m_d2.structures import PseudoLabels

__version__ = "0.1.0"

__all__ = [
    "ARP",
    "DATASET_MAPPER_REGISTRY",
    "DISTILLATION_REGISTRY",
    "REFINER_REGISTRY",
    "SAM_BACKEND_REGISTRY",
    "TRANSFORMER_DECODER_REGISTRY",
    "ARPDatasetMapper",
    "ConfigError",
    "DatasetError",
    "EMATeacher",
    "EMATeacherHook",
    "InputError",
    "LabeledDatasetMapper",
    "PointRefiner",
    "PseudoLabels",
    "S4MCheckpointer",
    "S4MError",
    "S4MMaskFormer",
    "S4MTrainer",
    "SEPLRefiner",
    "SamBackend",
    "StructuralDistillation",
    "TeacherTrainer",
    "WeightsError",
    "add_s4m_config",
    "build_evaluator",
    "build_sam_backend",
    "load_config",
    "register_splits",
    "register_unlabeled_folder",
    "select_pseudo_labels",
]
