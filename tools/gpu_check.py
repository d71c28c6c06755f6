"""Whether all is right on this machine's GPU, and how fast it is: about ten minutes.

    make gpu-check
    make gpu-check STEPS="kernels tests"
    python tools/gpu_check.py --simulated kernels ddp     # without a GPU, and without figures

Each step is a process of its own, of at most three minutes. It writes STEP.json and STEP.log into
the output folder, and a step that fails does not end the others. summary.md has all of them in a
table, which docs/performance.md takes over. Needed are the environment of `make setup` and a C
compiler, and no network, data set or weights: what is not generated is random.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "tests")]

import torch  # noqa: E402
from tabulate import tabulate  # noqa: E402

from s4m_d2.files import atomic_write  # noqa: E402

LIMIT = 180  # seconds of a step
ITERATIONS, WARMUP = 30, 3
HALF = 2e-2  # how far half precision may be from the losses of the first iteration on a CPU
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}  # of the kernels
CITYSCAPES_LEVELS = [(64, 128), (32, 64), (16, 32)]  # of a crop of 512 x 1024


def kernels(folder: Path) -> dict[str, Any]:
    """The Triton kernels at Mask2Former's shapes beside the plain form in float64."""
    from s4m_d2.layers.ms_deform_attn import _kernels_compile, deformable_sampling

    cells, draws = sum(h * w for h, w in CITYSCAPES_LEVELS), torch.Generator().manual_seed(0)
    shapes = [(2, cells, 8, 32), (2, cells, 8, 3, 4, 2), (2, cells, 8, 3, 4), (2, cells, 256)]
    inputs = [torch.rand(shape, generator=draws).to("cuda") for shape in shapes]

    def results(dtype: torch.dtype) -> list[torch.Tensor]:
        value, locations, weights = (x.to(dtype).requires_grad_() for x in inputs[:3])
        output = deformable_sampling(value, CITYSCAPES_LEVELS, locations, weights)
        wanted = value, locations, weights
        return [output, *torch.autograd.grad(output, wanted, inputs[3].to(dtype))]

    found: dict[str, Any] = {"compile": _kernels_compile(inputs[0].device)}
    assert found["compile"], "Triton cannot compile here"
    for dtype, tolerance in TOLERANCES.items():
        # What rounds the inputs is no error of the kernels.
        inputs[:] = [x.to(dtype).float() for x in inputs]
        pairs = zip(results(dtype), results(torch.float64), strict=True)
        worst = max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in pairs)
        found[str(dtype).removeprefix("torch.")] = worst
        assert worst <= tolerance, f"{dtype}: {worst:.1e} of the largest value, at most {tolerance}"
    return found


def tests(folder: Path) -> dict[str, Any]:
    """The tests that are marked gpu."""
    import pytest

    status = pytest.main(["-m", "gpu", "-q", "-p", "no:cacheprovider", str(ROOT / "tests")])
    assert status == 0, f"pytest ends with {status!r}"
    return {}


def toyscapes(folder: Path, precision: str) -> dict[str, Any]:
    """Both stages, the second killed and resumed, beside the stored losses of a CPU."""
    import reference_runs

    run = folder / f"toyscapes_{precision}"
    run.mkdir(exist_ok=True)
    changes = {"MODEL.DEVICE": "cuda", "SOLVER.AMP.ENABLED": True, "S4M.AMP_PRECISION": precision}
    options = reference_runs.SMALL | changes
    found = reference_runs.train(run, reference_runs.QUICKSTART, 20, kill_at=14, **options)
    moved = reference_runs.differences(found, reference_runs.stored("quickstart"))
    assert moved[0] <= HALF, f"the first iteration's losses differ by {moved[0]:.1e}"
    return {"first iteration": moved[0], "last iteration": moved[-1]}


def timed(step: Any, iterations: int) -> float:
    """Seconds of a call."""
    for _ in range(WARMUP):
        step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(iterations):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / iterations


