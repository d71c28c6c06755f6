"""The model; importing this registers its parts."""

from s4m_d2.modeling.backbones import TimmBackbone, build_timm_backbone
from s4m_d2.modeling.head import MaskFormerHead
from s4m_d2.modeling.inference import instance_inference
from s4m_d2.modeling.meta_arch import S4MMaskFormer
from s4m_d2.modeling.pixel_decoder import MSDeformAttnPixelDecoder
from s4m_d2.modeling.registry import TRANSFORMER_DECODER_REGISTRY
from s4m_d2.modeling.transformer_decoder import (
    MultiScaleMaskedTransformerDecoder,
    build_transformer_decoder,
)

__all__ = [
    "TRANSFORMER_DECODER_REGISTRY",
    "MSDeformAttnPixelDecoder",
    "MaskFormerHead",
    "MultiScaleMaskedTransformerDecoder",
    "S4MMaskFormer",
    "TimmBackbone",
    "build_timm_backbone",
    "build_transformer_decoder",
    "instance_inference",
]
