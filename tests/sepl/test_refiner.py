"""SEPL as a refiner: which automatic masks redraw which instance, and what is left alone."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from literal_enhancement import literal_selection
from sepl_folders import rle_of
from torch import Tensor

from s4m_d2.engine.config_file import load_config
from s4m_d2.semi import build_refiner
from s4m_d2.semi.pseudo_labels import Selection
from s4m_d2.sepl.refiner import SEPLRefiner
from s4m_d2.structures import PseudoLabels

INSIDE = 9.0  # logit
SIZES = [(24, 40), (16, 36), (24, 32)]
PADDED = (24, 40)


@dataclass
class Scripted:
    """Automatic masks of each image, known by its first value."""

    records: dict[int, list[dict]]
    shown: list[np.ndarray] = field(default_factory=list)

    def generate(self, image):
        self.shown.append(image)
        return self.records.get(int(image[0, 0, 0]), [])


def records_of(masks: np.ndarray, ious=None) -> list[dict]:
    """As SAM's generator gives them: compressed, with str counts."""
    ious = [0.5] * len(masks) if ious is None else ious
    pairs = zip(masks, ious, strict=True)
    return [{"segmentation": rle_of(mask), "predicted_iou": iou} for mask, iou in pairs]


def selection_of(masks: np.ndarray) -> Selection:
    """Teacher's masks at image size, so that resizing changes nothing."""
    logits = torch.where(torch.as_tensor(masks), INSIDE, -INSIDE)
    count = len(masks)
    labels = PseudoLabels(torch.arange(count) + 3, logits > 0, torch.linspace(0.7, 1.0, count))
    return Selection(labels, logits, tuple(map(float, masks.shape[1:])), {"kept": count})


def image_names(count: int, dtype=torch.uint8) -> Tensor:
    return torch.arange(count)[:, None, None, None].expand(count, 3, *PADDED).to(dtype)


def refine(teachers: list[np.ndarray], objects: list[np.ndarray], sizes=None, ious=None, **options):
    """Refinement of images with such masks."""
    sizes = sizes or [masks.shape[1:] for masks in teachers]
    script = Scripted(
        {i: records_of(m, None if ious is None else ious[i]) for i, m in enumerate(objects)}
    )
    refiner = SEPLRefiner(automatic_masks=script, **options)
    selections = [selection_of(masks) for masks in teachers]
    return refiner(selections, image_names(len(teachers)), sizes), script


def row(*spans: tuple[int, int], width=20) -> np.ndarray:
    """(N, 1, W) bool: masks from ``start`` to before ``end``."""
    columns = np.arange(width)
    masks = [(start <= columns) & (columns < end) for start, end in spans]
    return np.array(masks, dtype=bool).reshape(-1, 1, width)


