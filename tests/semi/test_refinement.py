"""Refinement: where the clicks fall, which of SAM's masks is taken, what it falls back to."""

import math
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from hand_made import make_selection
from seeds import seeded
from torch import Tensor

from s4m_d2.engine.config_file import load_config
from s4m_d2.sam.backend import EncodedImages
from s4m_d2.sam.point_prompts import Frame
from s4m_d2.semi.refinement import (
    MASKS_AT_ONCE,
    PointRefiner,
    TeacherMasks,
    build_refiner,
    teacher_masks,
)

LOW_RES = 8


@dataclass
class FakeOutput:
    mask_logits: Tensor
    iou_predictions: Tensor


@dataclass
class FakeBackend:
    """Mask m of a prompt covers the m-th third of the columns; IoUs are set by the test.

    ``ious`` holds (N, 3) for each encoded image, ``empty`` the masks (image, prompt, m) that are
    empty.
    """

    ious: list[Tensor] = field(default_factory=list)
    empty: set[tuple[int, int, int]] = field(default_factory=set)
    encoded: list[tuple[Tensor, list]] = field(default_factory=list)
    prompts: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    largest_upscale: int = 0

    def encode(self, images, image_sizes):
        assert len(images) == len(image_sizes)
        self.encoded.append((images, list(image_sizes)))
        return images

    def prompt(self, encoded, points, labels, *, multimask=True, masks=True, features=False):
        assert multimask and masks and len(encoded) == len(points) == len(labels)
        self.prompts.extend(zip(points, labels, strict=True))
        columns = torch.arange(9) // 3
        outputs = []
        for image, clicks in enumerate(points):
            logits = torch.where(columns == torch.arange(3)[:, None], 5.0, -5.0)
            logits = logits[:, None, :].repeat(len(clicks), 1, LOW_RES, 1).view(-1, 3, LOW_RES, 9)
            for of_image, prompt, mask in self.empty:
                if of_image == image:
                    logits[prompt, mask] = -5.0
            outputs.append(FakeOutput(logits, self.ious[image]))
        return outputs

    def upscale(self, mask_logits, image_size):
        self.largest_upscale = max(self.largest_upscale, len(mask_logits))
        return F.interpolate(mask_logits[:, None], image_size, mode="nearest")[:, 0]


def blobs(count: int, size=(6, 9), seed=0) -> Tensor:
    return 3 * torch.randn(count, *size, generator=seeded(seed)) + 0.5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("broken", ["iou", "mask"])
def test_the_best_finite_mask_is_taken_and_without_one_the_teachers(broken, value):
    """Prompt 0 loses its best mask, prompt 1 all three."""
    backend = FakeBackend([torch.tensor([[0.1, 0.9, 0.5], [0.8, 0.2, 0.3]])])
    prompt = backend.prompt

    def broken_prompt(*args, **kwargs):
        outputs = prompt(*args, **kwargs)
        for row, masks in ((0, [1]), (1, [0, 1, 2])):
            if broken == "iou":
                outputs[0].iou_predictions[row, masks] = value
            else:
                outputs[0].mask_logits[row, masks, 2, 4] = value
        return outputs

    backend.prompt = broken_prompt
    selection = make_selection(blobs(2))
    refined = PointRefiner(backend=backend)([selection], torch.zeros(1, 3, 24, 36), [(24, 36)])
    last = torch.arange(36) // 12 == 2
    assert torch.equal(refined.labels[0].masks[0], last.expand(24, -1))
    assert torch.equal(refined.labels[0].masks[1], teacher_masks(selection, (24, 36))[1])
    assert refined.num_fallbacks == 1
    assert refined.predicted_ious.tolist() == pytest.approx([0.5, 0.0])


