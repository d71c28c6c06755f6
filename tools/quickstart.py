"""Make toyscapes, train both stages on it, and show the result.

    python tools/quickstart.py --output output/quickstart

Prints a table (stage-1 teacher, student, EMA teacher) and writes ``overview.png``, ``results.md``
and ``report.html`` into the output folder. A stopped run continues where it stopped.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch
from detectron2.data import MetadataCatalog
from tabulate import tabulate

from s4m_d2.engine import PseudoLabeling, S4MTrainer, run_config, stage_config
from s4m_d2.engine.checkpointing.checkpoint import S4MCheckpointer
from s4m_d2.engine.config_file import load_config
from s4m_d2.engine.figures.figure_set import (
    PAIR_ALL,
    at_image_size,
    draw_found,
    draw_labels,
    draw_truth,
    validation_samples,
)
from s4m_d2.engine.figures.similarity_figure import to_rgb
from s4m_d2.files import atomic_write
from s4m_d2.report import read_results, write_report
from s4m_d2.semi.ema_teacher import EMATeacher
from s4m_d2.visualization import panel_grid

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = (
    "image",
    "ground truth",
    "teacher's pseudo-labels",
    "refined by SAM",
    "ARP view (student's input)",
    "student's prediction",
)
# Tell glibc to keep freed memory: on a CPU, fetching the same pages from the system again in every
# iteration takes a large part of the time. Other systems ignore these variables.
KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 33),
    "MALLOC_ARENA_MAX": "1",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config-file", default=str(ROOT / "configs" / "toyscapes_10pct.yaml"))
    parser.add_argument("--output", default=str(ROOT / "output" / "quickstart"))
    parser.add_argument("--images", type=int, default=4, help="rows of the overview")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config overrides: KEY VALUE ...")
    args = parser.parse_args()
    os.environ.setdefault("DETECTRON2_DATASETS", str(ROOT / "datasets"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    opts = ["MODEL.DEVICE", device, *args.opts, "OUTPUT_DIR", args.output]

    data = Path(os.environ["DETECTRON2_DATASETS"]) / "toyscapes"
    _run("datasets/make_toyscapes.py", "--output", str(data))
    _run("train_net.py", "--config-file", args.config_file, "--resume", *opts)

    table = quickstart_table(args.output)
    with atomic_write(os.path.join(args.output, "results.md")) as file:
        file.write(table + "\n")
    print(f"\n{table}\n", flush=True)
    overview = os.path.join(args.output, "overview.png")
    draw_overview(run_config(load_config(args.config_file, opts)), overview, args.images)
    print(f"Picture: {overview}\nReport: {write_report(args.output)}")  # with the overview


def _run(script: str, *arguments: str) -> None:
    """Run one of the project's scripts; its failure is ours, its own message is enough."""
    command = [sys.executable, str(ROOT / script), *arguments]
    status = subprocess.run(command, env=KEEP_MEMORY | os.environ).returncode
    if status:
        sys.exit(status)


def quickstart_table(output: str) -> str:
    """AP and AP50 of the three models, in Markdown."""
    first = read_results(os.path.join(output, "teacher", "results.json"))
    second = read_results(os.path.join(output, "student", "results.json"))
    models = {"stage-1 teacher": first, "student": second, "EMA teacher": second["teacher"]}
    rows = [(name, *map(found["segm"].get, ("AP", "AP50"))) for name, found in models.items()]
    heads = ("model", "AP", "AP50")
    return tabulate(rows, heads, tablefmt="github", floatfmt=".1f", missingval="–")


@torch.no_grad()
def draw_overview(cfg, path: str, num_images: int) -> None:
    """Draw what happens to a few validation images on their way through stage 2."""
    cfg = stage_config(cfg, "student")
    cfg.defrost()
    cfg.S4M.ARP.PAIR_FRACTION = PAIR_ALL
    cfg.freeze()
    weights = os.path.join(cfg.OUTPUT_DIR, "model_final.pth")
    student, teacher = S4MTrainer.build_model(cfg).eval(), S4MTrainer.build_model(cfg)
    S4MCheckpointer(student).load(weights, branch="student", require=True)
    S4MCheckpointer(teacher).load(weights, branch="teacher", require=True)

    samples = validation_samples(cfg, num_images)
    views = PseudoLabeling(cfg, EMATeacher(teacher, cfg.S4M.EMA_DECAY))(samples)
    names = MetadataCatalog.get(cfg.DATASETS.TEST[0]).thing_classes
    all_refined, all_pasted = views.refined, views.arp_labels
    rows = []
    for i, (sample, result) in enumerate(zip(samples, student(samples), strict=True)):
        image = to_rgb(sample["image"])
        unrefined = at_image_size(views.selections[i], image.shape[:2])
        mixed = to_rgb(views.student_batch[i]["image"])
        rows.append(
            [
                image,
                draw_truth(sample, names),
                draw_labels(image, unrefined, names, scores=True),
                draw_labels(image, all_refined[i], names),
                draw_labels(mixed, all_pasted[i], names),
                draw_found(image, result["instances"], names),
            ]
        )
    panel_grid(rows, COLUMNS, path)


if __name__ == "__main__":
    main()
