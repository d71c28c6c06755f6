"""Trainings and tools give the values that are stored (how they were made: reference_runs.py)."""

import json
import os
import subprocess
import sys

import pytest
from reference_runs import ROOT, RUNS, STEADY, differences, fingerprint, stored

# As the quickstart does: glibc keeps what was freed.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 33)}


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    """Of all runs, in one process that imports once."""
    path = tmp_path_factory.mktemp("reference") / "values.json"
    script = [sys.executable, str(ROOT / "tests" / "reference_runs.py"), "--output", str(path)]
    subprocess.run(script, check=True, env=os.environ | KEEP_MEMORY)
    return json.loads(path.read_text())


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", RUNS)
def test_runs_give_the_stored_values(values, name):
    found, expected = values[name], stored(name)
    if expected.pop("fingerprint") == fingerprint():
        assert found == expected
    every = name in STEADY
    compared = differences(found, expected, "" if every else "loss")
    assert max(compared if every else compared[:1], default=0) < 1e-4
