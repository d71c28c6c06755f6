"""Whether all is right on this machine's GPU, and how fast it is: about ten minutes.

    make gpu-check
    make gpu-check STEPS="kernels tests"
    python tools/gpu_check.py --document      # the last results, into docs/performance.md
    python tools/gpu_check.py --simulated     # without a GPU: small, and without figures

Each step is a process of its own, of at most three minutes. It writes STEP.json and STEP.log into
the output folder, and a step that fails does not end the others. summary.md has the last results of
all steps in a table. Needed are the environment of `make setup`, a C compiler and Python's headers
(for Triton), and no network, data set or weights: what is not generated is random.
"""

import argparse
import contextlib
import gc
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "tests")]

import torch  # noqa: E402
from benchmarking import ours  # noqa: E402
from benchmarking.bench import CASES, Bench, case_config  # noqa: E402
from tabulate import tabulate  # noqa: E402

from s4m_d2.engine.checks.resource_checks import stage_memory  # noqa: E402
from s4m_d2.engine.command.arguments import command_parser  # noqa: E402
from s4m_d2.evaluation import masks_as_rle  # noqa: E402
from s4m_d2.files import atomic_write, write_json  # noqa: E402
from s4m_d2.layers import ms_deform_attn  # noqa: E402

SCRIPT, PAGE = Path(__file__).resolve(), ROOT / "docs" / "performance.md"
LIMIT, LIMIT_OF_ALL = 180, 600  # seconds of a step, and of a call
TIMED = 60  # seconds after which fewer iterations have to do
# How far losses may be from a CPU's, whose points are drawn differently: the first one of the same
# weights, and the means of the stages. float16's first updates are left out until the scale fits.
FIRST, CURVES = 0.05, {"teacher": 0.2, "student": 0.5}
RESUMED = 2e-2  # how far the first loss after a stop may be from the one before it
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}  # of the kernels
CITYSCAPES_LEVELS = [(64, 128), (32, 64), (16, 32)]  # of a crop of 512 x 1024
ONE_BY_ONE = ("S4M.SAM.MAX_IMAGES", "1")  # else SAM takes half of the memory that is free
HALF = ("S4M.PSEUDO_LABEL.PRECISION", "amp", "S4M.SAM.PRECISION", "auto")
CHOICES = {
    "as configured": (),
    "without TF32": ("S4M.TF32", "False"),
    "bfloat16": ("S4M.AMP_PRECISION", "bfloat16"),
    "labeling in half precision": HALF,
    "SAM image by image": ONE_BY_ONE,
    "plain deformable attention": (),
}
YES, NO, PARTLY = "yes", "**no**", "in part"
BEGIN, END = "<!-- gpu-check -->\n", "<!-- end of gpu-check -->\n"


@dataclass(frozen=True)
class Extent:
    """How much a step does, and where."""

    iterations: int = 30
    warmup: int = 3
    images: int = 0  # of a batch; 0: the step's
    divisor: int = 1  # of the sides of images and maps
    sam: str = "config"
    marks: str = "gpu"
    words: tuple[str, ...] = ("--images", "4", "--repeats", "3")  # of tools/benchmark.py
    group: tuple[str, str] = ("nccl", "cuda")


SMALL = "--size 64x128 --images 2 --instances 3 --sam tiny_toyscapes --repeats 1 --warmup 0"
SIMULATED = Extent(
    iterations=1,
    warmup=0,
    images=2,
    divisor=8,
    sam="tiny_toyscapes",
    marks="gpu and not slow",
    words=(*SMALL.split(), "--no-memory"),
    group=("gloo", "cpu"),
)


