"""Layers that need nothing but torch."""

from s4m_d2.layers.ms_deform_attn import MSDeformAttn, deformable_sampling
from s4m_d2.layers.position_encoding import cell_centers, sine_position_encoding
from s4m_d2.layers.weight_init import xavier_fill

__all__ = [
    "MSDeformAttn",
    "cell_centers",
    "deformable_sampling",
    "sine_position_encoding",
    "xavier_fill",
]
