"""DeepLab's config keys and its learning-rate schedule."""

from detectron2.config import CfgNode
from detectron2.solver import LRScheduler
from detectron2.solver import build_lr_scheduler as build_plain_lr_scheduler
from torch.optim import Optimizer


def add_deeplab_config(cfg: CfgNode) -> None:
    """Add DeepLab's keys, which Mask2Former's configs set; here only the schedule reads some."""
    cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA = 1.0  # of a crop; 1.0 accepts every crop
    cfg.SOLVER.POLY_LR_POWER = 0.9
    cfg.SOLVER.POLY_LR_CONSTANT_ENDING = 0.0  # lower bound, relative to the base rate
    cfg.MODEL.SEM_SEG_HEAD.LOSS_TYPE = "hard_pixel_mining"
    cfg.MODEL.SEM_SEG_HEAD.PROJECT_FEATURES = ["res2"]
    cfg.MODEL.SEM_SEG_HEAD.PROJECT_CHANNELS = [48]
    cfg.MODEL.SEM_SEG_HEAD.ASPP_CHANNELS = 256
    cfg.MODEL.SEM_SEG_HEAD.ASPP_DILATIONS = [6, 12, 18]
    cfg.MODEL.SEM_SEG_HEAD.ASPP_DROPOUT = 0.1
    cfg.MODEL.SEM_SEG_HEAD.USE_DEPTHWISE_SEPARABLE_CONV = False
    cfg.MODEL.RESNETS.RES4_DILATION = 1
    cfg.MODEL.RESNETS.RES5_MULTI_GRID = [1, 2, 4]
    cfg.MODEL.RESNETS.STEM_TYPE = "deeplab"


class WarmupPolyLR(LRScheduler):
    """Base rate x warm-up x (1 - t / max_iters) ** power, after the warm-up at least base rate x
    `constant_ending`.

    In the first `warmup_iters` iterations the warm-up rises from `warmup_factor` to 1 ("linear")
    or stays there ("constant"). The state holds the schedule too.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        max_iters: int,
        warmup_factor: float = 0.001,
        warmup_iters: int = 1000,
        warmup_method: str = "linear",
        last_epoch: int = -1,
        power: float = 0.9,
        constant_ending: float = 0.0,
    ):
        if warmup_method not in ("constant", "linear"):
            raise ValueError(f"Unknown warmup method: {warmup_method}")
        self.max_iters, self.power, self.constant_ending = max_iters, power, constant_ending
        self.warmup_factor, self.warmup_iters = warmup_factor, warmup_iters
        self.warmup_method = warmup_method
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float]:
        factor, warmup = (1.0 - self.last_epoch / self.max_iters) ** self.power, 1.0
        if self.last_epoch < self.warmup_iters:
            progress = self.last_epoch / self.warmup_iters if self.warmup_method == "linear" else 0
            warmup = self.warmup_factor * (1 - progress) + progress
        if warmup == 1.0:
            factor = max(factor, self.constant_ending)
        return [base_lr * warmup * factor for base_lr in self.base_lrs]


def build_lr_scheduler(cfg: CfgNode, optimizer: Optimizer) -> LRScheduler:
    """Build `cfg.SOLVER.LR_SCHEDULER_NAME`: "WarmupPolyLR" or one of detectron2.solver's."""
    solver = cfg.SOLVER
    if solver.LR_SCHEDULER_NAME != "WarmupPolyLR":
        return build_plain_lr_scheduler(cfg, optimizer)
    return WarmupPolyLR(
        optimizer,
        solver.MAX_ITER,
        warmup_factor=solver.WARMUP_FACTOR,
        warmup_iters=solver.WARMUP_ITERS,
        warmup_method=solver.WARMUP_METHOD,
        power=solver.POLY_LR_POWER,
        constant_ending=solver.POLY_LR_CONSTANT_ENDING,
    )
