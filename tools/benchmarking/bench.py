"""One stage of the project at one case's shapes: models with random weights, and batches."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from segment_anything import sam_model_registry
from torch import Tensor, nn

from benchmarking import synthetic
from s4m_d2 import engine
from s4m_d2.engine.config_file import load_config
from s4m_d2.engine.training.step import PRECISIONS
from s4m_d2.errors import ConfigError
from s4m_d2.losses import build_distillation
from s4m_d2.sam import EncodedImages, PromptOutput, build_sam_backend
from s4m_d2.sam.segment_anything import SegmentAnythingBackend
from s4m_d2.semi import EMATeacher

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
STAGES = {1: "teacher", 2: "student"}
CONFIG_SAM, TINY_SAM = "config", "tiny_toyscapes"


@dataclass(frozen=True)
class Case:
    """One set of shapes, and where it is measured."""

    name: str
    config: str  # file of configs/
    image_size: tuple[int, int]  # (H, W) of a training image, px
    raw_size: tuple[int, int]  # (H, W) of an image file, px
    instances: int  # per image, labeled or pseudo-labeled
    images: int = 0  # per batch, labeled, and as many unlabeled; 0: the config's
    device: str = "cpu"
    sam: str = TINY_SAM  # or CONFIG_SAM
    opts: tuple[str, ...] = ()  # config keys and values


CASES = {
    case.name: case
    for case in (
        Case("quickstart", "toyscapes_10pct.yaml", (128, 256), (128, 256), 6),
        Case("cityscapes", "cityscapes_10pct.yaml", (512, 1024), (1024, 2048), 20),
        Case("coco", "coco_10pct.yaml", (1024, 1024), (480, 640), 7),
    )
}


def case_config(case: Case, stage: int):
    """The config of a stage (1 or 2), with random weights, for one process: SyncBN becomes BN."""
    file = str(CONFIGS / case.config)
    plain = load_config(file)
    keys = {"MODEL.WEIGHTS": "", "MODEL.DEVICE": case.device, "DATALOADER.NUM_WORKERS": 0}
    if plain.MODEL.RESNETS.NORM == "SyncBN":
        keys["MODEL.RESNETS.NORM"] = "BN"
    if case.sam == TINY_SAM:
        keys |= {"S4M.SAM.BACKEND": TINY_SAM, "S4M.SAM.CHECKPOINT": ""}
    height, width = case.image_size
    if plain.INPUT.DATASET_MAPPER_NAME != "coco_instance_lsj":
        keys["INPUT.CROP.SIZE"] = height, width
    elif height == width:
        keys["INPUT.IMAGE_SIZE"] = height
    else:
        raise ConfigError(
            f"--size {height}x{width}: {case.config} trains on squares; give a size like 512x512"
        )
    if case.images:
        keys |= dict.fromkeys(("SOLVER.IMS_PER_BATCH", "S4M.TEACHER.IMS_PER_BATCH"), case.images)
    overrides = [str(word) for item in keys.items() for word in item]
    cfg = load_config(file, [*overrides, *case.opts])
    return engine.stage_config(engine.run_config(cfg), STAGES[stage])


class Bench:
    """Stage 1 or 2 at one case's shapes, with random weights.

    ``teacher``, ``labeling`` and ``unlabeled`` are stage 2's, ``distillation`` is stage 1's.
    ``sam`` computes; ``answers`` also replaces its masks by synthetic ones, because an untrained
    SAM's (or teacher's) would not give the number of instances that is asked for.
    """

    def __init__(self, case: Case, stage: int) -> None:
        # SAM is handed over below, without weights.
        opts = (*case.opts, "S4M.DISTILL.ENABLED", "False")
        self.case, self.stage = case, stage
        self.cfg = case_config(replace(case, opts=opts), stage)
        self.device, self.size = torch.device(case.device), case.image_size
        self.num_classes = self.cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
        self.student = engine.TeacherTrainer.build_model(self.cfg).train()
        self.optimizer = engine.build_optimizer(self.cfg, self.student)
        self.sam = build_sam(self.cfg)
        batch = self.cfg.SOLVER.IMS_PER_BATCH
        parts = (batch, self.size, case.instances, self.num_classes)
        self.labeled = synthetic.samples("labeled", *parts)
        self.unlabeled = synthetic.samples("unlabeled", *parts) if stage == 2 else []
        self.sizes = [self.size] * batch
        self.teacher = self.labeling = self.distillation = None
        if stage == 1:
            self.distillation = build_distillation(self.cfg, self.sam)
            self.student.distillation = self.distillation
            return
        queries = self.cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES
        self.answers = FixedAnswers(self.sam, min(case.instances, queries), self.sizes)
        self.teacher = EMATeacher(copy.deepcopy(self.student), decay=self.cfg.S4M.EMA_DECAY)
        predict = self.teacher.model.predict_queries
        size, known = (self.size[0] // 4, self.size[1] // 4), (case.instances, self.num_classes)
        logits, masks = synthetic.query_predictions(batch, queries, size, *known)
        self.known = {"pred_logits": logits.to(self.device), "pred_masks": masks.to(self.device)}
        self.teacher.model.predict_queries = lambda samples: {**predict(samples), **self.known}
        self.labeling = engine.PseudoLabeling(self.cfg, self.teacher, self.answers)

    @property
    def weak(self) -> list[dict]:
        """The unlabeled batch as the teacher sees it."""
        return [{**sample, "image": sample["image_weak"]} for sample in self.unlabeled]

    @property
    def rgb(self) -> Tensor:
        """(B, 3, H, W) uint8 on the device: what SAM sees in this stage."""
        samples = self.weak if self.stage == 2 else self.labeled
        return torch.stack([sample["image"] for sample in samples]).to(self.device)

    @property
    def half(self) -> bool:
        """Whether the training uses mixed precision."""
        return bool(self.cfg.SOLVER.AMP.ENABLED)

    def autocast(self) -> torch.autocast:
        dtype = PRECISIONS[self.cfg.S4M.AMP_PRECISION]
        return torch.autocast(self.device.type, dtype=dtype, enabled=self.half)

    @torch.no_grad()
    def predictions(self) -> dict:
        """The teacher's forward pass over the weak views."""
        with self.autocast():
            return self.teacher.model.predict_queries(self.weak)


