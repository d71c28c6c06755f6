"""The model; importing this registers its parts."""

from s4m_d2.modeling.meta_arch import MaskFormerHead, S4MMaskFormer
from s4m_d2.modeling.pixel_decoder import MSDeformAttnPixelDecoder
from s4m_d2.modeling.timm_backbone import TimmBackbone
from s4m_d2.modeling.transformer_decoder import (
    TRANSFORMER_DECODER_REGISTRY,
    MultiScaleMaskedTransformerDecoder,
)

__all__ = [
    "TRANSFORMER_DECODER_REGISTRY",
    "MSDeformAttnPixelDecoder",
    "MaskFormerHead",
    "MultiScaleMaskedTransformerDecoder",
    "S4MMaskFormer",
    "TimmBackbone",
]