def kernels(folder: Path, extent: Extent) -> dict[str, Any]:
    """The Triton kernels at Mask2Former's shapes beside the plain form in float64."""
    levels = [(h // extent.divisor, w // extent.divisor) for h, w in CITYSCAPES_LEVELS]
    cells, draws = sum(h * w for h, w in levels), torch.Generator().manual_seed(0)
    shapes = [(2, cells, 8, 32), (2, cells, 8, 3, 4, 2), (2, cells, 8, 3, 4), (2, cells, 256)]
    inputs = [torch.rand(shape, generator=draws).to("cuda") for shape in shapes]

    def results(dtype: torch.dtype) -> list[torch.Tensor]:
        value, locations, weights = (x.to(dtype).requires_grad_() for x in inputs[:3])
        output = ms_deform_attn.deformable_sampling(value, levels, locations, weights)
        wanted = value, locations, weights
        return [output, *torch.autograd.grad(output, wanted, inputs[3].to(dtype))]

    assert ms_deform_attn._kernels_compile(inputs[0].device), "Triton cannot compile here"
    found: dict[str, Any] = {}
    for dtype, tolerance in TOLERANCES.items():
        # What rounds the inputs is no error of the kernels.
        inputs[:] = [x.to(dtype).float() for x in inputs]
        pairs = zip(results(dtype), results(torch.float64), strict=True)
        worst = max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in pairs)
        found[str(dtype).removeprefix("torch.")] = worst
        assert worst <= tolerance, f"{dtype}: {worst:.1e} of the largest value, at most {tolerance}"
    return found


def tests(folder: Path, extent: Extent) -> dict[str, Any]:
    """The tests that are marked gpu."""
    import pytest

    rooms = [ROOT / "tests", ROOT / "detectron2_lite" / "tests"]
    status = pytest.main(["-m", extent.marks, "-q", "-p", "no:cacheprovider", *map(str, rooms)])
    assert status == 0, f"pytest ends with {status!r}: see its log"
    return {}


def toyscapes(folder: Path, extent: Extent, precision: str) -> dict[str, Any]:
    """Both stages, the second killed and resumed, beside the stored losses of a CPU."""
    import reference_runs

    changes = {"MODEL.DEVICE": "cuda", "SOLVER.AMP.ENABLED": True, "S4M.AMP_PRECISION": precision}
    options = {**reference_runs.SMALL, **changes, "kill_at": 12, "tolerance": RESUMED}
    with tempfile.TemporaryDirectory(dir=folder) as run:
        curves = reference_runs.train(Path(run), reference_runs.QUICKSTART, 20, **options)
    found: dict[str, Any] = {"curves": {}}
    for stage, stored in reference_runs.stored("quickstart")["losses"].items():
        curve, of_cpu = curves["losses"][stage]["total_loss"], stored["total_loss"]
        found["curves"][stage] = {"GPU": curve, "CPU": of_cpu}
        found[f"{stage}'s loss / a CPU's"] = ratio = sum(curve) / sum(of_cpu)
        found[f"{stage}'s first"] = curve[0] / of_cpu[0]
        assert abs(ratio - 1) <= CURVES[stage], f"{stage}: the mean loss is {ratio:.2f} of a CPU's"
    first = found["teacher's first"]
    assert abs(first - 1) <= FIRST, f"the first loss is {first:.3f} of a CPU's"
    return found


def timed(step: Callable[[], Any], extent: Extent, iterations: int) -> float:
    """Seconds of a call."""
    for _ in range(extent.warmup):
        step()
    torch.cuda.synchronize()
    start, done = time.perf_counter(), 0
    while done < min(iterations, extent.iterations) and time.perf_counter() - start < TIMED:
        step()
        done += 1
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / done


def stage_two(extent: Extent, shapes: str, images: int, opts: tuple[str, ...] = ()) -> Any:
    """Stage 2 at published shapes, with random weights, ViT-L and synthetic images."""
    case = CASES[shapes]
    height, width = (side // extent.divisor for side in case.image_size)
    case = replace(case, image_size=(height, width), images=extent.images or images)
    return Bench(replace(case, device="cuda", sam=extent.sam, opts=opts), 2)


def fitting(make: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns; None if the GPU's memory does not suffice."""
    gc.collect()  # models refer to themselves
    torch.cuda.empty_cache()
    with contextlib.suppress(torch.cuda.OutOfMemoryError):
        return make(*arguments)


def published(folder: Path, extent: Extent, shapes: str) -> dict[str, Any]:
    """Stage 2 at the published batch, or the largest part of it that fits, beside the estimate."""

    def measured(images: int) -> dict[str, Any]:
        bench = stage_two(extent, shapes, images, ONE_BY_ONE)
        images = len(bench.labeled)
        torch.cuda.reset_peak_memory_stats()
        seconds = timed(ours.training_step(bench), extent, extent.iterations)
        estimate = stage_memory(bench.cfg, "student", bench.student, bench.sam)
        return {
            "images": f"{images} + {images}",
            "seconds": seconds,
            "images per second": 2 * images / seconds,
            "peak, GiB": torch.cuda.max_memory_allocated() / 2**30,
            "estimate, GiB": estimate / 2**30,
        }

    images, found = case_config(CASES[shapes], 2).SOLVER.IMS_PER_BATCH, None
    while found is None:
        assert images > 1, "2 + 2 images are too many"
        found = fitting(measured, images)
        images //= 2
    return found


def choices(folder: Path, extent: Extent) -> dict[str, Any]:
    """Seconds of a step of 4 + 4 images with each choice that waits for a measurement."""

    def seconds(opts: tuple[str, ...]) -> float:
        step = ours.training_step(stage_two(extent, "cityscapes", 4, opts))
        return timed(step, extent, 10)

    found = {}
    for name, opts in CHOICES.items():
        ms_deform_attn.USE_TRITON = not name.startswith("plain")
        found[name] = fitting(seconds, opts) or "out of memory"
    return found


def benchmark(folder: Path, extent: Extent) -> dict[str, Any]:
    """Stage 2 and its parts beside their plain forms: benchmark.json."""
    import benchmark
    from benchmarking import timing

    timing.MATRIX_SIDE["cuda"] //= extent.divisor**2
    timing.COPIED_BYTES["cuda"] //= extent.divisor**2
    words = ["--shapes", "cityscapes", "--device", "cuda", "--stage", "2", *extent.words]
    assert benchmark.main([*words, "--output", str(folder)]) == 0, "the benchmark failed"
    [stage] = json.loads((folder / "benchmark.json").read_text())["stages"]
    return {"plain / ours": stage["step"]["ratio"]["median"]}


def ddp(folder: Path, extent: Extent) -> dict[str, Any]:
    """Two steps under DDP with NCCL, in a world of one."""
    from detectron2.utils.events import EventStorage
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    backend, device = extent.group
    with tempfile.TemporaryDirectory() as place:
        rendezvous = f"file://{place}/rendezvous"
        distributed.init_process_group(backend, init_method=rendezvous, rank=0, world_size=1)
        bench = Bench(replace(CASES["quickstart"], device=device, images=2), 2)
        step = ours.stage_step(bench)
        step.model = DistributedDataParallel(step.model, broadcast_buffers=False)
        with EventStorage(0) as step.storage:
            for step.iter in range(2):
                step.run_step()
        loss = step.storage.latest()["total_loss"][0]
        distributed.destroy_process_group()
    assert math.isfinite(loss) and step.bad_steps.total == 0, f"the loss is {loss}"
    return {"loss": loss}


def evaluation(folder: Path, extent: Extent) -> dict[str, Any]:
    """An image of 1024 x 2048 through the model, with encoded masks."""
    student = stage_two(extent, "cityscapes", 1).student.eval()
    shape = 3, 1024 // extent.divisor, 2048 // extent.divisor
    image = torch.arange(math.prod(shape)).view(shape).remainder(251).byte()
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad(), masks_as_rle(student):
        seconds = timed(lambda: student([{"image": image}]), extent, 10)
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
SPEED = "published sizes, seconds and memory"
NOT_SIMULATED = {
    "kernels": "Triton (the plain form computes)",
    "tests": "CUDA's kernels, Triton, slow tests",
    "toyscapes_float16": "CUDA's arithmetic and draws",
    "toyscapes_bfloat16": "CUDA's arithmetic and draws",
    "ddp": "NCCL and a GPU (gloo and the CPU compute)",
}


def run_step(name: str, folder: Path, simulated: bool) -> None:
    """In a process of its own: do it, and write its results."""
    device: Any = contextlib.nullcontext()
    if simulated and name != "ddp":  # which computes on the CPU then
        from simulated_gpu.device import GPU, install

        install()
        device = GPU
    with device:
        found = STEPS[name](folder, SIMULATED if simulated else Extent())
    found = {"right": YES, **found}
    if simulated:
        found = {k: v for k, v in found.items() if name in NOT_SIMULATED or k == "images"}
        found = {**found, "right": PARTLY, "not in simulation": NOT_SIMULATED.get(name, SPEED)}
    write_json(folder / f"{name}.json", found, indent=1)


def start_step(
    name: str, folder: Path, options: list[str], limit: float | None, environment: Any
) -> None:
    """Start a step and wait for it. Its results, or why there are none, are in STEP.json then."""
    path, start = folder / f"{name}.json", time.perf_counter()
    path.unlink(missing_ok=True)
    command = [sys.executable, str(SCRIPT), name, "--alone", "--output", str(folder), *options]
    with (folder / f"{name}.log").open("w+") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = f"no time left after {limit:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and what it started
            process.wait()
        log.seek(0)
        lines = [line for line in log.read().split("\n") if line.strip()]
    found = {"right": NO, "error": f"{lines[-1] if lines else 'no message'} (exit: {status})"}
    if path.exists() and status == 0:
        found = json.loads(path.read_text())
    found["step, s"] = time.perf_counter() - start
    write_json(path, found, indent=1)


def row(name: str, folder: Path) -> list[str]:
    """A step's line of the table."""
    path = folder / f"{name}.json"
    if not path.exists():
        return [name, "not run", "", ""]
    found = json.loads(path.read_text())
    right, seconds = found.pop("right"), found.pop("step, s")
    texts = [
        f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in found.items()
        if not isinstance(value, dict)
    ]
    return [name, right, f"{seconds:.0f}", "; ".join(texts).replace("|", "\\|")]


def summarize(folder: Path, machine: str) -> str:
    """Write summary.md, a table of the last results of all steps; its text."""
    rows = [row(name, folder) for name in STEPS]
    table = tabulate(rows, ["step", "right", "s", "found"], tablefmt="pipe", disable_numparse=True)
    text = f"{machine}, PyTorch {torch.__version__}\n\n{table}\n"
    with atomic_write(folder / "summary.md") as file:
        file.write(text)
    return text


def document(summary: Path, page: Path) -> None:
    """Put the table of summary.md between the marks of a page."""
    before, _, rest = page.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    with atomic_write(page) as file:
        file.write(before + BEGIN + summary.read_text() + END + after)


def run_steps(names: list[str], folder: Path, simulated: bool) -> bool:
    """Run steps one after the other; whether none has failed."""
    end, options, environment = time.perf_counter() + LIMIT_OF_ALL, [], None
    with tempfile.TemporaryDirectory() as library:
        if simulated:
            import simulated_gpu

            options, environment = ["--simulated"], simulated_gpu.environment(Path(library))
        for name in names:
            limit = None if simulated else max(0.0, min(LIMIT, end - time.perf_counter()))
            start_step(name, folder, options, limit, environment)
            print(*row(name, folder), sep="  ", flush=True)
    return NO not in [row(name, folder)[1] for name in names]


def main() -> int:
    parser = command_parser(__doc__)
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"of {', '.join(STEPS)}")
    parser.add_argument("--output", type=Path, help="default: output/gpu-check[-simulated]")
    parser.add_argument("--simulated", action="store_true", help="on a CPU that plays a GPU")
    parser.add_argument("--document", action="store_true", help="run nothing; write docs")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := set(args.steps) - set(STEPS):
        parser.error(f"no step {', '.join(sorted(unknown))}; choose from {', '.join(STEPS)}")
    default = Path("output", "gpu-check-simulated" if args.simulated else "gpu-check")
    folder = (args.output or default).resolve()
    if args.alone:
        run_step(args.steps[0], folder, args.simulated)
        return 0
    if args.document:
        document(folder / "summary.md", PAGE)
        return 0
    if not (args.simulated or torch.cuda.is_available()):
        parser.error("PyTorch finds no GPU here; --simulated does without one")
    folder.mkdir(parents=True, exist_ok=True)
    is_right = run_steps(args.steps or list(STEPS), folder, args.simulated)
    machine = "Simulated GPU" if args.simulated else torch.cuda.get_device_name()
    print(f"\n{summarize(folder, machine)}\n{folder}/summary.md")
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
