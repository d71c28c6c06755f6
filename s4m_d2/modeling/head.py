"""The segmentation head: pixel decoder and transformer decoder."""

from __future__ import annotations

from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import Tensor, nn

from s4m_d2.errors import ConfigError, registered, require
from s4m_d2.modeling.pixel_decoder import MSDeformAttnPixelDecoder, register_if_free
from s4m_d2.modeling.transformer_decoder import TRANSFORMER_DECODER_REGISTRY


@register_if_free
class MaskFormerHead(nn.Module):
    """Pixel decoder and transformer decoder: maps of the backbone -> classes and masks.

    Args:
        num_classes: object classes, without "no object".
        pixel_decoder: backbone maps -> (mask features, three maps from coarse to fine).
        transformer_predictor: (maps, mask features) -> predictions.
    """

    _version = 2  # as Mask2Former's of these names, whose loading would rename our weights else

    @configurable
    def __init__(
        self, *, num_classes: int, pixel_decoder: nn.Module, transformer_predictor: nn.Module
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.pixel_decoder = pixel_decoder
        self.predictor = transformer_predictor

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]) -> dict:
        head = cfg.MODEL.SEM_SEG_HEAD
        missing = sorted(set(head.IN_FEATURES) - set(input_shape))
        if missing:
            raise ConfigError(
                f"MODEL.SEM_SEG_HEAD.IN_FEATURES names {missing}, which the backbone does not "
                f"return; it returns {sorted(input_shape)} (MODEL.RESNETS.OUT_FEATURES)"
            )
        former, key = cfg.MODEL.MASK_FORMER, "MODEL.MASK_FORMER.TRANSFORMER"
        source, name = former.TRANSFORMER_IN_FEATURE, former.TRANSFORMER_DECODER_NAME
        multi_scale = "multi_scale_pixel_decoder"
        require(f"{key}_IN_FEATURE", source, source == multi_scale, repr(multi_scale))
        predictor = registered(TRANSFORMER_DECODER_REGISTRY, f"{key}_DECODER_NAME", name)
        return {
            "num_classes": head.NUM_CLASSES,
            "pixel_decoder": build_head(cfg, input_shape, "PIXEL_DECODER_NAME"),
            "transformer_predictor": predictor(cfg, head.CONVS_DIM),
        }

    def forward(
        self, features: dict[str, Tensor], *, aux_outputs: bool = True
    ) -> dict[str, Tensor | list[dict[str, Tensor]]]:
        """Predict.

        Args:
            features: backbone maps (B, C_i, H_i, W_i) by name.
            aux_outputs: also predict from every decoder layer but the last (deep supervision).

        Returns:
            those of the transformer decoder, and ``mask_features`` (B, C, h, w).
        """
        mask_features, maps = self.pixel_decoder(features)
        outputs = self.predictor(maps, mask_features, aux_outputs=aux_outputs)
        return {**outputs, "mask_features": mask_features}


def build_head(cfg, input_shape: dict[str, ShapeSpec], key: str = "NAME") -> nn.Module:
    """Build our class with the name in ``MODEL.SEM_SEG_HEAD[key]``, or else the registered one."""
    name = cfg.MODEL.SEM_SEG_HEAD[key]
    ours = {cls.__name__: cls for cls in (MaskFormerHead, MSDeformAttnPixelDecoder)}
    if name in ours:
        return ours[name](cfg, input_shape)
    return registered(SEM_SEG_HEADS_REGISTRY, f"MODEL.SEM_SEG_HEAD.{key}", name)(cfg, input_shape)
