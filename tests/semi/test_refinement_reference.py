"""Refinement against a literal reference: resizing by hand, instance by instance, in double.

SAM's answers are random, its geometry is the real one: low-resolution logits of a square frame,
upscaled to the square, cut to the content and resized to the image.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from seeds import seeded

from s4m_d2.sam import EncodedImages, PromptOutput
from s4m_d2.sam.segment_anything import SegmentAnythingBackend, build_tiny_toyscapes
from s4m_d2.semi.pseudo_labels import Selection, select_pseudo_labels
from s4m_d2.semi.refinement import (
    FALLBACKS,
    PREDICTED_IOU,
    PointRefiner,
    TeacherMasks,
    sample_mask_points,
)
from s4m_d2.structures import PseudoLabels, drop_empty

SIDE, LOW_RES = 256, 64  # the square frame of the tiny SAM and of its mask logits
CANVAS, STRIDE = (72, 80), 4  # the padded batch and the teacher's masks in it
FRAMES = [(72, 80), (72, 72), (40, 40), (37, 80), (72, 31), (13, 17), (5, 6), (2, 41)]
NEAR_ZERO = 1e-4  # closer to the threshold, rounding may choose either side
THRESHOLDS = [0.5, 0.3, 0.8]


class ScriptedBackend(SegmentAnythingBackend):
    """Answers the prompts of each image, in each try, with the given logits and IoUs."""

    tries: list[list[PromptOutput]]

    def encode(self, images, image_sizes):
        self.encoded = images[:, 0, 0, 0].tolist(), list(image_sizes)
        return EncodedImages(torch.zeros(len(images), 1, 1, 1), list(image_sizes))

    def prompt(self, encoded, points, labels=None):
        answers = self.tries.pop(0)
        assert [len(p) for p in points] == [len(answer.mask_logits) for answer in answers]
        return answers


class Instance(NamedTuple):
    """``values`` (H, W) are positive inside the mask; ``iou`` is NaN if it is the teacher's."""

    label: int
    score: float
    values: np.ndarray
    iou: float = math.nan


class Expected(NamedTuple):
    """``margin``: how far the decision whether a mask is empty is from the other one."""

    instances: list[Instance]
    ious: list[float]
    fallbacks: int
    margin: float


@cache
def reading(length, pixels, extent):
    """(length, pixels) weights that resize the first ``extent`` of ``pixels`` to ``length``.

    Centers lie at i + 0.5; a read beyond the outermost center repeats it.
    """
    weights = np.zeros((length, pixels))
    for i in range(length):
        position = min(max((i + 0.5) * extent / length - 0.5, 0.0), pixels - 1.0)
        before = math.floor(position)
        after = min(before + 1, pixels - 1)
        weights[i, before] += 1 - (position - before)
        weights[i, after] += position - before
    return weights


def resize(logits, size, extent):
    rows, columns = (
        reading(*axis) for axis in zip(size, logits.shape, map(float, extent), strict=True)
    )
    return rows @ logits @ columns.T


def upscale_sam(logits, size):
    """SAM's rule: the long side of the image fills the square."""
    square = resize(logits, (SIDE, SIDE), logits.shape)
    scale = SIDE / max(size)
    height, width = (int(side * scale + 0.5) for side in size)
    content = square[:height, :width]
    return resize(content, size, content.shape)


def logit(probability):
    return math.log(probability / (1 - probability))


def teacher_values(selection, size, thresh):
    """For each instance, logits at image size minus the threshold's."""
    return [
        resize(logits.double().numpy(), size, selection.content_size) - logit(thresh)
        for logits in selection.mask_logits
    ]


