"""Refinement: its prompts and its memory. Which mask is taken: *_reference."""

from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from hand_made import make_selection
from seeds import seeded
from torch import Tensor

from s4m_d2.engine.config_file import load_config
from s4m_d2.sam import EncodedImages, PromptOutput
from s4m_d2.semi.pseudo_labels import MASKS_AT_ONCE
from s4m_d2.semi.refinement import PointRefiner, TeacherMasks, build_refiner

LOW_RES = 8


@dataclass
class FakeBackend:
    """Mask m of a prompt covers the m-th third of the columns; ``ious``: (N, 3) of each image."""

    ious: list[Tensor] = field(default_factory=list)
    prompts: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    mask_prompts: list[Tensor] | None = None
    largest_upscale: int = 0

    def encode(self, images, image_sizes):
        return EncodedImages(images, image_sizes)

    def prompt(self, encoded, points, labels, *, mask_prompts=None):
        self.prompts.extend(zip(points, labels, strict=True))
        self.mask_prompts = mask_prompts
        columns = torch.arange(9) // 3
        outputs = []
        for image, clicks in enumerate(points):
            logits = torch.where(columns == torch.arange(3)[:, None], 5.0, -5.0)
            logits = logits[:, None, :].repeat(len(clicks), 1, LOW_RES, 1).view(-1, 3, LOW_RES, 9)
            outputs.append(PromptOutput(logits, self.ious[image]))
        return outputs

    def upscale(self, mask_logits, image_size):
        self.largest_upscale = max(self.largest_upscale, len(mask_logits))
        return F.interpolate(mask_logits[:, None], image_size, mode="nearest")[:, 0]


def blobs(count: int, size=(6, 9), seed=0) -> Tensor:
    return 3 * torch.randn(count, *size, generator=seeded(seed)) + 0.5


def refine(backend, logits, size, content_size=None, **options):
    selection = make_selection(logits, content_size)
    return PointRefiner(backend=backend, **options)([selection], torch.zeros(1, 3, *size), [size])


def test_many_masks_are_upscaled_in_chunks():
    count = 2 * MASKS_AT_ONCE + 3
    backend = FakeBackend([torch.rand(count, 3, generator=seeded(0))])
    refined = refine(backend, blobs(count), (24, 36))
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
    refiners = [PointRefiner(backend=backend, tries=2) for backend in (together, alone)]
    refiners[0](selections, images, [(24, 36)] * 2, [seeded(5), seeded(6)])
    refiners[1](selections[1:], images[1:], [(24, 36)], [seeded(6)])
    clicks = [points for points, _ in together.prompts[1::2]]  # of both tries
    assert all(map(torch.equal, clicks, [points for points, _ in alone.prompts]))
    assert clicks[0].shape == (2, 3, 2) and not torch.equal(*clicks)


@pytest.mark.parametrize(
    ("prompt", "clicks", "negative"), [("box", 0, 0), ("both", 3, 0), ("both", 3, 1)]
)
def test_boxes_are_around_the_content_and_negative_points_in_the_neighbor(prompt, clicks, negative):
    """Content of 6 x 8.5 px; the second mask reaches its end."""
    logits = torch.full((2, 6, 9), -1.0)
    logits[0, 1:4, 2:6] = logits[1, 5:, 4:] = 1.0
    backend = FakeBackend([torch.rand(2, 3, generator=seeded(0))])
    options = {"prompt": prompt, "negative_points": 2 * negative}  # there is one neighbor
    refine(backend, logits, (24, 34), (6.0, 8.5), **options)
    [(points, labels)] = backend.prompts
    assert labels.tolist() == [[1] * clicks + [2, 3] + [0] * negative] * 2
    corners = [[[2 / 8.5, 1 / 6], [6 / 8.5, 4 / 6]], [[4 / 8.5, 5 / 6], [1.0, 1.0]]]
    torch.testing.assert_close(points[:, clicks : clicks + 2], torch.tensor(corners))
    pixels = (points * torch.tensor([8.5, 6.0])).long().tolist()
    for i, of_mask in enumerate(pixels):
        assert all(logits[i, y, x] > 0 for x, y in of_mask[:clicks])
        assert all(logits[1 - i, y, x] > 0 for x, y in of_mask[clicks + 2 :])


@pytest.mark.parametrize(
    ("scale", "rows", "below"), [((1.0, 43 / 64), 22, 7), ((1.0, 1.0), 32, 11)]
)
def test_the_teachers_logits_lie_in_sams_frame(scale, rows, below):
    """An image of 24 x 36 px in a frame of 64, padded or not, whose masks have 32 x 32.

    Padded, the content has 21.5 rows of 32. The first mask ends after 4 of 9 columns (14.2 of 32),
    the second after 2 of 6 rows (7.2 of 21.5, or 10.7 of 32).
    """
    logits = torch.full((2, 6, 9), -50.0)
    logits[0, :, :4] = logits[1, :2] = 50.0
    backend = FakeBackend([torch.rand(2, 3, generator=seeded(0))])
    backend.grid_side, backend.grid_scale = 8, lambda size: scale
    refine(backend, logits, (24, 36), mask_prompt=True)
    y, x = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    expected = torch.stack([(x < 14) & (y < rows), y < below])
    [of_image] = backend.mask_prompts
    assert torch.equal(of_image > 0, expected)
    assert of_image.amax() == 32 and (of_image[:, rows:] == -32).all()


def test_the_config_selects_the_refiner():
    backend = FakeBackend()
    refiner = build_refiner(load_config("", ["S4M.REFINE.NUM_POINTS", "5"]), backend)
    assert isinstance(refiner, PointRefiner)
    assert refiner.backend is backend and refiner.num_points == 5
    off = load_config("", ["S4M.REFINE.ENABLED", "False"])
    assert isinstance(build_refiner(off, None), TeacherMasks)
