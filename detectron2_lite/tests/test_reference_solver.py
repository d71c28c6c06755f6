"""Learning rates and parameter groups against Detectron2's."""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.projects.deeplab import add_deeplab_config, build_lr_scheduler
from detectron2.solver import build_optimizer
from torch import nn

SCHEDULES = {
    "plain": {},
    "warm_up": {"WARMUP_ITERS": 5, "WARMUP_FACTOR": 0.2},
    "constant_warm_up": {"WARMUP_ITERS": 5, "WARMUP_FACTOR": 0.2, "WARMUP_METHOD": "constant"},
    "step_within_warm_up": {"WARMUP_ITERS": 8, "WARMUP_FACTOR": 0.25, "STEPS": (3, 12)},
    "step_within_constant": {"WARMUP_ITERS": 8, "STEPS": (3,), "WARMUP_METHOD": "constant"},
    "warm_up_longer_than_training": {"WARMUP_ITERS": 1000, "WARMUP_FACTOR": 0.001},
    "longer_and_a_step": {"WARMUP_ITERS": 30, "WARMUP_FACTOR": 0.5, "STEPS": (6,)},
    "steps_beyond": {"STEPS": (7, 24), "GAMMA": 0.5},
    "ending": {"POLY_LR_CONSTANT_ENDING": 0.4},
    "ending_within_warm_up": {
        "WARMUP_ITERS": 16, "WARMUP_FACTOR": 0.1, "POLY_LR_CONSTANT_ENDING": 0.6,
    },
    "ending_without_warming": {
        "WARMUP_ITERS": 16, "WARMUP_FACTOR": 1.0, "POLY_LR_CONSTANT_ENDING": 0.6,
    },
}  # fmt: skip
SCHEDULERS = ["WarmupMultiStepLR", "WarmupPolyLR"]


def solver_cfg(name, options):
    cfg = get_cfg()
    add_deeplab_config(cfg)
    solver = cfg.SOLVER
    solver.LR_SCHEDULER_NAME = name
    solver.MAX_ITER, solver.STEPS, solver.WARMUP_ITERS = 20, (9, 14), 0
    for key, value in options.items():
        solver[key] = value
    return cfg


def start(cfg):
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.5, 0.02)]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    return optimizer, build_lr_scheduler(cfg, optimizer)


def run(optimizer, scheduler, steps):
    rates = []
    for _ in range(steps):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("options", SCHEDULES)
def test_rates_of_all_iterations(reference, name, options):
    rates = run(*start(solver_cfg(name, SCHEDULES[options])), 20)
    reference(f"solver/rates/{name}/{options}", rates, rel=1e-8)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_state_in_a_run_of_another_length(reference, name):
    """Whether a resumed run follows the config that it has now or the one that it had."""
    warm = {"WARMUP_ITERS": 4, "WARMUP_FACTOR": 0.2}
    optimizer, scheduler = start(solver_cfg(name, warm))
    run(optimizer, scheduler, 7)
    state = scheduler.state_dict()
    optimizer, scheduler = start(solver_cfg(name, {**warm, "MAX_ITER": 40, "STEPS": (8, 10)}))
    scheduler.load_state_dict(state)
    own = ("max_iters", "power", "constant_ending", "warmup_iters", "warmup_factor", "last_epoch")
    reference(f"solver/state/{name}", {key: state[key] for key in own if key in state})
    reference(f"solver/resumed/{name}", run(optimizer, scheduler, 6)[1:], rel=1e-8)


def models():
    shared = nn.Linear(2, 2)
    frozen = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.Linear(2, 2))
    frozen[0].requires_grad_(False)
    return {
        "usual": nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.Linear(2, 2)),
        "norm_first": nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 2), nn.GroupNorm(1, 2)),
        "norm_first_of_the_trained": frozen,
        "shared": nn.Sequential(shared, nn.InstanceNorm2d(2, affine=True), shared),
        "no_norm": nn.Linear(2, 1),
        "only_norms": nn.Sequential(nn.LayerNorm(2), nn.SyncBatchNorm(2)),
        "encoder": nn.TransformerEncoderLayer(4, 2, 8),
    }


@pytest.mark.parametrize("name", models())
def test_parameter_groups(reference, name):
    """Their order too: it is that of the optimizer's state in a checkpoint."""
    model = models()[name]
    cfg = solver_cfg("WarmupPolyLR", {"MOMENTUM": 0.8, "NESTEROV": True, "BASE_LR": 0.3})
    cfg.SOLVER.WEIGHT_DECAY, cfg.SOLVER.WEIGHT_DECAY_NORM = 0.2, 0.05
    names = {id(param): name for name, param in model.named_parameters()}
    options = ("lr", "momentum", "nesterov", "weight_decay", "dampening")
    groups = [
        {**{k: group[k] for k in options}, "params": [names[id(p)] for p in group["params"]]}
        for group in build_optimizer(cfg, model).param_groups
    ]
    reference(f"solver/groups/{name}", groups)


@pytest.mark.parametrize("kind", ["value", "norm"])
@pytest.mark.parametrize("norm_type", [1.0, 2.0])
def test_clipped_steps(reference, kind, norm_type):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    cfg = solver_cfg("WarmupPolyLR", {"BASE_LR": 0.5})
    clip = cfg.SOLVER.CLIP_GRADIENTS
    clip.ENABLED, clip.CLIP_TYPE, clip.CLIP_VALUE, clip.NORM_TYPE = True, kind, 0.02, norm_type
    optimizer = build_optimizer(cfg, model)
    for _ in range(3):
        optimizer.zero_grad()
        (model(torch.arange(6.0).view(2, 3)) ** 2).sum().backward()
        optimizer.step()
    weights = [p.detach().double().sum() for p in model.parameters()]
    name = f"solver/clipped/{kind}/{norm_type}"
    reference(name, [type(optimizer).__name__, weights], rel=1e-5, abs=1e-6)
