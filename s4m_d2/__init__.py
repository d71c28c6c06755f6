"""S4M: semi-supervised instance segmentation with a foundation model, for Detectron2."""

try:
    import detectron2  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "detectron2":  # an engine is there but broken: its own error says why
        raise
    raise ImportError(
        "s4m_d2 needs an engine that provides the module 'detectron2'. Install one of the two:\n"
        "  the embedded one: pip install ./detectron2_lite   (in the checkout of s4m_d2)\n"
        "  Detectron2 itself: https://detectron2.readthedocs.io/tutorials/install.html"
    ) from None

__version__ = "0.1.0"

from s4m_d2.config import add_s4m_config
from s4m_d2.data import ARPDatasetMapper, LabeledDatasetMapper
from s4m_d2.engine import EMATeacherHook, S4MCheckpointer, S4MTrainer, TeacherTrainer
from s4m_d2.losses.structural_distillation import StructuralDistillation
from s4m_d2.modeling import S4MMaskFormer
from s4m_d2.sam import build_sam_backend
from s4m_d2.semi import ARP, EMATeacher, PointRefiner
from s4m_d2.structures import PseudoLabels

__all__ = [
    "ARP",
    "ARPDatasetMapper",
    "EMATeacher",
    "EMATeacherHook",
    "LabeledDatasetMapper",
    "PointRefiner",
    "PseudoLabels",
    "S4MCheckpointer",
    "S4MMaskFormer",
    "S4MTrainer",
    "StructuralDistillation",
    "TeacherTrainer",
    "add_s4m_config",
    "build_sam_backend",
]
