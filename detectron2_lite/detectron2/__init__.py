"""The part of Detectron2's API that s4m_d2 uses, in pure Python."""

__version__ = "0.6+lite"