def refine_literally(selection, tries, size, thresh, least):
    """``tries``: SAM's answers, with a row for each instance, or none. ``least``: agreement."""
    instances, ious, fallbacks, margin = [], [], 0, math.inf
    for index, teacher in enumerate(teacher_values(selection, size, thresh)):
        best, values = 0.0, np.full(size, -math.inf)
        for answer in tries:
            for logits, iou in zip(
                answer.mask_logits[index], answer.iou_predictions[index].tolist(), strict=True
            ):
                if logits.isfinite().all() and best < iou < math.inf:
                    best, values = iou, upscale_sam(logits.double().numpy(), size)
        ious.append(best)
        shared = ((values > 0) & (teacher > 0)).sum()
        short = least * ((values > 0) | (teacher > 0)).sum() - shared
        unsure = (np.minimum(abs(values), abs(teacher)) < NEAR_ZERO).sum()
        margin = min(margin, abs(values.max()), abs(short) - unsure if least else math.inf)
        if not (values > 0).any() or (least and short > 0):
            values, best, fallbacks = teacher, math.nan, fallbacks + 1
            margin = min(margin, abs(values.max()))
        if (values > 0).any():
            label, score = selection.labels.labels[index], selection.labels.scores[index]
            instances.append(Instance(int(label), float(score), values, best))
    return Expected(instances, ious, fallbacks, margin)


def smooth(count, size, generator):
    """Logits with blobs of either sign; a third of the maps have hardly a positive pixel."""
    coarse = 4 * torch.randn(count, 1, 4, 5, generator=generator)
    coarse -= 11.0 * (torch.rand(count, 1, 1, 1, generator=generator) < 0.35)
    return F.interpolate(coarse, size, mode="bilinear", align_corners=False)[:, 0]


