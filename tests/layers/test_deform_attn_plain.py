"""Deformable sampling in plain PyTorch against one ``grid_sample`` a level."""

import pytest
import torch
from benchmarking.plain import deformable_sampling as level_by_level
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_cases import SIZES, SpecialCases, random_inputs, with_gradients

from s4m_d2.layers import MSDeformAttn, deform_attn_plain, deformable_sampling

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def no_kernels(monkeypatch):
    monkeypatch.setattr("s4m_d2.layers.ms_deform_attn.USE_TRITON", False)


def assert_all_close(actual, expected, tolerance):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double().cpu(), b.cpu(), rtol=tolerance, atol=tolerance)


@settings(max_examples=25)
@given(
    level_sizes=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=3),
    batch=st.integers(1, 3),
    queries=st.integers(1, 9),
    heads=st.integers(1, 3),
    channels=st.integers(1, 9),
    points=st.integers(1, 4),
    piece=st.integers(1, 60),
    seed=st.integers(0, 1000),
)
def test_output_and_gradients_equal_the_reference(level_sizes, piece, **shape):
    inputs = random_inputs(level_sizes, **shape)
    grad = torch.randn(
        shape["batch"],
        shape["queries"],
        shape["heads"] * shape["channels"],
        generator=torch.Generator().manual_seed(shape["seed"]),
        dtype=torch.float64,
    )
    arguments = (inputs[0], level_sizes, *inputs[1:], grad)
    expected = with_gradients(level_by_level, *arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deform_attn_plain, "_PIECE", piece)
        assert_all_close(with_gradients(deformable_sampling, *arguments), expected, 1e-8)


@pytest.mark.parametrize("device", DEVICES)
def test_single_precision_of_views_with_strides(device):
    value, locations, weights = random_inputs(SIZES, queries=7, channels=4, dtype=torch.float32)
    grad = torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(1))
    inputs = (value.double(), SIZES, locations.double(), weights.double(), grad.double())
    expected = with_gradients(level_by_level, *inputs)
    strided = [
        tensor.to(device).transpose(0, 1).contiguous().transpose(0, 1)
        for tensor in (value, locations, weights, grad)
    ]
    actual = with_gradients(deformable_sampling, strided[0], SIZES, *strided[1:])
    assert_all_close(actual, expected, 2e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_results_do_not_depend_on_the_run_or_on_threads(device):
    arguments = random_inputs(SIZES, queries=100, heads=3, channels=16, dtype=torch.float32)
    arguments = [tensor.to(device) for tensor in arguments]
    grad = torch.randn(2, 100, 48, generator=torch.Generator().manual_seed(1)).to(device)
    runs = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            runs.append(
                with_gradients(deformable_sampling, arguments[0], SIZES, *arguments[1:], grad)
            )
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        for first, again in zip(runs[0], run, strict=True):
            assert torch.equal(first, again)


def test_nothing_but_the_inputs_is_kept_for_the_backward():
    inputs = random_inputs(SIZES, queries=50, dtype=torch.float32)
    inputs = [tensor.requires_grad_() for tensor in inputs]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
        deformable_sampling(inputs[0], SIZES, *inputs[1:])
    storages = {tensor.untyped_storage().data_ptr() for tensor in kept}
    assert storages == {tensor.untyped_storage().data_ptr() for tensor in inputs}


@pytest.mark.parametrize("device", ["cpu"])
class TestSpecialCases(SpecialCases):
    sample = staticmethod(deformable_sampling)


def test_autocast_changes_the_projections_only():
    torch.manual_seed(0)
    layer = MSDeformAttn(embed_dim=8, num_levels=3, num_heads=2, num_points=2)
    query, value = torch.randn(1, 6, 8), torch.randn(1, 27, 8)
    points = torch.rand(1, 6, 2)
    expected = layer(query, points, value, SIZES)
    with torch.autocast("cpu", torch.bfloat16):
        actual = layer(query, points, value, SIZES)
        actual.float().sum().backward()
    torch.testing.assert_close(actual.float(), expected, rtol=0.05, atol=0.05)
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())
    assert layer.value_proj.weight.grad.abs().max() > 0
