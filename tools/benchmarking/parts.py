"""The parts of a step: what each does, in our form and, where there is one, in the plain form."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

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
from s4m_d2.layers import cell_centers
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
    """A part of a step.

    Attributes:
        ours, plain: the forms; None: what the plain form does is the same.
        check: raises AssertionError if the forms differ.
        moved_bytes: that the part cannot avoid to read and write; 0: it is bound by arithmetic, or
            not looked at.
        counts_flops: whether its bound is the arithmetic of what it runs.
        in_step: whether a step waits for it; the data are loaded by other processes.
    """

    ours: Form
    plain: Form | None = None
    check: Callable[[], None] = lambda: None
    moved_bytes: int = 0
    counts_flops: bool = False
    in_step: bool = True


class Parts:
    """Makes the parts of a stage's step; what several of them need is made once."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.rng = np.random.default_rng(0)
        self.images = [sample["image"].to(bench.device) for sample in bench.unlabeled]
        self.loose = 5e-2 if bench.half else 2e-3

    @cached_property
    def selected(self) -> list:
        known = {"image_sizes": self.bench.sizes, "padded_size": self.bench.size}
        return ours.selections(self.bench, self.bench.known | known)

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
        position = 0

        def load() -> None:
            nonlocal position
            for stream, mapper in mappers.items():
                for _ in self.bench.labeled:
                    record = dict(records[position % len(records)])
                    if stream == "unlabeled":
                        record.pop("annotations")
                    mapper({**record, "seeds": sample_seeds(0, stream, position)})
                    position += 1

        load.folder = folder  # the files live as long as the part
        return Part(Form(load), in_step=False)

    def ema(self) -> Part:
        """The teacher's update; two tensors are read and one is written."""
        teacher, student = self.bench.teacher, self.bench.student

        def state() -> dict[str, Tensor]:
            return {name: value.clone() for name, value in teacher.model.state_dict().items()}

        def update_plainly() -> None:
            plain.update_teacher(teacher.model, student, teacher.decay)

        def check() -> None:
            start = state()
            with torch.no_grad():
                for tensor in teacher.model.parameters():
                    tensor.add_(1.0)  # else the teacher is the student, and nothing would move
            moved = state()
            teacher.update(student)
            found = state()
            teacher.model.load_state_dict(moved)
            update_plainly()
            expected = state()
            teacher.model.load_state_dict(start)
            assert_close(found, expected, rtol=1e-5, atol=1e-6)

        size = sum(p.numel() * p.element_size() for p in student.parameters())
        update = Form(lambda: teacher.update(student))
        return Part(update, Form(update_plainly), check, moved_bytes=3 * size)

    def teacher(self) -> Part:
        """The teacher's pass; the plain one with plain deformable attention."""

        def predict_plainly() -> dict:
            with ours.plain_model(self.bench):
                return ours.predictions(self.bench)

        predict = Form(lambda: ours.predictions(self.bench))
        return Part(predict, Form(predict_plainly), counts_flops=True)

    def selection(self) -> Part:
        known = {"image_sizes": self.bench.sizes, "padded_size": self.bench.size}
        predicted = self.bench.known | known
        return Part(Form(lambda: ours.selections(self.bench, predicted)))

    def sam_encode(self) -> Part:
        """SAM's encoder: the batch together, and image by image."""
        bench, images = self.bench, self.bench.rgb
        backends = bench.sam, OneByOne(bench.sam)
        forms = [lambda b=backend: ours.encode(bench, b, images) for backend in backends]

        def check() -> None:
            self._close(*(form().embeddings for form in forms))

        return Part(*map(Form, forms), check, counts_flops=True)

    def sam_prompts(self) -> Part:
        """SAM's answers to the clicks of all images together, and image by image."""
        bench, drawn = self.bench, ours.points(self.bench, self.selected)
        backends = bench.sam, OneByOne(bench.sam)
        forms = [
            lambda b=backend: ours.prompt(bench, b, self.encoded, *drawn) for backend in backends
        ]
        return Part(
            *map(Form, forms), lambda: self._close(*(form() for form in forms)), counts_flops=True
        )

    def points(self) -> Part:
        """Clicks; the draws differ, but all are centers of pixels of their masks."""

        def check() -> None:
            found = ours.points(self.bench, self.selected)
            expected = list(zip(*self._plain_points(), strict=True))
            self._close(*([kinds.cpu() for kinds in drawn[1]] for drawn in (found, expected)))
            for clicks in (found, expected):
                for one, places, kinds in zip(self.selected, *clicks, strict=True):
                    height, width = one.content_size
                    x, y = (places.cpu() * torch.tensor([width, height])).long().unbind(-1)
                    row = torch.arange(len(one.labels))[:, None]
                    assert one.labels.masks.cpu()[row, y, x][kinds.cpu() > 0].all()

        draw = Form(lambda: ours.points(self.bench, self.selected))
        return Part(draw, Form(self._plain_points), check)

    def _plain_points(self) -> list:
        return plain_step.points(self.bench, self.selected, self.rng)

    def refinement(self) -> Part:
        """Clicks, choice of SAM's masks and their size, without SAM's passes."""

        def refine_plainly() -> list:
            with self.bench.answers.without_passes():
                return plain_step.refine(self.bench, self.selected, self.rng)

        refine = Form(lambda: ours.refine(self.bench, self.selected))
        return Part(
            refine, Form(refine_plainly), lambda: same_labels(self.refined, refine_plainly())
        )

    def arp(self) -> Part:
        """ARP; each mask of a pair is read and written."""
        bench = self.bench
        forms = [
            lambda step=step: step.exchange(bench, self.images, self.refined)
            for step in (ours, plain_step)
        ]

        def check() -> None:
            (found, labels), (expected, wanted) = (form() for form in forms)
            same_labels(labels, wanted)
            same_pictures(found, expected, 1.0)

        count = len(self.images)
        pairs = max(1, int(bench.cfg.S4M.ARP.PAIR_FRACTION * count)) if count > 1 else 0
        channels = 2 * 2 * bench.case.instances + 3 * 3
        moved = pairs * 2 * bench.size[0] * bench.size[1] * channels
        return Part(*map(Form, forms), check, moved_bytes=moved)

    def strong_view(self) -> Part:
        """The student's images."""
        forms = [
            lambda step=step: step.strong_views(self.bench, self.images)
            for step in (ours, plain_step)
        ]
        return Part(*map(Form, forms), lambda: same_pictures(*(f() for f in forms), LEVELS))

    def distillation(self) -> Part:
        """Structural distillation, from SAM's embeddings on: points, prompts, similarities."""
        bench = self.bench
        channels = bench.cfg.MODEL.SEM_SEG_HEAD.MASK_DIM
        shape = (len(bench.labeled), channels, bench.size[0] // 4, bench.size[1] // 4)
        features = torch.rand(shape, generator=synthetic.generator("mask features"))
        features = features.to(bench.device).requires_grad_()
        losses = bench.distillation, plain.Distillation(bench.distillation)
        forms = [
            lambda loss=loss: ours.distill(bench, loss, self.encoded, features, self.wanted[0])
            for loss in losses
        ]
        return Part(
            *map(Form, forms), lambda: self._close(*(f() for f in forms), atol=0), counts_flops=True
        )

    def student_forward(self) -> Part:
        passes = self._passes()

        def check() -> None:
            with torch.no_grad():
                self._close(*([out["mask_features"] for out in p.forward()] for p in passes))

        return Part(*(Form(p.forward) for p in passes), check, counts_flops=True)

    def losses(self) -> Part:
        passes = self._passes()
        forms = [Form(one.losses, lambda: (self.outputs,)) for one in passes]
        return Part(*forms, lambda: self._close(*(one.losses(self.outputs) for one in passes)))

    def backward(self) -> Part:
        passes = self._passes()

        def check() -> None:
            self._close(*(one.gradient_norm() for one in passes), rtol=5 * self.loose)

        forms = [Form(torch.Tensor.backward, one.graph) for one in passes]
        return Part(*forms, check, counts_flops=True)

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
        forms = [
            lambda matcher=matcher: ours.match(bench, matcher, self.outputs, wanted, self.batches)
            for matcher in (own, plain.Matcher(**vars(own)))
        ]

        def check() -> None:
            found, expected = (torch.cat([q.flatten() for q in form()]) for form in forms)
            assert (found == expected).float().mean() >= SAME_MATCHES

        return Part(*map(Form, forms), check)

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

        def check() -> None:  # gradients of places jump where cells end
            found, expected = run(ours.deformable_sampling()), run(plain.deformable_sampling)
            for index in (0, 1, 3):
                assert_close(found[index], expected[index], rtol=1e-3, atol=1e-3)

        mine = Form(lambda: run(ours.deformable_sampling()))
        return Part(mine, Form(lambda: run(plain.deformable_sampling)), check)

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
        return torch.nn.utils.get_total_norm(
            [p.grad for p in self._bench.student.parameters() if p.grad is not None]
        )


def check_step(bench: Bench) -> None:
    """The losses of a whole step, with the strong view, whose rounding differs, left out."""
    if bench.labeling is not None:
        view, bench.labeling.strong_view = bench.labeling.strong_view, lambda images, _: images
    try:
        with torch.no_grad():
            found = ours.step_losses(bench)
            expected = plain_step.losses(
                bench, np.random.default_rng(0), views=lambda _, images: images
            )
    finally:
        if bench.labeling is not None:
            bench.labeling.strong_view = view
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
        annotations = [
            {
                "category_id": n % bench.num_classes,
                "iscrowd": 0,
                "segmentation": [polygon.ravel().tolist() for polygon in mask_polygons(rle)],
            }
            for n, rle in enumerate(masks)
        ]
        record = {"file_name": str(name), "height": size[0], "width": size[1], "image_id": index}
        records.append({**record, "annotations": annotations})
    return records
