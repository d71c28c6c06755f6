"""Pixel decoder, head, their registration and config errors."""

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY

from s4m_d2.modeling import MSDeformAttnPixelDecoder
from s4m_d2.modeling.pixel_decoder import register_if_free

SHAPES = {
    f"res{i + 2}": ShapeSpec(channels=8 * 2**i, stride=4 * 2**i, height=None, width=None)
    for i in range(4)
}


def random_features(batch=2, height=64, width=96):
    rng = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(batch, s.channels, height // s.stride, width // s.stride, generator=rng)
        for name, s in SHAPES.items()
    }


def test_fewer_encoder_levels_leave_more_to_the_pyramid(make_tiny_cfg):
    key = "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES"
    decoder = MSDeformAttnPixelDecoder(make_tiny_cfg(key, ["res4", "res5"]), SHAPES)
    mask_features, maps = decoder(random_features())
    assert mask_features.shape == (2, 64, 16, 24)
    assert [m.shape[-2:] for m in maps] == [(2, 3), (4, 6), (8, 12)]
    assert decoder.adapter_1.in_channels == 8 and decoder.adapter_2.in_channels == 16


def test_pixel_decoder_computes_in_float32_under_autocast(make_tiny_cfg):
    decoder, features = MSDeformAttnPixelDecoder(make_tiny_cfg(), SHAPES), random_features()
    expected, _ = decoder({name: f.bfloat16().float() for name, f in features.items()})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, maps = decoder({name: f.bfloat16() for name, f in features.items()})
    assert actual.dtype == torch.float32 and all(m.dtype == torch.float32 for m in maps)
    torch.testing.assert_close(actual, expected)


def test_a_name_that_is_taken_stays_with_its_owner():
    owner = SEM_SEG_HEADS_REGISTRY.get("MaskFormerHead")
    taken = type("MaskFormerHead", (), {})
    assert register_if_free(taken) is taken
    assert SEM_SEG_HEADS_REGISTRY.get("MaskFormerHead") is owner
