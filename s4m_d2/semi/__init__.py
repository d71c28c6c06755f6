"""The semi-supervised part of the method: pseudo-labels, refinement, ARP and the EMA teacher."""

from s4m_d2.semi.arp import ARP
from s4m_d2.semi.ema_teacher import EMATeacher
from s4m_d2.semi.pseudo_labels import select_pseudo_labels
from s4m_d2.semi.refinement import REFINER_REGISTRY, PointRefiner, build_refiner

__all__ = [
    "ARP",
    "REFINER_REGISTRY",
    "EMATeacher",
    "PointRefiner",
    "build_refiner",
    "select_pseudo_labels",
]
