"""The usual set-up of a run: command line, logging, trainer, predictor."""

from __future__ import annotations

import argparse
import logging
import os
import weakref
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from detectron2 import data, evaluation, modeling, solver
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm, events
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler

from . import hooks
from .train_loop import AMPTrainer, HookBase, SimpleTrainer, TrainerBase

__all__ = [
    "DefaultTrainer",
    "create_ddp_model",
    "default_argument_parser",
    "default_setup",
    "default_writers",
]

_WRITE_PERIOD = 20  # iterations between two log lines
_FIRST_PORT, _NUM_PORTS = 2**15 + 2**14, 2**14  # the dynamic ports


def create_ddp_model(model: nn.Module, **kwargs: Any) -> nn.Module:
    """Wrap the model in DistributedDataParallel(**kwargs) if there are several processes."""
    if comm.get_world_size() == 1:
        return model
    if next(model.parameters()).is_cuda:
        kwargs.setdefault("device_ids", [comm.get_local_rank()])
    return DistributedDataParallel(model, **kwargs)


def default_argument_parser(epilog: str | None = None) -> argparse.ArgumentParser:
    """The options every training script takes; ``opts`` holds "KEY VALUE" config overrides."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(epilog=epilog, formatter_class=as_written)
    add = parser.add_argument
    add("--config-file", default="", metavar="FILE", help="path to config file")
    add("--resume", action="store_true", help="continue from OUTPUT_DIR's last checkpoint")
    add("--eval-only", action="store_true", help="perform evaluation only")
    add("--num-gpus", type=int, default=1, help="number of gpus *per machine*")
    add("--num-machines", type=int, default=1, help="total number of machines")
    add("--machine-rank", type=int, default=0, help="the rank of this machine (from 0)")
    # One port per user, so that a port in use points at processes left over from a crash.
    port = _FIRST_PORT + (os.getuid() if hasattr(os, "getuid") else 1) % _NUM_PORTS
    add("--dist-url", default=f"tcp://127.0.0.1:{port}", help="address of rank 0, or 'auto'")
    add("opts", nargs=argparse.REMAINDER, help='config overrides, as "PATH.KEY VALUE" pairs')
    return parser


def default_setup(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Set up logging, log and save the config to OUTPUT_DIR/config.yaml, seed, set up cuDNN.

    Rank r seeds with SEED + r; a negative SEED means a random one.
    """
    rank, output_dir = comm.get_rank(), cfg.OUTPUT_DIR
    if comm.is_main_process() and output_dir:
        os.makedirs(output_dir, exist_ok=True)
    setup_logger(output_dir, distributed_rank=rank, name="fvcore")
    logger = setup_logger(output_dir, distributed_rank=rank)
    logger.info(f"Rank of current process: {rank}. World size: {comm.get_world_size()}")
    logger.info(f"Environment info:\n{collect_env_info()}\nCommand line arguments: {args}")
    if config_file := getattr(args, "config_file", ""):
        with open(config_file, encoding="utf-8") as file:
            logger.info(f"Contents of args.config_file={config_file}:\n{file.read()}")
    if comm.is_main_process() and output_dir:
        path = os.path.join(output_dir, "config.yaml")
        with open(path + ".tmp", "w", encoding="utf-8") as file:
            file.write(cfg.dump())
        os.replace(path + ".tmp", path)
        logger.info(f"Running with full config, saved to {path}:\n{cfg.dump()}")
    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED + rank)
    if not getattr(args, "eval_only", False):  # sizes vary in evaluation: benchmarks do not pay
        torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK


def default_writers(output_dir: str, max_iter: int | None = None) -> list[events.EventWriter]:
    """Console, OUTPUT_DIR/metrics.json and TensorBoard events in OUTPUT_DIR."""
    os.makedirs(output_dir, exist_ok=True)
    return [
        events.CommonMetricPrinter(max_iter),
        events.JSONWriter(os.path.join(output_dir, "metrics.json")),
        events.TensorboardXWriter(output_dir),
    ]


def _forwarded(name: str) -> property:
    return property(
        lambda self: getattr(self._trainer, name),
        lambda self, value: setattr(self._trainer, name, value),
    )


