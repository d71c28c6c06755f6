"""Optimizers and learning-rate schedules against closed formulas."""

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.projects.deeplab import add_deeplab_config, build_lr_scheduler
from detectron2.solver import build_optimizer
from detectron2.solver.build import maybe_add_gradient_clipping
from torch import nn

BASE_LR = 0.5


def solver_cfg(**options):
    cfg = get_cfg()
    add_deeplab_config(cfg)
    cfg.SOLVER.BASE_LR = BASE_LR
    cfg.SOLVER.MAX_ITER = 20
    cfg.SOLVER.WARMUP_ITERS = 0
    for key, value in options.items():
        cfg.SOLVER[key] = value
    return cfg


def rates(cfg, scales=(1.0,)):
    """The learning rates of all iterations: (MAX_ITER, groups)."""
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": BASE_LR * s} for s in scales]
    optimizer = torch.optim.SGD(groups, lr=BASE_LR)
    scheduler = build_lr_scheduler(cfg, optimizer)
    rows = []
    for _ in range(cfg.SOLVER.MAX_ITER):
        rows.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return np.array(rows)


def test_steps_divide_the_rate():
    cfg = solver_cfg(STEPS=(5, 12), GAMMA=0.1)
    expected = [BASE_LR * 0.1 ** ((i >= 5) + (i >= 12)) for i in range(20)]
    assert rates(cfg)[:, 0] == pytest.approx(expected)


def test_warm_up_rises_linearly_from_its_factor():
    cfg = solver_cfg(STEPS=(15,), WARMUP_ITERS=4, WARMUP_FACTOR=0.2)
    expected = [BASE_LR * (0.2 + 0.8 * i / 4) for i in range(4)] + [BASE_LR] * 11
    assert rates(cfg)[:15, 0] == pytest.approx(expected)
    constant = solver_cfg(STEPS=(15,), WARMUP_ITERS=4, WARMUP_FACTOR=0.2, WARMUP_METHOD="constant")
    assert rates(constant)[:5, 0] == pytest.approx([BASE_LR * 0.2] * 4 + [BASE_LR])


def test_poly_falls_to_zero_at_the_end():
    cfg = solver_cfg(LR_SCHEDULER_NAME="WarmupPolyLR")
    expected = [BASE_LR * (1 - i / 20) ** 0.9 for i in range(20)]
    assert rates(cfg)[:, 0] == pytest.approx(expected)


def test_poly_with_warm_up_and_a_constant_ending():
    cfg = solver_cfg(
        LR_SCHEDULER_NAME="WarmupPolyLR",
        WARMUP_ITERS=5,
        WARMUP_FACTOR=0.1,
        POLY_LR_POWER=2.0,
        POLY_LR_CONSTANT_ENDING=0.2,
    )
    expected = []
    for i in range(20):
        poly = (1 - i / 20) ** 2
        expected.append(BASE_LR * (poly * (0.1 + 0.9 * i / 5) if i < 5 else max(poly, 0.2)))
    assert rates(cfg)[:, 0] == pytest.approx(expected)


@pytest.mark.parametrize("name", ["WarmupMultiStepLR", "WarmupPolyLR"])
def test_groups_keep_their_ratio(name):
    cfg = solver_cfg(LR_SCHEDULER_NAME=name, STEPS=(5,), WARMUP_ITERS=3)
    for full, tenth in rates(cfg, scales=(1.0, 0.1)):
        assert tenth == pytest.approx(0.1 * full)


@pytest.mark.parametrize("name", ["WarmupMultiStepLR", "WarmupPolyLR"])
def test_a_schedule_continues_from_its_state(name):
    cfg = solver_cfg(LR_SCHEDULER_NAME=name, STEPS=(5,), WARMUP_ITERS=3)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=BASE_LR)
    scheduler = build_lr_scheduler(cfg, optimizer)
    for _ in range(7):
        optimizer.step()
        scheduler.step()
    other_optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=BASE_LR)
    other = build_lr_scheduler(cfg, other_optimizer)
    other_optimizer.load_state_dict(optimizer.state_dict())
    other.load_state_dict(scheduler.state_dict())
    for _ in range(3):
        for each in (optimizer, other_optimizer, scheduler, other):
            each.step()
        assert optimizer.param_groups[0]["lr"] == other_optimizer.param_groups[0]["lr"]


def test_steps_beyond_the_end_are_ignored_and_unknown_names_refused():
    assert rates(solver_cfg(STEPS=(5, 99)))[-1, 0] == pytest.approx(BASE_LR * 0.1)
    with pytest.raises(ValueError, match="NoSuchLR"):
        rates(solver_cfg(LR_SCHEDULER_NAME="NoSuchLR"))
    with pytest.raises(ValueError, match="warmup"):
        rates(solver_cfg(WARMUP_METHOD="quadratic"))


def toy():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 2), nn.GroupNorm(1, 2)
    )
    model[2].weight.requires_grad = False
    model.alias = model[0]
    return model


def by_parameter(groups, model):
    """Name of each parameter -> its hyper-parameters."""
    options = {
        id(p): {k: v for k, v in group.items() if k != "params"}
        for group in groups
        for p in group["params"]
    }
    assert sum(len(group["params"]) for group in groups) == len(options)
    return {name: options.get(id(p)) for name, p in model.named_parameters()}


def test_sgd_follows_the_config():
    model = toy()
    cfg = solver_cfg(MOMENTUM=0.8, NESTEROV=True, WEIGHT_DECAY=0.2, WEIGHT_DECAY_NORM=0.05)
    optimizer = build_optimizer(cfg, model)
    assert type(optimizer) is torch.optim.SGD
    options = by_parameter(optimizer.param_groups, model)
    assert options["0.weight"]["weight_decay"] == 0.2
    assert options["1.weight"]["weight_decay"] == 0.05
    for group in optimizer.param_groups:
        assert (group["lr"], group["momentum"], group["nesterov"]) == (BASE_LR, 0.8, True)


@pytest.mark.parametrize("as_class", [True, False])
@pytest.mark.parametrize(
    "kind, expected", [("value", [[0.5, -0.5], [0.1]]), ("norm", [[0.3, -0.4], [0.1]])]
)
def test_gradients_are_clipped_for_each_parameter(kind, expected, as_class):
    cfg = solver_cfg()
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = kind
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 0.5
    params = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))]
    if as_class:
        optimizer = maybe_add_gradient_clipping(cfg, torch.optim.SGD)(params, lr=1.0)
    else:
        optimizer = maybe_add_gradient_clipping(cfg, torch.optim.SGD(params, lr=1.0))
    params[0].grad, params[1].grad = torch.tensor([3.0, -4.0]), torch.tensor([0.1])
    optimizer.step()
    for param, values in zip(params, expected, strict=True):
        torch.testing.assert_close(param.detach(), -torch.tensor(values), rtol=1e-4, atol=1e-5)


def test_without_clipping_an_optimizer_stays_as_it_is():
    assert maybe_add_gradient_clipping(solver_cfg(), torch.optim.SGD) is torch.optim.SGD
    cfg = solver_cfg()
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "full_model"
    with pytest.raises(ValueError, match="full_model"):
        maybe_add_gradient_clipping(cfg, torch.optim.SGD)
