"""Memory over a long run, and of evaluation."""

import json
from pathlib import Path

import pytest
from helpers import QUICKSTART, run_script
from quickstart import KEEP_MEMORY

ITERATIONS = 300
WARM = 50  # iterations; caches are full by then
GROWTH = 0.05
PROCESSES = 3  # the trainer and a worker of each loader
HOUR = 3600
OPTIONS = ["MODEL.DEVICE", "cpu", "DATASETS.TEST", "()"]


@pytest.fixture(scope="module")
def quickstart_teacher(tmp_path_factory):
    """The quickstart's data folder and stage-1 checkpoint."""
    folder = tmp_path_factory.mktemp("quickstart")
    run_script("datasets/make_toyscapes.py", "--output", folder / "toyscapes")
    options = [*OPTIONS, "S4M.STAGE", "teacher", "OUTPUT_DIR", folder / "run"]
    config = ("--config-file", QUICKSTART)
    run_script("train_net.py", *config, *options, DETECTRON2_DATASETS=str(folder))
    return folder, folder / "run" / "teacher" / "model_final.pth"


@pytest.mark.slow
@pytest.mark.timeout(HOUR)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux' /proc")
def test_stage_two_does_not_grow(quickstart_teacher, tmp_path):
    """Each process by itself, with the quickstart's own config and settings of the allocator.

    All iterations lie within the burn-in: one teacher labels for all, so that the work is alike.
    """
    data, teacher = quickstart_teacher
    options = [*OPTIONS, "S4M.TEACHER_WEIGHTS", teacher, "SOLVER.MAX_ITER", ITERATIONS]
    options += ["S4M.BURN_IN", ITERATIONS, "OUTPUT_DIR", tmp_path / "run"]
    output = tmp_path / "memory.json"
    script = "tests/engine/memory_run.py"
    run_script(script, output, *options, DETECTRON2_DATASETS=str(data), **KEEP_MEMORY)
    record = {int(done): sizes for done, sizes in json.loads(output.read_text()).items()}
    assert max(record) == ITERATIONS
    for done, sizes in record.items():
        assert len(sizes) == PROCESSES
        if done > WARM:
            growth = [now / before - 1 for now, before in zip(sizes, record[WARM], strict=True)]
            assert max(growth) <= GROWTH, record
