"""Drawing: instances on an image, heat maps, grids of pictures, videos."""

from s4m_d2.visualization.drawing import (
    FILL_ALPHA,
    ColorScale,
    box_colors,
    heat_map,
    mark_point,
    outline,
    overlay,
)
from s4m_d2.visualization.panels import Panels, evenly_spaced, panel_grid, write_png

__all__ = [
    "FILL_ALPHA",
    "ColorScale",
    "Panels",
    "box_colors",
    "evenly_spaced",
    "heat_map",
    "mark_point",
    "outline",
    "overlay",
    "panel_grid",
    "write_png",
]
