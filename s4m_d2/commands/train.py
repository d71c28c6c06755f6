"""Train S4M (stage 1: the teacher, stage 2: the student) or evaluate a checkpoint.

    s4m-train --config-file cityscapes_10pct
    s4m-train --config-file cityscapes_10pct --check
    s4m-train --config-file cityscapes_10pct --resume
    s4m-train --config-file custom --labeled annotations.json --images DIR --unlabeled DIR
    torchrun --nproc-per-node 4 -m s4m_d2.commands.train --config-file cityscapes_10pct
    s4m-train --config-file cityscapes_10pct --eval-only \
        MODEL.WEIGHTS output/student/model_final.pth S4M.EVAL both

--config-file takes a path, or the name of a config of the package. In a clone, `python
train_net.py` is the same command. After SIGTERM, SIGUSR1 or Ctrl-C a training saves after the
current iteration and exits with status 75; --resume continues it. A second Ctrl-C exits at once.
"""

import argparse
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detectron2.engine import default_argument_parser, default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from s4m_d2.engine.checks.config_checks import check_config
from s4m_d2.engine.checks.preflight import PreflightReport
from s4m_d2.engine.checks.resource_checks import check_output_dir
from s4m_d2.engine.command import run
from s4m_d2.engine.command.arguments import add_arguments, check_arguments, read_config
from s4m_d2.engine.command.launch import launch, plain_endings
from s4m_d2.engine.config_file import config_path
from s4m_d2.engine.training.stop_signals import listen
from s4m_d2.errors import ConfigError
from s4m_d2.files import atomic_write
from s4m_d2.report.run import CONFIG, FACTS

logger = logging.getLogger("s4m_d2.train_net")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit status."""
    with plain_endings():
        return start(parse_args(arguments))


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = default_argument_parser(epilog=__doc__)
    add_arguments(parser)
    args = parser.parse_args(arguments)
    args.config_file = config_path(args.config_file)  # Detectron2's set-up opens it, too
    if args.check and args.eval_only:
        parser.error("--check is for training runs; --eval-only checks its settings by itself")
    return args


def run_process(args: argparse.Namespace) -> Mapping[str, Any] | None:
    """Train or evaluate in one process of a run."""
    report = vars(args).pop("report")  # no argument: Detectron2's set-up logs all of them
    if not args.eval_only:
        listen()
    cfg, own_data = read_config(args)
    if args.eval_only:  # a training is checked before its processes start
        check_config(cfg, eval_only=True)
        if not cfg.MODEL.WEIGHTS:
            example = "such as output/student/model_final.pth"
            raise ConfigError(f"MODEL.WEIGHTS is empty: name what to evaluate, {example}.")
        check_output_dir(cfg, resume=True)
    config, facts = (Path(cfg.OUTPUT_DIR, name) for name in (CONFIG, FACTS))
    is_runs = args.eval_only and config.is_file() and facts.is_file()
    content = config.read_bytes() if is_runs else b""
    default_setup(cfg, args)
    if is_runs and comm.is_main_process():  # the run's other commands read its own
        with atomic_write(config, "wb") as file:
            file.write(content)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="s4m_d2")
    if own_data is not None:
        own_data.save(warn=args.eval_only)
    if args.eval_only:
        return run.evaluate(cfg)
    logger.info("Checked before training:\n%s", report)
    return run.train(cfg, resume=args.resume, checked=report.findings)


def start(args: argparse.Namespace) -> int:
    """Check and train, or evaluate; the exit status."""
    check_arguments(args)
    if not args.config_file:
        raise ConfigError("--config-file is missing: a path or a name, such as custom_small.")
    report = PreflightReport(())
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0  # of this machine's processes under torchrun
    if first and not args.eval_only:
        report = run.check(args)
        if args.check:
            print(report)
        elif report.errors:
            print(f"{report}\nTraining was not started.", file=sys.stderr)
        if report.errors:
            return 1
    if args.check:
        return 0
    args.report = report
    launch(run_process, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
