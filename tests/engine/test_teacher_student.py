"""The losses of a step of stage 2, by model and by trainer."""

from s4m_d2.engine import S4MCheckpointer, S4MTrainer, stage_config


def test_a_step_of_stage_two_has_the_losses_of_both_batches(small_config, tmp_path):
    cfg = small_config(S4M__UNLABELED_IMS_PER_BATCH=3, SOLVER__MAX_ITER=1, DATASETS__TEST="()")
    cfg = stage_config(cfg, "student")
    S4MCheckpointer(S4MTrainer.build_model(cfg), str(tmp_path)).save("teacher")
    trainer = S4MTrainer(cfg, str(tmp_path / "teacher.pth"))
    seen = []
    trainer.trained_model.backbone.register_forward_hook(lambda _, args, out: seen.append(args))
    trainer.train()
    assert [len(images) for (images,) in seen] == [2, 3]
    logged = trainer.storage.latest()
    assert {"loss_ce", "unsup/loss_ce", "pseudo_labels/per_image"} <= logged.keys()
