"""The pyramid of a plain ViT: ViTDet's layers and exact strides. Needs no timm."""

import pytest
import torch
from torch.nn import functional as F

from s4m_d2.modeling.timm_backbone import SimpleFeaturePyramid, resize_to_grid


def test_a_patch_covers_a_whole_stride_of_the_image():
    """On a ramp, the mean of a 14 px patch is the value at the center of 16 px of the image."""
    ramp_x = torch.arange(128.0).expand(1, 1, 64, 128)
    ramp_y = torch.arange(64.0)[:, None].expand(1, 1, 64, 128)
    resized = resize_to_grid(torch.cat([ramp_x, ramp_y], 1), patch=14, stride=16)
    assert resized.shape == (1, 2, 56, 112)
    means = F.avg_pool2d(resized, 14)[0, :, 1:-1, 1:-1]  # the border has no outer neighbor
    centers_x, centers_y = 16 * torch.arange(8.0) + 7.5, 16 * torch.arange(4.0) + 7.5
    torch.testing.assert_close(means[0], centers_x[1:-1].expand(2, 6), rtol=0, atol=1e-3)
    torch.testing.assert_close(means[1], centers_y[1:-1, None].expand(2, 6), rtol=0, atol=1e-3)


@torch.no_grad()
def test_the_pyramid_is_vitdet_s():
    """Each level computed by hand, on a map of stride 16."""
    torch.manual_seed(0)
    pyramid = SimpleFeaturePyramid(in_channels=8, stride=16, out_channels=6)
    for parameter in pyramid.parameters():
        torch.nn.init.normal_(parameter)
    weights = {name: value.double() for name, value in pyramid.state_dict().items()}
    x = torch.randn(2, 8, 4, 6, dtype=torch.float64)

    def upsample(x, name):
        """A 2 x 2 kernel at stride 2: every input pixel becomes a block of its own."""
        blocks = torch.einsum("bchw,cdij->bdhiwj", x, weights[f"{name}.weight"])
        blocks = blocks.flatten(4, 5).flatten(2, 3)
        return blocks + weights[f"{name}.bias"][:, None, None]

    def norm(x, name):
        deviation = x - x.mean(1, keepdim=True)
        x = deviation / (deviation.square().mean(1, keepdim=True) + 1e-6).sqrt()
        return x * weights[f"{name}.weight"][:, None, None] + weights[f"{name}.bias"][:, None, None]

    def project(x, level, first):
        x = torch.einsum("bchw,dc->bdhw", x, weights[f"{level}.{first}.weight"][..., 0, 0])
        x = norm(x, f"{level}.{first + 1}")
        x = F.conv2d(x, weights[f"{level}.{first + 2}.weight"], padding=1)
        return norm(x, f"{level}.{first + 3}")

    quarter = F.gelu(norm(upsample(x, "levels.0.0"), "levels.0.1"))
    halves = x.unflatten(2, (2, 2)).unflatten(4, (3, 2))
    expected = [
        project(upsample(quarter, "levels.0.3"), "levels.0", 4),
        project(upsample(x, "levels.1.0"), "levels.1", 1),
        project(x, "levels.2", 0),
        project(halves.amax(dim=(3, 5)), "levels.3", 1),
    ]
    for actual, reference in zip(pyramid.double()(x), expected, strict=True):
        torch.testing.assert_close(actual, reference)


@pytest.mark.parametrize(("stride", "sizes"), [(8, (8, 4, 2, 1)), (32, (32, 16, 8, 4))])
def test_a_pyramid_starts_at_any_power_of_two(stride, sizes):
    pyramid = SimpleFeaturePyramid(in_channels=16, stride=stride, out_channels=4)
    maps = pyramid(torch.zeros(1, 16, 4, 4))
    assert [tuple(level.shape) for level in maps] == [(1, 4, size, size) for size in sizes]
