"""Layers that need nothing but torch."""

from s4m_d2.layers.ms_deform_attn import MSDeformAttn, deformable_sampling
from s4m_d2.layers.position_encoding import cell_centers, sine_position_encoding

__all__ = ["MSDeformAttn", "cell_centers", "deformable_sampling", "sine_position_encoding"]
