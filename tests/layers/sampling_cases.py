"""Random inputs of deformable sampling, and what every form of it must do with special ones."""

import pytest
import torch

SIZES = [(2, 3), (1, 1), (4, 5)]


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


class SpecialCases:
    """Tests of a form of the sampling, ``sample``, on a ``device``."""

    @pytest.mark.parametrize("broken", [float("nan"), -float("inf")])
    def test_a_broken_location_spoils_its_own_query_at_most(self, broken, device):
        """NaN spoils its own query and head; what is infinitely far away is outside."""
        value, locations, weights = random_inputs(SIZES, dtype=torch.float32)
        locations[1, 2, 1, 0, 1, 0] = broken
        inputs = [x.to(device) for x in (value, locations, weights, torch.ones(2, 5, 6))]
        output, *grads = with_gradients(self.sample, inputs[0], SIZES, *inputs[1:])
        spoiled = torch.zeros(2, 5, 6, dtype=torch.bool)
        spoiled[1, 2, 3:] = broken != broken
        assert torch.equal(output.isnan().cpu(), spoiled)
        assert all(gradient[0].isfinite().all() for gradient in grads)
        assert grads[0][1, :, 0].isfinite().all()

    @pytest.mark.parametrize(("batch", "queries"), [(0, 3), (2, 0)])
    def test_nothing_to_look_up(self, batch, queries, device):
        inputs = random_inputs(SIZES, batch=batch, queries=queries, dtype=torch.float32)
        value, *others = (x.to(device) for x in (*inputs, torch.zeros(batch, queries, 6)))
        output, *grads = with_gradients(self.sample, value, SIZES, *others)
        assert output.shape == others[-1].shape
        assert not any(gradient.any() for gradient in grads)
        assert [gradient.shape for gradient in grads] == [x.shape for x in inputs]
