"""A step in one process and in several, on the same images in all."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from detectron2.engine import default_argument_parser
from detectron2.utils import comm

from benchmarking import ours
from benchmarking.bench import build
from benchmarking.cases import CASES
from benchmarking.timing import Clock, Form, measure, summarize
from s4m_d2.engine.command.launch import launch
from s4m_d2.errors import ConfigError, S4MError


def main(args: argparse.Namespace) -> None:
    """In each process: measure its part of the batch; the first writes the result."""
    torch.set_num_threads(args.threads)
    world = comm.get_world_size()
    case = replace(CASES[args.shapes], images=args.images // world, instances=args.instances)
    case = replace(case, image_size=tuple(args.size))
    device = f"cuda:{comm.get_local_rank()}" if args.device == "cuda" else "cpu"
    bench = build(case, args.stage, device=device, sam=args.sam, opts=tuple(args.opts))
    clock = Clock(bench.device, wall=True)
    step = Form(ours.training_step(bench))
    times = measure({"step": step}, clock, repeats=args.repeats, warmup=1)["step"]
    if comm.is_main_process():
        Path(args.result).write_text(json.dumps(asdict(summarize(times))))


def measure_processes(settings: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """Steps in 1 and ``count`` processes, each started anew.

    Args:
        settings: shapes, images (in all), instances, size, stage, device, sam, threads, repeats,
            opts.

    Raises:
        ConfigError: the images cannot be divided among the processes.
        S4MError: a process failed; what it said stands before.
    """
    if settings["images"] % count:
        raise ConfigError(
            f"--processes {count}: {settings['images']} images cannot be divided among them; "
            "choose a multiple with --images"
        )
    rows = []
    for processes in (1, count):
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / "result.json"
            text = json.dumps({**settings, "result": str(result), "num_gpus": processes})
            command = [sys.executable, str(Path(__file__).parent.parent / "benchmark.py")]
            if subprocess.run([*command, "--as-processes", text]).returncode:
                raise S4MError(f"--processes: the run in {processes} processes failed")
            rows.append({"processes": processes, "step": json.loads(result.read_text())})
    return rows


def start(text: str) -> None:
    """What ``--as-processes`` does: start the processes that the settings (JSON) ask for."""
    args = default_argument_parser().parse_args([])
    vars(args).update(json.loads(text))
    launch(main, args)
