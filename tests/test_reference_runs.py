"""Trainings and tools give the values that are stored (how they were made: reference_runs.py)."""

import json

import pytest
from helpers import run_script
from quickstart import KEEP_MEMORY
from reference_runs import RUNS, STEADY, differences, fingerprint, stored


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", RUNS)
def test_runs_give_the_stored_values(tmp_path, name):
    path = tmp_path / "values.json"
    run_script("tests/reference_runs.py", name, "--output", path, **KEEP_MEMORY)
    found, expected = json.loads(path.read_text())[name], stored(name)
    if expected.pop("fingerprint") == fingerprint():
        assert found == expected
    every = name in STEADY
    compared = differences(found, expected, "" if every else "loss")
    assert max(compared if every else compared[:1], default=0) < 1e-4
