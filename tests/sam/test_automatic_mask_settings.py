"""The settings of SAM's automatic masks: ranges, and what a fingerprint tells apart."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import fields, replace

import pytest
from sam_cases import build_smallest

from s4m_d2.errors import InputError
from s4m_d2.sam.automatic_masks import AutomaticMasks, AutomaticMaskSettings
from s4m_d2.sam.segment_anything import SegmentAnythingBackend

OTHER_VALUES = {
    "points_per_side": 5, "pred_iou_thresh": 0.5, "stability_score_thresh": 0.5,
    "stability_score_offset": 0.5, "box_nms_thresh": 0.5, "crop_n_layers": 1,
    "crop_nms_thresh": 0.5, "crop_overlap_ratio": 0.5, "crop_n_points_downscale_factor": 2,
    "min_mask_region_area": 1,
}  # fmt: skip


def test_the_fingerprint_names_weights_and_settings():
    backend = build_smallest("segment_anything")
    settings = AutomaticMaskSettings()
    known = AutomaticMasks(backend, settings).fingerprint()
    assert AutomaticMasks(SegmentAnythingBackend(deepcopy(backend.sam))).fingerprint() == known
    other_batches = replace(settings, points_per_batch=3)
    assert AutomaticMasks(backend, other_batches).fingerprint() == known
    prints = [known, AutomaticMasks(build_smallest("segment_anything")).fingerprint()]
    for name, value in OTHER_VALUES.items():
        prints.append(AutomaticMasks(backend, replace(settings, **{name: value})).fingerprint())
    assert len(set(prints)) == len(prints) == len(fields(settings)) + 1
    one, whole = (replace(settings, box_nms_thresh=value) for value in (1, 1.0))
    assert (
        AutomaticMasks(backend, one).fingerprint() == AutomaticMasks(backend, whole).fingerprint()
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"points_per_side": 0}, "points_per_side is 0; expected a whole number from 1 on"),
        ({"points_per_side": 8.0}, "points_per_side is 8.0; expected a whole number"),
        ({"points_per_side": True}, "points_per_side is True"),
        ({"points_per_batch": 0}, "points_per_batch is 0"),
        ({"pred_iou_thresh": 1.01}, "pred_iou_thresh is 1.01; expected a number from 0 to 1"),
        ({"pred_iou_thresh": "0.5"}, "pred_iou_thresh is '0.5'"),
        ({"stability_score_thresh": -0.1}, "stability_score_thresh is -0.1"),
        ({"stability_score_offset": -1.0}, "offset is -1.0; expected a finite number from 0 on"),
        ({"stability_score_offset": float("inf")}, "stability_score_offset is inf"),
        ({"box_nms_thresh": float("nan")}, "box_nms_thresh is nan"),
        ({"crop_n_layers": -1}, "crop_n_layers is -1; expected a whole number from 0 on"),
        ({"crop_nms_thresh": 2}, "crop_nms_thresh is 2"),
        ({"crop_overlap_ratio": 1.5}, "crop_overlap_ratio is 1.5"),
        ({"crop_n_points_downscale_factor": 0}, "crop_n_points_downscale_factor is 0"),
        ({"min_mask_region_area": None}, "min_mask_region_area is None"),
        (
            {"points_per_side": 7, "crop_n_layers": 3, "crop_n_points_downscale_factor": 2},
            "points_per_side is 7, of which crop_n_points_downscale_factor 2 leaves none in layer",
        ),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        AutomaticMaskSettings(**changes)
