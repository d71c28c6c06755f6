"""Tables and the chart of what was measured."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import detectron2
import torch
from matplotlib.figure import Figure
from tabulate import tabulate

from benchmarking.measuring import REST
from benchmarking.timing import Clock
from s4m_d2.files import atomic_write

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


def write_chart(path: Path, stages: Sequence[dict[str, Any]]) -> None:
    """Horizontal bars: the share of a step that each part takes, ours and plain."""
    height = 1 + sum(1 + 0.32 * len(stage["parts"]) for stage in stages)
    figure = Figure(figsize=(9, height), layout="constrained")
    axes = figure.subplots(len(stages), 1, squeeze=False)[:, 0]
    for axis, stage in zip(axes, stages, strict=True):
        rows = [row for row in stage["parts"] if row["in_step"] and not row["inside"]]
        names = [row["name"] for row in rows] + [REST]
        for form, offset, color in (("ours", -0.2, "#2f6f9f"), ("plain", 0.2, "#d9903d")):
            # the plain form's bars are in units of our step, so that lengths compare
            factor = stage["totals"][form] / stage["totals"]["ours"]
            shares = [row[f"share_{form}"] for row in rows] + [stage["totals"][f"rest_{form}"]]
            places = [index + offset for index in range(len(names))]
            axis.barh(places, [100 * factor * s for s in shares], 0.38, label=form, color=color)
        axis.set_yticks(range(len(names)), names)
        axis.invert_yaxis()
        axis.set_xlabel("% of our step")
        axis.set_title(f"{stage['shapes']}, stage {stage['stage']}", loc="left")
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png", dpi=120)
