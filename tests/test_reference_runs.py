"""Trainings and tools give the values that are stored (how they were made: reference_runs.py)."""

import json
import os
import subprocess
import sys

import pytest
from reference_runs import ROOT, RUNS, STEADY, differences, fingerprint, stored

# As the quickstart does: glibc keeps what was freed.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 33)}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", RUNS)
def test_runs_give_the_stored_values(tmp_path, name):
    path = tmp_path / "values.json"
    script = str(ROOT / "tests" / "reference_runs.py")
    words = [sys.executable, script, name, "--output", str(path)]
    subprocess.run(words, check=True, env=os.environ | KEEP_MEMORY)
    found, expected = json.loads(path.read_text())[name], stored(name)
    if expected.pop("fingerprint") == fingerprint():
        assert found == expected
    every = name in STEADY
    compared = differences(found, expected, "" if every else "loss")
    assert max(compared if every else compared[:1], default=0) < 1e-4
