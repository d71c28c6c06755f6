"""The loop, its hooks and one optimization step, against hand-computed values."""

import math

import pytest
import torch
from detectron2.engine import AMPTrainer, HookBase, SimpleTrainer, TrainerBase
from detectron2.engine.hooks import LRScheduler
from torch import nn

LR = 0.1


class Squared(nn.Module):
    """loss = (w * x) ** 2 for a number x, so that its gradient is 2 * w * x ** 2."""

    def __init__(self, weight=1.0, split=False):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))
        self.split = split

    def forward(self, x):
        loss = (self.weight * x) ** 2
        return {"loss_a": 0.25 * loss, "loss_b": 0.75 * loss} if self.split else loss


def make_trainer(data=(2.0,) * 8, model=None, momentum=0.0, **kwargs):
    model = model or Squared()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=momentum)
    return SimpleTrainer(model, list(data), optimizer, **kwargs)


class Recorder(HookBase):
    def __init__(self, name, log):
        self.name, self.log = name, log

    def record(self, point):
        self.log.append((point, self.name, self.trainer.iter))
        assert self.trainer.storage.iter == self.trainer.iter or point == "before_train"

    def before_train(self):
        self.record("before_train")

    def after_train(self):
        self.record("after_train")

    def before_step(self):
        self.record("before_step")

    def after_backward(self):
        self.record("after_backward")

    def after_step(self):
        self.record("after_step")


class Metrics(HookBase):
    """Keeps the latest scalars of each iteration."""

    def __init__(self):
        self.scalars = []

    def after_step(self):
        self.scalars.append({k: v for k, (v, _) in self.trainer.storage.latest().items()})


def test_hooks_run_in_order_of_registration_at_each_point():
    log, trainer = [], make_trainer()
    trainer.register_hooks([Recorder("first", log), None, Recorder("second", log)])
    trainer.train(3, 5)
    both = ("first", "second")
    expected = [("before_train", name, 3) for name in both]
    for iteration in (3, 4):
        for point in ("before_step", "after_backward", "after_step"):
            expected += [(point, name, iteration) for name in both]
    assert log == expected + [("after_train", name, 5) for name in both]


def test_after_train_runs_after_an_error_and_shows_the_failed_iteration():
    class Failing(TrainerBase):
        def run_step(self):
            if self.iter == 2:
                raise RuntimeError("out of luck")

    log, trainer = [], Failing()
    trainer.register_hooks([Recorder("hook", log)])
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer.train(0, 5)
    assert log[-1] == ("after_train", "hook", 2)
    assert ("after_step", "hook", 2) not in log


def test_only_hooks_can_be_registered():
    with pytest.raises(AssertionError):
        TrainerBase().register_hooks([object()])


@pytest.mark.parametrize("split", [False, True])
def test_a_step_is_gradient_descent_on_the_sum_of_losses(split):
    trainer, metrics = make_trainer(model=Squared(split=split)), Metrics()
    trainer.register_hooks([metrics])
    trainer.train(0, 2)
    # w: 1 -> 1 - 0.1 * 8 = 0.2 -> 0.2 - 0.1 * 1.6 = 0.04
    assert trainer.model.weight.item() == pytest.approx(0.04)
    assert [m["total_loss"] for m in metrics.scalars] == pytest.approx([4.0, 0.16])
    if split:
        assert [m["loss_a"] for m in metrics.scalars] == pytest.approx([1.0, 0.04])
        assert [m["loss_b"] for m in metrics.scalars] == pytest.approx([3.0, 0.12])
    assert {"data_time", "rank_data_time"} <= metrics.scalars[0].keys()


def test_a_loss_that_is_not_finite_stops_before_the_update():
    trainer = make_trainer(data=[2.0, math.inf])
    with pytest.raises(FloatingPointError, match="iteration=1"):
        trainer.train(0, 2)
    assert trainer.model.weight.item() == pytest.approx(0.2)


def test_training_in_eval_mode_is_refused():
    trainer = make_trainer()
    trainer.model.eval()
    with pytest.raises(AssertionError, match="eval mode"):
        trainer.train(0, 1)


def test_a_replaced_loader_starts_anew():
    trainer = make_trainer(data=[2.0, 100.0])
    trainer.train(0, 1)
    trainer.reset_data_loader(lambda: [1.0, 100.0])
    trainer.train(1, 2)
    assert trainer.model.weight.item() == pytest.approx(0.2 - LR * 0.4)


def test_the_loader_is_not_iterated_before_the_first_step():
    class Loader:
        def __iter__(self):
            raise AssertionError("too early")

    trainer = SimpleTrainer(Squared(), Loader(), None)
    assert trainer.model.training


def make_resumable(weight):
    data = [2.0, 1.0, 0.5, 1.5, 1.0, 0.25]
    trainer = make_trainer(data, Squared(weight), momentum=0.9)
    trainer.scheduler = torch.optim.lr_scheduler.StepLR(trainer.optimizer, step_size=2)
    trainer.register_hooks([LRScheduler()])
    return trainer


def test_resuming_restores_iteration_optimizer_and_scheduler():
    whole = make_resumable(1.0)
    whole.train(0, 6)

    first = make_resumable(1.0)
    first.train(0, 3)
    first.iter = 2  # a checkpoint is written inside iteration 2
    state = first.state_dict()
    assert state["iteration"] == 2
    assert state["hooks"].keys() == {"LRScheduler"}

    second = make_resumable(first.model.weight.item())
    second.load_state_dict(state)
    assert second.iter == 2
    for _ in range(3):
        next(second._data_loader_iter)
    second.train(second.iter + 1, 6)
    assert second.model.weight.item() == whole.model.weight.item()
    assert second.scheduler.get_last_lr() == whole.scheduler.get_last_lr() != [LR]
    lrs = [value for value, _ in second.storage.history("lr").values()]
    assert lrs == pytest.approx([0.01, 0.001, 0.001])


def test_the_state_of_an_unknown_hook_is_ignored():
    trainer = make_trainer()
    trainer.load_state_dict({**trainer.state_dict(), "iteration": 7, "hooks": {"Gone": {"a": 1}}})
    assert trainer.iter == 7


@pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")
def test_mixed_precision_without_cuda_is_refused():
    model = Squared()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    scaler = torch.amp.GradScaler("cuda", enabled=False)
    trainer = AMPTrainer(model, [2.0], optimizer, grad_scaler=scaler)
    with pytest.raises(AssertionError, match="CUDA"):
        trainer.train(0, 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_mixed_precision_step_on_cuda(precision):
    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(1, 1, bias=False)
            nn.init.ones_(self.linear.weight)

        def forward(self, x):
            out = self.linear(x)
            self.dtype = out.dtype
            return {"loss": (out.float() ** 2).sum()}

    model = Linear().cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    trainer = AMPTrainer(model, [torch.tensor([[2.0]]).cuda()], optimizer, precision=precision)
    trainer.train(0, 1)
    assert model.dtype == precision
    assert model.linear.weight.item() == pytest.approx(0.2)
    assert trainer.state_dict()["grad_scaler"]["scale"] == 2.0**16
