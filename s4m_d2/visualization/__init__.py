"""Drawing: instances on an image, heat maps, grids of pictures, videos."""

from s4m_d2.visualization.heat import ColorScale, heat_map, mark_point, outline
from s4m_d2.visualization.instances import FILL_ALPHA, box_colors, overlay
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
