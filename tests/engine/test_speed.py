"""The precision of AMP, and torch.compile: what they change and what they leave alone."""

import pytest
import torch
from detectron2.engine import AMPTrainer, SimpleTrainer
from torch import nn

from s4m_d2.engine.training.bad_steps import BadSteps, skip_bad_steps
from s4m_d2.engine.training.run_state import with_scaler_state
from s4m_d2.engine.training.speed import set_precision, speed_errors

BACKEND = "eager"  # traces, but needs no compiler


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU())
        self.head = nn.Linear(2, 1)

    def forward(self, x):
        return self.head(self.backbone(x).mean((2, 3)))


def amp_trainer(data=(), scale=8.0):
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return AMPTrainer(model, list(data), optimizer, grad_scaler=scaler)


def test_bfloat16_has_no_loss_scale_and_float16_keeps_its_own():
    trainer = amp_trainer()
    set_precision(trainer, "bfloat16")
    assert trainer.precision == torch.bfloat16 and not trainer.grad_scaler.is_enabled()
    trainer = amp_trainer()
    set_precision(trainer, "float16")
    assert trainer.precision == torch.float16 and trainer.grad_scaler.get_scale() == 8.0


def test_a_trainer_without_amp_stays_as_it_is():
    trainer = SimpleTrainer(nn.Linear(1, 1), [], None)
    set_precision(trainer, "bfloat16")
    assert not hasattr(trainer, "precision") and not hasattr(trainer, "grad_scaler")


def test_in_bfloat16_gradients_that_overflow_are_a_bad_step(monkeypatch, tmp_path):
    """No loss scale could be to blame."""
    for name in ("is_available", "is_bf16_supported"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: True)

    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

        def forward(self, batch):
            return {"loss": self.weight.sqrt()}

    model = Root()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = AMPTrainer(model, [[]], optimizer, grad_scaler=torch.amp.GradScaler("cpu"))
    set_precision(trainer, "bfloat16")
    trainer = skip_bad_steps(trainer, BadSteps(10, str(tmp_path), seed=0))
    trainer.train(0, 1)
    assert trainer.bad_steps.total == 1 and model.weight.item() == 0.0
    assert trainer.precision == torch.bfloat16


@pytest.mark.parametrize("written", ["float16", "bfloat16"])
@pytest.mark.parametrize("read", ["float16", "bfloat16"])
def test_a_run_continues_in_either_precision(written, read):
    source, target = amp_trainer(scale=16.0), amp_trainer(scale=4.0)
    set_precision(source, written)
    set_precision(target, read)
    state = with_scaler_state({"_trainer": source.state_dict()}, target)
    target.load_state_dict(state["_trainer"])
    if read == "float16":
        assert target.grad_scaler.get_scale() == (16.0 if written == "float16" else 4.0)
    else:
        assert not target.grad_scaler.is_enabled()


def test_another_precision_is_refused(small_config):
    assert not list(speed_errors(small_config()))
    [error] = speed_errors(small_config(S4M__AMP_PRECISION="fp8"))
    assert "'fp8'; expected one of ['bfloat16', 'float16']" in str(error)
