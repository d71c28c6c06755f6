"""Point sampling as in PointRend (Kirillov et al., CVPR 2020)."""

from . import point_features as point_features
