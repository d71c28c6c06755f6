#!/usr/bin/env python
"""Train a meta-architecture of one's own with S4M: the teacher, then the student.

    python examples/own_meta_arch/train_net.py --config-file examples/own_meta_arch/tiny_solo.yaml

mask_rcnn.yaml needs Detectron2 itself.
"""

import importlib.util
import os
import sys

import tiny_solo  # registers TinySOLO
from detectron2.config import get_cfg
from detectron2.engine import default_argument_parser, default_setup, launch

from s4m_d2 import S4MCheckpointer, S4MError, S4MTrainer, TeacherTrainer, add_s4m_config
from s4m_d2.engine import run_config, stage_config
from s4m_d2.engine.preflight import check_config, check_datasets, check_output_dir, runs_stage

if importlib.util.find_spec("detectron2.modeling.roi_heads"):  # not in detectron2 lite
    import mask_rcnn  # noqa: F401  (registers TeacherStudentRCNN)


def setup(args):
    cfg = get_cfg()
    add_s4m_config(cfg)
    tiny_solo.add_tiny_solo_config(cfg)
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    cfg = run_config(cfg)
    check_config(cfg, eval_only=args.eval_only)
    if not args.eval_only:
        check_output_dir(cfg, resume=args.resume)
    default_setup(cfg, args)
    return cfg


def main(args):
    cfg = setup(args)
    first, second = stage_config(cfg, "teacher"), stage_config(cfg, "student")
    if args.eval_only:
        model = TeacherTrainer.build_model(second)
        S4MCheckpointer(model).load(cfg.MODEL.WEIGHTS, branch=cfg.S4M.EVAL, require=True)
        return TeacherTrainer.test(second, model)
    check_datasets(cfg)
    weights = cfg.S4M.TEACHER_WEIGHTS or os.path.join(first.OUTPUT_DIR, "model_final.pth")
    if runs_stage(cfg, "teacher") and not (args.resume and os.path.isfile(weights)):
        train(TeacherTrainer(first), args.resume)
    if runs_stage(cfg, "student"):
        train(S4MTrainer(second, weights), args.resume)


def train(trainer, resume):
    os.makedirs(trainer.cfg.OUTPUT_DIR, exist_ok=True)
    trainer.resume_or_load(resume=resume)
    trainer.train()


if __name__ == "__main__":
    args = default_argument_parser(epilog=__doc__).parse_args()
    try:
        launch(main, args.num_gpus, dist_url=args.dist_url, args=(args,))
    except S4MError as error:
        sys.exit(f"{type(error).__name__}: {error}")
