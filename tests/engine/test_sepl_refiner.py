"""S4M.REFINE.METHOD sepl in a run of stage 2: checks of its settings, and continuing exactly."""

import json
from pathlib import Path

import pytest
import torch

from s4m_d2.engine import S4MCheckpointer, S4MTrainer, TeacherTrainer, stage_config
from s4m_d2.engine.checks.preflight import check_config
from s4m_d2.errors import ConfigError
from s4m_d2.sepl.refiner import SEPLRefiner

from .preflight_cases import config
from .sameness import assert_same

ITERATIONS = 2
SETTINGS = {
    "S4M__REFINE__METHOD": "sepl",
    "S4M__REFINE__SEPL__O_S_THRESH": 0.3,
    "S4M__REFINE__SEPL__POINTS_PER_SIDE": 4,
    "S4M__REFINE__SEPL__PRED_IOU_THRESH": 0.3,
    "S4M__REFINE__SEPL__STABILITY_SCORE_THRESH": 0.3,
    "SOLVER__MAX_ITER": ITERATIONS,
    "SOLVER__CHECKPOINT_PERIOD": 1,
    "S4M__BURN_IN": 1,
    "S4M__EMA_DECAY": 0.5,
    "DATASETS__TEST": "()",
}


def test_the_method_and_its_settings_pass_the_checks():
    check_config(config({"S4M.REFINE.METHOD": "sepl"}), num_processes=1)
    ends = {"O_S_THRESH": 1.0, "O_P_THRESH": 0.0, "POINTS_PER_SIDE": 1, "MIN_MASK_REGION_AREA": 100}
    changes = {f"S4M.REFINE.SEPL.{key}": value for key, value in ends.items()}
    check_config(config({"S4M.REFINE.METHOD": "sepl"} | changes), num_processes=1)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("O_S_THRESH", 1.5, r"is 1\.5; expected a share from 0 to 1"),
        ("O_P_THRESH", -0.1, r"is -0\.1; expected a share from 0 to 1"),
        ("O_P_THRESH", float("nan"), "is nan; expected a share from 0 to 1"),
        ("POINTS_PER_SIDE", 0, "is 0; expected 1 or more"),
        ("PRED_IOU_THRESH", 88.0, r"is 88\.0; expected a number from 0 to 1"),
        ("STABILITY_SCORE_THRESH", 1.1, r"is 1\.1; expected a number from 0 to 1"),
        ("BOX_NMS_THRESH", -1.0, r"is -1\.0; expected a number from 0 to 1"),
        ("MIN_MASK_REGION_AREA", -1, "is -1; expected 0 or more, in pixels"),
    ],
)
def test_settings_out_of_range_are_named(key, value, message):
    cfg = config({"S4M.REFINE.METHOD": "sepl"})
    cfg.S4M.REFINE.SEPL[key] = value
    with pytest.raises(ConfigError, match=rf"S4M\.REFINE\.SEPL\.{key} {message}"):
        check_config(cfg, num_processes=1)


def test_an_unknown_method_is_told_both():
    with pytest.raises(ConfigError, match="'boxes'; choose one of points, sepl"):
        check_config(config({"S4M.REFINE.METHOD": "boxes"}), num_processes=1)


def test_a_run_continued_is_the_unbroken_one_and_redraws_masks(small_config, tmp_path):
    cfg = stage_config(small_config(**SETTINGS), "student")
    folder, weights = Path(cfg.OUTPUT_DIR), tmp_path / "stage_one" / "model_final.pth"
    folder.mkdir(parents=True)
    S4MCheckpointer(TeacherTrainer.build_model(cfg), str(weights.parent)).save("model_final")
    whole = S4MTrainer(cfg, str(weights))
    whole.train()
    assert isinstance(whole.pseudo_labeling.refiner, SEPLRefiner)

    first = torch.load(folder / "model_final.pth", weights_only=True)
    lines = (folder / "metrics.json").read_text().splitlines()
    logged = {key: value for line in lines for key, value in json.loads(line).items()}
    (folder / "model_final.pth").unlink()
    (folder / "last_checkpoint").write_text("model_0000000.pth")
    resumed = S4MTrainer(cfg, str(weights))
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 1
    resumed.train()
    second = torch.load(folder / "model_final.pth", weights_only=True)
    assert_same(first["model"], second["model"])
    assert_same(first["trainer"]["hooks"], second["trainer"]["hooks"])

    assert 0 <= logged["refinement/fallbacks"] < 1
    assert 0.3 < logged["refinement/predicted_iou"] <= 1.5
