"""DefaultTrainer and the set-up functions, on a model of one number."""

import json
from argparse import Namespace

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.engine import (
    DefaultTrainer,
    default_argument_parser,
    default_setup,
    hooks,
)
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import META_ARCH_REGISTRY
from torch import nn


@META_ARCH_REGISTRY.register()
class EngineTestModel(nn.Module):
    """Trains to (w - x) ** 2; infers w times the image's channel means."""

    def __init__(self, cfg):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, batch):
        if self.training:
            loss = ((self.weight - batch) ** 2).sum()
            return {"loss_w": loss, "loss_zero": 0 * loss}
        return [{**x, "means": self.weight * x["image"].mean((1, 2))} for x in batch]


class Numbers:
    """A test loader of three batches."""

    def __len__(self):
        return 3

    def __iter__(self):
        return iter([[{"image": torch.full((3, 2, 2), float(i))}] for i in range(3)])


class SumEvaluator(DatasetEvaluator):
    def reset(self):
        self.total = 0.0

    def process(self, inputs, outputs):
        self.total += sum(output["means"].sum().item() for output in outputs)

    def evaluate(self):
        return {"toy": {"sum": self.total}}


class Trainer(DefaultTrainer):
    @classmethod
    def build_train_loader(cls, cfg):
        return [2.0, 4.0, 1.0, 3.0, 0.5, 1.5]

    @classmethod
    def build_test_loader(cls, cfg, dataset_name):
        return Numbers()

    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        return SumEvaluator()


@pytest.fixture
def cfg(tmp_path):
    cfg = get_cfg()
    cfg.OUTPUT_DIR = str(tmp_path)
    cfg.MODEL.META_ARCHITECTURE = "EngineTestModel"
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = ""
    cfg.DATASETS.TEST = ("engine_test_numbers",)
    cfg.SOLVER.MAX_ITER = 6
    cfg.SOLVER.BASE_LR = 0.05
    cfg.SOLVER.STEPS = (2, 4)
    cfg.SOLVER.WARMUP_ITERS = 0
    cfg.SOLVER.CHECKPOINT_PERIOD = 3
    cfg.TEST.EVAL_PERIOD = 0
    return cfg


def test_the_default_hooks_run_in_this_order(cfg):
    assert [type(hook) for hook in Trainer(cfg)._hooks] == [
        hooks.IterationTimer,
        hooks.LRScheduler,
        hooks.PeriodicCheckpointer,
        hooks.EvalHook,
        hooks.PeriodicWriter,
    ]


def test_the_step_trainer_owns_model_loader_and_optimizer(cfg):
    trainer = Trainer(cfg)
    assert trainer.model is trainer._trainer.model
    assert trainer.optimizer is trainer._trainer.optimizer
    trainer.data_loader = [7.0]
    assert trainer._trainer.data_loader == [7.0]


def test_training_writes_checkpoints_metrics_and_evaluates(cfg, tmp_path):
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    assert trainer.train() is None  # no results are expected
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    final = {key: value for line in lines for key, value in line.items()}
    weight = trainer.model.weight.item()
    assert final["toy/sum"] == pytest.approx(9 * weight)  # 3 channels of 0 + 1 + 2
    assert final["lr"] == pytest.approx(0.05 * 0.1**2)
    assert {"total_loss", "loss_w", "loss_zero", "data_time", "time", "eta_seconds"} <= set(final)
    assert {path.name for path in tmp_path.glob("*.pth")} == {
        "model_0000002.pth", "model_0000005.pth", "model_final.pth",
    }  # fmt: skip
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_training_resumes_after_the_last_checkpoint(cfg, tmp_path):
    whole = Trainer(cfg)
    whole.train()
    (tmp_path / "last_checkpoint").write_text("model_0000002.pth")

    resumed = Trainer(cfg)
    resumed.resume_or_load(resume=True)
    assert (resumed.iter, resumed.start_iter) == (2, 3)
    resumed.data_loader = resumed.data_loader[3:]
    resumed.train()
    assert resumed.model.weight.item() == whole.model.weight.item()
    assert (
        resumed.optimizer.state_dict()["param_groups"]
        == (whole.optimizer.state_dict()["param_groups"])
    )
    momentum = [t.optimizer.state_dict()["state"][0]["momentum_buffer"] for t in (whole, resumed)]
    assert torch.equal(*momentum)


def test_weights_alone_do_not_continue_a_run(cfg, tmp_path):
    Trainer(cfg).train()
    cfg.MODEL.WEIGHTS = str(tmp_path / "model_0000002.pth")
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    saved = torch.load(cfg.MODEL.WEIGHTS, weights_only=True)["model"]["weight"]
    assert torch.equal(trainer.model.weight, saved)
    assert (trainer.iter, trainer.start_iter) == (0, 0)


def test_resuming_without_a_checkpoint_starts_from_the_weights(cfg, tmp_path):
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 0


def test_expected_results_are_returned_and_checked(cfg):
    cfg.TEST.EXPECTED_RESULTS = [["toy", "sum", 9.0, 100.0]]
    assert Trainer(cfg).train()["toy"].keys() == {"sum"}
    cfg.TEST.EXPECTED_RESULTS = [["toy", "sum", 1000.0, 1.0]]
    with pytest.raises(SystemExit):
        Trainer(cfg).train()


def test_results_of_several_test_sets_are_kept_apart(cfg):
    cfg.DATASETS.TEST = ("engine_test_a", "engine_test_b")
    model = EngineTestModel(cfg)
    expected = {"toy": {"sum": 9.0}}
    assert Trainer.test(cfg, model) == {"engine_test_a": expected, "engine_test_b": expected}
    cfg.DATASETS.TEST = ("engine_test_a",)
    assert Trainer.test(cfg, model) == expected


def test_a_trainer_without_evaluator_has_no_results(cfg):
    class Plain(Trainer):
        build_evaluator = DefaultTrainer.build_evaluator

    assert Plain.test(cfg, EngineTestModel(cfg)) == {}


def test_the_command_line():
    parser = default_argument_parser()
    args = parser.parse_args([])
    assert (args.config_file, args.resume, args.eval_only) == ("", False, False)
    assert (args.num_gpus, args.num_machines, args.machine_rank) == (1, 1, 0)
    assert args.dist_url.startswith("tcp://127.0.0.1:")
    assert not args.opts
    command = "--config-file a.yaml --num-gpus 2 --resume SOLVER.BASE_LR 0.1 OUTPUT_DIR out"
    args = parser.parse_args(command.split())
    assert (args.config_file, args.num_gpus, args.resume) == ("a.yaml", 2, True)
    assert args.opts == ["SOLVER.BASE_LR", "0.1", "OUTPUT_DIR", "out"]


def test_set_up_saves_the_config_and_seeds(cfg, tmp_path):
    cfg.OUTPUT_DIR = str(tmp_path / "new" / "folder")
    cfg.SEED = 7
    config_file = tmp_path / "used.yaml"
    config_file.write_text("SEED: 7\n")
    draws = []
    for _ in range(2):
        default_setup(cfg, Namespace(config_file=str(config_file), eval_only=False))
        draws.append((torch.rand(1).item(), np.random.rand()))
    assert draws[0] == draws[1]
    saved = get_cfg()
    saved.merge_from_file(str(tmp_path / "new" / "folder" / "config.yaml"))
    assert (saved.SEED, saved.OUTPUT_DIR, saved.SOLVER) == (7, cfg.OUTPUT_DIR, cfg.SOLVER)
    assert "used.yaml" in (tmp_path / "new" / "folder" / "log.txt").read_text()
