"""What a run of DefaultTrainer writes and does, against Detectron2's."""

import json

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.engine import HookBase, default_argument_parser, default_writers
from detectron2.utils.events import CommonMetricPrinter
from test_engine_defaults import Trainer

TIMES = ("time", "data_time", "rank_data_time", "eta_seconds")


def trainer_cfg(folder, max_iter=6):
    cfg = get_cfg()
    cfg.OUTPUT_DIR = str(folder)
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.DEVICE = "EngineTestModel", "cpu"
    cfg.DATASETS.TEST = ("reference_engine_numbers",)
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR = max_iter, 0.05
    cfg.SOLVER.STEPS, cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.WARMUP_FACTOR = (3,), 2, 0.5
    cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD = 2, 2
    return cfg


class Cycling(Trainer):
    @classmethod
    def build_train_loader(cls, cfg):
        return [2.0, 4.0, 1.0, 3.0, 0.5, 1.5] * 9


def structure(value):
    """Keys, types and numbers of a checkpoint."""
    if isinstance(value, dict):
        return {str(k): structure(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [structure(v) for v in value]
    if isinstance(value, torch.Tensor):
        return [str(value.dtype), list(value.shape), value.double().sum()]
    return value


@pytest.mark.parametrize("max_iter", [6, 41])
def test_what_a_run_writes(reference, tmp_path, max_iter):
    trainer = Cycling(trainer_cfg(tmp_path, max_iter))
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    for line in lines:
        line["timed"] = [key for key in TIMES if line.pop(key, None) is not None]
    reference(f"engine/metrics/{max_iter}", lines, rel=1e-5)
    files = sorted(path.name for path in tmp_path.iterdir() if "tfevents" not in path.name)
    reference(f"engine/files/{max_iter}", files)
    saved = torch.load(tmp_path / "model_final.pth", weights_only=True)
    reference(f"engine/checkpoint/{max_iter}", structure(saved), rel=1e-5)
    reference(f"engine/smoothing/{max_iter}", trainer.storage._smoothing_hints)


class Trace(HookBase):
    """Notes what has been put into the storage and saved whenever a hook could act."""

    def __init__(self, folder, log):
        self.folder, self.log = folder, log

    def note(self, point):
        storage = self.trainer.storage
        latest = {k: i for k, (_, i) in storage.latest().items()}
        files = len(list(self.folder.glob("*.pth")))
        lr = self.trainer.optimizer.param_groups[0]["lr"]
        self.log.append([point, self.trainer.iter, storage.iter, latest, files, lr])

    def before_train(self):
        self.note("before_train")

    def after_train(self):
        self.note("after_train")

    def before_step(self):
        self.note("before_step")

    def after_step(self):
        self.note("after_step")


def test_the_order_of_everything_in_a_run(reference, tmp_path):
    """Between the default hooks others look at the state of the run."""
    trainer, log = Cycling(trainer_cfg(tmp_path)), []
    default, trainer._hooks = trainer._hooks, []
    for hook in default:
        trainer.register_hooks([Trace(tmp_path, log), hook])
    trainer.register_hooks([Trace(tmp_path, log)])
    trainer.train()
    keys = [sorted(entry[3].items()) for entry in log]
    shown = [
        [*entry[:3], entry[4], entry[5], len(key)] for entry, key in zip(log, keys, strict=True)
    ]
    reference("engine/trace", shown, rel=1e-6)
    reference("engine/trace_last", keys[-1])


@pytest.mark.parametrize("last", ["model_0000001", "model_0000003", "model_final"])
def test_resuming_from_any_checkpoint(reference, tmp_path, last):
    cfg = trainer_cfg(tmp_path)
    Cycling(cfg).train()
    (tmp_path / "last_checkpoint").write_text(f"{last}.pth")
    cfg.SOLVER.MAX_ITER = 9
    trainer = Cycling(cfg)
    trainer.resume_or_load(resume=True)
    position = [trainer.iter, trainer.start_iter, trainer.scheduler.last_epoch]
    trainer.train()
    final = [trainer.iter, trainer.model.weight, trainer.optimizer.param_groups[0]["lr"]]
    reference(f"engine/resumed/{last}", [position, final], rel=1e-5)


def test_the_options_of_the_command_line(reference):
    parser = default_argument_parser()
    options = [
        [a.option_strings, a.dest, a.default, type(a).__name__, getattr(a.type, "__name__", None)]
        for a in parser._actions
        if a.dest != "help"
    ]
    reference("engine/options", options)


def test_the_default_writers(reference, tmp_path):
    writers = default_writers(str(tmp_path), 7)
    reference("engine/writers", [type(writer).__name__ for writer in writers])
    assert isinstance(writers[0], CommonMetricPrinter)
    for writer in writers:
        writer.close()