def stage_two(shapes: str, images: int = 0, opts: tuple[str, ...] = (), **changes: Any) -> Any:
    """Stage 2 at published shapes, with random weights, ViT-L and synthetic images."""
    from benchmarking.bench import CASES, CONFIG_SAM, Bench

    case = replace(CASES[shapes], device="cuda", sam=CONFIG_SAM, images=images, opts=opts)
    return Bench(replace(case, **changes), 2)


def published(folder: Path, shapes: str) -> dict[str, Any]:
    """Stage 2 at the published batch, or the largest part of it that fits, beside the estimate."""
    from benchmarking import ours

    from s4m_d2.engine.checks.resource_checks import activation_bytes

    images = 16
    while True:
        try:
            bench = stage_two(shapes, images)
            step = ours.training_step(bench)
            held = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            seconds = timed(step, ITERATIONS)
            break
        except torch.cuda.OutOfMemoryError:
            assert images > 2, "2 images are too many"
            bench = step = None
            torch.cuda.empty_cache()
            images //= 2
    return {
        "images": f"{images} + {images}",
        "seconds": seconds,
        "images per second": 2 * images / seconds,
        "peak, GiB": torch.cuda.max_memory_allocated() / 2**30,
        "estimate, GiB": (held + activation_bytes(bench.cfg, "student", 1)) / 2**30,
    }


def choices(folder: Path) -> dict[str, Any]:
    """Seconds of a step of 4 + 4 images with each choice that waits for a measurement."""
    from benchmarking import ours

    from s4m_d2.layers import ms_deform_attn

    def seconds(*opts: str) -> float:
        return timed(ours.training_step(stage_two("cityscapes", 4, opts)), 10)

    found = {"as configured": seconds(), "without TF32": seconds("S4M.TF32", "False")}
    found["bfloat16"] = seconds("S4M.AMP_PRECISION", "bfloat16")
    labeling = ("S4M.PSEUDO_LABEL.PRECISION", "amp", "S4M.SAM.PRECISION", "auto")
    found["labeling in half precision"] = seconds(*labeling)
    ms_deform_attn.USE_TRITON = False
    return {**found, "plain deformable attention": seconds()}


def benchmark(folder: Path) -> dict[str, Any]:
    """Stage 2 and its parts beside their plain forms: benchmark.json."""
    import benchmark

    words = "--shapes cityscapes --device cuda --stage 2 --images 4 --repeats 3 --output".split()
    assert benchmark.main([*words, str(folder)]) == 0, "the benchmark failed"
    [stage] = json.loads((folder / "benchmark.json").read_text())["stages"]
    return {"plain / ours": stage["step"]["ratio"]}


def ddp(folder: Path) -> dict[str, Any]:
    """Two steps under DDP with NCCL, in a world of one."""
    from benchmarking import ours
    from detectron2.utils.events import EventStorage
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    rendezvous = f"file://{tempfile.mkdtemp()}/rendezvous"
    distributed.init_process_group("nccl", init_method=rendezvous, rank=0, world_size=1)
    step = ours.stage_step(stage_two("quickstart", 2))
    step.model = DistributedDataParallel(step.model, broadcast_buffers=False)
    with EventStorage(0) as step.storage:
        for step.iter in range(2):
            step.run_step()
    loss = step.storage.latest()["total_loss"][0]
    distributed.destroy_process_group()
    assert math.isfinite(loss) and step.bad_steps.total == 0, f"the loss is {loss}"
    return {"loss": loss}


def evaluation(folder: Path) -> dict[str, Any]:
    """An image of 1024 x 2048 through the model, with encoded masks."""
    from s4m_d2.evaluation import masks_as_rle

    student = stage_two("cityscapes", 1).student.eval()
    image = torch.arange(3 * 1024 * 2048).view(3, 1024, 2048).remainder(251).byte()
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad(), masks_as_rle(student):
        seconds = timed(lambda: student([{"image": image}]), 10)
    return {"seconds": seconds, "peak, GiB": torch.cuda.max_memory_allocated() / 2**30}


