"""The study's figures over all seeds, as tables, a chart and pictures."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from cam_like import FAILURES
from make_cam_labels import CLASS_NAMES
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from s4m_d2.files import atomic_write
from s4m_d2.sepl import enhance
from s4m_d2.sepl.drawing import draw_image, draw_label, draw_masks, legend_entries
from s4m_d2.sepl.scores import confusion
from s4m_d2.visualization import panel_grid
from sepl_study.cases import BEFORE, EXACT, STUDY_STRENGTH, TINY
from sepl_study.scenes import MIN_INSTANCE_AREA, StudyScene

PUBLISHED_QUALITY = (50, 60)  # mIoU of CAM labels on VOC
PICTURES = 4
TITLES = ("image", "CAM-like label", "the tiny SAM's masks", "SEPL", "ground truth")


def summarize(runs: Sequence[Mapping[str, Sequence[float | None]]]) -> dict[str, dict[str, float]]:
    """Mean and sample deviation over seeds, in percent.

    Args:
        runs: of each seed what :func:`sepl_study.cases.measure` returns.

    Returns:
        Case → ``mIoU``, ``mIoU deviation``, ``gain``, ``gain deviation`` (None of a single seed),
        and ``IoU``, a list with a number a class, None where it never occurs.
    """
    scores = {name: np.array([_percent(run[name]) for run in runs]) for name in runs[0]}
    before = np.nanmean(scores[BEFORE], axis=1)
    result = {}
    for name, ious in scores.items():
        miou = np.nanmean(ious, axis=1)
        occurs = ~np.isnan(ious)
        sums, counts = np.nansum(ious, axis=0), occurs.sum(0)
        result[name] = {
            "mIoU": float(miou.mean()),
            "mIoU deviation": _deviation(miou),
            "gain": float((miou - before).mean()),
            "gain deviation": _deviation(miou - before),
            "IoU": [float(s / n) if n else None for s, n in zip(sums, counts, strict=True)],
        }
    return result


def _percent(ious: Sequence[float | None]) -> list[float]:
    return [np.nan if value is None else 100 * value for value in ious]


def _deviation(values: np.ndarray) -> float | None:
    return float(values.std(ddof=1)) if len(values) > 1 else None


def markdown(results: Mapping[str, Any]) -> str:
    """All tables of ``results.json``."""
    parameters, studies = results["parameters"], results["studies"]
    seeds = ", ".join(map(str, parameters["seeds"]))
    lines = [
        f"{parameters['images']} toyscapes scenes a seed, seeds {seeds}: mean ± deviation over the "
        "seeds of the data set's mIoU, in percent, over 8 classes and background.",
        "",
        "| strength | CAM-like label | SEPL, exact masks | gain | SEPL, tiny SAM | gain |",
        "|---|---|---|---|---|---|",
    ]
    for strength, row in results["strengths"].items():
        lines.append(f"| {float(strength):g} | {_main_cells(row)} |")
    lines += ["", f"At the strength {STUDY_STRENGTH:g}, the failures each alone:", ""]
    lines += ["| failure | CAM-like label | SEPL, exact masks | gain | SEPL, tiny SAM | gain |"]
    lines += ["|---|---|---|---|---|---|"]
    lines += [f"| {name} | {_main_cells(studies[f'{name} only'])} |" for name in FAILURES]
    lines += ["", f"At the strength {STUDY_STRENGTH:g}, other settings:", ""]
    lines += _case_table(studies["settings"])
    lines += ["", f"At the strength {STUDY_STRENGTH:g}, bad masks:", ""]
    lines += _case_table(studies["bad masks"])
    lines += ["", f"At the strength {STUDY_STRENGTH:g}, IoU by class:", ""]
    lines += [f"| | {' | '.join(CLASS_NAMES)} |", "|---" * (len(CLASS_NAMES) + 1) + "|"]
    for name in (BEFORE, EXACT, TINY):
        cells = ["–" if v is None else f"{v:.1f}" for v in studies["settings"][name]["IoU"]]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    masks = results["masks"]
    lines += [
        "",
        f"The tiny SAM gives {masks['masks an image']:.1f} masks an image; "
        f"{masks['IoU > 0.5']:.0%} of the instances of at least {MIN_INSTANCE_AREA} px have one of "
        f"IoU > 0.5, {masks['IoU > 0.75']:.0%} one of IoU > 0.75. Where all touching pairs are "
        f"fused, {masks['fused']:.0%} of the instances share their mask with another class.",
    ]
    return "\n".join(lines) + "\n"


def _main_cells(row: Mapping[str, Mapping[str, float]]) -> str:
    cells = [_with_deviation(row[BEFORE], "mIoU")]
    for name in (EXACT, TINY):
        cells += [_with_deviation(row[name], "mIoU"), _with_deviation(row[name], "gain")]
    return " | ".join(cells)


def _with_deviation(figures: Mapping[str, float], key: str) -> str:
    sign = "+" if key == "gain" else ""
    deviation = figures[f"{key} deviation"]
    return f"{figures[key]:{sign}.1f}" + ("" if deviation is None else f" ± {deviation:.1f}")


def _case_table(cases: Mapping[str, Mapping[str, float]]) -> list[str]:
    lines = ["| masks | mIoU | gain |", "|---|---|---|"]
    for name, figures in cases.items():
        gain = "" if name == BEFORE else _with_deviation(figures, "gain")
        lines.append(f"| {name} | {_with_deviation(figures, 'mIoU')} | {gain} |")
    return lines


def draw_gains(strengths: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """A chart: the gain against the mIoU before, a line a kind of masks."""
    figure = Figure(figsize=(6, 3.8), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
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
    scenes: Sequence[StudyScene],
    masks: Sequence[Sequence[Mapping[str, Any]]],
    seed: int,
    path: str | os.PathLike[str],
) -> None:
    """Some images at the study's strength, from the one that gains most to the one that loses.

    Args:
        masks: COCO RLEs of each scene, the tiny SAM's.
    """
    found = []
    for number, scene in enumerate(scenes):
        before = scene.cam_label(seed, STUDY_STRENGTH, FAILURES)
        after = enhance(before, masks[number])
        ious = [
            100 * confusion(scene.truth, label, len(CLASS_NAMES)).miou()
            for label in (before, after)
        ]
        found.append((ious[1] - ious[0], number, ious, before, after))
    found.sort(key=lambda row: -row[0])
    count = min(PICTURES, len(found))
    chosen = [found[i] for i in np.linspace(0, len(found) - 1, count).round().astype(int)]
    rows, titles, labels = [], [], []
    for gain, number, ious, before, after in chosen:
        scene = scenes[number]
        shown = [draw_label(scene.image, label) for label in (before, after, scene.truth)]
        rows.append([draw_image(scene.image), shown[0], draw_masks(scene.image, masks[number]),
                     *shown[1:]])  # fmt: skip
        titles.append(f"mIoU {ious[0]:.1f} → {ious[1]:.1f} ({gain:+.1f})")
        labels += [before, after, scene.truth]
    panel_grid(rows, TITLES, path, titles, legend_entries(labels, CLASS_NAMES))
