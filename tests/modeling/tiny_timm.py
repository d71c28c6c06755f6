"""Small models registered with timm, for tests without downloads."""

import pytest

timm = pytest.importorskip("timm")

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model  # noqa: E402
from timm.models.swin_transformer import SwinTransformer  # noqa: E402
from timm.models.swin_transformer_v2 import SwinTransformerV2  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402

SWIN_DEPTHS, SWIN_HEADS, SWIN_WINDOW, SWIN_CHANNELS = (2, 2, 3, 2), (1, 2, 2, 4), 3, 8
VIT_FILE = "s4m_vit14.pth"  # its "pre-trained weights": a file in the working directory

_COLORS = {"url": "", "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
default_cfgs = generate_default_cfgs(
    {
        "s4m_swin": _COLORS,
        "s4m_swinv2": _COLORS,
        "s4m_vit14.file": {"file": VIT_FILE, **_COLORS},
    }
)


def _build(cls, name, pretrained, kwargs, **sizes):
    return build_model_with_cfg(cls, name, pretrained, **{**sizes, **kwargs})


SWIN = {
    "img_size": 24,  # smaller than a window at the last stage
    "window_size": SWIN_WINDOW,
    "embed_dim": SWIN_CHANNELS,
    "depths": SWIN_DEPTHS,
    "num_heads": SWIN_HEADS,
}


@register_model
def s4m_swin(pretrained=False, **kwargs):
    """Pads at each stage for images of 64 x 96: 16 x 24, 8 x 12, 4 x 6 and 2 x 3, windows of 3."""
    return _build(SwinTransformer, "s4m_swin", pretrained, kwargs, **SWIN)


@register_model
def s4m_swinv2(pretrained=False, **kwargs):
    return _build(SwinTransformerV2, "s4m_swinv2", pretrained, kwargs, **SWIN)


@register_model
def s4m_vit14(pretrained=False, **kwargs):
    return _build(
        VisionTransformer,
        "s4m_vit14",
        pretrained,
        kwargs,
        img_size=70,
        patch_size=14,
        embed_dim=32,
        depth=2,
        num_heads=2,
        init_values=1.0,
        reg_tokens=2,
    )