STEPS = {
    "kernels": kernels,
    "tests": tests,
    "toyscapes_float16": partial(toyscapes, precision="float16"),
    "toyscapes_bfloat16": partial(toyscapes, precision="bfloat16"),
    "cityscapes": partial(published, shapes="cityscapes"),
    "coco": partial(published, shapes="coco"),
    "choices": choices,
    "benchmark": benchmark,
    "ddp": ddp,
    "evaluation": evaluation,
}


def run_step(name: str, folder: Path, simulated: bool) -> None:
    """In a process of its own: do it, and write its results."""
    device = contextlib.nullcontext()
    if simulated:
        from simulated_gpu.device import GPU, install

        install()
        device = GPU
    with device:
        found = STEPS[name](folder)
    with atomic_write(folder / f"{name}.json") as file:
        json.dump({"ok": True, **found}, file, indent=1)


def start_step(name: str, folder: Path, options: list[str], environment: Any) -> dict[str, Any]:
    """Start a step; its results, or why there are none, which are in STEP.json then."""
    path, start = folder / f"{name}.json", time.perf_counter()
    path.unlink(missing_ok=True)
    command = [sys.executable, __file__, name, "--alone", "--output", str(folder), *options]
    limit = None if options else LIMIT
    with (folder / f"{name}.log").open("w+") as log:
        try:
            subprocess.run(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=limit
            )
        except subprocess.TimeoutExpired:
            log.write(f"\nit took more than {LIMIT} s")
        log.seek(0)
        lines = log.read().split("\n")
    found = {"ok": False, "error": next(filter(str.strip, reversed(lines)), "no message")}
    if path.exists():
        found = json.loads(path.read_text())
    found["step, s"] = time.perf_counter() - start
    with atomic_write(path) as file:
        json.dump(found, file, indent=1)
    return found


def row(name: str, found: dict[str, Any]) -> list[str]:
    """A step's line of the table."""
    values = {key: value for key, value in found.items() if key not in ("ok", "step, s")}
    texts = [f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items()]
    return [name, "yes" if found["ok"] else "**no**", f"{found['step, s']:.0f}", "; ".join(texts)]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"of {', '.join(STEPS)}")
    parser.add_argument("--output", type=Path, default=Path("output/gpu-check"))
    parser.add_argument("--simulated", action="store_true", help="on a CPU that plays a GPU")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := set(args.steps) - set(STEPS):
        parser.error(f"no step {', '.join(sorted(unknown))}; choose from {', '.join(STEPS)}")
    if args.alone:
        run_step(args.steps[0], args.output.resolve(), args.simulated)
        return 0
    if not (args.simulated or torch.cuda.is_available()):
        parser.error("PyTorch finds no GPU here; --simulated does without one")
    args.output.mkdir(parents=True, exist_ok=True)
    options, environment = [], None
    with tempfile.TemporaryDirectory() as folder:
        if args.simulated:
            import simulated_gpu

            options, environment = ["--simulated"], simulated_gpu.environment(Path(folder))
        results = {}
        for name in args.steps or STEPS:
            results[name] = start_step(name, args.output, options, environment)
            print(*row(name, results[name]), sep="  ", flush=True)
    gpu = "simulated" if args.simulated else torch.cuda.get_device_name()
    rows = [row(name, found) for name, found in results.items()]
    table = tabulate(rows, ["step", "right", "s", "found"], tablefmt="pipe", disable_numparse=True)
    text = f"{gpu}, PyTorch {torch.__version__}\n\n{table}\n"
    with atomic_write(args.output / "summary.md") as file:
        file.write(text)
    print(f"\n{text}\n{args.output}/summary.md")
    return 0 if all(found["ok"] for found in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
