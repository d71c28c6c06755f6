"""Settings of how SAM computes, and the warning where its cache cannot be hit."""

import pytest

from s4m_d2.engine.checks.config_checks import config_errors
from s4m_d2.engine.checks.sam_checks import sam_cache_findings

from .preflight_cases import config

REPEATING = {  # labeled images come again, but for the flip
    "S4M.SAM.CACHE": "cache",
    "INPUT.CROP.ENABLED": False,
    "INPUT.MIN_SIZE_TRAIN": (512, 640),
    "INPUT.COLOR_AUG_SSD": False,
}
JITTER = {"INPUT.DATASET_MAPPER_NAME": "coco_instance_lsj"}
ONE_SCALE = {"INPUT.MIN_SCALE": 1.0, "INPUT.MAX_SCALE": 1.0}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"S4M.SAM.MAX_IMAGES": -1}, "MAX_IMAGES is -1; expected 1 or more, or 0"),
        ({"S4M.SAM.PRECISION": "half"}, "PRECISION is 'half'; choose one of auto, float32"),
        ({"S4M.SAM.CACHE_SIZE_GB": 0.0}, "CACHE_SIZE_GB is 0.0; expected a number above 0"),
    ],
)
def test_values_out_of_range_are_refused_with_what_was_expected(changes, expected):
    (error,) = config_errors(config(changes))
    assert expected in str(error)
    assert config_errors(config()) == []


@pytest.mark.parametrize(
    ("changes", "reasons"),
    [
        ({}, []),
        ({"INPUT.CROP.ENABLED": True}, ["INPUT.CROP.ENABLED"]),
        ({"INPUT.COLOR_AUG_SSD": True}, ["INPUT.COLOR_AUG_SSD"]),
        ({"INPUT.MIN_SIZE_TRAIN": (1, 2, 3, 4)}, []),
        ({"INPUT.MIN_SIZE_TRAIN": (1, 2, 3, 4, 4, 5)}, ["gives 5 sizes"]),
        ({"INPUT.MIN_SIZE_TRAIN_SAMPLING": "range"}, ["gives 129 sizes"]),
        (
            {"INPUT.CROP.ENABLED": True, "INPUT.COLOR_AUG_SSD": True},
            ["INPUT.CROP.ENABLED", "INPUT.COLOR_AUG_SSD"],
        ),
        (JITTER, ["coco_instance_lsj"]),
        (JITTER | ONE_SCALE, []),
        (JITTER | ONE_SCALE | {"INPUT.CROP.ENABLED": True}, []),  # and no crop but its own
    ],
)
def test_the_warning_names_what_makes_views_differ(changes, reasons):
    (finding,) = sam_cache_findings(config(REPEATING | changes))
    assert finding.status == ("warning" if reasons else "ok")
    text = " ".join(finding.warnings)
    assert all(reason in text for reason in reasons)
    assert text.count(";") == max(len(reasons) - 1, 0)


def test_without_a_cache_nothing_is_said_and_without_its_stage_that_it_is_not_used():
    crop = {"INPUT.CROP.ENABLED": True}
    assert list(sam_cache_findings(config(crop))) == []
    for unused in ({"S4M.DISTILL.ENABLED": False}, {"S4M.TEACHER_WEIGHTS": "teacher.pth"}):
        (finding,) = sam_cache_findings(config(REPEATING | crop | unused))
        assert "not used" in finding.text and finding.status == "ok"
