"""Time the parts of a training step, compared with plain forms of the same.

    python tools/benchmark.py --shapes quickstart
    python tools/benchmark.py --shapes cityscapes --device cuda
    python tools/benchmark.py --shapes cityscapes --device cpu --images 2 --parts points arp ema

Weights are random, images and pseudo-labels synthetic: no data set or checkpoint is needed. On the
CPU the packaged SAM tiny_toyscapes replaces the config's, unless --sam names another. If a part has
a plain form, both are checked to give the same result and then timed alternately. Writes
benchmark.json. Further arguments override config keys, as in train_net.py.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from benchmarking import measuring
from benchmarking.bench import CASES, CONFIG_SAM, TINY_SAM
from benchmarking.timing import Clock

from s4m_d2.engine.command.arguments import command_parser, natural, positive
from s4m_d2.engine.command.launch import exit_status
from s4m_d2.errors import ConfigError
from s4m_d2.files import atomic_write


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--shapes", choices=[*CASES, "all"], default="quickstart")
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    add("--device", choices=["cpu", "cuda"], default=devices[0], help="default: cuda if any")
    add("--stage", choices=["1", "2", "both"], default="both")
    add("--parts", nargs="+", default=[], metavar="PART", help="default: all")
    add("--images", type=positive, default=0, help="a batch; default: the config's")
    add("--instances", type=positive, default=0, help="an image")
    add("--size", type=size, metavar="HxW", help="of the images, multiples of 32")
    add("--sam", choices=[CONFIG_SAM, TINY_SAM], help="default: see above")
    add("--repeats", type=positive, default=7)
    add("--warmup", type=natural, default=2, help="calls before the timed ones")
    add("--threads", type=positive, help="of PyTorch on the CPU")
    add("--no-memory", action="store_true", help="leave out the peak memory")
    add("--output", type=Path, default=Path("output/benchmark"))
    add("opts", nargs="*", metavar="KEY VALUE", help="config overrides, after --")
    return parser.parse_args(arguments)


def size(text: str) -> tuple[int, int]:
    """HxW, for argparse."""
    sides = text.lower().split("x")
    if len(sides) != 2 or not all(s.isdigit() and int(s) and int(s) % 32 == 0 for s in sides):
        raise argparse.ArgumentTypeError(f"{text!r} is not HxW in multiples of 32, as 512x1024")
    return int(sides[0]), int(sides[1])


@exit_status
def main(arguments: list[str] | None = None) -> int:
    args = parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: PyTorch finds no GPU here; use --device cpu")
    if args.threads:
        torch.set_num_threads(args.threads)
    args.parts = measuring.check_names(args.parts)
    content: dict = {"arguments": vars(args) | {"output": str(args.output)}}
    content |= {"environment": measuring.environment(Clock(torch.device(args.device)))}
    content |= {"peaks": {}, "stages": []}
    given = {"images": args.images, "instances": args.instances, "image_size": args.size}
    given = {name: value for name, value in given.items() if value} | {"opts": tuple(args.opts)}
    sam = args.sam or (TINY_SAM if args.device == "cpu" else CONFIG_SAM)
    for case in CASES.values() if args.shapes == "all" else [CASES[args.shapes]]:
        case = replace(case, device=args.device, sam=sam, **given)
        for stage in (1, 2) if args.stage == "both" else (int(args.stage),):
            content["stages"].append(measuring.measure_stage(case, stage, args, content["peaks"]))
            print(f"\n{measuring.stage_table(content['stages'][-1])}", flush=True)
    print(f"\n{measuring.peaks_line(content['peaks'])}")
    args.output.mkdir(parents=True, exist_ok=True)
    with atomic_write(args.output / "benchmark.json") as file:
        json.dump(content, file, indent=1, allow_nan=False)
    print(f"\n{args.output}/benchmark.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
