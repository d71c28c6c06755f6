"""Training: the two trainers, their hooks, loaders, checkpoints and checks."""

from s4m_d2.engine.build import build_optimizer, run_config, stage_config
from s4m_d2.engine.checkpoint import S4MCheckpointer
from s4m_d2.engine.hooks import EMATeacherHook, SeedHook
from s4m_d2.engine.protocol import QueryPredictions, S4MTrainable
from s4m_d2.engine.pseudo_labeling import PseudoLabeling, TeacherStudentModel
from s4m_d2.engine.trainer import S4MTrainer, TeacherTrainer, stage_is_finished

__all__ = [
    "EMATeacherHook",
    "PseudoLabeling",
    "QueryPredictions",
    "S4MCheckpointer",
    "S4MTrainable",
    "S4MTrainer",
    "SeedHook",
    "TeacherStudentModel",
    "TeacherTrainer",
    "build_optimizer",
    "run_config",
    "stage_config",
    "stage_is_finished",
]
