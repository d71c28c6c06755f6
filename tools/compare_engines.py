"""Train a few iterations from saved weights and batches, to compare the two engines.

    python tools/compare_engines.py output/engines            # in the one environment
    python tools/compare_engines.py output/engines            # in the other, on the same folder

The first run saves the quickstart model's initial weights and batches; each run trains stage 1 and
stage 2 on them and saves its losses under its engine's version; every further one prints how far
its losses are from the others'. The teacher is untrained, so its threshold is lowered until it
labels something.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import detectron2
import torch
from detectron2.engine import HookBase
from detectron2.structures import BitMasks, Instances

from s4m_d2.engine import (
    BadSteps,
    EMATeacherHook,
    PseudoLabeling,
    SeedHook,
    StudentStep,
    TeacherStep,
    TeacherTrainer,
    build_optimizer,
    run_config,
    stage_config,
)
from s4m_d2.engine.config_file import load_config
from s4m_d2.engine.training.build import build_labeled_loader, build_unlabeled_loader
from s4m_d2.files import atomic_write
from s4m_d2.semi.ema_teacher import EMATeacher

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "toyscapes_10pct.yaml"
OPTIONS = ["MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", 0]
SCORE_THRESH = 0.15  # an untrained teacher is not certain of anything
BURN_IN_SHARE = 0.5


class LossRecorder(HookBase):
    """The losses of every iteration."""

    def __init__(self) -> None:
        self.losses: list[dict[str, float]] = []

    def after_step(self) -> None:
        latest = self.trainer.storage.latest()
        self.losses.append({k: v for k, (v, _) in latest.items() if "loss" in k})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="weights, batches and losses")
    parser.add_argument("--iterations", type=int, default=20)
    args = parser.parse_args()
    options = ["S4M.PSEUDO_LABEL.SCORE_THRESH", SCORE_THRESH]
    options += ["S4M.BURN_IN", int(BURN_IN_SHARE * args.iterations)]
    cfg = run_config(load_config(str(CONFIG), [*map(str, OPTIONS + options)]))

    saved = args.folder / "weights_and_batches.pth"
    if not saved.exists():
        with atomic_write(saved, "wb") as file:
            torch.save(prepare(stage_config(cfg, "student"), args.iterations), file)
    start = torch.load(saved, weights_only=True)
    losses = {stage: train(stage_config(cfg, stage), stage, start) for stage in start["stages"]}
    name = f"losses-{detectron2.__version__}.json"
    with atomic_write(args.folder / name) as file:
        json.dump(losses, file, indent=1)
    print(f"{args.folder / name}: {args.iterations} iterations of {', '.join(losses)}")
    for other in sorted(args.folder.glob("losses-*.json")):
        if other.name != name:
            for stage, difference in compare(losses, json.loads(other.read_text())).items():
                print(f"{stage}: largest relative difference to {other.name}: {difference:.1e}")


def prepare(cfg, iterations: int) -> dict:
    """Initial weights and ``iterations`` batches of both streams, as plain tensors."""

    def batches(loader):
        return [[_plain(sample) for sample in next(loader)] for _ in range(iterations)]

    return {
        "stages": ["teacher", "student"],
        "weights": TeacherTrainer.build_model(cfg).state_dict(),
        "labeled": batches(iter(build_labeled_loader(cfg))),
        "unlabeled": batches(iter(build_unlabeled_loader(cfg))),
    }


def _plain(sample: dict) -> dict:
    sample = dict(sample)
    if "instances" in sample:
        instances = sample.pop("instances")
        sample |= {"classes": instances.gt_classes, "masks": instances.gt_masks.tensor}
    return sample


def _batch(samples: list[dict]) -> list[dict]:
    """Samples with this engine's structures again."""
    result = []
    for sample in samples:
        sample = dict(sample)
        if "classes" in sample:
            sample["instances"] = Instances(
                tuple(sample["image"].shape[-2:]),
                gt_classes=sample.pop("classes"),
                gt_masks=BitMasks(sample.pop("masks")),
            )
        result.append(sample)
    return result


def train(cfg, stage: str, start: dict) -> list[dict[str, float]]:
    """Losses of each iteration on the saved batches."""
    student = TeacherTrainer.build_model(cfg)
    student.load_state_dict(start["weights"])
    hooks, batches = [], [_batch(samples) for samples in start["labeled"]]
    optimizer, bad_steps = build_optimizer(cfg, student), BadSteps(0, "unused", cfg.SEED)
    if stage == "student":
        teacher = TeacherTrainer.build_model(cfg)
        teacher.load_state_dict(start["weights"])
        teacher = EMATeacher(teacher, decay=cfg.S4M.EMA_DECAY)
        hooks = [EMATeacherHook(teacher, student, cfg.S4M.BURN_IN)]
        trainer = StudentStep(
            student,
            list(zip(batches, map(_batch, start["unlabeled"]), strict=True)),
            optimizer,
            bad_steps,
            labeling=PseudoLabeling(cfg, teacher),
            unsup_loss_weight=cfg.S4M.UNSUP_LOSS_WEIGHT,
        )
    else:
        trainer = TeacherStep(student, batches, optimizer, bad_steps)
    recorder = LossRecorder()
    trainer.register_hooks([*hooks, SeedHook(cfg.SEED, 0), recorder])
    trainer.train(0, len(batches))
    return recorder.losses


def compare(first: dict, second: dict) -> dict[str, float]:
    """The largest relative difference of any loss, by stage."""
    return {
        stage: max(
            abs(row[name] - other[name]) / max(abs(row[name]), abs(other[name]), 1e-12)
            for row, other in zip(rows, second[stage], strict=True)
            for name in row.keys() | other.keys()
        )
        for stage, rows in first.items()
    }


if __name__ == "__main__":
    main()