class DefaultTrainer(TrainerBase):
    """Everything a config describes, behind overridable ``build_*`` methods.

    The step itself is ``_trainer``'s, a SimpleTrainer, or an AMPTrainer if SOLVER.AMP.ENABLED;
    ``model``, ``data_loader`` and ``optimizer`` are read from and written to it.
    """

    model = _forwarded("model")
    data_loader = _forwarded("data_loader")
    optimizer = _forwarded("optimizer")

    def __init__(self, cfg: CfgNode):
        super().__init__()
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()  # the script did not call default_setup
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        model = create_ddp_model(model, broadcast_buffers=False)
        step_trainer = AMPTrainer if cfg.SOLVER.AMP.ENABLED else SimpleTrainer
        self._trainer = step_trainer(model, data_loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        state = {"trainer": weakref.proxy(self)}
        self.checkpointer = DetectionCheckpointer(model, cfg.OUTPUT_DIR, **state)
        self.cfg, self.max_iter = cfg, cfg.SOLVER.MAX_ITER
        self.register_hooks(self.build_hooks())

    def resume_or_load(self, resume: bool = True) -> None:
        """With ``resume`` and a checkpoint in OUTPUT_DIR: load all states and continue after the
        iteration it holds. Else: load only weights, from MODEL.WEIGHTS, and start from 0."""
        self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        if resume and self.checkpointer.has_checkpoint():
            self.start_iter = self.iter + 1

    def build_hooks(self) -> list[HookBase]:
        """Timer, scheduler, checkpoints, evaluation, writers, in this order: a failing evaluation
        leaves a checkpoint, and the writers see its results."""
        cfg = self.cfg

        def test_and_save_results() -> dict:
            self._last_eval_results = self.test(self.cfg, self.model)
            return self._last_eval_results

        ret: list[HookBase] = [hooks.IterationTimer(), hooks.LRScheduler()]
        if comm.is_main_process():
            period = cfg.SOLVER.CHECKPOINT_PERIOD
            ret.append(hooks.PeriodicCheckpointer(self.checkpointer, period))
        ret.append(hooks.EvalHook(cfg.TEST.EVAL_PERIOD, test_and_save_results))
        if comm.is_main_process():
            ret.append(hooks.PeriodicWriter(self.build_writers(), period=_WRITE_PERIOD))
        return ret

    def build_writers(self) -> list[events.EventWriter]:
        return default_writers(self.cfg.OUTPUT_DIR, self.max_iter)

    def train(self) -> dict | None:
        """Train from ``start_iter``; if TEST.EXPECTED_RESULTS is set, verify the last results and
        return them."""
        super().train(self.start_iter, self.max_iter)
        if not (len(self.cfg.TEST.EXPECTED_RESULTS) and comm.is_main_process()):
            return None
        evaluation.verify_results(self.cfg, self._last_eval_results)
        return self._last_eval_results

    def run_step(self) -> None:
        self._trainer.iter = self.iter
        self._trainer.run_step()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "_trainer": self._trainer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._trainer.load_state_dict(state_dict["_trainer"])

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        model = modeling.build_model(cfg)
        logging.getLogger(__name__).info(f"Model:\n{model}")
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return solver.build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> LRScheduler:
        return solver.build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Iterable:
        return data.build_detection_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable:
        return data.build_detection_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        raise NotImplementedError(f"{cls.__name__}.build_evaluator is not implemented")

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module) -> dict:
        """Evaluate the model, as it is, on DATASETS.TEST with what ``build_evaluator`` builds.

        Returns the results by data set, or those of the only data set.
        """
        logger = logging.getLogger(__name__)
        results = OrderedDict()
        for name in cfg.DATASETS.TEST:
            try:
                evaluator = cls.build_evaluator(cfg, name)
            except NotImplementedError:
                logger.warning(f"No evaluator for {name}: implement build_evaluator.")
                results[name] = {}
                continue
            loader = cls.build_test_loader(cfg, name)
            results[name] = evaluation.inference_on_dataset(model, loader, evaluator)
            if comm.is_main_process():
                logger.info(f"Evaluation results for {name} in csv format:")
                evaluation.print_csv_format(results[name])
        return next(iter(results.values())) if len(results) == 1 else results
