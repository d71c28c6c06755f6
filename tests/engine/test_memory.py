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

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ITERATIONS = 300
WARM = 50  # iterations; caches are full and the burn-in is over by then
GROWTH = 0.05
PROCESSES = 3  # the trainer and a worker of each loader
HOUR = 3600
RUN = {
    "SOLVER__MAX_ITER": ITERATIONS,
    "S4M__BURN_IN": WARM // 2,
    "DATALOADER__NUM_WORKERS": 1,  # for each of the two loaders, as in the quickstart
}


def quickstart_memory_settings() -> dict[str, str]:
    sys.path.insert(0, str(ROOT / "tools"))
    from quickstart import KEEP_MEMORY

    return KEEP_MEMORY


@pytest.mark.slow
@pytest.mark.timeout(HOUR)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux' /proc")
@pytest.mark.parametrize("settings", ["system's", "quickstart's"])
def test_stage_two_does_not_grow(settings, small_options, tmp_path):
    """Each process by itself, in the allocator's two modes; images and model are small."""
    environment = os.environ | (quickstart_memory_settings() if settings == "quickstart's" else {})
    output = tmp_path / "memory.json"
    command = [sys.executable, str(HERE / "memory_run.py"), str(output), *small_options(**RUN)]
    subprocess.run(command, check=True, env=environment)
    record = {int(done): sizes for done, sizes in json.loads(output.read_text()).items()}
    print(f"\n{settings} allocator, MiB: { {i: in_mib(sizes) for i, sizes in record.items()} }")
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
    monkeypatch.setattr("s4m_d2.engine.trainer.masks_as_rle", lambda model: torch.no_grad())
    dense = S4MTrainer.test(cfg, model)
    assert len(returned) == 4 and all(isinstance(masks, torch.Tensor) for masks in returned[2:])
    assert repr(encoded) == repr(dense)  # scores may be NaN
