"""The parts of a step: what each does, in our form and, where there is one, in the plain form."""

from __future__ import annotations

import contextlib
import copy
import itertools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.testing import assert_close

from benchmarking import ours, plain, plain_step, synthetic
from benchmarking.bench import Bench, OneByOne
from benchmarking.timing import Form
from s4m_d2.data import DATASET_MAPPER_REGISTRY
from s4m_d2.engine.rng import sample_seeds
from s4m_d2.formats.coco import mask_polygons
from s4m_d2.layers import cell_centers, ms_deform_attn
from s4m_d2.semi.ema_teacher import TeacherPhase
from s4m_d2.structures import encode_masks

#: Parts that are inside another one and so do not count again in the sum of a step.
INSIDE = {"points": "refinement", "matching": "losses", "deformable attention": "student forward"}
#: The method's own operations, whose plain forms the project promises to beat.
METHOD_PARTS = ("points", "arp", "ema")
FILES = 4  # image files, which a batch reads in turn
OTHER_PIXELS = 1e-3  # share of a mask's frame that rounding of coordinates may change
LEVELS = 3.0  # mean difference of two strong views, of 255; PIL rounds to 8 bits after each change
SAME_MATCHES = 0.9  # share of the queries: ties are broken by rounding


@dataclass(frozen=True)
class Part:
    """A part of a step."""

    ours: Form
    plain: Form | None = None  # None: the same
    same: Callable[[Any, Any], None] | None = None  # AssertionError: the two results differ
    moved_bytes: int = 0  # that cannot be avoided; 0: it is bound by arithmetic, or not looked at
    counts_flops: bool = False  # whether its bound is the arithmetic of what it runs
    in_step: bool = True  # whether a step waits for it; other processes load the data


def pair(run: Callable, first: Any, second: Any) -> tuple[Form, Form]:
    """Two forms that differ in an argument."""
    return Form(lambda: run(first)), Form(lambda: run(second))


