"""The precision of AMP: what it changes and what it leaves alone."""

import pytest
import torch
from torch import nn

from s4m_d2.engine.checks.config_checks import config_errors
from s4m_d2.engine.training.bad_steps import BadSteps
from s4m_d2.engine.training.step import PRECISIONS, TeacherStep


class Root(nn.Module):
    """A finite loss whose gradient is not."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, batch):
        return {"loss": self.weight.sqrt()}


def make(precision, folder="unused", scale=8.0):
    model = Root()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bad_steps = BadSteps(10, str(folder), seed=0)
    step = TeacherStep(model, [[]], optimizer, bad_steps, PRECISIONS.get(precision))
    if precision == "float16":
        step.grad_scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return step


@pytest.mark.parametrize("precision", ["bfloat16", None])
def test_without_a_loss_scale_gradients_that_overflow_are_a_bad_step(precision, tmp_path):
    step = make(precision, tmp_path)
    step.train(0, 1)
    assert step.bad_steps.total == 1 and step.model.weight.item() == 0.0


@pytest.mark.parametrize("written", ["float16", "bfloat16", None])
@pytest.mark.parametrize("read", ["float16", "bfloat16", None])
def test_a_run_continues_in_any_precision(written, read):
    source, target = make(written, scale=16.0), make(read, scale=4.0)
    target.load_state_dict(source.state_dict())
    if read == "float16":
        assert target.grad_scaler.get_scale() == (16.0 if written == "float16" else 4.0)
    else:
        assert not target.grad_scaler.is_enabled()


def test_another_precision_is_refused(small_config):
    assert not config_errors(small_config())
    [error] = config_errors(small_config(S4M__AMP_PRECISION="fp8"))
    assert "S4M.AMP_PRECISION" in str(error) and "bfloat16" in str(error)
