"""S4M.REFINE.METHOD sepl in a run of stage 2: checks of its settings, and what it draws."""

from pathlib import Path

import torch
from helpers import logged

from s4m_d2.engine import S4MCheckpointer, S4MTrainer, TeacherTrainer, stage_config
from s4m_d2.sepl.refiner import SEPLRefiner

SETTINGS = {
    "S4M__REFINE__METHOD": "sepl",
    "S4M__REFINE__SEPL__O_S_THRESH": 0.3,
    "S4M__REFINE__SEPL__POINTS_PER_SIDE": 4,
    "S4M__REFINE__SEPL__PRED_IOU_THRESH": 0.3,
    "S4M__REFINE__SEPL__STABILITY_SCORE_THRESH": 0.3,
    "SOLVER__MAX_ITER": 1,
    "S4M__BURN_IN": 1,
    "DATASETS__TEST": "()",
}


def test_a_run_redraws_masks(small_config, tmp_path):
    cfg = stage_config(small_config(**SETTINGS), "student")
    folder, weights = Path(cfg.OUTPUT_DIR), tmp_path / "stage_one" / "model_final.pth"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    model = TeacherTrainer.build_model(cfg)
    model.sem_seg_head.predictor.class_embed.bias.data[-1] = -9.0  # so that it finds objects
    S4MCheckpointer(model, str(weights.parent)).save("model_final")
    trainer = S4MTrainer(cfg, str(weights))
    trainer.train()
    assert isinstance(trainer.pseudo_labeling.refiner, SEPLRefiner)

    values = logged(folder)
    assert 0 <= values["refinement/fallbacks"] < 1
    assert 0.3 < values["refinement/predicted_iou"] <= 1.5
