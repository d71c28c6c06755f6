"""Time the parts of a training step, ours beside straightforward forms of the same.

    python tools/benchmark.py --shapes quickstart
    python tools/benchmark.py --shapes cityscapes --device cuda
    python tools/benchmark.py --shapes cityscapes --device cpu --images 2 --parts points arp ema
    python tools/benchmark.py --shapes quickstart --scale --processes 2
    python tools/benchmark.py --sepl --threads 1

Weights are random, images and pseudo-labels synthetic: no data set or checkpoint is needed. On the
CPU the packaged SAM tiny_toyscapes stands in for the config's, unless --sam names another. Where a
part has a plain form, both are checked to give the same and then timed in turns. Writes
benchmark.json and benchmark.png. Further arguments override config keys, as in train_net.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from benchmarking import report  # noqa: E402
from benchmarking.bench import build  # noqa: E402
from benchmarking.bounds import measure_machine  # noqa: E402
from benchmarking.cases import (  # noqa: E402
    CASES,
    CONFIG_SAM,
    SAM_SIZES,
    TINY_SAM,
    case_config,
    cases_of,
)
from benchmarking.measuring import check_names, measure_stage  # noqa: E402
from benchmarking.processes import measure_processes, start  # noqa: E402
from benchmarking.scale import measure_scale, scale_table  # noqa: E402
from benchmarking.sepl import measure_sepl, sepl_table  # noqa: E402
from benchmarking.timing import Clock  # noqa: E402

from s4m_d2.errors import ConfigError, S4MError  # noqa: E402


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", choices=[*CASES, "all"], default="quickstart")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help="default: cuda where there is one"
    )
    parser.add_argument("--stage", choices=["1", "2", "both"], default="both")
    parser.add_argument("--parts", nargs="+", default=[], metavar="PART", help="default: all")
    parser.add_argument("--images", type=positive, default=0, help="a batch; default: the config's")
    parser.add_argument("--instances", type=positive, default=0, help="an image")
    parser.add_argument("--size", type=size, metavar="HxW", help="of the images, multiples of 32")
    parser.add_argument("--sam", choices=[CONFIG_SAM, TINY_SAM, *SAM_SIZES])
    parser.add_argument("--repeats", type=positive, default=7)
    parser.add_argument("--warmup", type=natural, default=2, help="calls before the timed ones")
    parser.add_argument("--threads", type=positive, help="of PyTorch on the CPU")
    parser.add_argument("--no-memory", action="store_true", help="leave out the peak memory")
    parser.add_argument("--scale", action="store_true", help="how the step grows, not its parts")
    parser.add_argument(
        "--sepl", action="store_true", help="SEPL's enhancement, which is no part of a step, alone"
    )
    parser.add_argument("--processes", type=positive, help="also a step in so many processes")
    parser.add_argument("--output", type=Path, default=Path("output/benchmark"))
    parser.add_argument("--as-processes", help=argparse.SUPPRESS)
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config overrides, after --")
    return parser.parse_args(arguments)


def natural(text: str) -> int:
    """A count, for argparse."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 0")
    return int(text)


