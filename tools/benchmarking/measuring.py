"""Measures the parts of one stage at one case's shapes, and whole steps."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection
from typing import Any

from benchmarking import ours, plain_step
from benchmarking.bench import TINY_SAM, Bench, Case
from benchmarking.parts import INSIDE, MAKERS, METHOD_PARTS, Part, Parts, check_step
from benchmarking.timing import Clock, Form, count_flops, machine_peaks, peak_memory, summarize
from s4m_d2.errors import ConfigError, S4MError

STEP, REST = "step", "rest"
FORMS = ("ours", "plain")


class Mismatch(S4MError):
    """The plain form of a part does not give what ours gives: nothing is compared."""


def say(text: str) -> None:
    """Progress, on stderr."""
    print(f"  {text} …", file=sys.stderr, flush=True)


def check_names(names: Collection[str]) -> set[str]:
    """The parts that are named, in any spelling; none: all."""
    known = {name.lower().replace(" ", "-"): name for name in (*MAKERS, STEP)}
    keys = {name.lower().replace(" ", "-").replace("_", "-") for name in names}
    if unknown := sorted(keys - known.keys()):
        raise ConfigError(f"--parts {' '.join(unknown)}: no such part; choose from {[*known]}")
    return {known[key] for key in keys or known}


def measure_stage(case: Case, stage: int, args: argparse.Namespace, peaks: dict) -> dict[str, Any]:
    """The parts of a stage, checked and timed; everything that JSON holds of it.

    ``peaks`` of the machine, by precision, get what is missing.
    """
    say(f"{case.name}, stage {stage}")
    names = check_names(args.parts)
    bench = Bench(case, stage)
    clock, parts, rows = Clock(bench.device), Parts(bench), []
    precision = "float16" if bench.half else "float32"
    if precision not in peaks:
        peaks[precision] = machine_peaks(clock, half=bench.half)
    for name, (make, stages) in MAKERS.items():
        if name in names and stage in stages:
            say(name)
            part = make(parts)
            if part.same is not None:
                checked(name, lambda part=part: part.same(part.ours(), part.plain()))
            rows.append({"name": name, **measure_part(name, part, peaks[precision], clock, args)})
    step = None
    if STEP in names:
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


def checked(name: str, check: Callable[[], None]) -> None:
    try:
        check()
    except AssertionError as error:
        raise Mismatch(
            f"{name}: the plain form and ours differ, so that their times cannot be compared. "
            "This is a bug of tools/benchmarking or of the step.",
            *str(error).splitlines(),
        ) from error


def measure_part(name: str, part: Part, peak: dict, clock: Clock, args) -> dict[str, Any]:
    """Times of a part, their ratio, and how near it comes to what the machine can do."""
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
    steps = {"ours": ours.training_step(bench), "plain": plain_step.training_step(bench)}
    forms = {name: Form(step) for name, step in steps.items()}
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
    plain, mine = (sum(found[n][form]["median"] for n in METHOD_PARTS) for form in FORMS[::-1])
    return plain / mine
