#!/usr/bin/env python
"""Train a meta-architecture of one's own with S4M: the teacher, then the student.

    python examples/own_meta_arch/train_net.py --config-file examples/own_meta_arch/tiny_solo.yaml

mask_rcnn.yaml needs Detectron2 itself.
"""

import importlib.util
import sys

import tiny_solo  # registers TinySOLO
from detectron2.config import get_cfg
from detectron2.engine import default_argument_parser, default_setup
from detectron2.utils import comm

from s4m_d2 import S4MError, add_s4m_config
from s4m_d2.engine import run_config
from s4m_d2.engine.checks.config_checks import check_config
from s4m_d2.engine.checks.preflight import preflight
from s4m_d2.engine.command import run
from s4m_d2.engine.command.launch import launch
from s4m_d2.engine.training.stop_signals import listen
from s4m_d2.errors import raise_all

if importlib.util.find_spec("detectron2.modeling.roi_heads"):  # not in detectron2 lite
    import mask_rcnn  # noqa: F401  (registers TeacherStudentRCNN)


def setup(args):
    cfg = get_cfg()
    add_s4m_config(cfg)
    tiny_solo.add_tiny_solo_config(cfg)
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    cfg = run_config(cfg)
    if args.eval_only:
        check_config(cfg, eval_only=True)
    else:
        raise_all(preflight(cfg, resume=args.resume, num_processes=comm.get_world_size()).errors)
    default_setup(cfg, args)
    return cfg


def main(args):
    if args.eval_only:
        return run.evaluate(setup(args))
    listen()  # to SIGTERM and SIGUSR1: save and stop
    return run.train(setup(args), resume=args.resume)


if __name__ == "__main__":
    args = default_argument_parser(epilog=__doc__).parse_args()
    try:
        launch(main, args)
    except S4MError as error:
        sys.exit(f"{type(error).__name__}: {error}")
