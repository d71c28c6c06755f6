"""Drawing, on libraries: instances on an image, and grids of pictures."""

from s4m_d2.visualization.instances import FILL_ALPHA, instance_colors, overlay
from s4m_d2.visualization.panels import panel_figure, panel_grid

__all__ = ["FILL_ALPHA", "instance_colors", "overlay", "panel_figure", "panel_grid"]
