"""Training: the trainers of the stages, their hooks, loaders, checkpoints and checks."""

from s4m_d2.engine.checkpointing.checkpoint import S4MCheckpointer
from s4m_d2.engine.labeling.protocol import S4MTrainable
from s4m_d2.engine.labeling.pseudo_labeling import PseudoLabeling
from s4m_d2.engine.labeling.quality import QualityMeasurement
from s4m_d2.engine.stages import run_config, stage_config
from s4m_d2.engine.training.build import build_optimizer
from s4m_d2.engine.training.hooks import BadSteps, EMATeacherHook
from s4m_d2.engine.training.step import StudentStep, TeacherStep
from s4m_d2.engine.training.trainer import FineTuneTrainer, S4MTrainer, TeacherTrainer

__all__ = [
    "BadSteps",
    "EMATeacherHook",
    "FineTuneTrainer",
    "PseudoLabeling",
    "QualityMeasurement",
    "S4MCheckpointer",
    "S4MTrainable",
    "S4MTrainer",
    "StudentStep",
    "TeacherStep",
    "TeacherTrainer",
    "build_optimizer",
    "run_config",
    "stage_config",
]