def test_only_images_with_pseudo_labels_are_encoded():
    ious = torch.tensor([[0.1, 0.9, 0.5]])
    backend = FakeBackend([ious, ious.repeat(2, 1)])
    selections = [make_selection(blobs(n)) for n in (0, 1, 0, 2)]
    images = torch.arange(4.0)[:, None, None, None].expand(4, 3, 30, 40)
    sizes = [(24, 36), (30, 40), (12, 40), (18, 27)]
    refined = PointRefiner(backend=backend)(selections, images, sizes)
    [(encoded, encoded_sizes)] = backend.encoded
    assert encoded[:, 0, 0, 0].tolist() == [1.0, 3.0] and encoded_sizes == [sizes[1], sizes[3]]
    assert [len(labels) for labels in refined.labels] == [0, 1, 0, 2]
    assert [labels.image_size for labels in refined.labels] == sizes


def test_many_masks_are_upscaled_in_chunks():
    count = 2 * MASKS_AT_ONCE + 3
    backend = FakeBackend([torch.rand(count, 3, generator=seeded(0))])
    selection = make_selection(blobs(count))
    refined = PointRefiner(backend=backend)([selection], torch.zeros(1, 3, 24, 36), [(24, 36)])
    best = backend.ious[0].argmax(1)
    thirds = torch.arange(36) // 12
    expected = (thirds == best[:, None])[:, None].expand(-1, 24, -1)
    assert torch.equal(refined.labels[0].masks, expected)
    assert backend.largest_upscale == MASKS_AT_ONCE


def test_each_image_draws_from_its_own_generator():
    ious = [torch.rand(2, 3, generator=seeded(0))] * 2
    selections = [make_selection(blobs(2, seed=seed)) for seed in (1, 2)]
    images = torch.zeros(2, 3, 24, 36)
    together, alone = FakeBackend(ious), FakeBackend(ious)
    PointRefiner(backend=together)(selections, images, [(24, 36)] * 2, [seeded(5), seeded(6)])
    PointRefiner(backend=alone)(selections[1:], images[1:], [(24, 36)], [seeded(6)])
    assert torch.equal(together.prompts[1][0], alone.prompts[0][0])
    assert together.prompts[0][0].shape == (2, 3, 2)


@pytest.mark.parametrize(("prompt", "clicks"), [("box", 0), ("both", 3)])
def test_boxes_are_around_the_content(prompt, clicks):
    """Content of 6 x 8.5 px; the second mask reaches its end."""
    logits = torch.full((2, 6, 9), -1.0)
    logits[0, 1:4, 2:6] = logits[1, 5:, 4:] = 1.0
    backend = FakeBackend([torch.rand(2, 3, generator=seeded(0))])
    selection = make_selection(logits, (6.0, 8.5))
    PointRefiner(backend=backend, prompt=prompt)([selection], torch.zeros(1, 3, 24, 34), [(24, 34)])
    [(points, labels)] = backend.prompts
    assert labels.tolist() == [[1] * clicks + [2, 3]] * 2
    corners = [[[2 / 8.5, 1 / 6], [6 / 8.5, 4 / 6]], [[4 / 8.5, 5 / 6], [1.0, 1.0]]]
    torch.testing.assert_close(points[:, clicks:], torch.tensor(corners))
    pixels = (points[:, :clicks] * torch.tensor([8.5, 6.0])).long()
    assert all(logits[i, y, x] > 0 for i in range(2) for x, y in pixels[i].tolist())


def test_negative_points_follow_the_clicks_of_a_mask():
    """Two masks apart, each of them the other's only neighbor."""
    logits = torch.full((2, 6, 9), -1.0)
    logits[0, :3, :3] = logits[1, 3:, 6:] = 1.0
    backend = FakeBackend([torch.rand(2, 3, generator=seeded(0))])
    refiner = PointRefiner(backend=backend, negative_points=2, prompt="both")
    refiner([make_selection(logits)], torch.zeros(1, 3, 6, 9), [(6, 9)])
    [(points, labels)] = backend.prompts
    assert labels.tolist() == [[1, 1, 1, 2, 3, 0]] * 2
    for row, (x, y) in enumerate((points[:, -1] * torch.tensor([9, 6])).long().tolist()):
        assert logits[1 - row, y, x] > 0


