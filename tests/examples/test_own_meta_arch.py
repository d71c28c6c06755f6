"""examples/own_meta_arch: TinySOLO by itself, and trained by the teacher–student trainer."""

import json
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from helpers import logged

from s4m_d2.engine.labeling.protocol import check_model, check_predictions

PROJECT = "own_meta_arch"
CONFIG = "own_meta_arch/tiny_solo.yaml"
TINY = {"MODEL__RESNETS__OUT_FEATURES": "['res2', 'res3']", "MODEL__TINY_SOLO__CHANNELS": 32}
FEW_CELLS = {"MODEL__TINY_SOLO__GRID_SIZE": "(2, 3)"}  # SAM is asked about each


def test_it_is_what_the_protocol_asks_for(example_config):
    cfg = example_config(CONFIG, **TINY, MODEL__TINY_SOLO__GRID_SIZE="(4, 8)")
    model, sizes = build_model(cfg), [(64, 128), (64, 96)]  # the second is padded
    check_model(model)
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in sizes]
    with torch.no_grad():
        found = model.eval().predict_queries([{"image": image} for image in images])
    check_predictions(found, sizes, model, model.num_classes)
    assert found["pred_masks"].shape == (2, 4 * 8, 64 // 4, 128 // 4)


def test_the_script_trains_both_stages_and_evaluates_what_they_wrote(
    import_example, command_line, tmp_path
):
    script = import_example(PROJECT, "train_net")
    tiny = TINY | FEW_CELLS
    changes = tiny | {"S4M__TEACHER__MAX_ITER": 1, "SOLVER__MAX_ITER": 2, "S4M__BURN_IN": 1}
    script.main(command_line(CONFIG, **changes))
    student = Path(tmp_path, "run", "student")
    names = {"loss_class", "unsup/loss_class", "unsup/loss_dice", "teacher/segm/AP"}
    assert names <= logged(student).keys()
    results = json.loads((student / "results.json").read_text())
    weights = str(student / "model_final.pth")
    again = script.main(command_line(CONFIG, "--eval-only", **tiny, MODEL__WEIGHTS=weights))
    assert again["segm"]["AP"] == pytest.approx(results["segm"]["AP"], nan_ok=True)
