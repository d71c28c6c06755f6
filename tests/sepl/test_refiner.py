"""SEPL as a refiner: which automatic masks redraw which instance, and what is left alone."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from helpers import rle_of
from hypothesis import given, settings
from hypothesis import strategies as st
from literal_enhancement import literal_selection
from torch import Tensor
from toyscapes_scene import render_scene

from s4m_d2.engine.config_file import load_config
from s4m_d2.sam import EncodedImages, build_sam_backend
from s4m_d2.sam.automatic_masks import AutomaticMasks, AutomaticMaskSettings
from s4m_d2.semi import build_refiner
from s4m_d2.semi.pseudo_labels import Selection
from s4m_d2.semi.refinement import FALLBACKS, PREDICTED_IOU
from s4m_d2.sepl.refiner import SEPLRefiner
from s4m_d2.structures import PseudoLabels

INSIDE = 9.0  # logit
SIZES = [(24, 40), (16, 36), (24, 32)]
PADDED = (24, 40)


@dataclass
class Scripted:
    """Backend and automatic masks in one: answers each image, known by its first value."""

    records: dict[int, list[dict]]
    encoded: list[tuple[Tensor, list]] = field(default_factory=list)
    shown: list[tuple[np.ndarray, EncodedImages]] = field(default_factory=list)

    def encode(self, images, image_sizes):
        self.encoded.append((images, list(image_sizes)))
        names = images[:, :1, :1, :1].float()
        return EncodedImages(names, [tuple(size) for size in image_sizes])

    def generate(self, image, encoded=None):
        self.shown.append((image, encoded))
        assert encoded.embeddings.flatten().round().tolist() == [image[0, 0, 0]]
        assert encoded.image_sizes == [image.shape[:2]]
        return self.records.get(int(image[0, 0, 0]), [])


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
    ious = ious or [[0.5] * len(masks) for masks in objects]
    records = [
        [{"segmentation": rle_of(m), "predicted_iou": iou} for m, iou in zip(*of, strict=True)]
        for of in zip(objects, ious, strict=True)
    ]
    script = Scripted(dict(enumerate(records)))
    refiner = SEPLRefiner(backend=script, automatic_masks=script, **options)
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
    stats = {PREDICTED_IOU: 0.8, FALLBACKS: 1 / 3}  # of 0.9, 0.8 and 0.7
    assert {name: float(value) for name, value in refined.stats.items()} == pytest.approx(stats)
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
    total = sum(len(teachers) for teachers, _ in scenes)
    assert refined.stats.get(FALLBACKS, 0) == fallbacks / max(total, 1)


def test_images_are_encoded_once_and_shown_as_they_are_without_padding():
    teachers = [np.ones((1, *size), dtype=bool) for size in SIZES]
    teachers[1] = teachers[1][:0]  # nothing found there
    script = Scripted({})
    images = image_names(3, torch.float32).clone()
    images[2] += 0.4  # a float image; it is rounded
    images[2, 1, 5, 7] = 254.7
    images[2, 2, 5, 7] = 300.0
    selections = [selection_of(masks) for masks in teachers]
    SEPLRefiner(backend=script, automatic_masks=script)(selections, images, SIZES)
    [(encoded, sizes)] = script.encoded
    assert torch.equal(encoded, images[[0, 2]]) and sizes == [SIZES[0], SIZES[2]]
    first, second = (image for image, _ in script.shown)
    assert first.shape == (*SIZES[0], 3) and second.shape == (*SIZES[2], 3)
    assert second[5, 7].tolist() == [2, 255, 255] and second[0, 0].tolist() == [2, 2, 2]


def test_the_config_selects_it_with_its_settings():
    cfg = load_config("", ["S4M.REFINE.METHOD", "sepl"])
    settings = {"POINTS_PER_SIDE": 7, "PRED_IOU_THRESH": 0.6, "STABILITY_SCORE_THRESH": 0.5}
    settings |= {"BOX_NMS_THRESH": 0.4, "MIN_MASK_REGION_AREA": 9}
    cfg.S4M.REFINE.SEPL.update(settings | {"O_S_THRESH": 0.4, "O_P_THRESH": 0.9})
    refiner = build_refiner(cfg, Scripted({}))
    assert isinstance(refiner, SEPLRefiner)
    assert refiner.thresholds == {"o_s_thresh": 0.4, "o_p_thresh": 0.9}
    chosen = refiner.automatic_masks.settings
    assert {key: getattr(chosen, key.lower()) for key in settings} == settings


def refined_scene(device: str):
    """A toyscapes scene, whose true masks the tiny SAM redraws."""
    words = ["S4M.SAM.BACKEND", "tiny_toyscapes", "S4M.SAM.CHECKPOINT", "", "MODEL.DEVICE", device]
    backend = build_sam_backend(load_config("", words))
    few = AutomaticMaskSettings(5, pred_iou_thresh=0.6, stability_score_thresh=0.6)
    refiner = SEPLRefiner(backend=backend, automatic_masks=AutomaticMasks(backend, few))
    scene = render_scene(77, "val", 0, (256, 128))
    ids = np.unique(scene.instance_ids)
    selection = selection_of(scene.instance_ids == ids[ids >= 1000, None, None])
    labels = selection.labels
    labels = PseudoLabels(*(t.to(device) for t in (labels.labels, labels.masks, labels.scores)))
    there = Selection(labels, selection.mask_logits.to(device), selection.content_size, {})
    image = torch.from_numpy(scene.image).permute(2, 0, 1)[None].to(device)
    return refiner([there], image, [(128, 256)])


@pytest.mark.gpu
def test_on_a_gpu_it_is_the_same():
    expected = refined_scene("cpu")
    assert expected.stats[FALLBACKS] < 1
    refined = refined_scene("cuda")
    masks = refined.labels[0].masks
    assert masks.is_cuda and refined.stats[PREDICTED_IOU].is_cuda
    assert (masks.cpu() != expected.labels[0].masks).float().mean() < 1e-2
