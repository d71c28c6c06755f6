"""Deformable sampling with one ``grid_sample`` a level: the reference of the faster forms."""

import torch
import torch.nn.functional as F


def level_by_level(value, level_sizes, locations, weights):
    """As ``deformable_sampling``, differentiated by autograd."""
    batch, _, heads, channels = value.shape
    queries = locations.shape[1]
    grids = (2 * locations - 1).transpose(1, 2).flatten(0, 1)  # B·heads, Q, levels, points, 2
    weights = weights.transpose(1, 2).flatten(0, 1)[:, None]  # B·heads, 1, Q, levels, points
    levels = value.permute(0, 2, 3, 1).flatten(0, 1).split([h * w for h, w in level_sizes], dim=-1)
    output = value.new_zeros(batch * heads, channels, queries)
    for index, (level, size) in enumerate(zip(levels, level_sizes, strict=True)):
        sampled = F.grid_sample(
            level.unflatten(-1, size), grids[:, :, index], mode="bilinear", align_corners=False
        )
        output = output + (sampled * weights[:, :, :, index]).sum(-1)
    return output.view(batch, heads * channels, queries).transpose(1, 2)


def random_inputs(
    level_sizes, *, batch=2, queries=5, heads=2, channels=3, points=2, dtype=torch.float64, seed=0
):
    """Values, locations (some outside, some far outside) and weights, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(h * w for h, w in level_sizes)
    shape = (batch, queries, heads, len(level_sizes), points)
    value = torch.randn(batch, total, heads, channels, generator=generator, dtype=torch.float64)
    locations = torch.rand(*shape, 2, generator=generator, dtype=torch.float64) * 1.4 - 0.2
    far = torch.rand(shape, generator=generator) < 0.1
    locations[far] = locations[far] * 2e4 - 1e4
    weights = torch.rand(shape, generator=generator, dtype=torch.float64)
    return [tensor.to(dtype) for tensor in (value, locations, weights)]


def with_gradients(function, value, level_sizes, locations, weights, grad_output):
    """Output and the three gradients."""
    inputs = [tensor.detach().requires_grad_() for tensor in (value, locations, weights)]
    output = function(inputs[0], level_sizes, *inputs[1:])
    return [output.detach(), *torch.autograd.grad(output, inputs, grad_output.to(output))]
