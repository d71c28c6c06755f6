"""The Triton kernels of deformable sampling.

On a GPU the tests run as they are. Without one, a process of its own runs this file once more with
the kernels on the CPU, in Triton's interpreter, and the kernels are compiled for a GPU.
"""

import os
import re
import subprocess
import sys

import pytest
import torch
from benchmarking.plain import deformable_sampling as level_by_level
from sampling_cases import SIZES, SpecialCases, random_inputs, with_gradients

from s4m_d2.layers import deformable_sampling, ms_deform_attn

pytest.importorskip("triton", reason="Triton comes with torch's builds for CUDA only")
from s4m_d2.layers import deform_attn_triton as kernels  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)]
on_device = pytest.mark.parametrize("device", DEVICES)
SHAPES = {
    "one cell": ([(1, 1)], dict(batch=1, queries=4, heads=1, channels=1, points=3)),
    "odd sizes": (SIZES, dict(batch=2, queries=7, heads=3, channels=5, points=1)),
    "many programs": ([(5, 3), (2, 7)], dict(batch=2, queries=5, heads=2, channels=40, points=1)),
}
sample = kernels.TritonDeformableSampling.apply
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def random_case(name, device, *, dtype=torch.float32, others=torch.float32):
    """Arguments of the kernels, and output and gradients of the reference in double precision."""
    level_sizes, shape = SHAPES[name]
    value, locations, weights = random_inputs(level_sizes, **shape)
    inputs = [value.to(dtype), locations.to(others), weights.to(others)]
    rows = (len(value), locations.shape[1], value.shape[2] * value.shape[3])
    grad = torch.randn(rows, generator=torch.Generator().manual_seed(1)).to(dtype)
    doubles = [tensor.double() for tensor in (*inputs, grad)]
    expected = with_gradients(level_by_level, doubles[0], level_sizes, *doubles[1:])
    inputs = [tensor.to(device) for tensor in (*inputs, grad)]
    return (inputs[0], level_sizes, *inputs[1:]), expected


def assert_close_to_scale(actual, expected, tolerances):
    """Differences are at most the tolerance times the largest value expected."""
    for a, b, tolerance in zip(actual, expected, tolerances, strict=True):
        allowed = tolerance * max(1.0, b.abs().max().item())
        torch.testing.assert_close(a.double().cpu(), b, rtol=0, atol=allowed)


@on_device
@pytest.mark.parametrize("name", SHAPES)
def test_output_and_gradients_equal_the_reference_in_double_precision(name, device):
    arguments, expected = random_case(name, device)
    assert_close_to_scale(with_gradients(sample, *arguments), expected, [1e-5] * 4)


@on_device
@pytest.mark.parametrize(
    ("dtype", "others"), [(torch.bfloat16, torch.float32), (torch.float16, torch.float16)]
)
def test_half_precision_rounds_inputs_and_results_only(dtype, others, device):
    """With the other inputs in float32, as under autocast, and without."""
    arguments, expected = random_case("odd sizes", device, dtype=dtype, others=others)
    results = with_gradients(sample, *arguments)
    kinds = [dtype, dtype, others, others]
    assert [tensor.dtype for tensor in results] == kinds
    assert_close_to_scale(results, expected, [TOLERANCES[kind] for kind in kinds])


@on_device
def test_deterministic_backward_is_the_same_again_also_of_views_with_strides(device, deterministic):
    (value, sizes, *others), expected = random_case("many programs", device)
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (value, *others)]
    first, again = (with_gradients(sample, strided[0], sizes, *strided[1:]) for _ in range(2))
    assert_close_to_scale(first, expected, [1e-5] * 4)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)


@on_device
class TestSpecialCases(SpecialCases):
    sample = staticmethod(sample)


@pytest.mark.gpu
def test_tensors_on_a_gpu_go_to_the_kernels_unless_switched_off(monkeypatch):
    launched = []
    launch = kernels._launch
    monkeypatch.setattr(kernels, "_launch", lambda *args: (launched.append(1), launch(*args)))
    (*arguments, grad), expected = random_case("odd sizes", "cuda")
    ms_deform_attn._kernels_compile(arguments[0].device)
    launched.clear()
    results = with_gradients(deformable_sampling, *arguments, grad)
    assert len(launched) == 2
    assert_close_to_scale(results, expected, [1e-5] * 4)
    value, sizes, *others = arguments
    doubles = [tensor.double() for tensor in others]
    results = with_gradients(deformable_sampling, value.double(), sizes, *doubles, grad)
    assert_close_to_scale(results, expected, [1e-6] * 4)
    monkeypatch.setattr(ms_deform_attn, "USE_TRITON", False)
    with_gradients(deformable_sampling, *arguments, grad)
    assert len(launched) == 2


def test_without_a_compiler_the_plain_form_is_taken_with_one_warning(monkeypatch, caplog):
    def launch(*args):
        raise RuntimeError("Failed to find C compiler.\nAnd much more")

    monkeypatch.setattr(kernels, "_launch", launch)
    ms_deform_attn._kernels_compile.cache_clear()
    compiles = [ms_deform_attn._kernels_compile(torch.device("cpu")) for _ in range(2)]
    ms_deform_attn._kernels_compile.cache_clear()
    assert compiles == [False, False]
    [record] = caplog.records
    assert "C compiler" in record.message and "much more" not in record.message


@pytest.mark.skipif(INTERPRETED, reason="this is what it starts")
def test_the_tests_above_in_tritons_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", __file__, "-q", "-p", "no:cacheprovider"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stdout + run.stderr
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) >= 11, run.stdout


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("name", ["_forward_kernel", "_backward_kernel"])
def test_kernels_compile_for_a_gpu(name, tmp_path, monkeypatch):
    """What the interpreter accepts, the compiler may refuse; no GPU is needed for it."""
    # Older ones take constants in another form.
    compiler = pytest.importorskip("triton", minversion="3.3").compiler
    target = pytest.importorskip("triton.backends.compiler").GPUTarget("cuda", 80, 32)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"levels": 3, "points": 4, "block": 32, "tile": 32}
    kernel = getattr(kernels, name)
    kinds = dict.fromkeys(("sums", "queries", "cells", "heads", "channels"), "i32")
    kinds |= dict.fromkeys(("value", "output", "grad_output"), "*bf16") | {"table": "*i32"}
    kinds |= dict.fromkeys(constants, "constexpr")
    signature = {argument: kinds.get(argument, "*fp32") for argument in kernel.arg_names}
    source = compiler.ASTSource(kernel, signature, constexprs=constants)
    assembly = compiler.compile(source, target=target).asm["ptx"]
    assert bool(re.search(r"\b(atom|red)\.", assembly)) == (name == "_backward_kernel")
