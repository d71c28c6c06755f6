"""The training loop's one transfer: what comes to the host, and that Detectron2 waits no more."""

import math

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from s4m_d2.engine.training.bad_steps import BadSteps
from s4m_d2.engine.training.step import TeacherStep, fetch_step, gradient_norms
from s4m_d2.transfers import TO_HOST

STEPS = 3
WAITS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)


class Toy(nn.Module):
    """Two losses, and a batch norm's buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(1)
        self.line = nn.Linear(1, 1)

    def forward(self, batch):
        out = self.line(self.norm(batch[0]["x"])).square()
        return {"first": out.mean(), "second": out.mean() * 2}


class Step(TeacherStep):
    """Logs two scalars with the losses."""

    def finish(self, losses, scalars=None):
        super().finish(losses, {"on device": losses["first"].detach() + 1, "number": 4.0})


def make(data, tmp_path, device="cpu"):
    torch.manual_seed(0)
    model = Toy().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = [[{"x": x.to(device)}] for x in data]
    return Step(model, data, optimizer, BadSteps(10, str(tmp_path), seed=0))


def batches(steps=STEPS):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 1, generator=generator) for _ in range(steps)]


class CountWaits(TorchDispatchMode):
    """Counts the operations that bring a value to Python."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in WAITS
        return function(*args, **(kwargs or {}))


def test_a_step_of_the_loop_is_one_transfer(tmp_path):
    trainer = make(batches(), tmp_path)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        trainer.train(0, STEPS)
    assert [event.name for event in profiled.events()].count(TO_HOST) == STEPS


def test_beside_the_transfer_only_values_on_the_host_are_read(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(TeacherStep, "write_metrics", lambda self, losses, *_: seen.append(losses))
    trainer = make(batches(), tmp_path)
    with CountWaits() as waits:
        trainer.train(0, STEPS)
    assert waits.count == 0 and len(seen) == STEPS
    assert all(loss.device.type == "cpu" for losses in seen for loss in losses.values())


@pytest.mark.gpu
def test_a_step_waits_once_for_the_device(tmp_path, recwarn):
    trainer = make(batches(), tmp_path, "cuda")
    trainer.iter = 0
    with EventStorage(0):
        trainer.run_step()  # CUDA's libraries start up
        recwarn.clear()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            trainer.run_step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert sum("synchronizing" in str(w.message) for w in recwarn) == 1


def test_losses_and_scalars_are_logged_as_they_are(tmp_path):
    trainer = make(batches(1), tmp_path)
    expected = trainer.model.line(trainer.model.norm(batches(1)[0])).square()
    trainer.train(0, 1)
    latest = {name: value for name, (value, _) in trainer.storage.latest().items()}
    assert latest["first"] == expected.mean().item()
    assert latest["second"] == expected.mean().item() * 2
    assert latest["total_loss"] == pytest.approx(3 * expected.mean().item())
    assert latest["on device"] == expected.mean().item() + 1
    assert latest["number"] == 4.0


def test_a_skipped_step_is_logged_too_but_for_its_losses(tmp_path):
    trainer = make([torch.full((4, 1), math.inf)], tmp_path)
    trainer.train(0, 1)
    latest = trainer.storage.latest()
    assert trainer.bad_steps.total == 1
    assert latest["number"][0] == 4.0 and "first" not in latest


def test_buffers_come_back_though_they_were_kept_in_place(tmp_path):
    good = batches(2)
    bad = torch.full((4, 1), math.nan)
    expected = make(good, tmp_path)
    expected.train(0, 2)
    trainer = make([good[0], bad, good[1], bad], tmp_path)
    trainer.train(0, 4)
    for name, value in expected.model.state_dict().items():
        assert torch.equal(trainer.model.state_dict()[name], value), name


FINE = torch.tensor(1.0)
INF = torch.tensor(math.inf)


@pytest.mark.parametrize(
    ("losses", "norms", "scale", "finite"),
    [
        ([FINE, FINE], [FINE], None, True),
        ([FINE, FINE * math.nan], [FINE], None, False),
        ([FINE, INF], [], 1024.0, False),
        ([FINE], [FINE, INF], None, False),
        ([FINE], [FINE, INF], 1.0, False),
        ([FINE], [FINE, INF], 1024.0, True),  # the loss scale's affair
        ([FINE[None]], [FINE], None, True),
        ([FINE, FINE.double()], [FINE], None, True),
    ],
)
def test_a_step_is_finite_if_losses_and_unscaled_gradients_are(losses, norms, scale, finite):
    scale = None if scale is None else torch.tensor(scale)
    step = fetch_step(dict(enumerate(losses)), norms, loss_scale=scale)
    assert step.finite is finite
    for index, loss in enumerate(losses):
        assert step.losses[index].shape == ()
        torch.testing.assert_close(
            step.losses[index], loss.double().reshape(()), rtol=0, atol=0, equal_nan=True
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_losses_of_any_precision_come_over_exactly(dtype):
    loss = torch.tensor(1 / 3, dtype=dtype, requires_grad=True)
    step = fetch_step({"loss": loss}, scalars={"share": loss.detach(), "count": torch.tensor(3)})
    assert step.losses["loss"].item() == loss.item()
    assert step.scalars == {"share": loss.item(), "count": 3.0}


def test_norms_are_of_gradients_that_exist():
    used, unused = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    used.grad = torch.tensor([3.0, 4.0])
    empty = nn.Parameter(torch.zeros(0))
    empty.grad = torch.zeros(0)
    norms = gradient_norms(torch.optim.SGD([used, unused, empty], lr=1.0))
    assert [norm.item() for norm in norms] == [5.0]
