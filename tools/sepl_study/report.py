"""The study's figures over all seeds, as tables, a chart and pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cam_like import FAILURES
from make_cam_labels import CLASS_NAMES
from matplotlib.figure import Figure

from s4m_d2.files import atomic_write
from s4m_d2.sepl import enhance
from s4m_d2.sepl.results import confusion, draw_label, draw_masks, legend_entries, miou
from s4m_d2.visualization import panel_grid
from sepl_study.scenes import MIN_INSTANCE_AREA, STUDY_STRENGTH, StudyScene

BEFORE, EXACT, TINY = "before", "exact masks", "tiny SAM"
PUBLISHED_QUALITY = (50, 60)
PICTURES = 4
TITLES = ("image", "CAM-like label", "the tiny SAM's masks", "SEPL", "ground truth")
MAIN_HEAD = "CAM-like label | SEPL, exact masks | gain | SEPL, tiny SAM | gain |"


def summarize(runs: Sequence[Mapping[str, np.ndarray]]) -> dict[str, dict[str, Any]]:
    """By case ``mIoU`` and ``gain`` with their deviations, and ``IoU`` by class, in percent.

    Deviations are None of a single seed, IoUs where a class never occurs. ``runs``: of each seed
    (C,) IoUs in [0, 1] by case, ``BEFORE`` among them; nan where a class does not occur.
    """
    ious = {name: 100 * np.array([run[name] for run in runs]) for name in runs[0]}
    before = np.nanmean(ious[BEFORE], axis=1)
    result = {}
    for name, of in ious.items():
        miou_of, sums, counts = np.nanmean(of, axis=1), np.nansum(of, axis=0), (of == of).sum(0)
        result[name] = {
            "mIoU": float(miou_of.mean()),
            "mIoU deviation": _deviation(miou_of),
            "gain": float((miou_of - before).mean()),
            "gain deviation": _deviation(miou_of - before),
            "IoU": [float(s / n) if n else None for s, n in zip(sums, counts, strict=True)],
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
        f"{at}IoU by class:\n",
        f"| | {' | '.join(CLASS_NAMES)} |\n{'|---' * (len(CLASS_NAMES) + 1)}|",
    ]
    for name in (BEFORE, EXACT, TINY):
        cells = ["–" if v is None else f"{v:.1f}" for v in studies["settings"][name]["IoU"]]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines.append(
        f"\nThe tiny SAM gives {masks['masks an image']:.1f} masks an image; "
        f"{masks['IoU > 0.5']:.0%} of the instances of at least {MIN_INSTANCE_AREA} px have one of "
        f"IoU > 0.5, {masks['IoU > 0.75']:.0%} one of IoU > 0.75. Where all touching pairs are "
        f"fused, {masks['fused']:.0%} of the instances share their mask with another class."
    )
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


def draw_gains(strengths: Mapping[str, Any], path: Path) -> None:
    """A chart: the gain against the mIoU before, a line per kind of masks."""
    figure = Figure(figsize=(6, 3.8), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.axvspan(*PUBLISHED_QUALITY, color="0.9", label="published CAM labels of VOC")
    axes.axhline(0, color="0.6", linewidth=0.8)
    rows = sorted(strengths.values(), key=lambda row: row[BEFORE]["mIoU"])
    before = [row[BEFORE]["mIoU"] for row in rows]
    for name, marker in ((EXACT, "o"), (TINY, "s")):
        gains = [row[name]["gain"] for row in rows]
        deviations = [row[name]["gain deviation"] or 0 for row in rows]
        axes.errorbar(before, gains, deviations, marker=marker, markersize=4, capsize=3, label=name)
    axes.set_xlabel("mIoU of the CAM-like labels")
    axes.set_ylabel("gain of SEPL in mIoU")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png")


def draw_examples(
    scenes: Sequence[StudyScene], masks: Sequence[list[dict]], seed: int, path: Path
) -> None:
    """Some images at the study's strength, from the one that gains most to the one that loses."""
    found = []
    for scene, rles in zip(scenes, masks, strict=True):
        before = scene.cam_label(seed)
        maps = before, enhance(before, rles), scene.truth
        ious = [100 * miou(confusion(scene.truth, of, len(CLASS_NAMES))) for of in maps[:2]]
        found.append((ious[1] - ious[0], ious, scene.image, rles, maps))
    found.sort(key=lambda row: -row[0])
    places = np.linspace(0, len(found) - 1, min(PICTURES, len(found))).round().astype(int)
    rows, titles, labels = [], [], []
    for gain, ious, image, rles, maps in (found[place] for place in places):
        first, *others = (draw_label(image, label) for label in maps)
        rows.append([image, first, draw_masks(image, rles), *others])
        titles.append(f"mIoU {ious[0]:.1f} → {ious[1]:.1f} ({gain:+.1f})")
        labels += maps
    panel_grid(rows, TITLES, path, titles, legend_entries(labels, CLASS_NAMES))