def random_selection(size, seed, thresh):
    """The content of a padded prediction; some of its masks have no pixel."""
    generator = seeded(seed)
    queries = int(torch.randint(0, 6, (), generator=generator))
    class_logits = torch.full((queries, 4), -8.0)
    classes = torch.randint(0, 3, (queries,), generator=generator)
    class_logits[torch.arange(queries), classes] = torch.rand(queries, generator=generator)
    [selection] = select_pseudo_labels(
        [class_logits],
        [smooth(queries, (CANVAS[0] // STRIDE, CANVAS[1] // STRIDE), generator)],
        content_sizes=[(size[0] / STRIDE, size[1] / STRIDE)],
        score_thresh=0.7,
        min_area=0.0,
        mask_thresh=thresh,
    )
    return selection


def random_answer(selection, seed, broken):
    """Some of the IoUs, and of the masks one pixel, are ``broken``."""
    generator, count = seeded(seed), len(selection.labels)
    logits = smooth(3 * count, (LOW_RES, LOW_RES), generator).view(count, 3, LOW_RES, LOW_RES)
    ious, *draws = torch.rand(3, count, 3, generator=generator)
    if broken != 0:
        ious[draws[0] < 0.3] = broken
        logits[..., 5, 7][draws[1] < 0.3] = broken
    return PromptOutput(logits, ious)


def assert_same_instances(labels, expected):
    assert labels.labels.tolist() == [instance.label for instance in expected]
    assert labels.scores.tolist() == [instance.score for instance in expected]
    if expected and labels.sam_ious is not None:
        assert labels.sam_ious.tolist() == pytest.approx([i.iou for i in expected], nan_ok=True)
    for mask, instance in zip(labels.masks, expected, strict=True):
        sure = np.abs(instance.values) > NEAR_ZERO
        np.testing.assert_array_equal(mask.numpy()[sure], (instance.values > 0)[sure])


@pytest.fixture(scope="module")
def backend():
    return ScriptedBackend(build_tiny_toyscapes())


@settings(max_examples=60)
@given(
    sizes=st.lists(st.sampled_from(FRAMES), min_size=1, max_size=3),
    seed=st.integers(0, 10**6),
    thresh=st.sampled_from(THRESHOLDS),
    broken=st.sampled_from([0.0, math.nan, math.inf]),
    least=st.sampled_from([0.0, 0.3, 0.6]),
    tries=st.integers(1, 2),
)
def test_a_batch_equals_the_rules_applied_instance_by_instance(
    backend, sizes, seed, thresh, broken, least, tries
):
    selections = [random_selection(size, seed + i, thresh) for i, size in enumerate(sizes)]
    active = [i for i, selection in enumerate(selections) if len(selection.labels)]
    answers = [
        [random_answer(selection, seed + 9 * k + i, broken) for k in range(1, tries + 1)]
        for i, selection in enumerate(selections)
    ]
    expected = [
        refine_literally(*of_image, thresh, least)
        for of_image in zip(selections, answers, sizes, strict=True)
    ]
    of_teacher = [teacher_values(*pair, thresh) for pair in zip(selections, sizes, strict=True)]
    largest = [abs(values.max()) for of_image in of_teacher for values in of_image]
    assume(min([*largest, *(of_image.margin for of_image in expected)]) > NEAR_ZERO)
    backend.tries = [[answers[i][k] for i in active] for k in range(tries)]
    options = {"min_agreement": least, "tries": tries}
    images = torch.arange(len(sizes)).view(-1, 1, 1, 1).expand(-1, 3, *CANVAS)
    refined = PointRefiner(backend=backend, **options)(selections, images, sizes)
    if active:
        assert backend.encoded == (active, [sizes[i] for i in active])
    for labels, size, of_image in zip(drop_empty(refined.labels), sizes, expected, strict=True):
        assert labels.image_size == size
        assert_same_instances(labels, of_image.instances)
    ious = sum((of_image.ious for of_image in expected), [])
    fallbacks = sum(of_image.fallbacks for of_image in expected)
    stats = {PREDICTED_IOU: np.mean(ious), FALLBACKS: fallbacks / len(ious)} if ious else {}
    assert {name: float(value) for name, value in refined.stats.items()} == pytest.approx(stats)

    plain = TeacherMasks()(selections, images, sizes)
    for labels, selection, values in zip(
        drop_empty(plain.labels), selections, of_teacher, strict=True
    ):
        before = selection.labels.labels.tolist(), selection.labels.scores.tolist()
        rows = map(Instance, *before, values)
        assert_same_instances(labels, [row for row in rows if (row.values > 0).any()])


def test_an_instance_that_neither_sam_nor_the_teacher_has_at_image_size_is_dropped(backend):
    """A pixel barely inside, between pixels far outside, is interpolated away."""
    masks = torch.full((3, 8, 10), -6.0)
    masks[0, 2:5, 3:7] = masks[2, 5:7, 1:4] = 6.0
    masks[1, 4, 4] = 0.1
    scores = torch.tensor([0.9, 0.8, 0.7])
    selection = Selection(PseudoLabels(torch.arange(3), masks > 0, scores), masks, (8.0, 10.0), {})
    logits = torch.full((3, 3, LOW_RES, LOW_RES), -1.0)
    logits[2, 1, 20:40, 10:30] = 1.0
    backend.tries = [[PromptOutput(logits, torch.tensor([[0.1, 0.9, 0.2]] * 3))]]
    refined = PointRefiner(backend=backend)([selection], torch.zeros(1, 3, 32, 40), [(32, 40)])
    assert refined.stats[FALLBACKS] == 2 / 3
    [labels] = drop_empty(refined.labels)
    assert labels.labels.tolist() == [0, 2]
    assert torch.equal(labels.scores, scores[[0, 2]])
    assert labels.masks[0, 15, 19] and not labels.masks[1, 15, 19], "the teacher's; SAM's"


@settings(max_examples=40)
@given(
    size=st.sampled_from(FRAMES),
    seed=st.integers(0, 10**6),
    thresh=st.sampled_from(THRESHOLDS),
    count=st.integers(1, 7),
)
def test_clicks_are_distinct_pixels_of_the_mask_at_their_place_in_the_image(
    size, seed, thresh, count
):
    """In the image the centers of the prediction's pixels are STRIDE px apart, padding or not.

    One that lies beyond the content, which may end inside a pixel, moves onto its border.
    """
    selection = random_selection(size, seed, thresh)
    clicks, positive = sample_mask_points(selection, count, seeded(seed))
    assert clicks.shape == (*positive.shape, 2) == (len(selection.labels), count, 2)
    for mask, points, flags in zip(selection.labels.masks, clicks, positive, strict=True):
        centers = {
            (min(STRIDE * x + STRIDE // 2, size[1]), min(STRIDE * y + STRIDE // 2, size[0]))
            for y, x in mask.nonzero().tolist()
        }
        clicked = points[flags == 1] * torch.tensor(size[::-1])
        torch.testing.assert_close(clicked, clicked.round(), rtol=0, atol=1e-3)
        distinct = set(map(tuple, clicked.round().long().tolist()))
        assert distinct <= centers and set(flags.tolist()) <= {1, -1}
        assert len(distinct) == len(clicked) == min(count, len(centers))
