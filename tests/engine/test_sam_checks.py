"""Settings of how SAM computes."""

import pytest

from s4m_d2.engine.checks.config_checks import config_errors

from .preflight_cases import config


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"S4M.SAM.MAX_IMAGES": -1}, "MAX_IMAGES is -1; expected 1 or more, or 0"),
        ({"S4M.SAM.PRECISION": "half"}, "PRECISION is 'half'; choose one of auto, float32"),
    ],
)
def test_values_out_of_range_are_refused_with_what_was_expected(changes, expected):
    (error,) = config_errors(config(changes))
    assert expected in str(error)
    assert config_errors(config()) == []