def positive(text: str) -> int:
    """A count of at least 1, for argparse."""
    if natural(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be at least 1")
    return int(text)


def size(text: str) -> tuple[int, int]:
    """HxW, for argparse."""
    sides = text.lower().split("x")
    if len(sides) != 2 or not all(s.isdigit() and int(s) and int(s) % 32 == 0 for s in sides):
        raise argparse.ArgumentTypeError(f"{text!r} is not HxW in multiples of 32, as 512x1024")
    return int(sides[0]), int(sides[1])


def run(args: argparse.Namespace) -> None:
    """Measure what the command line asks for; write and print it."""
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: PyTorch finds no GPU here; use --device cpu")
    args.sam = args.sam or (TINY_SAM if args.device == "cpu" else CONFIG_SAM)
    if args.threads:
        torch.set_num_threads(args.threads)
    content = {"arguments": arguments_of(args), "stages": [], "scale": [], "processes": []}
    machines: dict = {}
    if args.sepl:
        content["sepl"] = measure_sepl(repeats=args.repeats, warmup=args.warmup, say=say)
    else:
        measure_cases(args, content, machines)
    device = torch.device(args.device)
    content["environment"] = report.environment(device, Clock(device).name, machines)
    print_results(content)
    args.output.mkdir(parents=True, exist_ok=True)
    paths = [report.write_json(args.output, content)]
    if content["stages"]:
        paths.append(report.write_chart(args.output, content["stages"]))
    print("\n" + ", ".join(map(str, paths)))


def measure_cases(args: argparse.Namespace, content: dict, machines: dict) -> None:
    """Fill in what is measured of each case and stage, and the peaks of the machine."""
    names = check_names(args.parts)
    cases = cases_of(args.shapes, args.images, args.instances, args.size)
    stages = (1, 2) if args.stage == "both" else (int(args.stage),)
    if args.device == "cpu" and args.sam == TINY_SAM:
        print("SAM on the CPU: the packaged tiny one; --sam config or a size chooses another.")
    for case in cases:
        for stage in stages:
            if args.scale:
                content["scale"] += scale(args, case, stage)
            else:
                content["stages"].append(measure(args, case, stage, names, machines))
            if args.processes:
                content["processes"] += processes(args, case, stage)


def arguments_of(args: argparse.Namespace) -> dict:
    """The command line, for JSON."""
    return {name: str(v) if isinstance(v, Path) else v for name, v in vars(args).items()}


def say(text: str) -> None:
    """Progress, on stderr."""
    print(f"  {text} …", file=sys.stderr, flush=True)


def measure(args, case, stage: int, names: set[str], machines: dict) -> dict:
    """The parts of one stage."""
    say(f"{case.name}, stage {stage}")
    bench = build(case, stage, device=args.device, sam=args.sam, opts=tuple(args.opts))
    half = bool(bench.cfg.SOLVER.AMP.ENABLED)
    precision = "float16" if half else "float32"
    if precision not in machines:
        machines[precision] = measure_machine(bench.device, Clock(bench.device), half=half)
    return measure_stage(
        bench,
        machines[precision],
        names,
        repeats=args.repeats,
        warmup=args.warmup,
        memory=not args.no_memory,
        say=say,
    )


def scale(args, case, stage: int) -> list[dict]:
    """How the step of one stage grows."""
    return measure_scale(
        case,
        stage,
        device=args.device,
        sam=args.sam,
        opts=tuple(args.opts),
        repeats=args.repeats,
        memory=not args.no_memory,
        say=say,
    )


def processes(args, case, stage: int) -> list[dict]:
    """The step of one stage in one and in several processes, on the same images in all."""
    cfg = case_config(case, stage, device=args.device, sam=args.sam, opts=tuple(args.opts))
    settings = {
        "shapes": case.name,
        "stage": stage,
        "images": cfg.SOLVER.IMS_PER_BATCH,
        "size": case.image_size,
        "instances": case.instances,
        "device": args.device,
        "sam": args.sam,
        "threads": args.threads or 1,
        "repeats": args.repeats,
        "opts": args.opts,
    }
    say(f"{case.name}, stage {stage}: {args.processes} processes")
    rows = measure_processes(settings, args.processes)
    return [{"shapes": case.name, "stage": stage, "images": settings["images"], **r} for r in rows]


def print_results(content: dict) -> None:
    """All tables."""
    for stage in content["stages"]:
        print("\n" + report.stage_table(stage))
    if "sepl" in content:
        print("\n" + sepl_table(content["sepl"]))
    if content["environment"]["peaks"]:
        print("\nmeasured peaks: " + report.peaks_line(content["environment"]["peaks"]))
    if content["scale"]:
        print("\n" + scale_table(content["scale"]))
    for one, many in zip(content["processes"][::2], content["processes"][1::2], strict=True):
        faster = one["step"]["median"] / many["step"]["median"]
        print(
            f"\n{one['shapes']}, stage {one['stage']}, {one['images']} images in all: a step in "
            f"{many['processes']} processes is {faster:.2f}x as fast as in one"
        )


def main(arguments: list[str] | None = None) -> int:
    """The exit status."""
    args = parse_args(arguments)
    try:
        if args.as_processes:
            start(args.as_processes)
        else:
            run(args)
    except S4MError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
