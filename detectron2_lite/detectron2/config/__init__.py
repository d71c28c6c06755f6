"""Configuration: CfgNode, Detectron2's defaults, and @configurable."""

from .config import CfgNode, configurable, get_cfg

__all__ = ["CfgNode", "configurable", "get_cfg"]
