#!/usr/bin/env python
"""Compare the pseudo-labels of a checkpoint with the true labels of unlabeled images.

    python tools/pseudo_label_quality.py --config-file configs/toyscapes_10pct.yaml \
        --weights output/student/model_final.pth --images 100

Images of DATASETS.UNLABELED with known labels, without those of DATASETS.TRAIN, or images of
S4M.QUALITY.DATASETS (own data: own_val) are resized as in a test and labeled as in stage 2. Masks
with an IoU above 0.5 are matched; class accuracy and SQ (the mean IoU) are computed over matches,
precision and recall also require the correct class. With --output, everything is also written
there as JSON.
"""

import argparse
import os
import sys
from collections.abc import Mapping

from detectron2.config import CfgNode
from tabulate import tabulate
from tqdm import tqdm

from s4m_d2.engine import PseudoLabeling, QualityMeasurement
from s4m_d2.engine.checks.config_checks import check_config
from s4m_d2.engine.command.arguments import command_parser
from s4m_d2.engine.command.launch import exit_status
from s4m_d2.engine.figures.predictor import load_model
from s4m_d2.engine.labeling.protocol import check_model
from s4m_d2.engine.labeling.quality import QualityReport, quality_datasets
from s4m_d2.engine.own_data import load_run
from s4m_d2.engine.stages import stage_config
from s4m_d2.evaluation import COUNTS, PseudoLabelQuality, Quality
from s4m_d2.report import write_results
from s4m_d2.semi.ema_teacher import EMATeacher

RESULT = "pseudo_label_quality.json"
# Columns of tables: a count or measure, and its title.
COLUMNS = {
    "instances": "instances",
    "pseudo_labels": "labels",
    "duplicates": "duplicates",
    "found": "found",
    "class_accuracy": "class acc.",
    "sq": "SQ",
    "precision": "precision",
    "recall": "recall",
    "mask_precision": "mask prec.",
    "mask_recall": "mask rec.",
    "pq": "PQ",
}


@exit_status
def main(arguments: list[str] | None = None) -> int:
    args = _parse(arguments)
    cfg = _config(args)
    report = measure(cfg, args.weights, args.model)
    content, names = report.as_dict(), list(quality_datasets(cfg))
    skipped = f", {report.skipped} unreadable ones left out" if report.skipped else ""
    where = f"{content['images']:,} images of {', '.join(names)}{skipped}"
    print(
        f"Pseudo-labels of the {args.model} on {where}:", *quality_tables(report.steps), sep="\n\n"
    )
    if args.output:
        path = os.path.join(args.output, RESULT)
        origin = {key: vars(args)[key] for key in ("config_file", "weights", "model")}
        write_results({**origin, "datasets": names, **content}, path)
        print(f"\nWritten: {path}")
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument("--weights", required=True, metavar="FILE", help="checkpoint of any stage")
    choice = {"dest": "model", "action": "store_const", "default": "teacher"}
    parser.add_argument("--teacher", const="teacher", help="the teacher labels (default)", **choice)
    parser.add_argument("--student", const="student", help="the student labels", **choice)
    parser.add_argument("--images", type=int, help="at most; 0: all; default: S4M.QUALITY")
    parser.add_argument("--output", default="", metavar="DIR", help=f"folder for {RESULT}")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config overrides: KEY VALUE ...")
    return parser.parse_args(arguments)


def _config(args: argparse.Namespace) -> CfgNode:
    """The checked config of a stage 2 that starts from the weights."""
    images = [] if args.images is None else ["S4M.QUALITY.MAX_IMAGES", str(args.images)]
    stage = ["S4M.STAGE", "student", "S4M.TEACHER_WEIGHTS", args.weights]
    cfg, _ = load_run(args.config_file, [*args.opts, *images, *stage])
    check_config(cfg)
    return stage_config(cfg, "student")


def measure(cfg: CfgNode, weights: str, branch: str) -> QualityReport:
    """Label with the "student" or "teacher" of a checkpoint, and compare."""
    model, _ = load_model(cfg, weights, branch)
    check_model(model)
    labeling = PseudoLabeling(cfg, EMATeacher(model, cfg.S4M.EMA_DECAY))
    return QualityMeasurement(cfg, labeling)(lambda places: tqdm(places, disable=None))


def quality_tables(steps: Mapping[str, PseudoLabelQuality]) -> list[str]:
    """Make three Markdown tables, in percent: all pseudo-labels, by size and by class.

    ``steps``: "before" and "after" refinement, or one of them.
    """
    tables = []
    for head in ("", "size", "class"):
        groups = {step: {"all": quality.overall()} for step, quality in steps.items()}
        if head:
            groups = {step: getattr(steps[step], f"by_{head}")() for step in steps}
        rows = [
            (name, step, *(_cell(groups[step][name], key) for key in COLUMNS))
            for name in next(iter(groups.values()))
            for step in steps
            if not head or groups[step][name]["instances"] or groups[step][name]["pseudo_labels"]
        ]
        heads = (head, "refinement", *COLUMNS.values())
        align = ("left", "left", *("right" for _ in COLUMNS)) if rows else None
        tables.append(tabulate(rows, heads, "github", colalign=align, disable_numparse=True))
    return tables


def _cell(quality: Quality, key: str) -> str:
    value = quality[key]
    if value is None:
        return "–"
    return f"{value:,}" if key in COUNTS else f"{100 * value:.1f}"


if __name__ == "__main__":
    sys.exit(main())
