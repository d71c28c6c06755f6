"""One stage of the project at one case's shapes: models with random weights, and batches."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from segment_anything import sam_model_registry
from torch import Tensor, nn

from benchmarking import synthetic
from benchmarking.cases import Case, case_config
from benchmarking.fixed_sam import FixedAnswers
from s4m_d2.engine import PseudoLabeling, TeacherTrainer, build_optimizer
from s4m_d2.losses import build_distillation
from s4m_d2.sam import build_sam_backend
from s4m_d2.sam.point_prompts import build_compute_options
from s4m_d2.sam.segment_anything import SegmentAnythingBackend
from s4m_d2.semi import EMATeacher


@dataclass
class Bench:
    """One stage at one case's shapes, with random weights.

    ``teacher``, ``labeling`` and ``unlabeled`` are stage 2's, ``distillation`` is stage 1's.
    ``sam`` computes; ``answers`` also replaces its masks by synthetic ones, because an untrained
    SAM's (or teacher's) would not give the number of instances that is asked for.
    """

    case: Case
    stage: int
    cfg: Any
    device: torch.device
    student: nn.Module
    optimizer: torch.optim.Optimizer
    labeled: list[dict]
    unlabeled: list[dict]
    sam: Any
    answers: FixedAnswers
    teacher: EMATeacher | None = None
    labeling: PseudoLabeling | None = None
    distillation: Any = None

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the images."""
        return self.case.image_size

    def autocast(self) -> contextlib.AbstractContextManager:
        """Mixed precision where the training uses it."""
        if not self.cfg.SOLVER.AMP.ENABLED:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.float16)


def build(case: Case, stage: int, *, device: str, sam: str, opts: tuple = ()) -> Bench:
    """Models, optimizer and batches of a stage (1 or 2)."""
    opts = (*opts, "S4M.DISTILL.ENABLED", "False")  # SAM is handed over below, without weights
    cfg = case_config(case, stage, device=device, sam=sam, opts=opts)
    where, classes = torch.device(device), cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    student = TeacherTrainer.build_model(cfg).train()
    batch = cfg.SOLVER.IMS_PER_BATCH
    backend = build_sam(cfg)
    queries = cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES
    counts = [min(case.instances, queries)] * batch
    parts = (case.image_size, case.instances, classes)
    bench = Bench(
        case,
        stage,
        cfg,
        where,
        student,
        build_optimizer(cfg, student),
        synthetic.samples("labeled", batch, *parts),
        synthetic.samples("unlabeled", batch, *parts) if stage == 2 else [],
        backend,
        FixedAnswers(backend, counts, case.image_size),
    )
    if stage == 1:
        bench.distillation = build_distillation(cfg, backend)
        student.distillation = bench.distillation
    else:
        bench.teacher = EMATeacher(copy.deepcopy(student), decay=cfg.S4M.EMA_DECAY)
        see_instances(bench)
        bench.labeling = PseudoLabeling(cfg, bench.teacher, bench.answers)
    return bench


def build_sam(cfg):
    """The SAM of the config: the packaged tiny one, or a published size with random weights."""
    if cfg.S4M.SAM.BACKEND == "tiny_toyscapes":
        return build_sam_backend(cfg)
    sam = sam_model_registry[cfg.S4M.SAM.MODEL_TYPE]().to(cfg.MODEL.DEVICE)
    for parameter in sam.parameters():
        if not parameter.abs().max():  # positions and biases of attention start at 0
            nn.init.normal_(parameter, std=0.02)
    return SegmentAnythingBackend(sam, **build_compute_options(cfg))


def see_instances(bench: Bench) -> None:
    """Let the untrained teacher, after it has computed, predict the instances asked for."""
    predict = bench.teacher.model.predict_queries

    def predict_queries(samples: Sequence[dict]) -> dict:
        found = predict(samples)
        key = tuple(found["pred_masks"].shape)
        if key not in known:
            shape = found["pred_masks"].shape
            known[key] = [
                tensor.to(bench.device)
                for tensor in synthetic.query_predictions(
                    shape[0],
                    shape[1],
                    tuple(shape[2:]),
                    bench.case.instances,
                    bench.cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
                )
            ]
        return {**found, "pred_logits": known[key][0], "pred_masks": known[key][1]}

    known: dict[tuple, list[Tensor]] = {}
    bench.teacher.model.predict_queries = predict_queries
