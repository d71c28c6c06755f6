"""Memory over a long run, and of evaluation."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from s4m_d2.engine import S4MTrainer, stage_config
from s4m_d2.structures import RLEMasks

ROOT = Path(__file__).resolve().parents[2]
ITERATIONS = 300
WARM = 50  # iterations; caches are full by then
GROWTH = 0.05
PROCESSES = 3  # the trainer and a worker of each loader
HOUR = 3600
CONFIG = str(ROOT / "configs" / "toyscapes_10pct.yaml")
OPTIONS = ["MODEL.DEVICE", "cpu", "DATASETS.TEST", "()"]


def run(script, *arguments, **environment):
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    subprocess.run(command, check=True, env=os.environ | environment)


def quickstart_memory_settings() -> dict[str, str]:
    sys.path.insert(0, str(ROOT / "tools"))
    from quickstart import KEEP_MEMORY

    return KEEP_MEMORY


@pytest.fixture(scope="module")
def quickstart_teacher(tmp_path_factory):
    """The quickstart's data folder and stage-1 checkpoint."""
    folder = tmp_path_factory.mktemp("quickstart")
    run("datasets/make_toyscapes.py", "--output", folder / "toyscapes")
    options = [*OPTIONS, "S4M.STAGE", "teacher", "OUTPUT_DIR", folder / "run"]
    run("train_net.py", "--config-file", CONFIG, *options, DETECTRON2_DATASETS=str(folder))
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
    run(script, output, *options, DETECTRON2_DATASETS=str(data), **quickstart_memory_settings())
    record = {int(done): sizes for done, sizes in json.loads(output.read_text()).items()}
    print(f"\nresident MiB: { {i: in_mib(sizes) for i, sizes in record.items()} }")
    assert max(record) == ITERATIONS
    for done, sizes in record.items():
        assert len(sizes) == PROCESSES
        if done > WARM:
            growth = [now / before - 1 for now, before in zip(sizes, record[WARM], strict=True)]
            assert max(growth) <= GROWTH, f"{in_mib(record[WARM])} -> {in_mib(sizes)} at {done}"


def in_mib(sizes):
    return [size >> 20 for size in sizes]


def test_trainers_evaluate_with_encoded_masks_and_leave_the_model_as_it_was(
    small_config, monkeypatch
):
    """The same results as with dense masks, which a model returns to anyone else."""
    cfg = stage_config(small_config(), "student")
    model = S4MTrainer.build_model(cfg).eval()
    forward, returned = model.forward, []

    def watched(samples):
        outputs = forward(samples)
        returned.extend(output["instances"].pred_masks for output in outputs)
        return outputs

    monkeypatch.setattr(model, "forward", watched)
    encoded = S4MTrainer.test(cfg, model)
    assert len(returned) == 2 and all(isinstance(masks, RLEMasks) for masks in returned)

    assert model.rle_masks is False
    monkeypatch.setattr(
        "s4m_d2.engine.training.trainer.masks_as_rle", lambda model: torch.no_grad()
    )
    dense = S4MTrainer.test(cfg, model)
    assert len(returned) == 4 and all(isinstance(masks, torch.Tensor) for masks in returned[2:])
    assert repr(encoded) == repr(dense)  # scores may be NaN
