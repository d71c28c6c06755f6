"""The study's figures over all seeds, as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from cam_like import FAILURES

from sepl_study.scenes import MIN_INSTANCE_AREA

BEFORE, EXACT, TINY = "before", "exact masks", "tiny SAM"
STUDY_STRENGTH = 0.5  # mIoU 50 to 60, as published CAM labels of VOC have
MAIN_HEAD = "CAM-like label | SEPL, exact masks | gain | SEPL, tiny SAM | gain |"


def summarize(runs: Sequence[Mapping[str, np.ndarray]]) -> dict[str, dict[str, Any]]:
    """Mean and sample deviation over seeds, in percent.

    Args:
        runs: of each seed the name of a case → (C,) IoUs in [0, 1], nan where a class does not
            occur; ``BEFORE`` among the names.

    Returns:
        Case → ``mIoU``, ``mIoU deviation``, ``gain``, ``gain deviation`` (None of a single seed).
    """
    ious = {name: 100 * np.array([run[name] for run in runs]) for name in runs[0]}
    before = np.nanmean(ious[BEFORE], axis=1)
    result = {}
    for name, of in ious.items():
        miou_of = np.nanmean(of, axis=1)
        result[name] = {
            "mIoU": float(miou_of.mean()),
            "mIoU deviation": _deviation(miou_of),
            "gain": float((miou_of - before).mean()),
            "gain deviation": _deviation(miou_of - before),
        }
    return result


def _deviation(values: np.ndarray) -> float | None:
    return float(values.std(ddof=1)) if len(values) > 1 else None


def markdown(results: Mapping[str, Any]) -> str:
    """All tables of ``results.json``."""
    parameters, studies, masks = results["parameters"], results["studies"], results["masks"]
    at = f"\nAt the strength {STUDY_STRENGTH:g}, "
    lines = [
        f"{parameters['images']} toyscapes scenes a seed, seeds "
        f"{', '.join(map(str, parameters['seeds']))}: mean ± deviation over the seeds of the data "
        "set's mIoU, in percent, over 8 classes and background.\n",
        f"| strength | {MAIN_HEAD}\n|---|---|---|---|---|---|",
        *(f"| {float(s):g} | {_main_cells(row)} |" for s, row in results["strengths"].items()),
        f"{at}the failures each alone:\n",
        f"| failure | {MAIN_HEAD}\n|---|---|---|---|---|---|",
        *(f"| {name} | {_main_cells(studies[f'{name} only'])} |" for name in FAILURES),
        f"{at}other settings:\n",
        *_case_table(studies["settings"]),
        f"{at}bad masks:\n",
        *_case_table(studies["bad masks"]),
        f"\nThe tiny SAM gives {masks['masks an image']:.1f} masks an image; "
        f"{masks['IoU > 0.5']:.0%} of the instances of at least {MIN_INSTANCE_AREA} px have one of "
        f"IoU > 0.5, {masks['IoU > 0.75']:.0%} one of IoU > 0.75. Where all touching pairs are "
        f"fused, {masks['fused']:.0%} of the instances share their mask with another class.",
    ]
    return "\n".join(lines) + "\n"


def _main_cells(row: Mapping[str, Mapping[str, Any]]) -> str:
    cells = [_cell(row[BEFORE], "mIoU")]
    for name in (EXACT, TINY):
        cells += [_cell(row[name], "mIoU"), _cell(row[name], "gain")]
    return " | ".join(cells)


def _cell(figures: Mapping[str, Any], key: str) -> str:
    sign, deviation = "+" if key == "gain" else "", figures[f"{key} deviation"]
    return f"{figures[key]:{sign}.1f}" + ("" if deviation is None else f" ± {deviation:.1f}")


def _case_table(cases: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = ["| masks | mIoU | gain |\n|---|---|---|"]
    for name, figures in cases.items():
        gain = "" if name == BEFORE else _cell(figures, "gain")
        lines.append(f"| {name} | {_cell(figures, 'mIoU')} | {gain} |")
    return lines