def test_of_several_tries_the_answer_rated_best_is_taken():
    ratings = [[[0.1, 0.9, 0.5]] * 2, [[0.95, 0.2, 0.3], [0.8, 0.2, 0.3]]]
    backend = FakeBackend([torch.zeros(2, 3)])
    prompt = backend.prompt

    def rated(*args, **kwargs):
        backend.ious = [torch.tensor(ratings[len(backend.prompts)])]
        return prompt(*args, **kwargs)

    backend.prompt = rated
    refiner = PointRefiner(backend=backend, tries=2)
    refined = refiner(
        [make_selection(blobs(2))], torch.zeros(1, 3, 24, 36), [(24, 36)], [seeded(0)]
    )
    thirds = torch.arange(36).expand(24, 36) // 12
    assert torch.equal(refined.labels[0].masks, torch.stack([thirds == 0, thirds == 1]))
    assert refined.predicted_ious.tolist() == pytest.approx([0.95, 0.9])
    (first, _), (second, _) = backend.prompts
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("padded", "rows", "below"), [(True, 22, 7), (False, 32, 11)])
def test_the_teachers_logits_lie_in_sams_frame(padded, rows, below):
    """An image of 24 x 36 px in a frame of 64, whose masks have 32 x 32.

    Padded, the content has 21.5 rows of 32. The first mask ends after 4 of 9 columns (14.2 of 32),
    the second after 2 of 6 rows (7.2 of 21.5, or 10.7 of 32).
    """
    logits = torch.full((2, 6, 9), -50.0)
    logits[0, :, :4] = logits[1, :2] = 50.0
    frame = Frame(64, torch.zeros(3, 1, 1), torch.ones(3, 1, 1), padded=padded)
    backend = FakeBackend([torch.rand(2, 3, generator=seeded(0))])
    backend.grid_side, backend.grid_scale = 8, frame.scale
    given, prompt = [], backend.prompt

    def recording(encoded, *args, mask_prompts):
        given.extend(mask_prompts)
        return prompt(encoded.embeddings, *args)

    backend.prompt = recording
    backend.encode = lambda images, sizes: EncodedImages(images, sizes)
    refiner = PointRefiner(backend=backend, mask_prompt=True)
    refiner([make_selection(logits)], torch.zeros(1, 3, 24, 36), [(24, 36)])
    y, x = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    expected = torch.stack([(x < 14) & (y < rows), y < below])
    [of_image] = given
    assert torch.equal(of_image > 0, expected)
    assert of_image.amax() == 32 and (of_image[:, rows:] == -32).all()


@pytest.mark.parametrize(("least", "kept"), [(0.0, []), (0.3, [1]), (0.6, [0, 1])])
def test_masks_that_agree_too_little_stay_the_teachers(least, kept):
    """SAM's are the first third; the teacher's the first two (IoU 1/2), and the last (0)."""
    logits = torch.full((2, 6, 9), -1.0)
    logits[0, :, :6] = logits[1, :, 6:] = 1.0
    backend = FakeBackend([torch.tensor([[0.9, 0.1, 0.1]] * 2)])
    refiner = PointRefiner(backend=backend, min_agreement=least)
    refined = refiner([make_selection(logits)], torch.zeros(1, 3, 6, 9), [(6, 9)])
    first = torch.arange(9).expand(6, 9) < 3
    expected = [logits[i] > 0 if i in kept else first for i in range(2)]
    assert torch.equal(refined.labels[0].masks, torch.stack(expected))
    assert refined.num_fallbacks == len(kept)
    of_sam = [math.nan if i in kept else 0.9 for i in range(2)]
    assert refined.labels[0].sam_ious.tolist() == pytest.approx(of_sam, nan_ok=True)
    assert refined.labels[0][1:].sam_ious.isnan().tolist() == [1 in kept]


def test_the_config_selects_the_refiner():
    backend = FakeBackend()
    refiner = build_refiner(load_config("", ["S4M.REFINE.NUM_POINTS", "5"]), backend)
    assert isinstance(refiner, PointRefiner)
    assert refiner.backend is backend and refiner.num_points == 5
    off = load_config("", ["S4M.REFINE.ENABLED", "False"])
    assert isinstance(build_refiner(off, None), TeacherMasks)
