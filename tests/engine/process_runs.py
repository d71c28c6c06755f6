"""Runs of both stages that any number of processes can share, and what each process saw of them."""

from __future__ import annotations

import hashlib
import os
from argparse import Namespace
from collections.abc import Iterator

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils import comm

from s4m_d2.engine import S4MTrainer, TeacherTrainer
from s4m_d2.errors import DatasetError

MISTAKE = "frankfurt_000000_000294.png is truncated."
LABELED, UNLABELED = 2, 4  # images a batch
# From this iteration on, the images in odd places of a batch, all those of the second of two
# processes, have neither labels nor pseudo-labels; stage 1 ends before.
EMPTY_FROM = 3
ITERATIONS, BURN_IN = {"teacher": EMPTY_FROM, "student": EMPTY_FROM + 1}, 2
CONFIG = {
    "SOLVER.IMS_PER_BATCH": LABELED,
    "S4M.TEACHER.IMS_PER_BATCH": LABELED,
    "S4M.UNLABELED_IMS_PER_BATCH": UNLABELED,
    "SOLVER.OPTIMIZER": "SGD",  # AdamW's first steps blow rounding errors up to the learning rate
    "SOLVER.BASE_LR": 0.03,
    "MODEL.RESNETS.NORM": "FrozenBN",
    "S4M.EMA_DECAY": 0.5,
    "S4M.ARP.PAIR_FRACTION": 0.5,  # two pairs of four images, one pair of two
    "DATASETS.TEST": "()",
    "S4M.BURN_IN": BURN_IN,
    # Pseudo-labels are measured while the teacher is stage 1's, and after that.
    "S4M.QUALITY.PERIOD": 2,
    "S4M.QUALITY.MAX_IMAGES": 2,
    "S4M.PSEUDO_LABEL.SCORE_THRESH": 0.1,
    "S4M.PSEUDO_LABEL.CLASS_THRESH": "auto",
    "S4M.PSEUDO_LABEL.LABEL_WEIGHT": True,
    "S4M.PSEUDO_LABEL.PIXEL_WEIGHT": True,
    "S4M.TEACHER.MAX_ITER": ITERATIONS["teacher"],
    "SOLVER.MAX_ITER": ITERATIONS["student"],
}


def places(count: int) -> list[int]:
    """Where the images of this process stand in the batch of all processes."""
    return [index * comm.get_world_size() + comm.get_rank() for index in range(count)]


class SeenLoader:
    """A loader whose stream positions are recorded, and some of whose labels removed."""

    def __init__(self, loader) -> None:
        self.loader = loader
        self.skipped_images = loader.skipped_images
        self.positions: list[list[int]] = []

    def __iter__(self) -> Iterator[list[dict]]:
        for iteration, batch in enumerate(self.loader):
            self.positions.append([sample["stream_position"] for sample in batch])
            for place, sample in zip(places(len(batch)), batch, strict=True):
                if iteration >= EMPTY_FROM and place % 2 and "instances" in sample:
                    sample["instances"] = sample["instances"][:0]
            yield batch


class Seen(HookBase):
    """The losses of each iteration, and digests of the models that should be alike everywhere."""

    def __init__(self) -> None:
        self.losses: list[dict[str, float]] = []
        self.teachers: list[str] = []
        self.students: list[str] = []
        self.pseudo_labels: list[float] = []
        self.thresholds: list[list[float]] = []

    def before_step(self) -> None:  # the last hook: the teacher has made its step
        if hasattr(self.trainer, "teacher"):
            self.teachers.append(digest(self.trainer.teacher.model))

    def after_step(self) -> None:
        latest = self.trainer.storage.latest()
        self.losses.append({name: v for name, (v, _) in latest.items() if "loss" in name})
        self.pseudo_labels.append(latest.get("pseudo_labels/per_image", (0.0, 0))[0])
        self.students.append(digest(self.trainer.trained_model))
        thresholds = getattr(self.trainer.pseudo_labeling, "class_thresholds", None)
        self.thresholds.append([] if thresholds is None else thresholds().tolist())


def digest(model: torch.nn.Module) -> str:
    """Of all parameters and persistent buffers, to the last bit."""
    content = hashlib.sha256()
    for name, value in model.state_dict().items():
        content.update(name.encode() + value.numpy().tobytes())
    return content.hexdigest()


def make_trainer(cfg: CfgNode, teacher_weights: str):
    """The trainer, its recorders, and with pairs that do not depend on the processes."""
    if not teacher_weights:
        trainer = TeacherTrainer(cfg)
        loader = trainer._trainer.data_loader = SeenLoader(trainer.data_loader)
        return trainer, [loader]
    trainer = S4MTrainer(cfg, teacher_weights)
    pair = trainer.data_loader
    pair.labeled, pair.unlabeled = SeenLoader(pair.labeled), SeenLoader(pair.unlabeled)
    labeling = trainer.pseudo_labeling
    world_size = comm.get_world_size()
    labeling.arp._draw_pairs = lambda batch, generators: (
        [[0, 1]] if world_size == 2 else [[0, 2], [1, 3]]  # each of images of one process of two
    )
    predict = labeling.teacher.model.predict_queries

    def sometimes_blind(batch):
        predictions = predict(batch)
        for place, logits in zip(places(len(batch)), predictions["pred_logits"], strict=True):
            if trainer.iter >= EMPTY_FROM and place % 2:
                logits[:, -1] = 1e4  # "no object"
        return predictions

    labeling.teacher.model.predict_queries = sometimes_blind
    return trainer, [pair.labeled, pair.unlabeled]


def train(name: str, cfg: CfgNode, teacher_weights: str, folder: str) -> None:
    """Make one run, or this process' part of it, and write what was seen into ``folder``."""
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    trainer, loaders = make_trainer(cfg, teacher_weights)
    before = {key: value.clone() for key, value in trainer.trained_model.state_dict().items()}
    seen = Seen()
    trainer.register_hooks([seen])
    trainer.train()
    result = {
        **vars(seen),
        "positions": [loader.positions for loader in loaders],
        "before": before,
        "after": trainer.trained_model.state_dict(),
    }
    result.pop("trainer")
    torch.save(result, result_path(name, folder, comm.get_rank(), comm.get_world_size()))


def train_all(cfgs: dict[str, CfgNode], teachers: dict[str, str], folder: str) -> None:
    """The runs, one after the other; ``teachers`` are files of stage 1 by run."""
    torch.set_num_threads(1)
    for name, cfg in cfgs.items():
        train(name, cfg, teachers.get(name, ""), folder)


def train_all_then_fail(args: Namespace) -> None:
    """In the end the second process makes a mistake, and the first one waits for it in vain."""
    train_all(args.cfgs, args.teachers, args.folder)
    comm.synchronize()
    if comm.get_rank() == 1:
        raise DatasetError(MISTAKE)
    comm.synchronize()


def result_path(name: str, folder: str, rank: int, world_size: int) -> str:
    return os.path.join(folder, f"{name}_{rank}_of_{world_size}.pth")
