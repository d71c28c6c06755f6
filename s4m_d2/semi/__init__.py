"""The semi-supervised part of the method: pseudo-labels, refinement, ARP and the EMA teacher."""

from s4m_d2.semi.arp import ARP
from s4m_d2.semi.burn_in import TeacherPhase, teacher_phase
from s4m_d2.semi.ema_teacher import EMATeacher
from s4m_d2.semi.pseudo_labels import Selection, select_pseudo_labels
from s4m_d2.semi.refinement import (
    REFINER_REGISTRY,
    PointRefiner,
    Refinement,
    TeacherMasks,
    build_refiner,
)

__all__ = [
    "ARP",
    "REFINER_REGISTRY",
    "EMATeacher",
    "PointRefiner",
    "Refinement",
    "Selection",
    "TeacherMasks",
    "TeacherPhase",
    "build_refiner",
    "select_pseudo_labels",
    "teacher_phase",
]