def build_sam(cfg):
    """The SAM of the config; a published size has random weights."""
    if cfg.S4M.SAM.BACKEND != "segment_anything":
        return build_sam_backend(cfg)
    sam = sam_model_registry[cfg.S4M.SAM.MODEL_TYPE]().to(cfg.MODEL.DEVICE)
    for parameter in sam.parameters():
        if not parameter.abs().max():  # positions and biases of attention start at 0
            nn.init.normal_(parameter, std=0.02)
    return SegmentAnythingBackend.build_from_config(cfg, sam)


class OtherBackend:
    """What is not defined here is another backend's."""

    def __init__(self, backend) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)


class FixedAnswers(OtherBackend):
    """A backend that asks another one and then answers with ``count`` synthetic masks an image."""

    def __init__(self, backend, count: int, sizes: Sequence[tuple[int, int]]) -> None:
        super().__init__(backend)
        self.passes = True  # False: answer at once, without running encoder or decoder
        frame = 4 * backend.grid_side
        self.answers = []
        for index, size in enumerate(sizes):
            answer = synthetic.sam_answer(index, count, frame, backend.grid_scale(size))
            self.answers.append([tensor.to(backend.device) for tensor in answer])

    def encode(self, images: Tensor, image_sizes: Sequence, **options: Any) -> EncodedImages:
        if self.passes:
            return self._backend.encode(images, image_sizes, **options)
        return EncodedImages(torch.zeros(len(images), 1, 1, 1), list(image_sizes))

    def prompt(self, encoded: EncodedImages, points: Sequence, *labels, **options) -> list:
        if self.passes:
            self._backend.prompt(encoded, points, *labels, **options)
        pairs = zip(points, self.answers, strict=False)
        return [PromptOutput(masks[: len(p)], ious[: len(p)]) for p, (masks, ious) in pairs]


class OneByOne(OtherBackend):
    """A backend that encodes one image a pass and answers the prompts of one image a pass."""

    def encode(self, images: Tensor, image_sizes: Sequence, **options: Any) -> EncodedImages:
        pairs = zip(images, image_sizes, strict=True)
        encoded = [self._backend.encode(image[None], [size]) for image, size in pairs]
        finer = zip(*(one.finer_maps for one in encoded), strict=True)
        embeddings = torch.cat([one.embeddings for one in encoded])
        return EncodedImages(embeddings, list(image_sizes), tuple(map(torch.cat, finer)))

    def prompt(self, encoded: EncodedImages, points: Sequence, labels: Sequence, **options) -> list:
        outputs = []
        for index, (clicks, kinds) in enumerate(zip(points, labels, strict=True)):
            outputs += self._backend.prompt(encoded.select([index]), [clicks], [kinds], **options)
        return outputs
