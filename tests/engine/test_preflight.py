"""Settings that cannot work, runs that continue; the report as a whole, and who prints it."""

import os
import re

import pytest
import torch
from helpers import QUICKSTART

from s4m_d2.engine.checks.config_checks import check_config, config_errors
from s4m_d2.engine.checks.preflight import preflight, resume_finding
from s4m_d2.engine.checks.resource_checks import sam_finding
from s4m_d2.engine.stages import stage_config, stages_to_run
from s4m_d2.engine.training.hooks import run_settings
from s4m_d2.errors import ConfigError, DatasetError, S4MError, raise_all
from s4m_d2.report import write_results

from .own_runs import train_net
from .test_preflight_data import config


def test_a_sound_config_passes():
    check_config(config())
    assert not config_errors(config({"SOLVER.IMS_PER_BATCH": 12}), num_processes=4)


WRONG = """
    S4M.PSEUDO_LABEL.MASK_THRESH -0.1       S4M.PSEUDO_LABEL.SCORE_THRESH 1e999
    S4M.PSEUDO_LABEL.COUNT_BAND (5.0,1.0)   S4M.REFINE.SEPL.POINTS_PER_SIDE 0
    S4M.STRONG_VIEW.JITTER (0.4,0.4,0.4)    S4M.STRONG_VIEW.JITTER (0.4,0.4,0.4,0.6)
    S4M.STRONG_VIEW.BLUR_SIGMA (2.0,0.1)    S4M.FIGURES.WHAT ('labels',)
    S4M.ARP.PAIR_FRACTION 0.75              S4M.ARP.SCALE_RANGE (1.2,0.8)
    S4M.BURN_IN 1001    S4M.BURN_IN -1      S4M.EMA_DECAY 1.0    S4M.MAX_BAD_STEPS -1
    S4M.STAGE first     S4M.STAGE student   S4M.AMP_PRECISION fp8
    S4M.UNLABELED_MAPPER Mapper             S4M.UNLABELED_IMS_PER_BATCH 5
    SOLVER.MAX_ITER 0                       SOLVER.IMS_PER_BATCH -2
    MODEL.META_ARCHITECTURE MaskFormer
    MODEL.DEVICE CPU                        INPUT.FORMAT L       INPUT.MIN_SCALE 3.0
    INPUT.RANDOM_FLIP diagonal              INPUT.CROP.ENABLED False
    DATASETS.TRAIN ()                       DATASETS.UNLABELED ()
    SOLVER.LR_SCHEDULER_NAME None           SOLVER.WARMUP_METHOD none
    SOLVER.CLIP_GRADIENTS.CLIP_TYPE none    MODEL.RESNETS.NORM SyncBN
""".split()


def test_settings_that_cannot_work_are_named():
    for key, value in zip(WRONG[::2], WRONG[1::2], strict=True):
        with pytest.raises(S4MError) as refused:
            raise_all(config_errors(config({key: value}), num_processes=2))
        assert key.removesuffix(".ENABLED") in str(refused.value), value


def test_stage_1_alone_needs_something_to_train_and_no_unlabeled_images():
    changes = {"S4M.STAGE": "teacher", "DATASETS.UNLABELED": (), "S4M.BURN_IN": 10**6}
    check_config(config(changes))
    with pytest.raises(ConfigError, match="S4M.TEACHER_WEIGHTS is 't.pth'"):
        check_config(config(changes | {"S4M.TEACHER_WEIGHTS": "t.pth"}))


SAM = {"S4M.SAM.BACKEND": "segment_anything", "S4M.SAM.CHECKPOINT": "nowhere/sam_vit_l.pth"}
NO_REFINEMENT, NO_DISTILLATION = {"S4M.REFINE.ENABLED": False}, {"S4M.DISTILL.ENABLED": False}


