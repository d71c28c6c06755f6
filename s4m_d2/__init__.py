"""S4M: semi-supervised instance segmentation with a foundation model, for Detectron2."""

try:
    import detectron2  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "detectron2":  # an engine is there but broken: its own error says why
        raise
    raise ImportError(
        "s4m_d2 needs an engine that provides the module 'detectron2'. Install one of the two:\n"
        "  the embedded one: pip install ./detectron2_lite   (in the checkout of s4m_d2)\n"
        "  Detectron2 itself: https://detectron2.readthedocs.io/tutorials/install.html"
    ) from None

__version__ = "0.1.0"