def test_classes_and_scores_stay_and_the_predicted_ious_are_of_the_selected_masks():
    teachers = [row((0, 5), (10, 15)), row(), row((3, 9))]
    objects = [row((0, 6), (16, 19), (9, 15), (1, 5)), row((0, 9)), row((15, 18))]
    ious = [[0.9, 0.1, 0.8, 0.7], [0.2], [0.3]]
    refined, script = refine(teachers, objects, ious=ious)
    for masks, labels in zip(teachers, refined.labels, strict=True):
        before = selection_of(masks).labels
        assert torch.equal(labels.labels, before.labels)
        assert torch.equal(labels.scores, before.scores)
    assert refined.predicted_ious.tolist() == pytest.approx([0.9, 0.8, 0.7])
    assert (refined.num_fallbacks, refined.num_instances) == (1, 3)
    assert len(script.shown) == 2, "the image without pseudo-labels was segmented"


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    counts=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 9)), min_size=1, max_size=3),
    o_s=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    o_p=st.sampled_from([0.2, 0.85, 1.0]),
)
def test_it_is_the_literal_double_loop(seed, counts, o_s, o_p):
    rng, sizes = np.random.default_rng(seed), SIZES[: len(counts)]

    def some(count, size):
        """Parts of a grid of 4 x 4 pixels, which may overlap, none empty."""
        coarse = rng.random((count, size[0] // 4, size[1] // 4)) < rng.random((count, 1, 1))
        coarse[:, 0, 0] |= ~coarse.any((1, 2))
        return coarse.repeat(4, axis=1).repeat(4, axis=2)

    scenes = [[some(n, size) for n in of] for of, size in zip(counts, sizes, strict=True)]
    refined, _ = refine(*zip(*scenes, strict=True), sizes, o_s_thresh=o_s, o_p_thresh=o_p)
    fallbacks = 0
    for labels, (teachers, objects) in zip(refined.labels, scenes, strict=True):
        expected = teachers.copy()
        selected = literal_selection(teachers, objects, o_s, o_p)
        for index in {best for _, best, _ in selected}:
            expected[index] = np.any([mask for mask, best, _ in selected if best == index], axis=0)
        fallbacks += len(teachers) - len({best for _, best, _ in selected})
        assert np.array_equal(labels.masks.numpy(), expected)
    assert refined.num_fallbacks == fallbacks
    assert refined.num_instances == sum(len(teachers) for teachers, _ in scenes)


def test_images_are_shown_as_they_are_without_padding():
    teachers = [np.ones((1, *size), dtype=bool) for size in SIZES]
    teachers[1] = teachers[1][:0]  # nothing found there
    script = Scripted({})
    images = image_names(3, torch.float32).clone()
    images[2] += 0.4  # a float image; it is rounded
    images[2, 1, 5, 7] = 254.7
    images[2, 2, 5, 7] = 300.0
    SEPLRefiner(automatic_masks=script)([selection_of(masks) for masks in teachers], images, SIZES)
    first, second = script.shown
    assert first.shape == (*SIZES[0], 3) and second.shape == (*SIZES[2], 3)
    assert second[5, 7].tolist() == [2, 255, 255] and second[0, 0].tolist() == [2, 2, 2]


def test_the_config_selects_it_with_its_settings():
    cfg = load_config("", ["S4M.REFINE.METHOD", "sepl", "S4M.PSEUDO_LABEL.MASK_THRESH", "0.8"])
    settings = {"POINTS_PER_SIDE": 7, "PRED_IOU_THRESH": 0.6, "STABILITY_SCORE_THRESH": 0.5}
    settings |= {"BOX_NMS_THRESH": 0.4, "MIN_MASK_REGION_AREA": 9}
    cfg.S4M.REFINE.SEPL.update(settings | {"O_S_THRESH": 0.4, "O_P_THRESH": 0.9})
    refiner = build_refiner(cfg, SimpleNamespace(image_side=64))
    assert isinstance(refiner, SEPLRefiner)
    assert refiner.thresholds == {"o_s_thresh": 0.4, "o_p_thresh": 0.9}
    assert refiner.logit_thresh == pytest.approx(np.log(4))
    chosen = refiner.automatic_masks.settings
    assert {key: getattr(chosen, key.lower()) for key in settings} == settings


@pytest.mark.gpu
def test_on_a_gpu_it_is_the_same():
    teachers, objects = row((0, 5), (10, 15), (17, 19)), row((0, 6), (9, 16), (9, 12))
    refined, script = refine([teachers], [objects])
    selection = selection_of(teachers)
    labels = PseudoLabels(
        *(getattr(selection.labels, n).cuda() for n in ("labels", "masks", "scores"))
    )
    there = Selection(labels, selection.mask_logits.cuda(), selection.content_size, {})
    found = SEPLRefiner(automatic_masks=script)([there], image_names(1).cuda(), [(1, 20)])
    assert found.labels[0].masks.is_cuda and found.predicted_ious.is_cuda
    assert torch.equal(found.labels[0].masks.cpu(), refined.labels[0].masks)
    assert found.num_fallbacks == refined.num_fallbacks == 1