def test_sams_weights_must_exist_where_they_are_needed():
    missing = r"'nowhere/sam_vit_l\.pth'.*Download"
    for changes, message in (
        (SAM, missing),
        (SAM | NO_REFINEMENT, missing),
        (SAM | NO_DISTILLATION, missing),
        ({"S4M.SAM.BACKEND": "sam3"}, "'sam3'.* segment_anything"),
        ({"S4M.SAM.BACKEND": "sam2"}, r"MODEL_TYPE is 'vit_l'.* hiera_t.*hiera_l"),
        (SAM | {"S4M.SAM.MODEL_TYPE": "vit_x"}, "'vit_x'.*vit_b, vit_l, vit_h"),
        (
            {"S4M.SAM.BACKEND": "transformers", "S4M.SAM.CHECKPOINT": "nowhere/sam"},
            "needs transformers|hf download nowhere/sam",
        ),
    ):
        sam, line = sam_finding(config(changes))
        assert sam is None and re.search(message, str(line.errors[0]))
    for changes in (NO_REFINEMENT | NO_DISTILLATION, NO_DISTILLATION | {"S4M.STAGE": "teacher"}):
        sam, line = sam_finding(config(SAM | changes))
        assert sam is None and line.status == "ok"


def test_an_evaluation_needs_a_test_set_and_a_device_has_to_be_there(monkeypatch):
    with pytest.raises(ConfigError, match=r"DATASETS\.TEST"):
        check_config(config({"DATASETS.TEST": ()}), eval_only=True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"MODEL\.DEVICE"):
        check_config(config({"MODEL.DEVICE": "cuda"}))


def statuses(report):
    return {finding.item: finding.status for finding in report.findings}


def test_one_error_is_raised_as_it_is_and_several_together():
    raise_all([])
    first, second = DatasetError("a"), ConfigError("b")
    with pytest.raises(DatasetError) as raised:
        raise_all([first])
    assert raised.value is first
    with pytest.raises(DatasetError, match=r"2 problems:\n1\. a\n2\. b"):
        raise_all([first, second])


def test_a_sound_run_has_a_short_report_without_problems(small_config, tmp_path):
    state = torch.get_rng_state()
    report = preflight(small_config(S4M__BURN_IN=1))
    assert not report.errors
    assert torch.equal(torch.get_rng_state(), state)
    assert list(statuses(report)) == [
        "settings", "device", "output", "labeled data", "labeled classes", "unlabeled data",
        "test data", "test classes", "model", "SAM", "first weights", "teacher", "disk", "memory",
    ]  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_processes_that_would_take_gpus_for_another_device_are_refused(small_config, monkeypatch):
    assert not preflight(small_config(), num_processes=2).errors
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert not preflight(small_config()).errors
    [error] = preflight(small_config(), num_processes=2).errors
    assert "MODEL.DEVICE is cpu" in str(error)


def test_all_wrong_settings_come_together_and_so_do_data_sets_and_weights(small_config):
    settings = {"SOLVER__OPTIMIZER": "ADAM", "SOLVER__IMS_PER_BATCH": 3, "S4M__EMA_DECAY": 2.0}
    files = {
        "DATASETS__TRAIN": "('toyscapes_9pct',)",
        "MODEL__WEIGHTS": "nowhere.pth",
        "S4M__SAM__CHECKPOINT": "no_sam.pth",
        "S4M__TEACHER_WEIGHTS": "no_teacher.pth",
    }
    for wrong, words in (
        (settings | files, "OPTIMIZER IMS_PER_BATCH EMA_DECAY"),
        (files | {"MODEL__SEM_SEG_HEAD__NUM_CLASSES": 4}, "NUM_CLASSES 9pct nowhere no_sam no_tea"),
    ):
        report = preflight(small_config(**wrong), num_processes=2)
        assert all(word in "".join(map(str, report.errors)) for word in words.split())


def test_what_is_wrong_is_printed_by_one_process_and_nothing_written(
    small_options, tmp_path, monkeypatch, capsys
):
    before = sorted(tmp_path.rglob("*"))
    words = small_options(S4M__BURN_IN=1, S4M__SAM__CHECKPOINT="no_sam.pth")
    assert train_net("--check", *words, config=QUICKSTART) == 1
    said = capsys.readouterr().out
    assert "toyscapes_train_30pct" in said and "1. Error: SAM weights" in said
    assert train_net(*small_options(S4M__EMA_DECAY=1.0), config=QUICKSTART) == 1
    said = capsys.readouterr()
    assert "S4M.EMA_DECAY" in said.err and not said.out
    monkeypatch.setenv("LOCAL_RANK", "1")  # another process of the machine
    assert train_net("--check", *words, config=QUICKSTART) == 0
    assert not capsys.readouterr().out and sorted(tmp_path.rglob("*")) == before


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
