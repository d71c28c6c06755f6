#!/usr/bin/env python
"""Train S4M (stage 1: the teacher, stage 2: the student) or evaluate a checkpoint.

    python train_net.py --config-file configs/cityscapes_10pct.yaml
    python train_net.py --config-file configs/cityscapes_10pct.yaml --resume
    torchrun --nproc-per-node 4 train_net.py --config-file configs/cityscapes_10pct.yaml
    python train_net.py --config-file configs/cityscapes_10pct.yaml \
        --eval-only MODEL.WEIGHTS output/student/model_final.pth S4M.EVAL both
"""

import logging
import os

from detectron2.engine import default_argument_parser, default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from s4m_d2.engine import S4MTrainer, TeacherTrainer, run_config, stage_config
from s4m_d2.engine.checkpoint import S4MCheckpointer
from s4m_d2.engine.launch import launch
from s4m_d2.engine.preflight import check_config, check_datasets, check_output_dir, load_config
from s4m_d2.errors import WeightsError

logger = logging.getLogger("s4m_d2.train_net")


def setup(args):
    """The checked, frozen config of this run; loggers and OUTPUT_DIR are ready afterwards."""
    cfg = run_config(load_config(args.config_file, args.opts))
    check_config(cfg, eval_only=args.eval_only)
    if not args.eval_only:
        check_output_dir(cfg, resume=args.resume)
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="s4m_d2")
    return cfg


def train(cfg, resume: bool):
    """Run the stages that S4M.STAGE asks for; a finished stage is not run again on resume."""
    check_datasets(cfg)
    teacher_weights = cfg.S4M.TEACHER_WEIGHTS
    results = None
    if cfg.S4M.STAGE != "student" and not teacher_weights:
        stage = stage_config(cfg, "teacher")
        teacher_weights = os.path.join(stage.OUTPUT_DIR, "model_final.pth")
        if not (resume and os.path.isfile(teacher_weights)):
            results = run(TeacherTrainer(stage), resume)
    if cfg.S4M.STAGE != "teacher":
        stage = stage_config(cfg, "student")
        finished = os.path.isfile(os.path.join(stage.OUTPUT_DIR, "model_final.pth"))
        if not (resume and finished):
            results = run(S4MTrainer(stage, teacher_weights), resume)
    return results


def run(trainer, resume: bool):
    os.makedirs(trainer.cfg.OUTPUT_DIR, exist_ok=True)
    trainer.resume_or_load(resume=resume)
    results = trainer.train()
    comm.synchronize()  # the first process has written what the others may read next
    return results


def evaluate(cfg):
    """Evaluate MODEL.WEIGHTS: the student, the teacher or both, as S4M.EVAL says."""
    if not cfg.MODEL.WEIGHTS:
        raise WeightsError("--eval-only needs MODEL.WEIGHTS: the checkpoint to evaluate.")
    cfg = stage_config(cfg, "student")
    model = TeacherTrainer.build_model(cfg)
    branches = ("student", "teacher") if cfg.S4M.EVAL == "both" else (cfg.S4M.EVAL,)
    results = {}
    for branch in branches:
        S4MCheckpointer(model).load(cfg.MODEL.WEIGHTS, branch=branch, require=True)
        logger.info("Evaluating the %s of %s", branch, cfg.MODEL.WEIGHTS)
        results[branch] = TeacherTrainer.test(cfg, model)
    if len(branches) == 1:
        results = results[branches[0]]
    if comm.is_main_process() and cfg.TEST.EXPECTED_RESULTS:
        verify_results(cfg, results)
    return results


def main(args):
    cfg = setup(args)
    return evaluate(cfg) if args.eval_only else train(cfg, args.resume)


if __name__ == "__main__":
    launch(main, default_argument_parser(epilog=__doc__).parse_args())
