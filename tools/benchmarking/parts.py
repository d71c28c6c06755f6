"""The parts of a step: what each does, in our form and, where there is one, in the plain form."""

import contextlib
import copy
import itertools
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.testing import assert_close

from benchmarking import ours, plain, synthetic
from benchmarking.bench import Bench, OneByOne
from benchmarking.timing import Form
from s4m_d2.data import DATASET_MAPPER_REGISTRY
from s4m_d2.engine.rng import sample_seeds
from s4m_d2.layers import cell_centers, ms_deform_attn
from s4m_d2.modeling.meta_arch import prepare_target
from s4m_d2.semi.ema_teacher import TeacherPhase
from s4m_d2.structures import sample_generators

#: Parts that are inside another one and so do not count again in the sum of a step.
INSIDE = {"points": "refinement", "matching": "losses", "deformable attention": "student forward"}
#: The method's own operations, whose plain forms the project promises to beat.
METHOD_PARTS = ("points", "arp", "ema")
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
        self.bench, self.rgb = bench, bench.rgb
        self.rng = np.random.default_rng(0)
        self.images = [sample["image"].to(bench.device) for sample in bench.unlabeled]
        self.loose = 5e-2 if bench.half else 2e-3
        # In which the models are ours, and have plain deformable attention and matching.
        self.models = contextlib.nullcontext, partial(plain.plain_model, bench)

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
        return self._encode(self.bench.sam)

    @cached_property
    def batches(self) -> list[list[dict]]:
        """The student's: labeled samples, and unlabeled ones with instances."""
        bench = self.bench
        shapes = (len(bench.unlabeled), bench.size, bench.case.instances, bench.num_classes)
        others = synthetic.samples("labeled", *shapes)
        samples = zip(bench.unlabeled, self.images, others, strict=True)
        given = [{**s, "image": image, "instances": o["instances"]} for s, image, o in samples]
        return [bench.labeled, given] if bench.stage == 2 else [bench.labeled]

    @cached_property
    def wanted(self) -> list[list[dict]]:
        """The criterion's targets."""
        about = self.bench.size, self.bench.device
        return [[prepare_target(x, *about) for x in batch] for batch in self.batches]

    @cached_property
    @torch.no_grad()
    def outputs(self) -> list[dict]:
        return ours.student_outputs(self.bench, self.batches)

    def data(self) -> Part:
        """One batch of a step, in one process; workers load it while another step runs."""
        cfg, case = self.bench.cfg, self.bench.case
        mappers = {"labeled": cfg.INPUT.DATASET_MAPPER_NAME}
        if self.bench.stage == 2:
            mappers["unlabeled"] = cfg.S4M.UNLABELED_MAPPER
        mappers = {k: DATASET_MAPPER_REGISTRY.get(name)(cfg, True) for k, name in mappers.items()}
        folder = tempfile.TemporaryDirectory()
        shown = case.raw_size, case.instances, self.bench.num_classes
        records = synthetic.write_images(Path(folder.name), *shown)
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
        updates = (
            Form(lambda: teacher.step(student, TeacherPhase.EMA)),
            Form(lambda: plain.update_teacher(teacher.model, student, teacher.decay)),
        )

        def same(*_) -> None:
            model, found = teacher.model, []
            start = copy.deepcopy(model.state_dict())
            for update in updates:
                model.load_state_dict(start)
                with torch.no_grad():
                    for tensor in model.parameters():
                        tensor.add_(1.0)  # else the teacher is the student, and nothing would move
                update()
                found.append(copy.deepcopy(model.state_dict()))
            model.load_state_dict(start)
            assert_close(*found, rtol=1e-5, atol=1e-6)

        return Part(*updates, same, moved_bytes=3 * size_of(student.parameters()))

    def teacher(self) -> Part:
        """The teacher's pass; the plain one with plain deformable attention."""

        def predict(model: Callable) -> dict:
            with model():
                return self.bench.predictions()

        return Part(*pair(predict, *self.models), counts_flops=True)

    def selection(self) -> Part:
        return Part(Form(lambda: self.bench.labeling.select(self.predicted)))

    def sam_encode(self) -> Part:
        """SAM's encoder: the batch together, and image by image."""
        forms = pair(self._encode, self.bench.sam, OneByOne(self.bench.sam))
        return Part(*forms, lambda a, b: self._close(a.embeddings, b.embeddings), counts_flops=True)

    def sam_prompts(self) -> Part:
        """SAM's answers to the clicks of all images together, and image by image."""
        bench, drawn = self.bench, ours.points(self.bench, self.selected)

        @torch.no_grad()
        def prompt(backend) -> list[Tensor]:
            with bench.autocast():
                return [output.mask_logits for output in backend.prompt(self.encoded, *drawn)]

        return Part(*pair(prompt, bench.sam, OneByOne(bench.sam)), self._close, counts_flops=True)

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
        draw_plainly = Form(lambda: plain.points(self.bench, self.selected, self.rng))
        return Part(draw, draw_plainly, same)

    def refinement(self) -> Part:
        """Clicks, choice of SAM's masks and their size, without SAM's passes."""

        def refine_plainly() -> list:
            with patch.object(self.bench.answers, "passes", False):
                return plain.refine(self.bench, self.selected, self.rng)

        refine = Form(lambda: ours.refine(self.bench, self.selected))
        return Part(refine, Form(refine_plainly), same_labels)

    def arp(self) -> Part:
        """ARP; each mask of a pair is read and written."""
        bench, count = self.bench, len(self.images)

        def same(found: tuple, expected: tuple) -> None:
            same_labels(found[1], expected[1])
            same_pictures(found[0], expected[0], 1.0)

        pairs = max(1, int(bench.cfg.S4M.ARP.PAIR_FRACTION * count)) if count > 1 else 0
        channels = 2 * 2 * bench.case.instances + 3 * 3
        moved = pairs * 2 * bench.size[0] * bench.size[1] * channels
        forms = pair(lambda of: of.exchange(bench, self.images, self.refined), ours, plain)
        return Part(*forms, same, moved_bytes=moved)

    def strong_view(self) -> Part:
        """The student's images."""
        forms = pair(lambda of: of.strong_views(self.bench, self.images), ours, plain)
        return Part(*forms, lambda found, expected: same_pictures(found, expected, LEVELS))

    def distillation(self) -> Part:
        """Structural distillation, from SAM's embeddings on: points, prompts, similarities."""
        bench = self.bench
        channels = bench.cfg.MODEL.SEM_SEG_HEAD.MASK_DIM
        shape = (len(bench.labeled), channels, bench.size[0] // 4, bench.size[1] // 4)
        features = torch.rand(shape, generator=synthetic.generator("mask features"))
        features = features.to(bench.device).requires_grad_()
        masks, encoded = [target["masks"] for target in self.wanted[0]], self.encoded

        def distill(loss: Callable) -> Tensor:
            generators = sample_generators(bench.labeled, "prompt_points", bench.device)
            with patch.object(bench.sam, "encode", lambda *_: encoded), bench.autocast():
                return loss(features, self.rgb, bench.sizes, masks, generators)["loss_sd"]

        losses = bench.distillation, partial(plain.distillation, bench.distillation)
        return Part(*pair(distill, *losses), partial(self._close, atol=0), counts_flops=True)

    def student_forward(self) -> Part:
        def same(*outputs: list[dict]) -> None:
            self._close(*([output["mask_features"] for output in form] for form in outputs))

        return Part(*pair(self._forward, *self.models), same, counts_flops=True)

    def losses(self) -> Part:
        return Part(*pair(partial(self._losses, self.outputs), *self.models), self._close)

    def backward(self) -> Part:
        forms = [Form(Tensor.backward, partial(self._graph, model)) for model in self.models]

        def same(*_) -> None:
            self._close(*map(self._gradient_norm, forms), rtol=5 * self.loose)

        return Part(*forms, same, counts_flops=True)

    def optimizer(self) -> Part:
        """Clipping and update: reads the gradients twice and writes them; then four and three."""
        optimizer = self.bench.optimizer
        tensors = [p for group in optimizer.param_groups for p in group["params"]]

        def gradients() -> tuple:
            if all(parameter.grad is None for parameter in tensors):
                self._graph(self.models[0])[0].backward()
            return ()

        return Part(Form(lambda: optimizer.step(), gradients), moved_bytes=10 * size_of(tensors))

    def matching(self) -> Part:
        """The assignments of all layers and images of a step: (L, M) matched queries of each."""
        wanted = [[{**t, "masks": t["masks"].float()} for t in batch] for batch in self.wanted]
        own = self.bench.student.criterion.matcher

        def same(*queries: list[Tensor]) -> None:
            found, expected = (torch.cat([q.flatten() for q in of_form]) for of_form in queries)
            assert (found == expected).float().mean() >= SAME_MATCHES

        def match(matcher: Callable) -> list[Tensor]:
            found = []
            for output, targets, batch in zip(self.outputs, wanted, self.batches, strict=True):
                draws = sample_generators(batch, "loss_points", self.bench.device)
                found += matcher([output, *output["aux_outputs"]], targets, draws)
            return [torch.from_numpy(image.queries) for image in found]

        return Part(*pair(match, own, plain.Matcher(**vars(own))), same)

    def deformable_attention(self) -> Part:
        """Forward and backward of one layer of the pixel decoder's look-ups, for one batch."""
        head, size, device = self.bench.cfg.MODEL.SEM_SEG_HEAD, self.bench.size, self.bench.device
        heads = head.DEFORMABLE_TRANSFORMER_ENCODER_N_HEADS
        points = head.DEFORMABLE_TRANSFORMER_ENCODER_N_POINTS
        levels = [(size[0] // stride, size[1] // stride) for stride in (32, 16, 8)]
        cells = sum(height * width for height, width in levels)
        draws = synthetic.generator("deformable attention")

        def random(*shape: int) -> Tensor:
            shape = len(self.bench.labeled), cells, heads, *shape
            return torch.rand(shape, generator=draws).to(device)

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

    @torch.no_grad()
    def _encode(self, backend):
        with self.bench.autocast():
            return backend.encode(self.rgb, self.bench.sizes)

    def _forward(self, model: Callable) -> list[dict]:
        """The student's outputs of each batch, with their graph."""
        with model():
            return ours.student_outputs(self.bench, self.batches)

    def _losses(self, outputs: Sequence[dict], model: Callable) -> Tensor:
        """The sum of all losses but the distillation's."""
        total, weights = 0.0, (1.0, self.bench.cfg.S4M.UNSUP_LOSS_WEIGHT)
        parts = zip(outputs, self.wanted, self.batches, weights, strict=False)
        with model():
            for output, targets, batch, weight in parts:
                draws = sample_generators(batch, "loss_points", self.bench.device)
                found = self.bench.student.criterion(output, targets, draws)
                total = total + weight * sum(found.values())
        return total

    def _graph(self, model: Callable) -> tuple[Tensor]:
        """The losses, ready for a backward pass."""
        self.bench.optimizer.zero_grad()
        return (self._losses(self._forward(model), model),)

    def _gradient_norm(self, backward: Form) -> Tensor:
        """Of all parameters together, after one pass."""
        backward()
        gradients = [p.grad for p in self.bench.student.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

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


def check_step(bench: Bench) -> None:
    """The losses of a whole step, with the strong view, whose rounding differs, left out."""
    keep = contextlib.nullcontext()
    if bench.labeling is not None:
        keep = patch.object(bench.labeling, "strong_view", lambda images, _: images)
    with torch.no_grad(), keep:
        found = ours.losses(bench)
        expected = plain.losses(bench, np.random.default_rng(0), views=lambda _, images: images)
    tolerance = 0.1 if bench.half else 5e-3
    assert_close(found, expected, rtol=tolerance, atol=tolerance)


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


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
