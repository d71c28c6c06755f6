"""What --check says of a run that is continued, also with another length."""

import os

import torch

from s4m_d2.engine.checks.preflight import resume_finding
from s4m_d2.engine.stages import stage_config, stages_to_run
from s4m_d2.engine.training.hooks import run_settings
from s4m_d2.report import write_results

from .preflight_cases import config

TEACHER, STUDENT, LAST = "S4M.TEACHER.MAX_ITER", "SOLVER.MAX_ITER", "S4M.FINETUNE.MAX_ITER"
BEGUN = {TEACHER: 10, STUDENT: 20, "S4M.BURN_IN": 5, "DATASETS.TEST": "()"}
DONE = {"teacher": 10}
BOTH = {"teacher": 10, "student": 20}
ALL = BOTH | {"finetune": 5}


def save(cfg, stage, finished):
    """A stage's checkpoint after so many iterations."""
    of_stage = stage_config(cfg, stage)
    settings = run_settings(of_stage, 1, has_teacher=stage == "student")
    state = {"hooks": {"RunStateHook": {"settings": settings}}}
    name = "model_final.pth" if finished == of_stage.SOLVER.MAX_ITER else "model_0000007.pth"
    os.makedirs(of_stage.OUTPUT_DIR)
    path = os.path.join(of_stage.OUTPUT_DIR, name)
    torch.save({"model": {}, "trainer": state, "iteration": finished - 1}, path)
    if finished == of_stage.SOLVER.MAX_ITER:
        write_results({"iterations": finished}, os.path.join(of_stage.OUTPUT_DIR, "results.json"))


def test_the_check_says_what_goes_on_and_what_has_changed(tmp_path):
    for number, (saved, changes, left, warned, refused) in enumerate(
        [
            ({}, {}, ["teacher", "student"], [], []),
            ({}, {"S4M.TEACHER_WEIGHTS": "t.pth"}, ["student"], [], []),
            (BOTH, {}, [], [], []),
            (BOTH, {STUDENT: 30}, ["student"], [STUDENT], []),
            (BOTH, {STUDENT: 15}, [], [], ["has done 20 iterations"]),
            (BOTH, {TEACHER: 12}, [], [], ["a teacher of 10 iterations"]),
            (BOTH, {TEACHER: 0, STUDENT: 30}, ["student"], [STUDENT], []),
            (DONE, {TEACHER: 12}, ["teacher", "student"], ["SOLVER.MAX_ITER was 10"], []),
            (DONE, {TEACHER: 8}, ["student"], [], ["has done 10 iterations"]),
            (
                {"teacher": 10, "student": 8},
                {STUDENT: 30, "S4M.EMA_DECAY": 0.5, "SEED": 4},
                ["student"],
                ["SEED", STUDENT, "S4M.EMA_DECAY"],
                [],
            ),
            ({"student": 8}, {"S4M.BURN_IN": 6}, ["teacher", "student"], [], ["S4M.BURN_IN"]),
            ({}, {LAST: 5}, ["teacher", "student", "finetune"], [], []),
            ({}, {LAST: 5, "S4M.STAGE": "teacher"}, ["teacher"], [], []),
            (BOTH, {LAST: 5}, ["finetune"], [], []),
            (ALL, {LAST: 5}, [], [], []),
            (ALL, {LAST: 8}, ["finetune"], ["SOLVER.MAX_ITER was 5"], []),
            (ALL, {LAST: 4}, [], [], ["has done 5 iterations"]),
            (ALL, {LAST: 5, STUDENT: 25}, [], [], ["a student of 20 iterations"]),
        ]
    ):
        output = {"OUTPUT_DIR": str(tmp_path / f"{number}")}
        for stage, finished in saved.items():
            save(config(BEGUN | {LAST: 5} | output), stage, finished)
        cfg = config(BEGUN | output | changes)
        assert stages_to_run(cfg, resume=True) == left
        finding = resume_finding(cfg, left, 1)
        assert "30" in finding.text or changes.get(STUDENT) != 30  # the new length
        for found, expected in ((finding.warnings, warned), (finding.errors, refused)):
            assert len(found) == len(expected)
            assert all(word in str(text) for text, word in zip(found, expected, strict=True))


def test_a_checkpoint_of_another_program_is_no_obstacle(tmp_path):
    cfg = config(BEGUN | {"OUTPUT_DIR": str(tmp_path)})
    for content in ({"model": {}}, {"iteration": "7"}, {"iteration": 4, "trainer": 3}):
        os.makedirs(tmp_path / "student", exist_ok=True)
        torch.save(content, tmp_path / "student" / "model_0000004.pth")
        assert resume_finding(cfg, ["teacher", "student"], 1).status == "ok"


def test_other_settings_that_differ_are_named_with_both_values(tmp_path):
    begun = BEGUN | {"OUTPUT_DIR": str(tmp_path)}
    cfg = config(begun)
    save(cfg, "student", 8)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    assert not resume_finding(cfg, ["teacher", "student"], 1).warnings
    changes = {"SOLVER.BASE_LR": 0.5, "S4M.SAM.BACKEND": "tiny", "TEST.EVAL_PERIOD": 7}
    [warning] = resume_finding(config(begun | changes), ["teacher", "student"], 1).warnings
    assert f"SOLVER.BASE_LR 0.5 (was {cfg.SOLVER.BASE_LR})" in warning
    assert "S4M.SAM.BACKEND 'tiny' (was 'tiny_toyscapes')" in warning
    assert "EVAL_PERIOD" not in warning
