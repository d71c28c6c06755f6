"""Measures the parts of one stage at one case's shapes, and whole steps; tables of them."""

import argparse
import platform
import sys
from collections.abc import Callable, Collection
from typing import Any

import detectron2
import torch
from tabulate import tabulate

from benchmarking import ours, plain
from benchmarking.bench import TINY_SAM, Bench, Case
from benchmarking.parts import INSIDE, MAKERS, METHOD_PARTS, Part, Parts, check_step
from benchmarking.timing import Clock, Form, count_flops, machine_peaks, peak_memory, summarize
from s4m_d2.errors import ConfigError, S4MError

STEP, REST = "step", "rest"
FORMS = ("ours", "plain")
MILLI, GIGA, TERA = 1e-3, 1e9, 1e12
MEBI = 1 << 20
UNITS = {"arithmetic": "GFLOP", "bandwidth": "GB"}


class Mismatch(S4MError):
    """The plain form of a part does not give what ours gives: nothing is compared."""


def say(text: str) -> None:
    """Progress, on stderr."""
    print(f"  {text} …", file=sys.stderr, flush=True)


def check_names(names: Collection[str]) -> list[str]:
    """The parts that are named, in any spelling; none: all."""
    known = {name.lower().replace(" ", "-"): name for name in (*MAKERS, STEP)}
    keys = {name.lower().replace(" ", "-").replace("_", "-") for name in names}
    if unknown := sorted(keys - known.keys()):
        raise ConfigError(f"--parts {' '.join(unknown)}: no such part; choose from {[*known]}")
    return [name for key, name in known.items() if key in keys or not keys]


def environment(clock: Clock) -> dict[str, Any]:
    """Versions and device."""
    is_cuda = clock.device.type == "cuda"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "detectron2": detectron2.__version__,
        "device": torch.cuda.get_device_name(clock.device) if is_cuda else platform.processor(),
        "threads": torch.get_num_threads(),
        "clock": clock.name,
    }


def measure_stage(case: Case, stage: int, args: argparse.Namespace, peaks: dict) -> dict[str, Any]:
    """The parts of a stage, checked and timed; everything that JSON holds of it.

    ``peaks`` of the machine, by precision, get what is missing.
    """
    say(f"{case.name}, stage {stage}")
    bench = Bench(case, stage)
    clock, parts, rows = Clock(bench.device), Parts(bench), []
    precision = "float16" if bench.half else "float32"
    if precision not in peaks:
        peaks[precision] = machine_peaks(clock, half=bench.half)
    for name, (make, stages) in MAKERS.items():
        if name in args.parts and stage in stages:
            say(name)
            row = measure_part(name, make(parts), peaks[precision], clock, args)
            rows.append({"name": name, **row})
    step = None
    if STEP in args.parts:
        say(STEP)
        step = measure_step(bench, clock, args)
    sam = bench.cfg.S4M.SAM
    return {
        "shapes": case.name,
        "stage": stage,
        "image_size": list(bench.size),
        "images": len(bench.labeled),
        "instances": case.instances,
        "sam": TINY_SAM if sam.BACKEND == TINY_SAM else f"{sam.MODEL_TYPE} (random weights)",
        "parts": rows,
        "step": step,
        "totals": add_shares(rows, step),
        "method_operations": method_ratio(rows),
    }


def checked(name: str, check: Callable[..., None], *results: Callable[[], Any]) -> None:
    """Mismatch if the results, which are made here, do not pass."""
    try:
        check(*(make() for make in results))
    except AssertionError as error:
        raise Mismatch(
            f"{name}: the plain form and ours differ, so that their times cannot be compared. "
            "This is a bug of tools/benchmarking or of the step.",
            *str(error).splitlines(),
        ) from error


def measure_part(name: str, part: Part, peak: dict, clock: Clock, args) -> dict[str, Any]:
    """Times of a part, their ratio, and how near it comes to what the machine can do."""
    if part.same is not None:
        checked(name, part.same, part.ours, part.plain)
    forms = {"ours": part.ours, **({"plain": part.plain} if part.plain else {})}
    row = {"inside": INSIDE.get(name), "in_step": part.in_step, **times_of(forms, clock, args)}
    amount = part.moved_bytes or (count_flops(part.ours) if part.counts_flops else 0)
    if not amount:
        return {**row, "bound": None}
    kind = "bandwidth" if part.moved_bytes else "arithmetic"
    fraction = amount / peak[kind] / row["ours"]["median"]
    return {**row, "bound": {"kind": kind, "amount": amount, "fraction": fraction}}


def measure_step(bench: Bench, clock: Clock, args: argparse.Namespace) -> dict[str, Any]:
    """A whole step through the trainer, and the one that is assembled from the plain forms."""
    checked(STEP, lambda: check_step(bench))
    forms = {"ours": Form(ours.training_step(bench)), "plain": Form(plain.training_step(bench))}
    row = times_of(forms, clock, args)
    row["peak_memory"] = None
    if not args.no_memory:
        row["peak_memory"] = {name: peak_memory(form, bench.device) for name, form in forms.items()}
    return row


