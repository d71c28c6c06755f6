"""How a step grows with its input: a few points along each axis."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

from tabulate import tabulate

from benchmarking import ours
from benchmarking.bench import build
from benchmarking.cases import Case
from benchmarking.timing import Clock, Form, measure, peak_memory, summarize

QUERIES = "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES"
STRIDE = 32  # sides are multiples of it
AXES = ("area", "images", "instances", "queries")


def points_of(case: Case, images: int, queries: int) -> Iterator[tuple[str, int, Case, tuple]]:
    """(axis, value, case, overrides): each axis from a quarter (or 1) to what the case has."""
    base = replace(case, images=images)
    for share in (0.5, 0.75, 1.0):
        size = tuple(max(STRIDE, round(share * side / STRIDE) * STRIDE) for side in case.image_size)
        yield "area", size[0] * size[1], replace(base, image_size=size), ()
    for count in _up_to(images):
        yield "images", count, replace(base, images=count), ()
    for count in _up_to(case.instances):
        yield "instances", count, replace(base, instances=count), ()
    for count in _up_to(queries):
        yield "queries", count, base, (QUERIES, str(count))


def _up_to(most: int) -> list[int]:
    return sorted({max(1, most // 4), max(1, most // 2), most})


def measure_scale(
    case: Case,
    stage: int,
    *,
    device: str,
    sam: str,
    opts: tuple,
    repeats: int,
    memory: bool,
    say: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """A row for each point; ``relative`` is to the first of its axis."""
    start = build(case, stage, device=device, sam=sam, opts=opts)
    images = len(start.labeled)
    queries = start.cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES
    del start
    rows, first = [], {}
    for axis, value, point, more in points_of(case, images, queries):
        say(f"{axis} {value}")
        bench = build(point, stage, device=device, sam=sam, opts=(*opts, *more))
        form = Form(ours.training_step(bench))
        clock = Clock(bench.device)
        times = measure({"step": form}, clock, repeats=repeats, warmup=1)["step"]
        summary = summarize(times)
        reference = first.setdefault(axis, (value, summary.median))
        rows.append(
            {
                "shapes": case.name,
                "stage": stage,
                "axis": axis,
                "value": value,
                "step": asdict(summary),
                "input_relative": value / reference[0],
                "step_relative": summary.median / reference[1],
                "peak_memory": peak_memory(form, bench.device) if memory else None,
            }
        )
    return rows


def scale_table(rows: list[dict[str, Any]]) -> str:
    """One line a point."""
    cells = [
        [
            row["shapes"],
            row["stage"],
            row["axis"],
            row["value"],
            f"{row['input_relative']:.2f}x",
            f"{row['step_relative']:.2f}x",
            f"{row['peak_memory'] / (1 << 20):.0f}" if row["peak_memory"] else "",
        ]
        for row in rows
    ]
    return tabulate(
        cells, headers=["shapes", "stage", "axis", "value", "input", "step", "peak, MiB"]
    )
