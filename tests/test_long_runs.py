"""Runs that take long: stored values, the quickstart's promise, memory. Slow."""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import QUICKSTART, ROOT, run_script
from quickstart import KEEP_MEMORY
from reference_runs import RUNS, STEADY, differences, fingerprint, stored

from s4m_d2.report import read_results

SEEDS = (0, 1, 2)
HOUR = 3600  # seconds


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


@pytest.mark.slow
@pytest.mark.timeout(2 * HOUR)
def test_the_student_is_better_than_the_stage_one_teacher_over_three_seeds(tmp_path):
    gains = []
    for seed in SEEDS:
        output = tmp_path / f"seed{seed}"
        run_script("tools/quickstart.py", "--output", output, "SEED", seed)
        teacher = read_results(str(output / "teacher" / "results.json"))
        student = read_results(str(output / "student" / "results.json"))
        print(f"seed {seed}:", (output / "results.md").read_text(), sep="\n")
        gains.append(student["segm"]["AP"] - teacher["segm"]["AP"])
        assert list((output / "student" / "figures").glob("pseudo_labels_*.png"))
    print(f"gain of the student: {gains}")
    assert min(gains) > 0
    assert statistics.mean(gains) > statistics.stdev(gains)


PERIOD = 20  # iterations between two writes to metrics.json
ITERATIONS = 300
WARM = 60  # iterations; caches are full by then
GROWTH = 0.05
PROCESSES = 3  # the trainer and a worker of each loader


def resident_bytes(pid: int | str) -> list[int]:
    """Resident memory of a process and of all processes that it started (loaders' workers)."""
    status = Path(f"/proc/{pid}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines())
    found = [int(fields["VmRSS"].split()[0]) * 1024]
    for task in sorted(Path(f"/proc/{pid}/task").iterdir()):
        for child in (task / "children").read_text().split():
            found += resident_bytes(child)
    return found


@pytest.mark.slow
@pytest.mark.timeout(HOUR)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux' /proc")
def test_stage_two_does_not_grow(tmp_path):
    """Each process by itself, with the quickstart's own config and settings of the allocator.

    All iterations lie within the burn-in: one teacher labels for all, so that the work is alike.
    """
    common = ["--config-file", QUICKSTART, "MODEL.DEVICE", "cpu", "DATASETS.TEST", "()"]
    own = {"DETECTRON2_DATASETS": str(tmp_path)}
    run_script("datasets/make_toyscapes.py", "--output", tmp_path / "toyscapes")
    words = ["S4M.STAGE", "teacher", "OUTPUT_DIR", tmp_path / "short"]
    run_script("train_net.py", *common, *words, **own)
    teacher = tmp_path / "short" / "teacher" / "model_final.pth"
    words = [sys.executable, ROOT / "train_net.py", *common, "S4M.TEACHER_WEIGHTS", teacher]
    words += ["SOLVER.MAX_ITER", ITERATIONS, "S4M.BURN_IN", ITERATIONS]
    words += ["OUTPUT_DIR", tmp_path / "run"]
    metrics, record = tmp_path / "run" / "student" / "metrics.json", {}
    with subprocess.Popen(list(map(str, words)), env=os.environ | KEEP_MEMORY | own) as process:
        while process.poll() is None:
            time.sleep(0.1)
            *lines, _ = metrics.read_text().split("\n") if metrics.exists() else [""]
            done = json.loads(lines[-1])["iteration"] + 1 if lines else ITERATIONS
            if done < ITERATIONS and done not in record:  # after the last one, it ends
                record[done] = resident_bytes(process.pid)
    assert process.returncode == 0 and max(record) >= ITERATIONS - PERIOD
    for done, sizes in record.items():
        assert len(sizes) == PROCESSES
        if done > WARM:
            growth = [now / before - 1 for now, before in zip(sizes, record[WARM], strict=True)]
            assert max(growth) <= GROWTH, record