def times_of(forms: dict[str, Form], clock: Clock, args: argparse.Namespace) -> dict[str, Any]:
    """Summaries of the forms, and of plain / ours."""
    times = clock.measure(forms, repeats=args.repeats, warmup=args.warmup)
    row: dict[str, Any] = {"ours": summarize(times["ours"]), "plain": None, "ratio": None}
    if "plain" in times:  # of the repeats that were taken in turns
        ratios = [a / b for a, b in zip(times["plain"], times["ours"], strict=True)]
        row |= {"plain": summarize(times["plain"]), "ratio": summarize(ratios)}
    return row


def add_shares(rows: list[dict[str, Any]], step: dict[str, Any] | None) -> dict[str, float]:
    """Give each part the share of the step that it takes; for each form the whole, and the rest.

    The whole, in seconds, is the step as it was measured, or the sum of its parts where that is
    more or there is no step. A part inside another one has a share, but is not counted again; the
    data, which other processes load, are compared with the step.
    """
    totals = {}
    for form in FORMS:
        seconds = [(row, (row[form] or row["ours"])["median"]) for row in rows]
        counted = sum(s for row, s in seconds if row["in_step"] and not row["inside"])
        whole = max(counted, step[form]["median"] if step else 0.0)
        for row, part_seconds in seconds:
            row[f"share_{form}"] = part_seconds / whole if whole else None
        totals[form] = whole
        totals[f"{REST}_{form}"] = (whole - counted) / whole if whole else 0.0
    return totals


def method_ratio(rows: list[dict[str, Any]]) -> float | None:
    """Plain over ours of point sampling, ARP and EMA together; None if one was not measured."""
    found = {row["name"]: row for row in rows}
    if not all(name in found for name in METHOD_PARTS):
        return None
    plainly, mine = (sum(found[n][form]["median"] for n in METHOD_PARTS) for form in FORMS[::-1])
    return plainly / mine


def stage_table(stage: dict[str, Any]) -> str:
    """The table of one stage, with the lines below it."""
    totals, step = stage["totals"], stage["step"]
    rest = [REST, "", "", "", _percent(totals["rest_ours"]), _percent(totals["rest_plain"]), "", ""]
    height, width = stage["image_size"]
    heads = "part|ours, ms|quartiles|plain/ours|share|share, plain|bound|of bound".split("|")
    align = ("left", *["right"] * 5, "left", "right")
    rows = [*map(_row, stage["parts"]), rest]
    lines = [
        f"{stage['shapes']}, stage {stage['stage']}: {stage['images']} images of {height} x "
        f"{width}, {stage['instances']} instances each, SAM {stage['sam']}",
        tabulate(rows, heads, colalign=align, disable_numparse=True),
    ]
    if step is not None:
        milliseconds = step["ours"]["median"] / MILLI
        lines.append(f"whole step: {milliseconds:.1f} ms, plain/ours {_ratio(step['ratio'])}")
        if memory := step["peak_memory"]:
            lines.append(
                f"peak memory of a step: {memory['ours'] / MEBI:.0f} MiB beyond what is held "
                f"before it, plain/ours {memory['plain'] / memory['ours']:.2f}x"
            )
    if stage["method_operations"] is not None:
        lines.append(f"method operations: {stage['method_operations']:.1f}x")
    return "\n".join(lines)


def _row(row: dict[str, Any]) -> list[str]:
    ours, bound = row["ours"], row["bound"]
    name = f"  {row['name']} (in {row['inside']})" if row["inside"] else row["name"]
    return [
        name if row["in_step"] else f"{name} (workers)",
        f"{ours['median'] / MILLI:.2f}",
        f"{ours['lower'] / MILLI:.2f} – {ours['upper'] / MILLI:.2f}",
        _ratio(row["ratio"]),
        _percent(row["share_ours"]),
        _percent(row["share_plain"]),
        f"{bound['amount'] / GIGA:.3g} {UNITS[bound['kind']]}" if bound else "",
        _percent(bound["fraction"]) if bound else "",
    ]


def _ratio(ratio: dict[str, Any] | None) -> str:
    if ratio is None:
        return ""
    return f"{ratio['median']:.2f}x ({ratio['lower']:.2f} – {ratio['upper']:.2f})"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def peaks_line(peaks: dict[str, dict[str, float]]) -> str:
    """What the bounds are measured against."""
    return "measured peaks: " + "; ".join(
        f"{name}: {peak['arithmetic'] / TERA:.3g} TFLOP/s, {peak['bandwidth'] / GIGA:.3g} GB/s"
        for name, peak in peaks.items()
    )
