"""Measures the parts of one stage at one case's shapes."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import asdict
from typing import Any

from benchmarking import ours, plain_step
from benchmarking.bench import Bench
from benchmarking.bounds import Machine, bound_of
from benchmarking.parts import INSIDE, METHOD_PARTS, Part
from benchmarking.stage_parts import ORDER, parts_of
from benchmarking.timing import Clock, Form, measure, peak_memory, ratio, summarize
from s4m_d2.errors import ConfigError

STEP, REST = "step", "rest"
FORMS = ("ours", "plain")


def key_of(name: str) -> str:
    """A part's name on the command line."""
    return name.lower().replace(" ", "-").replace("_", "-")


def check_names(names: Collection[str]) -> set[str]:
    """The names of parts as keys; none: all.

    Raises:
        ConfigError: one is no part.
    """
    known = [*map(key_of, ORDER), STEP]
    keys = {key_of(name) for name in names}
    unknown = sorted(keys - set(known))
    if unknown:
        raise ConfigError(f"--parts {' '.join(unknown)}: no such part; choose from {known}")
    return keys or set(known)


def measure_stage(
    bench: Bench,
    machine: Machine,
    names: Collection[str],
    *,
    repeats: int,
    warmup: int,
    memory: bool,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """The parts called ``names`` (keys), checked and timed; everything that JSON holds of a stage.

    Raises:
        Mismatch: two forms of a part do not give the same.
    """
    clock = Clock(bench.device)
    rows = []
    for part in parts_of(bench):
        if key_of(part.name) in names:
            say(part.name)
            rows.append(measure_part(part, machine, clock, repeats=repeats, warmup=warmup))
    step = None
    if STEP in names:
        say(STEP)
        step = measure_step(bench, clock, repeats=repeats, warmup=warmup, memory=memory)
    totals = add_shares(rows, step)
    return {
        "shapes": bench.case.name,
        "stage": bench.stage,
        "image_size": list(bench.size),
        "images": len(bench.labeled),
        "instances": bench.case.instances,
        "sam": sam_name(bench),
        "mixed_precision": bool(bench.cfg.SOLVER.AMP.ENABLED),
        "parts": rows,
        "step": step,
        "totals": totals,
        "method_operations": method_ratio(rows),
    }


def sam_name(bench: Bench) -> str:
    """Which SAM, and whose weights."""
    sam = bench.cfg.S4M.SAM
    packaged = sam.BACKEND == "tiny_toyscapes"
    return f"{sam.BACKEND} (packaged)" if packaged else f"{sam.MODEL_TYPE} (random weights)"


def measure_part(
    part: Part, machine: Machine, clock: Clock, *, repeats: int, warmup: int
) -> dict[str, Any]:
    """Times of a part, their ratio, and its bound."""
    if part.check is not None:
        part.check()
    bound = bound_of(part, machine)
    row: dict[str, Any] = {
        "name": part.name,
        "inside": INSIDE.get(part.name),
        "in_step": part.in_step,
        **times_of(part.forms, clock, repeats=repeats, warmup=warmup),
        "checked": part.check is not None,
        "bound": None,
    }
    if bound is not None:
        fraction = bound.seconds / row["ours"]["median"]
        row["bound"] = {**asdict(bound), "fraction": fraction}
    return row


def measure_step(
    bench: Bench, clock: Clock, *, repeats: int, warmup: int, memory: bool
) -> dict[str, Any]:
    """A whole step through the trainer, and the one that is assembled from the plain forms."""
    plain_step.check_step(bench)
    forms = {"ours": Form(ours.training_step(bench)), "plain": Form(plain_step.TrainingStep(bench))}
    row: dict[str, Any] = times_of(forms, clock, repeats=repeats, warmup=max(1, warmup))
    peaks = (
        {name: peak_memory(form, bench.device) for name, form in forms.items()} if memory else {}
    )
    row["peak_memory"] = peaks or None
    row["memory_ratio"] = peaks["plain"] / peaks["ours"] if peaks else None
    return row


def times_of(forms: dict[str, Form], clock: Clock, *, repeats: int, warmup: int) -> dict[str, Any]:
    """Summaries of the forms, and of plain / ours."""
    times = measure(forms, clock, repeats=repeats, warmup=warmup)
    return {
        "ours": asdict(summarize(times["ours"])),
        "plain": asdict(summarize(times["plain"])) if "plain" in times else None,
        "ratio": asdict(ratio(times["plain"], times["ours"])) if "plain" in times else None,
    }


def add_shares(rows: list[dict[str, Any]], step: dict[str, Any] | None) -> dict[str, float]:
    """Give each part the share of the step that it takes, in both forms; shares add up to 1.

    The whole is the step as it was measured, or the sum of its parts where that is more or there
    is no step; what no part explains is the rest. A part inside another one has a share, but is
    not counted again; the data, which other processes load, are compared with the step.

    Returns:
        for each form the whole, in seconds, and the share of the rest.
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
