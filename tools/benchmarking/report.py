"""Tables, JSON and the chart of what was measured."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tabulate import tabulate

from benchmarking.bounds import Machine
from benchmarking.measuring import REST
from s4m_d2.files import atomic_write

JSON_NAME, CHART_NAME = "benchmark.json", "benchmark.png"
PACKAGES = ("torchvision", "numpy", "opencv-python-headless", "segment-anything")
MILLI, GIGA, TERA = 1e-3, 1e9, 1e12
MEBI = 1 << 20


def environment(device: torch.device, clock: str, machines: dict[str, Machine]) -> dict[str, Any]:
    """Versions, device, and the measured peaks by precision."""
    import detectron2

    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "detectron2": detectron2.__version__,
    }
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    is_cuda = device.type == "cuda"
    return {
        "versions": versions,
        "device": torch.cuda.get_device_name(device) if is_cuda else "cpu",
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "clock": clock,
        "peaks": {
            name: {"flops_per_second": machine.flops, "bytes_per_second": machine.bytes}
            for name, machine in machines.items()
        },
    }


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def write_json(folder: Path, content: dict[str, Any]) -> Path:
    """The whole result."""
    path = folder / JSON_NAME
    with atomic_write(path) as file:
        json.dump(content, file, indent=1, allow_nan=False)
    return path


def stage_table(stage: dict[str, Any]) -> str:
    """The table of one stage, with the lines below it."""
    rows = [_row(row) for row in stage["parts"]]
    totals, step = stage["totals"], stage["step"]
    rest = [REST, "", "", "", _percent(totals["rest_ours"]), _percent(totals["rest_plain"])]
    rows.append([*rest, "", ""])
    lines = [
        f"{stage['shapes']}, stage {stage['stage']}: {stage['images']} images of "
        f"{stage['image_size'][0]} x {stage['image_size'][1]}, {stage['instances']} instances "
        f"each, SAM {stage['sam']}",
        tabulate(
            rows,
            headers=[
                "part", "ours, ms", "quartiles", "plain/ours", "share", "share, plain", "bound",
                "of bound",
            ],
            colalign=("left", *["right"] * 5, "left", "right"),
            disable_numparse=True,
        ),
    ]  # fmt: skip
    if step is not None:
        lines.append(
            f"whole step: {step['ours']['median'] / MILLI:.1f} ms, plain/ours "
            f"{_ratio(step['ratio'])}"
        )
        if step["peak_memory"]:
            lines.append(
                f"peak memory of a step: {step['peak_memory']['ours'] / MEBI:.0f} MiB beyond what "
                f"is held before it, plain/ours {step['memory_ratio']:.2f}x"
            )
    if stage["method_operations"] is not None:
        lines.append(f"method operations: {stage['method_operations']:.1f}x")
    return "\n".join(lines)


def _row(row: dict[str, Any]) -> list[str]:
    ours, bound = row["ours"], row["bound"]
    name = f"  {row['name']} (in {row['inside']})" if row["inside"] else row["name"]
    amounts = {"arithmetic": "{:.3g} GFLOP", "bandwidth": "{:.3g} GB"}
    return [
        name if row["in_step"] else f"{name} (workers)",
        f"{ours['median'] / MILLI:.2f}",
        f"{ours['lower'] / MILLI:.2f} – {ours['upper'] / MILLI:.2f}",
        _ratio(row["ratio"]),
        _percent(row["share_ours"]),
        _percent(row["share_plain"]),
        amounts[bound["kind"]].format(bound["amount"] / GIGA) if bound else "",
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
    return "; ".join(
        f"{name}: {peak['flops_per_second'] / TERA:.3g} TFLOP/s, "
        f"{peak['bytes_per_second'] / GIGA:.3g} GB/s"
        for name, peak in peaks.items()
    )


def write_chart(folder: Path, stages: Sequence[dict[str, Any]]) -> Path:
    """Horizontal bars: the share of a step that each part takes, ours and plain."""
    figure = Figure(figsize=(9, 1 + sum(1 + 0.32 * len(s["parts"]) for s in stages)))
    FigureCanvasAgg(figure)
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
    figure.tight_layout()
    path = folder / CHART_NAME
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png", dpi=120)
    return path
