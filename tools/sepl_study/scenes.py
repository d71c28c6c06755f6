"""Toyscapes scenes for the study, and masks of them: exact ones, the tiny SAM's, bad ones."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from cam_like import FAILURES, cam_label
from make_cam_labels import class_map, label_generator
from make_toyscapes import GENERATOR_VERSION
from toyscapes_scene import INSTANCES_PER_LABEL, render_scene
from tqdm import tqdm

from s4m_d2.sam.automatic_masks import AutomaticMasks, AutomaticMaskSettings
from s4m_d2.sam.checkpoint import load_sam
from s4m_d2.sam.segment_anything import (
    TOYSCAPES_WEIGHTS,
    SegmentAnythingBackend,
    build_tiny_toyscapes,
)
from s4m_d2.sepl.files import kept_masks

STUDY_STRENGTH = 0.5  # mIoU 50 to 60, as published CAM labels of VOC have
SPLIT = "evidence"  # no data set's split: the quickstart's scenes are others, whatever the seed
# Chosen by the gain on 24 scenes of seed 100. SAM's defaults suit ViT-H, which rates itself higher:
# they leave the tiny SAM one mask per image.
TINY_SAM_SETTINGS = AutomaticMaskSettings(
    points_per_side=16, pred_iou_thresh=0.6, stability_score_thresh=0.7
)
TOUCH_KERNEL = 5  # px: a gap up to half of it counts as touching
MIN_INSTANCE_AREA = 100  # px: smaller ones do not count in the recall
MIN_REGION_AREA = 50  # px, of a background region


@dataclass(frozen=True)
class StudyScene:
    """A picture, its class map, and Cityscapes' instanceIds."""

    name: str
    image: np.ndarray  # (H, W, 3) uint8 RGB
    truth: np.ndarray  # (H, W) uint8
    instance_ids: np.ndarray  # (H, W) uint16

    def cam_label(self, seed: int, strength=STUDY_STRENGTH, failures=FAILURES) -> np.ndarray:
        """(H, W) uint8 CAM-like label."""
        rng = label_generator(seed, self.name)
        return cam_label(self.truth, rng, strength, instances=self.instance_ids, failures=failures)


def render_scenes(seed: int, count: int) -> list[StudyScene]:
    """Scenes 0..count-1 of a seed."""
    scenes = [render_scene(seed, SPLIT, index) for index in range(count)]
    return [
        StudyScene(f"{index:04d}", scene.image, class_map(scene.instance_ids), scene.instance_ids)
        for index, scene in enumerate(scenes)
    ]


def tiny_sam() -> AutomaticMasks:
    """The packaged tiny SAM with the study's settings, on the CPU."""
    sam = load_sam(build_tiny_toyscapes, TOYSCAPES_WEIGHTS, "tiny_toyscapes")
    return AutomaticMasks(SegmentAnythingBackend(sam), TINY_SAM_SETTINGS)


def sam_masks(
    scenes: list[StudyScene], generator: AutomaticMasks, folder: Path
) -> list[list[dict]]:
    """COCO RLEs of each scene's automatic masks, kept in ``folder`` and taken from there."""
    version = f"{generator.fingerprint()} toyscapes {GENERATOR_VERSION}"
    found = []
    for scene in tqdm(scenes, desc="SAM's masks", unit="image"):
        path, generate = folder / f"{scene.name}.json.gz", partial(generator.generate, scene.image)
        found.append(kept_masks(path, scene.truth.shape, version, generate))
    return found


def exact_masks(scene: StudyScene) -> np.ndarray:
    """(N, H, W) bool, one per visible instance."""
    ids = np.unique(scene.instance_ids)
    return scene.instance_ids == ids[ids >= INSTANCES_PER_LABEL][:, None, None]


def fused_masks(scene: StudyScene, share: float, seed: int) -> np.ndarray:
    """Exact masks, of which a share of the pairs that touch and differ in class are fused into one.

    Each pair is drawn for itself; a larger share has those of a smaller one.
    """
    masks = exact_masks(scene)
    draws = label_generator(seed, f"fused {scene.name}").random((len(masks), len(masks)))
    classes = [int(scene.truth[mask][0]) for mask in masks]
    kernel = np.ones((TOUCH_KERNEL, TOUCH_KERNEL), np.uint8)
    group = np.arange(len(masks))
    for i, mask in enumerate(masks):
        grown = cv2.dilate(mask.astype(np.uint8), kernel).astype(bool)
        for j in range(i + 1, len(masks)):
            touches = classes[i] != classes[j] and (grown & masks[j]).any()
            if touches and draws[i, j] < share:
                group[group == group[j]] = group[i]
    fused = [masks[group == number].any(0) for number in np.unique(group)]
    return np.array(fused, dtype=bool).reshape(-1, *scene.truth.shape)


def background_masks(scene: StudyScene) -> np.ndarray:
    """(N, H, W) bool: connected regions of the road, of buildings, of the sky, ..."""
    regions, ids = [], scene.instance_ids
    for index in np.unique(ids[ids < INSTANCES_PER_LABEL]):
        count, parts = cv2.connectedComponents((ids == index).astype(np.uint8), connectivity=4)
        regions += [parts == part for part in range(1, count)]
    regions = [region for region in regions if region.sum() >= MIN_REGION_AREA]
    return np.array(regions, dtype=bool).reshape(-1, *scene.truth.shape)


def best_ious(scene: StudyScene, masks: np.ndarray) -> list[float]:
    """Of each instance that is not small, the IoU with the best mask."""
    large = [of for of in exact_masks(scene) if of.sum() >= MIN_INSTANCE_AREA]
    pairs = [((masks & of).sum((1, 2)), (masks | of).sum((1, 2))) for of in large]
    return [float((shared / either).max(initial=0)) for shared, either in pairs]
