"""The tests for a GPU on a simulated one, and what this one refuses as a GPU does."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from . import environment

TESTS = Path(__file__).resolve().parents[1]
needs_no_gpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the tests for a GPU have a GPU, or simulate one already"
)


def run_tests(folder, marks):
    """Run the tests of a GPU that have these marks on the simulated one."""
    is_new = hasattr(torch._C, "_ensureCUDADeviceGuardSet")
    is_possible = shutil.which("cc") and torch.version.cuda and is_new and sys.platform == "linux"
    if not is_possible and os.environ.get("SIMULATED_GPU") != "required":
        pytest.skip("needs Linux, a C compiler and a build of a newer PyTorch for CUDA")
    files = [path for path in TESTS.rglob("test_*.py") if "mark.gpu" in path.read_text()]
    command = [sys.executable, "-m", "pytest", "-p", "simulated_gpu.plugin", "-q", "--tb=short"]
    command += ["-p", "no:cacheprovider", "-p", "no:xdist", "-m", marks, "-rs"]
    options = {"env": environment(folder), "capture_output": True, "text": True, "timeout": 3550}
    run = subprocess.run([*command, *files], **options)
    # Optional packages may be missing, the device may not.
    assert run.returncode == 0 and "CUDA device" not in run.stdout, run.stdout + run.stderr
    return int(re.search(r"(\d+) passed", run.stdout)[1])


@needs_no_gpu
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("marks", "fewest"),
    [("gpu and not slow", 40), pytest.param("gpu and slow", 0, marks=pytest.mark.slow)],
)
def test_the_tests_for_a_gpu_pass_on_the_simulated_one(tmp_path, marks, fewest):
    assert run_tests(tmp_path, marks) > fewest


@pytest.mark.gpu
@pytest.mark.parametrize(
    "fault",
    [
        lambda x: x + x.cpu(),
        lambda x: torch.cat([x, torch.zeros(3)]),
        lambda x: x.cpu()[x > 0],
        lambda x: x.numpy(),
        lambda x: x.cpu()[:1].expand(3).pin_memory(),
        lambda x: torch.rand(2, device="cuda", generator=torch.Generator().manual_seed(3)),
        lambda x: torch.rand(2, generator=torch.Generator("cuda").manual_seed(4)),
    ],
)
def test_what_a_gpu_refuses(fault):
    with pytest.raises((RuntimeError, TypeError)):
        fault(torch.ones(3, device="cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("waits", "operation"),
    [
        (True, lambda x, mask: x.sum().item()),
        (True, lambda x, mask: x[mask]),
        (True, lambda x, mask: mask.nonzero()),
        (True, lambda x, mask: bool(mask.any())),
        (True, lambda x, mask: torch.ones(3).to("cuda")),
        (True, lambda x, mask: torch.tensor([1.0], device="cuda")),
        (False, lambda x, mask: torch.ones(3).pin_memory().to("cuda", non_blocking=True)),
        (False, lambda x, mask: x.masked_fill_(mask, 2.0).sort()),
        (False, lambda x, mask: x.__setitem__(mask, 2.0)),
        (False, lambda x, mask: x.__setitem__(slice(1), 2.0)),
    ],
)
def test_where_the_host_waits_for_a_gpu(waits, operation):
    x = torch.ones(3, device="cuda")
    mask = x > 0
    torch.cuda.set_sync_debug_mode("error")
    try:
        if waits:
            with pytest.raises(RuntimeError, match="synchronizing"):
                operation(x, mask)
        else:
            operation(x, mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_page_locked_memory_is_left_alone_until_its_copy_has_arrived():
    if torch.cuda.get_device_name() != "simulated":
        pytest.skip("a GPU does not tell")
    source = torch.ones(3).pin_memory()
    copy = source.to("cuda", non_blocking=True)
    source.fill_(2.0)
    with pytest.raises(RuntimeError, match="written to"):
        copy.cpu()
