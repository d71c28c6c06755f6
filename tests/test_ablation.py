"""tools/ablation.py: its runs, their settings, the report's arithmetic."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ablation_study import runs
from ablation_study.data_sets import RealSet, Toyscapes
from ablation_study.report import Report
from ablation_study.runs import PLANS, Run, all_runs
from helpers import ROOT, key_values

from s4m_d2.engine.checks.config_checks import config_errors
from s4m_d2.engine.config_file import load_config
from s4m_d2.engine.stages import run_config, stage_config
from s4m_d2.errors import ConfigError

CONFIG = str(ROOT / "configs" / "toyscapes_ablation.yaml")
SEEDS = (0, 1, 2)
PLAN = PLANS["toyscapes"]
AP = {"teacher": 10, "teacher-sd": 11, "supervised": 12, "gd": 15, "gd-sd": 16, "gd-pr": 17}
AP |= {"gd-sd-pr": 18.5, "gd-sd-arp": 14.0, "gd-sd-pr-arp": 19.5, "gd-sd-pr-arp-unique": 20.0}


def result(run) -> dict:
    """A result as the study keeps it."""
    ap = AP[run.method.slug] + run.percent / 10 + 2 * run.seed
    one = {"AP": ap, "AP50": 2 * ap, "by class": {"person": ap - 1, "car": ap + 1}}
    models = {"stage-1 teacher" if run.method.is_teacher else "student": one}
    labels = {}
    if run.method.has_student:
        models["EMA teacher"] = {**one, "AP": ap + 0.5}
        labels = {"pseudo_labels/per_image": 4.0 + run.seed}
    return {
        "name": run.name,
        "method": run.method.slug,
        "models": models,
        "pseudo-labels": {"burn-in": {}, "end": labels},
        "iterations": 300 if run.method.is_teacher else 600,
        "seconds": 60.0,
    }


def config(run: Run):
    """The config of the stage that a run trains, and that of the whole run."""
    values = Toyscapes(None, Path("output")).overrides(run) | run.overrides(Path("runs"))
    cfg = run_config(load_config(CONFIG, key_values(values | {"MODEL.DEVICE": "cpu"})))
    return stage_config(cfg, run.stage), cfg


def rows(text: str, title: str) -> list[list[str]]:
    """The cells after ``title`` of all table rows that begin with it, table by table."""
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    return [found[1:] for found in cells if found and found[0] == title]


def test_only_named_runs_are_chosen_and_trained_with_the_teachers_that_they_need(tmp_path):
    named = runs.chosen_runs(PLAN, SEEDS, ["5pct-seed[01]-*", "10pct-seed1-gd-pr"])
    assert [run.name for run in named][:2] == ["10pct-seed1-gd-pr", "5pct-seed0-supervised"]
    assert len(named) == 11
    assert {run.seed for run in runs.chosen_runs(PLAN, SEEDS) if run.percent == 5} == {0}
    with pytest.raises(ConfigError, match="5pct-seed3-gd"):
        runs.chosen_runs(PLAN, SEEDS, ["5pct-seed3-gd"])
    student, other = Run(runs.GUIDED, 10, 0), Run(runs.PR, 10, 0)
    teacher = student.teacher
    done = {student.name, teacher.name}
    assert runs.left_to_train([student, teacher], done, tmp_path) == []  # nothing needs weights
    assert runs.left_to_train([student, other], done, tmp_path) == [teacher, other]
    teacher.weights(tmp_path).parent.mkdir(parents=True)
    teacher.weights(tmp_path).touch()
    assert runs.left_to_train([other], done, tmp_path) == [other]
    assert runs.left_to_train([other, student], (), tmp_path) == [teacher, other, student]


def test_settings_of_every_method():
    for run in all_runs(PLAN, (0,))[:12]:
        of_stage, cfg = config(run)
        assert config_errors(cfg) == []
        parts = run.method.slug.split("-")
        if run.stage == "student":
            assert cfg.S4M.REFINE.ENABLED == ("pr" in parts)
            assert cfg.S4M.ARP.ENABLED == ("arp" in parts)
            assert (cfg.S4M.PSEUDO_LABEL.DUPLICATE_IOU < 1) == ("unique" in parts)
            teacher = f"{run.percent}pct-seed0-teacher" + ("-sd" if "sd" in parts else "")
            assert cfg.S4M.TEACHER_WEIGHTS == f"runs/{teacher}/teacher/model_final.pth"
        else:
            assert cfg.S4M.DISTILL.ENABLED == (run.method.slug == "teacher-sd")
        share = "" if run.percent == 100 else f"_{run.percent}pct"
        assert of_stage.DATASETS.TRAIN == (f"toyscapes_train{share}",)
        assert of_stage.SOLVER.MAX_ITER == (300 if "teacher" in parts else 600)


def test_a_supervised_run_is_the_student_without_unlabeled_images():
    supervised, _ = config(Run(runs.SUPERVISED, 10, 2))
    student, _ = config(Run(runs.FULL, 10, 2))
    for cfg in (supervised, student):
        cfg.defrost()
        cfg.OUTPUT_DIR = ""
        del cfg["S4M"]
    assert supervised == student


def test_the_report_by_hand():
    results = {run.name: result(run) for run in all_runs(PLAN)}
    text = Report(results, PLAN, SEEDS).markdown()
    # AP is that of the method, + 1 for 10 %, + 2 a seed: a deviation of 2, and none of differences.
    [guided] = rows(text, "Guided Distillation")[:1]
    assert guided == ["18.0 ± 2.0", "36.0 ± 4.0", "18.5 ± 2.0", "3"]
    [ceiling] = rows(text, "supervised, 100 % labels (ceiling)")
    assert ceiling == ["24.0 ± 2.0", "48.0 ± 4.0", "–", "3"]
    gain = ["+1.5 ± 0.0", "+1.5, +1.5, +1.5", "+1.5 ± 0.0", "3"]
    assert rows(text, "SD, with PR")[0] == [*gain, "gain, as in the paper"]
    assert rows(text, "ARP, with SD, without PR")[0][-1] == "loss, as in the paper"
    assert rows(text, "20 %")[0] == ["14.0", "17.0", "21.5", "+4.5", "+4.2", "1"]
    assert rows(text, "stage-1 teacher")[1] == ["12.0", "14.0"]  # AP by class
    assert rows(text, "Guided Distillation")[2] == ["– → 5.0", "–", "–", "–", "–"]
    assert "48 of 48 runs." in text and "Missing" not in text
    # Runs that were asked for by name: the other shares of labels with the other seeds.
    results = {run.name: result(run) for run in all_runs(PLAN, every_seed=True)}
    text = Report(results, PLAN, SEEDS).markdown()
    shares = ["16.0 ± 2.0", "19.0 ± 2.0", "23.5 ± 2.0", "+4.5 ± 0.0", "+4.2", "3"]
    assert rows(text, "20 %")[0] == shares and "78 of 78 runs." in text


def test_what_is_missing_is_shown_as_missing_and_differences_are_paired_by_seed(tmp_path):
    gone = ["10pct-seed1-gd", "10pct-seed0-gd-pr", "10pct-seed1-gd-pr", "10pct-seed2-gd-pr",
            "20pct-seed0-gd"]  # fmt: skip
    results = {run.name: result(run) for run in all_runs(PLAN) if run.name not in gone}
    text = Report(results, PLAN, SEEDS).markdown()
    assert all(name in text.partition("**Missing:**")[2] for name in gone)
    assert rows(text, "SD")[0][1:4:2] == ["+1.0, +1.0", "2"]
    assert rows(text, "PR")[0] == ["–", "–", "–", "0", "missing"]
    assert rows(text, "20 %")[0][1:4] == ["–", "21.5", "–"]
    Report(results, PLAN, SEEDS).draw(tmp_path / "chart.png")
    Report({}, PLAN, SEEDS).draw(tmp_path / "empty.png")
    assert (tmp_path / "chart.png").stat().st_size > (tmp_path / "empty.png").stat().st_size


def test_real_images_are_set_aside_drawn_by_seed_and_left_unlabeled_otherwise(tmp_path):
    folder = tmp_path / "nuclei"
    for split in ("train", "val"):
        (folder / split).mkdir(parents=True)
        ids = range(50)
        images = [{"id": i, "file_name": f"{i}.png", "height": 8, "width": 8} for i in ids]
        for image in images:
            (folder / split / image["file_name"]).touch()
        annotations = [{"id": i + 1, "image_id": i, "category_id": 1} for i in ids]
        content = {"images": images, "annotations": annotations, "categories": []}
        (folder / f"{split}.json").write_text(json.dumps(content))
    data = RealSet("nuclei", tmp_path, tmp_path / "out", dev=True)
    data.prepare()

    def names(path: str) -> set[str]:
        content = json.loads(Path(path).read_text())
        of_labels = {annotation["image_id"] for annotation in content["annotations"]}
        assert of_labels == {image["id"] for image in content["images"]}
        return {image["file_name"] for image in content["images"]}

    asked = (Run(runs.SUPERVISED, percent, seed) for percent, seed in ((10, 0), (10, 1), (100, 0)))
    first, second, all_labels = map(data.overrides, asked)
    aside = names(first["S4M.DATA.VAL"])
    unlabeled = {path.name for path in Path(first["S4M.DATA.UNLABELED"]).iterdir()}
    drawn = [names(values["S4M.DATA.LABELED"]) for values in (first, second, all_labels)]
    assert [len(aside), *map(len, drawn)] == [10, 5, 5, 40] and drawn[0] != drawn[1]
    assert unlabeled == drawn[2] and not aside & unlabeled and drawn[0] | drawn[1] <= unlabeled
    evaluated = RealSet("nuclei", tmp_path, tmp_path / "out", dev=False)
    of_val = names(evaluated.overrides(Run(runs.FULL, 10, 0))["S4M.DATA.VAL"])
    assert of_val == {f"{i}.png" for i in range(50)}


def test_methods_beyond_the_paper_train_their_own_teacher_where_it_distills():
    named = {run.method.slug: run for run in all_runs(PLANS["facades"], (0,))}
    own, best = named["s4m-gate"], named["s4m-best"]
    values = own.overrides(Path("runs"))
    assert own.teacher is None and values["S4M.STAGE"] == "both"
    assert values["S4M.REFINE.GATE"] == "auto" and values["S4M.DISTILL.ENABLED"] == "True"
    assert "S4M.TEACHER.MAX_ITER" not in values and "S4M.TEACHER_WEIGHTS" not in values
    values = best.overrides(Path("runs"))
    assert best.teacher == named["gd"].teacher and values["S4M.STAGE"] == "student"
    assert values["S4M.DISTILL.ENABLED"] == "False" and values["S4M.SAM.ADAPT"] != "0"
    assert float(values["S4M.PSEUDO_LABEL.DUPLICATE_IOU"]) < 1
    cfg = load_config(str(ROOT / "tools" / "ablation_study" / "facades.yaml"), ["SEED", "1"])
    assert cfg.S4M.REFINE.GATE == "off" and cfg.S4M.SAM.ADAPT == 0
