#!/usr/bin/env python
"""Draw figures of a checkpoint and of the training's views, one PNG for each kind.

    python tools/visualize.py --config-file configs/toyscapes_10pct.yaml \
        --weights output/quickstart/student/model_final.pth --output output/figures
    python tools/visualize.py --config-file configs/toyscapes_10pct.yaml \
        --weights output/quickstart/student/model_final.pth --output output/figures \
        --what similarity --point 120 80 --images 2 MODEL.DEVICE cpu

Of a run on own data, give OUTPUT_DIR/config.yaml.

labeled        labeled images before and after augmentation
views          the weak and the strong view of unlabeled images
pseudo_labels  the way of an image: ground truth, the teacher's pseudo-labels, refined, exchanged
               between images (ARP), and the student's predictions
arp            images and pseudo-labels before and after the exchange of instances
similarity     cosine similarities to a point, of SAM's tokens and of the models' mask features
predictions    predictions and the ground truth

S4M.FIGURES.PERIOD draws the same during training.
"""

import argparse
import os
import sys

from detectron2.config import CfgNode
from torch import nn

from s4m_d2.engine.checks.config_checks import check_config
from s4m_d2.engine.command.arguments import command_parser, positive, split_overrides
from s4m_d2.engine.command.launch import exit_status
from s4m_d2.engine.figures.figure_set import FIGURES, OF_TEACHER, WITHOUT_MODEL, FigureSet
from s4m_d2.engine.figures.predictor import load_model
from s4m_d2.engine.labeling.gate import labeling_of_run
from s4m_d2.engine.labeling.pseudo_labeling import PseudoLabeling
from s4m_d2.engine.own_data import load_run
from s4m_d2.errors import ConfigError
from s4m_d2.sam import SamBackend, build_sam_backend
from s4m_d2.visualization import write_png


@exit_status
def main(arguments: list[str] | None = None) -> int:
    words, overrides = split_overrides(arguments)
    args = parse_args(words)
    cfg, _ = load_run(args.config_file, overrides, resume=True)
    check_config(cfg, eval_only=True)
    point = tuple(args.point) if args.point else None
    models = _models(cfg, args.weights, args.what)
    figures = FigureSet(cfg, args.images, *models, point=point)
    for name in dict.fromkeys(args.what):
        path = os.path.join(args.output, f"{name}.png")
        write_png(figures.draw(name), path)
        print(path)
    return 0


def parse_args(words: list[str]) -> argparse.Namespace:
    parser = command_parser(__doc__, overrides=True)
    add = parser.add_argument
    add("--config-file", required=True, metavar="FILE")
    text = "checkpoint of either stage, or of one model; labeled and views need none"
    add("--weights", default="", metavar="FILE", help=text)
    add("--output", required=True, metavar="DIR", help="for the PNG files")
    add("--what", nargs="+", choices=FIGURES, default=list(FIGURES), help="default: all")
    add("--images", type=positive, default=4, metavar="N", help="default: 4")
    text = "of similarity, in pixels of the image; default: inside its largest instance"
    add("--point", nargs=2, type=float, metavar=("X", "Y"), help=text)
    return parser.parse_args(words)


def _models(
    cfg: CfgNode, weights: str, what: list[str]
) -> tuple[dict[str, nn.Module], PseudoLabeling | None, SamBackend | None]:
    """What the figures are drawn of, no more than they need."""
    wanted = set(what)
    if wanted <= set(WITHOUT_MODEL):
        return {}, None, None
    if not weights:
        raise ConfigError(
            f"--what {sorted(wanted - set(WITHOUT_MODEL))[0]} needs a checkpoint: add --weights "
            "output/student/model_final.pth."
        )
    teacher, branch = load_model(cfg, weights, "teacher")
    if branch is None:
        by_name = {"model": teacher}
    else:
        by_name = {"student": load_model(cfg, weights, "student")[0], "teacher": teacher}
    labels = bool(wanted & set(OF_TEACHER))
    needs_sam = "similarity" in wanted or (labels and cfg.S4M.REFINE.ENABLED)
    backend = build_sam_backend(cfg) if needs_sam else None
    labeling = labeling_of_run(cfg, weights, teacher, backend) if labels else None
    return by_name, labeling, backend


if __name__ == "__main__":
    sys.exit(main())