class Parts:
    """Makes the parts of a stage's step; what several of them need is made once."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.rng = np.random.default_rng(0)
        self.images = [sample["image"].to(bench.device) for sample in bench.unlabeled]
        self.loose = 5e-2 if bench.half else 2e-3

    @cached_property
    def predicted(self) -> dict:
        return self.bench.known | {"image_sizes": self.bench.sizes, "padded_size": self.bench.size}

    @cached_property
    def selected(self) -> list:
        return self.bench.labeling.select(self.predicted)

    @cached_property
    def refined(self) -> list:
        return ours.refine(self.bench, self.selected)

    @cached_property
    def encoded(self):
        return ours.encode(self.bench, self.bench.sam, self.bench.rgb)

    @cached_property
    def batches(self) -> list[list[dict]]:
        bench = self.bench
        return [bench.labeled, *([ours.pseudo_labeled(bench)] if bench.stage == 2 else [])]

    @cached_property
    def wanted(self) -> list[list[dict]]:
        return [ours.targets(self.bench, batch) for batch in self.batches]

    @cached_property
    @torch.no_grad()
    def outputs(self) -> list[dict]:
        return ours.student_outputs(self.bench, self.batches)

    def data(self) -> Part:
        """One batch of a step, in one process; workers load it while another step runs."""
        cfg = self.bench.cfg
        mappers = {"labeled": cfg.INPUT.DATASET_MAPPER_NAME}
        if self.bench.stage == 2:
            mappers["unlabeled"] = cfg.S4M.UNLABELED_MAPPER
        mappers = {k: DATASET_MAPPER_REGISTRY.get(name)(cfg, True) for k, name in mappers.items()}
        folder = tempfile.TemporaryDirectory()
        records = write_images(Path(folder.name), self.bench)
        positions = itertools.count()

        def load(folder=folder) -> None:  # the files live as long as the part
            for stream, mapper in mappers.items():
                for position in itertools.islice(positions, len(self.bench.labeled)):
                    record = dict(records[position % len(records)])
                    if stream == "unlabeled":
                        record.pop("annotations")
                    mapper({**record, "seeds": sample_seeds(0, stream, position)})

        return Part(Form(load), in_step=False)

    def ema(self) -> Part:
        """The teacher's update; two tensors are read and one is written."""
        teacher, student = self.bench.teacher, self.bench.student

        def update_plainly() -> None:
            plain.update_teacher(teacher.model, student, teacher.decay)

        def same(*_) -> None:
            model, found = teacher.model, []
            start = copy.deepcopy(model.state_dict())
            for update in (lambda: teacher.step(student, TeacherPhase.EMA), update_plainly):
                model.load_state_dict(start)
                with torch.no_grad():
                    for tensor in model.parameters():
                        tensor.add_(1.0)  # else the teacher is the student, and nothing would move
                update()
                found.append(copy.deepcopy(model.state_dict()))
            model.load_state_dict(start)
            assert_close(*found, rtol=1e-5, atol=1e-6)

        size = sum(p.numel() * p.element_size() for p in student.parameters())
        update = Form(lambda: teacher.step(student, TeacherPhase.EMA))
        return Part(update, Form(update_plainly), same, moved_bytes=3 * size)

    def teacher(self) -> Part:
        """The teacher's pass; the plain one with plain deformable attention."""

        def predict_plainly() -> dict:
            with ours.plain_model(self.bench):
                return ours.predictions(self.bench)

        predict = Form(lambda: ours.predictions(self.bench))
        return Part(predict, Form(predict_plainly), counts_flops=True)

    def selection(self) -> Part:
        return Part(Form(lambda: self.bench.labeling.select(self.predicted)))

    def sam_encode(self) -> Part:
        """SAM's encoder: the batch together, and image by image."""
        bench, images = self.bench, self.bench.rgb
        backends = bench.sam, OneByOne(bench.sam)
        forms = pair(lambda backend: ours.encode(bench, backend, images), *backends)
        return Part(*forms, lambda a, b: self._close(a.embeddings, b.embeddings), counts_flops=True)

    def sam_prompts(self) -> Part:
        """SAM's answers to the clicks of all images together, and image by image."""
        bench, drawn = self.bench, ours.points(self.bench, self.selected)
        backends = bench.sam, OneByOne(bench.sam)
        forms = pair(lambda backend: ours.prompt(bench, backend, self.encoded, *drawn), *backends)
        return Part(*forms, self._close, counts_flops=True)

    def points(self) -> Part:
        """Clicks; the draws differ, but all are centers of pixels of their masks."""

        def same(found: list, by_image: list) -> None:
            expected = list(zip(*by_image, strict=True))
            self._close(*([kinds.cpu() for kinds in drawn[1]] for drawn in (found, expected)))
            for clicks in (found, expected):
                for one, places, kinds in zip(self.selected, *clicks, strict=True):
                    height, width = one.content_size
                    x, y = (places.cpu() * torch.tensor([width, height])).long().unbind(-1)
                    row = torch.arange(len(one.labels))[:, None]
                    assert one.labels.masks.cpu()[row, y, x][kinds.cpu() > 0].all()

        draw = Form(lambda: ours.points(self.bench, self.selected))
        draw_plainly = Form(lambda: plain_step.points(self.bench, self.selected, self.rng))
        return Part(draw, draw_plainly, same)

    def refinement(self) -> Part:
        """Clicks, choice of SAM's masks and their size, without SAM's passes."""

        def refine_plainly() -> list:
            with patch.object(self.bench.answers, "passes", False):
                return plain_step.refine(self.bench, self.selected, self.rng)

        refine = Form(lambda: ours.refine(self.bench, self.selected))
        return Part(refine, Form(refine_plainly), same_labels)

    def arp(self) -> Part:
        """ARP; each mask of a pair is read and written."""
        bench = self.bench

        def same(found: tuple, expected: tuple) -> None:
            same_labels(found[1], expected[1])
            same_pictures(found[0], expected[0], 1.0)

        count = len(self.images)
        pairs = max(1, int(bench.cfg.S4M.ARP.PAIR_FRACTION * count)) if count > 1 else 0
        channels = 2 * 2 * bench.case.instances + 3 * 3
        moved = pairs * 2 * bench.size[0] * bench.size[1] * channels
        forms = pair(lambda of: of.exchange(bench, self.images, self.refined), ours, plain_step)
        return Part(*forms, same, moved_bytes=moved)

    def strong_view(self) -> Part:
        """The student's images."""
        forms = pair(lambda of: of.strong_views(self.bench, self.images), ours, plain_step)
        return Part(*forms, lambda found, expected: same_pictures(found, expected, LEVELS))

    def distillation(self) -> Part:
        """Structural distillation, from SAM's embeddings on: points, prompts, similarities."""
        bench = self.bench
        channels = bench.cfg.MODEL.SEM_SEG_HEAD.MASK_DIM
        shape = (len(bench.labeled), channels, bench.size[0] // 4, bench.size[1] // 4)
        features = torch.rand(shape, generator=synthetic.generator("mask features"))
        features = features.to(bench.device).requires_grad_()
        losses = bench.distillation, partial(plain.distillation, bench.distillation)
        wanted = self.wanted[0]
        forms = pair(
            lambda loss: ours.distill(bench, loss, self.encoded, features, wanted), *losses
        )
        return Part(*forms, partial(self._close, atol=0), counts_flops=True)

    def student_forward(self) -> Part:
        def same(*outputs: list[dict]) -> None:
            self._close(*([output["mask_features"] for output in form] for form in outputs))

        return Part(*pair(StudentPass.forward, *self._passes()), same, counts_flops=True)

    def losses(self) -> Part:
        forms = pair(lambda of: of.losses(self.outputs), *self._passes())
        return Part(*forms, self._close)

    def backward(self) -> Part:
        passes = self._passes()

        def same(*_) -> None:
            self._close(*(one.gradient_norm() for one in passes), rtol=5 * self.loose)

        forms = [Form(torch.Tensor.backward, one.graph) for one in passes]
        return Part(*forms, same, counts_flops=True)

    def optimizer(self) -> Part:
        """Clipping and update: reads the gradients twice and writes them; then four and three."""
        optimizer, student = self.bench.optimizer, self._passes()[0]
        tensors = [p for group in optimizer.param_groups for p in group["params"]]

        def gradients() -> tuple:
            if all(parameter.grad is None for parameter in tensors):
                student.gradient_norm()
            return ()

        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return Part(Form(lambda: optimizer.step(), gradients), moved_bytes=10 * size)

    def matching(self) -> Part:
        """The assignments of all layers and images of a step."""
        bench = self.bench
        wanted = [[{**t, "masks": t["masks"].float()} for t in batch] for batch in self.wanted]
        own = bench.student.criterion.matcher

        def same(*queries: list[Tensor]) -> None:
            found, expected = (torch.cat([q.flatten() for q in of_form]) for of_form in queries)
            assert (found == expected).float().mean() >= SAME_MATCHES

        def match(matcher: Callable) -> list[Tensor]:
            return ours.match(bench, matcher, self.outputs, wanted, self.batches)

        return Part(*pair(match, own, plain.Matcher(**vars(own))), same)

    def deformable_attention(self) -> Part:
        """Forward and backward of one layer of the pixel decoder's look-ups, for one batch."""
        head, size, device = self.bench.cfg.MODEL.SEM_SEG_HEAD, self.bench.size, self.bench.device
        heads = head.DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS
        points = head.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS
        levels = [(size[0] // stride, size[1] // stride) for stride in (32, 16, 8)]
        cells = sum(height * width for height, width in levels)
        draws = synthetic.generator("deformable attention")
        first = len(self.bench.labeled), cells, heads

        def random(*shape: int) -> Tensor:
            return torch.rand((*first, *shape), generator=draws).to(device)

        value = random(head.CONVS_DIM // heads).requires_grad_()
        # near the query's own place, as an encoder looks: within a few cells
        centers = torch.cat([cell_centers(level) for level in levels]).to(device)
        offsets = (random(len(levels), points, 2) - 0.5) * 0.1
        locations = (centers[None, :, None, None, None] + offsets).requires_grad_()
        weights = random(len(levels), points).requires_grad_()

        def run(form: Callable) -> list[Tensor]:
            output = form(value, levels, locations, weights)
            return [output, *torch.autograd.grad(output.sum(), (value, locations, weights))]

        def same(found: list, expected: list) -> None:  # gradients of places jump at cells' ends
            for index in (0, 1, 3):
                assert_close(found[index], expected[index], rtol=1e-3, atol=1e-3)

        return Part(*pair(run, ms_deform_attn.deformable_sampling, plain.deformable_sampling), same)

    def _passes(self) -> list[StudentPass]:
        return [StudentPass(self, plainly) for plainly in (False, True)]

    def _close(self, found, expected, **tolerance: float) -> None:
        tolerance = {"rtol": self.loose, "atol": self.loose} | tolerance
        assert_close(found, expected, check_dtype=False, **tolerance)


# Names in the order of a step, what makes them, and in which stages.
MAKERS: dict[str, tuple[Callable[[Parts], Part], tuple[int, ...]]] = {
    "data": (Parts.data, (1, 2)),
    "ema": (Parts.ema, (2,)),
    "teacher": (Parts.teacher, (2,)),
    "selection": (Parts.selection, (2,)),
    "SAM encode": (Parts.sam_encode, (1, 2)),
    "SAM prompts": (Parts.sam_prompts, (2,)),
    "points": (Parts.points, (2,)),
    "refinement": (Parts.refinement, (2,)),
    "arp": (Parts.arp, (2,)),
    "strong view": (Parts.strong_view, (2,)),
    "distillation": (Parts.distillation, (1,)),
    "student forward": (Parts.student_forward, (1, 2)),
    "deformable attention": (Parts.deformable_attention, (1, 2)),
    "losses": (Parts.losses, (1, 2)),
    "matching": (Parts.matching, (1, 2)),
    "backward": (Parts.backward, (1, 2)),
    "optimizer": (Parts.optimizer, (1, 2)),
}


class StudentPass:
    """The student on a step's batches; plainly: with plain deformable attention and matching."""

    def __init__(self, parts: Parts, plainly: bool) -> None:
        self._parts, self._bench, self._plainly = parts, parts.bench, plainly

    def _form(self) -> contextlib.AbstractContextManager:
        return ours.plain_model(self._bench) if self._plainly else contextlib.nullcontext()

    def forward(self) -> list[dict]:
        """Outputs of each batch, with their graph."""
        with self._form():
            return ours.student_outputs(self._bench, self._parts.batches)

    def losses(self, outputs: list[dict]) -> Tensor:
        """The sum of all losses."""
        with self._form():
            return ours.losses(self._bench, outputs, self._parts.wanted, self._parts.batches)

    def graph(self) -> tuple[Tensor]:
        """The losses, ready for a backward pass."""
        self._bench.optimizer.zero_grad()
        return (self.losses(self.forward()),)

    def gradient_norm(self) -> Tensor:
        """Of all parameters together, after one pass."""
        self.graph()[0].backward()
        gradients = [p.grad for p in self._bench.student.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)


def check_step(bench: Bench) -> None:
    """The losses of a whole step, with the strong view, whose rounding differs, left out."""
    keep = contextlib.nullcontext()
    if bench.labeling is not None:
        keep = patch.object(bench.labeling, "strong_view", lambda images, _: images)
    with torch.no_grad(), keep:
        found = ours.step_losses(bench)
        rng = np.random.default_rng(0)
        expected = plain_step.losses(bench, rng, views=lambda _, images: images)
    tolerance = 0.1 if bench.half else 5e-3
    assert_close(found, expected, rtol=tolerance, atol=tolerance)


def same_labels(found: Sequence, expected: Sequence) -> None:
    """Pseudo-labels: classes, scores, and masks but for single pixels."""
    for one, other in zip(found, expected, strict=True):
        assert_close((one.labels, one.scores), (other.labels, other.scores))
        assert one.masks.shape == other.masks.shape
        assert not len(one) or (one.masks ^ other.masks).float().mean() <= OTHER_PIXELS


def same_pictures(found: Sequence[Tensor], expected: Sequence[Tensor], levels: float) -> None:
    """uint8 images, by the mean difference."""
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert (one.float() - other.float()).abs().mean() <= levels


def write_images(folder: Path, bench: Bench) -> list[dict]:
    """A few PNG files of the data set's size, and Detectron2's records of them."""
    size, records = bench.case.raw_size, []
    for index in range(FILES):
        draws = synthetic.generator("files", index)
        pixels = synthetic.image(size, draws).permute(1, 2, 0).numpy()
        name = folder / f"{index}.png"
        cv2.imwrite(str(name), np.ascontiguousarray(pixels[..., ::-1]))
        masks = encode_masks(synthetic.instance_logits(bench.case.instances, size, draws) > 0)
        annotations = []
        for n, rle in enumerate(masks):
            polygons = [polygon.ravel().tolist() for polygon in mask_polygons(rle)]
            common = {"category_id": n % bench.num_classes, "iscrowd": 0}
            annotations.append({**common, "segmentation": polygons})
        record = {"file_name": str(name), "height": size[0], "width": size[1], "image_id": index}
        records.append({**record, "annotations": annotations})
    return records
