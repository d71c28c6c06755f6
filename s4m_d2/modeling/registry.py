"""The registry of transformer decoders, and registration beside Mask2Former's own package."""

from __future__ import annotations

from collections.abc import Callable

from fvcore.common.registry import Registry

TRANSFORMER_DECODER_REGISTRY = Registry("TRANSFORMER_DECODER")
TRANSFORMER_DECODER_REGISTRY.__doc__ = """
Transformer decoders, selected by ``MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME``.

A decoder is called with ``(cfg, in_channels)`` and maps (feature maps from coarse to fine, mask
features) to ``pred_logits``, ``pred_masks`` and ``aux_outputs``.
"""


def register_if_free(registry: Registry) -> Callable[[type], type]:
    """Register a class under its name unless the name is taken.

    Mask2Former's package registers some of the same names in Detectron2's registries, which refuse
    a second class. Both packages can be used in one process if Mask2Former is imported first;
    ``modeling.head`` finds our classes without the registry.
    """

    def register(cls: type) -> type:
        if cls.__name__ not in registry:
            registry.register(cls)
        return cls

    return register
