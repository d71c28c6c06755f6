"""A program that stands in for train_net.py, and results of runs that nobody trained.

    python ablation_runs.py --config-file FILE --resume KEY VALUE ...

writes what a training writes, AP included (:func:`expected_ap`). The file that ABLATION_PLAN names
says which runs fail and which wait until they are stopped; ABLATION_CALLS gets a line a start.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

AP = {"teacher": 10, "teacher-sd": 11, "supervised": 12, "gd": 15, "gd-sd": 16, "gd-pr": 17}
AP |= {"gd-sd-pr": 18.5, "gd-sd-arp": 14.0, "gd-sd-pr-arp": 19.5, "gd-sd-pr-arp-unique": 20.0}
EXIT_STOPPED = 75


def expected_ap(slug: str, percent: int, seed: int) -> float:
    return AP[slug] + percent / 10 + 2 * seed


def result(run) -> dict:
    """A result as the study keeps it."""
    ap = expected_ap(run.method.slug, run.percent, run.seed)
    one = {"AP": ap, "AP50": 2 * ap, "by class": {"person": ap - 1, "car": ap + 1}}
    models = {"stage-1 teacher" if run.method.is_teacher else "student": one}
    labels = {}
    if run.method.has_student:
        models["EMA teacher"] = {**one, "AP": ap + 0.5}
        labels = {"pseudo_labels/per_image": 4.0 + run.seed}
    return {
        "name": run.name,
        "method": run.method.slug,
        "models": models,
        "pseudo-labels": {"burn-in": {}, "end": labels},
        "iterations": 300 if run.method.is_teacher else 600,
        "seconds": 60.0,
    }


def main() -> int:
    start = sys.argv.index("--resume") + 1
    options = dict(zip(sys.argv[start::2], sys.argv[start + 1 :: 2], strict=True))
    folder = Path(options["OUTPUT_DIR"])
    plan = json.loads(Path(os.environ["ABLATION_PLAN"]).read_text())
    with open(os.environ["ABLATION_CALLS"], "a") as file:
        file.write(f"{folder.name}\n")
    stage = folder / options["S4M.STAGE"]
    stage.mkdir(parents=True, exist_ok=True)
    weights = options.get("S4M.TEACHER_WEIGHTS")
    if weights and not Path(weights).is_file():
        return 1
    if folder.name in plan.get("fail", ()):
        print("the reason why it failed", flush=True)
        return 3
    if folder.name in plan.get("wait", ()) and not list(stage.glob("model_*.pth")):
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_STOPPED))
        (stage / "model_0000299.pth").touch()  # as after a half
        time.sleep(60)
    write_training(stage, folder.name)
    return 0


def write_training(stage: Path, name: str) -> None:
    """Files of a finished stage with 600 iterations."""
    percent, seed, slug = name.split("-", 2)
    ap = expected_ap(slug, int(percent[:-3]), int(seed[4:]))
    figures = {"AP": ap, "AP50": 2 * ap, "AP-person": ap - 1, "AP-car": ap + 1}
    results = {"segm": figures}
    lines = []
    for iteration in range(19, 600, 20):
        lines.append({"iteration": iteration, "total_loss": 600.0 - iteration})
        if slug.startswith("gd"):
            results["teacher"] = {"segm": {**figures, "AP": ap + 0.5}}
            lines[-1] |= {"pseudo_labels/per_image": iteration + 1.0}
            lines[-1] |= {"teacher/phase": 0 if iteration < 300 else 2}
    (stage / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (stage / "results.json").write_text(json.dumps(results))
    (stage / "model_final.pth").touch()


if __name__ == "__main__":
    sys.exit(main())
