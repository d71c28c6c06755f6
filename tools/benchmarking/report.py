"""Tables of what was measured."""

from __future__ import annotations

import platform
from typing import Any

import detectron2
import torch
from tabulate import tabulate

from benchmarking.measuring import REST
from benchmarking.timing import Clock

MILLI, GIGA, TERA = 1e-3, 1e9, 1e12
MEBI = 1 << 20


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


def stage_table(stage: dict[str, Any]) -> str:
    """The table of one stage, with the lines below it."""
    totals, step = stage["totals"], stage["step"]
    rest = [REST, "", "", "", _percent(totals["rest_ours"]), _percent(totals["rest_plain"])]
    height, width = stage["image_size"]
    heads = "part|ours, ms|quartiles|plain/ours|share|share, plain|bound|of bound".split("|")
    lines = [
        f"{stage['shapes']}, stage {stage['stage']}: {stage['images']} images of {height} x "
        f"{width}, {stage['instances']} instances each, SAM {stage['sam']}",
        tabulate(
            [*map(_row, stage["parts"]), [*rest, "", ""]],
            heads,
            colalign=("left", *["right"] * 5, "left", "right"),
            disable_numparse=True,
        ),
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
    unit = {"arithmetic": "GFLOP", "bandwidth": "GB"}
    return [
        name if row["in_step"] else f"{name} (workers)",
        f"{ours['median'] / MILLI:.2f}",
        f"{ours['lower'] / MILLI:.2f} – {ours['upper'] / MILLI:.2f}",
        _ratio(row["ratio"]),
        _percent(row["share_ours"]),
        _percent(row["share_plain"]),
        f"{bound['amount'] / GIGA:.3g} {unit[bound['kind']]}" if bound else "",
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
