"""tools/ablation.py: its runs, their settings, the report's arithmetic; trainings by a stand-in."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "datasets"), str(ROOT / "tests")]

import ablation  # noqa: E402
from ablation_runs import expected_ap, result  # noqa: E402
from ablation_study import report, runs  # noqa: E402
from ablation_study.chart import draw_chart  # noqa: E402
from ablation_study.report import Summary  # noqa: E402
from ablation_study.runs import Run, all_runs  # noqa: E402

from s4m_d2.engine.checks.config_checks import config_errors  # noqa: E402
from s4m_d2.engine.config_file import load_config  # noqa: E402
from s4m_d2.engine.stages import run_config, stage_config  # noqa: E402

CONFIG = str(ROOT / "configs" / "toyscapes_ablation.yaml")
SEEDS = (0, 1, 2)
TEACHER, STUDENT = "10pct-seed0-teacher", "10pct-seed0-gd"
SD_TEACHER, FULL = "10pct-seed0-teacher-sd", "10pct-seed0-gd-sd-pr-arp"
SUPERVISED = "10pct-seed0-supervised"


def config(run: Run):
    """The config of the stage that a run trains, and that of the whole run."""
    options = [text for pair in run.overrides(Path("runs")).items() for text in pair]
    cfg = run_config(load_config(CONFIG, ["MODEL.DEVICE", "cpu", *options]))
    return stage_config(cfg, run.stage), cfg


def rows(text: str, title: str) -> list[list[str]]:
    """The cells after ``title`` of all table rows that begin with it, table by table."""
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    return [found[1:] for found in cells if found and found[0] == title]


def test_the_study_has_the_runs_that_it_promises_each_after_its_teacher():
    found, done = {}, set()
    for run in all_runs():
        found.setdefault((run.percent, run.method.slug), set()).add(run.seed)
        assert run.teacher is None or run.teacher in done
        done.add(run)
        if run.method.has_student:
            assert ("sd" in run.method.parts) == run.teacher.method.slug.endswith("-sd")
    methods = "supervised gd gd-sd gd-pr gd-sd-pr gd-sd-arp gd-sd-pr-arp gd-sd-pr-arp-unique"
    teachers = ["teacher", "teacher-sd"]
    few = ["supervised", "gd", "gd-sd-pr-arp", *teachers]
    expected = {(10, slug): {0, 1, 2} for slug in (*methods.split(), *teachers)}
    expected[100, "supervised"] = {0, 1, 2}
    expected |= {(percent, slug): {0} for percent in (5, 20, 30) for slug in few}
    assert found == expected
    assert len(all_runs()) == len(done) == 48


def test_only_named_runs_are_chosen_and_trained_with_the_teachers_that_they_need(tmp_path):
    named = runs.chosen_runs(SEEDS, ["5pct-*", "10pct-seed1-gd-pr"])
    assert [run.name for run in named][:2] == ["10pct-seed1-gd-pr", "5pct-seed0-supervised"]
    assert len(named) == 6
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
    for run in all_runs((0,))[:12]:
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


@pytest.mark.parametrize(
    ("values", "text", "reading"),
    [
        ({}, "–", "missing"),
        ({0: 3.0}, "+3.0", "one seed: no deviation"),
        ({0: 1.0, 1: 2.0, 2: 6.0}, "+3.0 ± 2.6", "gain, as in the paper"),  # deviation √7
        ({0: 0.0, 1: 2.0}, "+1.0 ± 1.4", "within the deviation"),
        ({0: -3.0, 1: -2.0}, "-2.5 ± 0.7", "loss, not as in the paper"),
    ],
)
def test_means_sample_deviations_and_their_reading(values, text, reading):
    assert Summary(values).text("+") == text
    assert Summary(values).reading(1) == reading


def test_the_report_by_hand():
    results = {run.name: result(run) for run in all_runs()}
    text = report.markdown(results, SEEDS)
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


def test_what_is_missing_is_shown_as_missing_and_differences_are_paired_by_seed(tmp_path):
    gone = ["10pct-seed1-gd", "10pct-seed0-gd-pr", "10pct-seed1-gd-pr", "10pct-seed2-gd-pr",
            "20pct-seed0-gd"]  # fmt: skip
    results = {run.name: result(run) for run in all_runs() if run.name not in gone}
    text = report.markdown(results, SEEDS)
    missing = ", ".join(run.name for run in all_runs() if run.name in gone)
    assert f"**Missing:** {missing}." in text
    assert rows(text, "SD")[0][1:4:2] == ["+1.0, +1.0", "2"]
    assert rows(text, "PR")[0] == ["–", "–", "–", "0", "missing"]
    assert rows(text, "20 %")[0][1:4] == ["–", "21.5", "–"]
    draw_chart(results, SEEDS, tmp_path / "chart.png")
    draw_chart({}, SEEDS, tmp_path / "empty.png")
    assert (tmp_path / "chart.png").stat().st_size > (tmp_path / "empty.png").stat().st_size


class Study:
    """An output folder, what the stand-in shall do, and what it was asked."""

    def __init__(self, folder: Path, data: Path, monkeypatch) -> None:
        self.data, self.output = data, folder / "study"
        self._plan, self._calls = folder / "plan.json", folder / "calls.txt"
        self.plan()
        monkeypatch.setenv("ABLATION_PLAN", str(self._plan))
        monkeypatch.setenv("ABLATION_CALLS", str(self._calls))
        monkeypatch.setattr(ablation, "TRAIN_NET", ROOT / "tests" / "ablation_runs.py")

    def plan(self, **plan) -> None:
        self._plan.write_text(json.dumps(plan))

    def run(self, *arguments: str) -> int:
        places = ["--output", str(self.output), "--data", str(self.data)]
        return ablation.main([*places, *arguments])

    def calls(self) -> list[str]:
        """The runs that were started since the last question."""
        found = self._calls.read_text().split() if self._calls.exists() else []
        self._calls.unlink(missing_ok=True)
        return found

    def results(self) -> dict[str, dict]:
        files = (self.output / "results").glob("*")
        return {path.stem: json.loads(path.read_text()) for path in files}


@pytest.fixture
def study(tmp_path, small_data, monkeypatch):
    return Study(tmp_path, small_data, monkeypatch)


def test_runs_are_trained_once_after_their_teachers_and_the_report_is_made(study, capsys):
    assert study.run("--list", "--only", STUDENT) == 0
    assert "0 done, 2 missing" in capsys.readouterr().out and not study.output.exists()
    assert study.run("--only", FULL, STUDENT) == 0
    assert study.calls() == [TEACHER, STUDENT, SD_TEACHER, FULL]
    assert study.run("--only", FULL, SUPERVISED) == 0
    assert study.calls() == [SUPERVISED]
    before = (study.output / "ablation.md").read_text()
    assert "| Guided Distillation | 16.0 | 32.0 | 16.5 | 1 |" in before
    (study.output / "ablation.md").unlink()
    assert study.run("--only", FULL) == 0 and study.calls() == []
    assert (study.output / "ablation.md").read_text() == before
    assert study.run("--list", "--only", STUDENT, "10pct-seed1-supervised") == 0
    assert "2 done, 1 missing" in capsys.readouterr().out
    found, student = study.results()[STUDENT], expected_ap("gd", 10, 0)
    ap = {name: figures["AP"] for name, figures in found["models"].items()}
    assert ap == {"stage-1 teacher": 11, "student": student, "EMA teacher": student + 0.5}
    assert found["models"]["student"]["by class"] == {"person": student - 1, "car": student + 1}
    # Means over the last 2 of 15 and 3 of 30 logged iterations.
    ends = [found["pseudo-labels"][phase] for phase in ("burn-in", "end")]
    assert ends == [{"pseudo_labels/per_image": 290}, {"pseudo_labels/per_image": 580}]
    assert found["iterations"] == 600 and found["data"]["counts"] == {"train": 10, "val": 2}
    assert found["attempts"] == 1 and 0 <= found["seconds"] < 60
    assert str(study.output) not in json.dumps(found)


def test_a_failed_run_is_named_the_others_go_on_and_it_is_tried_again(study, capsys):
    study.plan(fail=[SD_TEACHER])
    only = ("--only", STUDENT, FULL, SUPERVISED)
    assert study.run(*only) == 1
    assert set(study.results()) == {SUPERVISED, TEACHER, STUDENT}
    printed = capsys.readouterr().out
    assert "the reason why it failed" in printed and f"{FULL}: it needs {SD_TEACHER}" in printed
    study.plan()
    study.calls()
    assert study.run(*only) == 0
    assert study.calls() == [SD_TEACHER, FULL]
    assert study.results()[SD_TEACHER]["attempts"] == 2


def test_a_run_out_of_time_is_saved_and_later_continued(study):
    study.plan(wait=[TEACHER])
    assert study.run("--only", STUDENT, "--max-minutes", "0.02") == 0
    assert study.calls() == [TEACHER] and study.results() == {}
    assert study.run("--only", STUDENT) == 0
    assert study.results()[TEACHER]["attempts"] == 2
    stage = study.output / "runs" / TEACHER / "teacher"
    assert [path.name for path in stage.glob("*.pth")] == ["model_final.pth"]


def test_mistakes_are_named_and_nothing_is_written(study, capsys):
    for arguments, message in (
        (["--only", "10pct-seed9-gd"], "10pct-seed9-gd"),
        (["--", "SOLVER.MAXITER", "3"], "SOLVER.MAX_ITER"),
        (["--data", str(ROOT / "tests")], "make_toyscapes.py"),
    ):
        assert study.run(*arguments) == 1
        assert message in capsys.readouterr().err
        assert not study.output.exists()
    assert study.run("--only", SUPERVISED) == 0  # the folder holds runs of one configuration
    assert study.run("--only", SUPERVISED, "--", "SOLVER.MAX_ITER", "700") == 1
    assert "SOLVER.MAX_ITER" in capsys.readouterr().err
    path = study.output / "results" / f"{SUPERVISED}.json"
    path.write_text(path.read_text()[:50])
    assert study.run("--only", SUPERVISED) == 1
    assert str(path) in capsys.readouterr().err
