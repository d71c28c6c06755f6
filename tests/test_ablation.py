"""tools/ablation.py: which runs there are, their settings, and the arithmetic of the report."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "datasets"), str(ROOT / "tests")]

from ablation_runs import expected_ap, result  # noqa: E402
from ablation_study import plan, report, runs, times  # noqa: E402
from ablation_study.chart import draw_chart  # noqa: E402
from ablation_study.comparisons import COMPARISONS  # noqa: E402
from ablation_study.figures import Summary, summary  # noqa: E402
from ablation_study.runs import Run, all_runs  # noqa: E402

from s4m_d2.engine.checks.config_checks import config_errors  # noqa: E402
from s4m_d2.engine.config_file import load_config  # noqa: E402
from s4m_d2.engine.stages import run_config, stage_config  # noqa: E402
from s4m_d2.errors import ConfigError  # noqa: E402

CONFIG = str(ROOT / "configs" / "toyscapes_ablation.yaml")
SEEDS = (0, 1, 2)


def config(run: Run):
    """The config of the stage that a run trains, and that of the whole run."""
    options = [text for pair in run.overrides(Path("runs")).items() for text in pair]
    cfg = run_config(load_config(CONFIG, ["MODEL.DEVICE", "cpu", *options]))
    return stage_config(cfg, run.stage), cfg


def rows(text: str, title: str) -> list[list[str]]:
    """The cells after ``title`` of all table rows that begin with it, table by table."""
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    return [found[1:] for found in cells if found and found[0] == title]


def row(text: str, title: str) -> list[str]:
    """The row of the first table that has one of this title."""
    return rows(text, title)[0]


# Which runs there are.


def test_the_study_has_the_runs_that_it_promises():
    found = {(run.percent, run.method.slug): set() for run in all_runs()}
    for run in all_runs():
        found[run.percent, run.method.slug].add(run.seed)
    methods = "supervised gd gd-sd gd-pr gd-sd-pr gd-sd-arp gd-sd-pr-arp".split()
    methods += ["gd-sd-pr-arp-unique"]
    few = "supervised gd gd-sd-pr-arp".split()
    teachers = ["teacher", "teacher-sd"]
    expected = {(10, slug): {0, 1, 2} for slug in methods + teachers}
    expected[100, "supervised"] = {0, 1, 2}
    expected |= {(percent, slug): {0} for percent in (5, 20, 30) for slug in few + teachers}
    assert found == expected
    assert len(all_runs()) == len({run.name for run in all_runs()}) == 48


def test_the_first_seed_comes_first_and_the_other_shares_of_labels_last():
    places = [(run.percent not in (10, 100), run.seed) for run in all_runs((4, 2, 7))]
    order = [(False, 4), (False, 2), (False, 7), (True, 4)]
    assert list(dict.fromkeys(places)) == order
    assert [order.index(place) for place in places] == sorted(order.index(p) for p in places)
    compared = [run.method.slug for run in all_runs() if not run.method.is_teacher]
    assert compared[:3] == ["supervised", "gd", "gd-sd-pr-arp"]


def test_every_run_comes_after_its_teacher_which_runs_with_the_same_stage_one_share():
    done = set()
    for run in all_runs():
        assert run.teacher is None or run.teacher in done
        done.add(run)
    stages = {}
    for run in all_runs():
        if run.method.has_student:
            assert run.teacher.method.distills == run.method.distills
            stages.setdefault((run.percent, run.seed, run.method.distills), set()).add(run.teacher)
    assert all(len(teachers) == 1 for teachers in stages.values())
    assert len(stages) == 12  # of 33 runs with a student


def test_only_named_runs_and_patterns_are_chosen_in_the_order_of_the_study():
    named = plan.chosen_runs(SEEDS, ["5pct-*", "10pct-seed1-gd-pr"])
    assert [run.name for run in named][:2] == ["10pct-seed1-gd-pr", "5pct-seed0-supervised"]
    assert len(named) == 6
    assert plan.chosen_runs((7,)) == all_runs((7,))
    with pytest.raises(ConfigError, match="10pct-seed3-gd.*seeds 0, 1, 2.*--list"):
        plan.chosen_runs(SEEDS, ["10pct-seed0-gd", "10pct-seed3-gd"])


def test_what_is_left_are_runs_without_results_and_the_teachers_that_they_need():
    student, other = Run(runs.GUIDED, 10, 0), Run(runs.PR, 10, 0)
    teacher = student.teacher
    results = {student.name: {}, teacher.name: {}}

    def left(*chosen, weights=True):
        return plan.left_to_train(chosen, results, lambda run: weights)

    assert left(student, teacher) == []
    assert left(student, teacher, weights=False) == []  # nothing needs them
    assert left(student, other) == [other]
    assert left(other, weights=False) == [teacher, other]
    results.clear()
    assert left(other, student) == [teacher, other, student]


# What the runs train.


@pytest.mark.parametrize("run", all_runs((0,)), ids=lambda run: run.name)
def test_settings_of_every_run(run):
    of_stage, cfg = config(run)
    assert config_errors(cfg) == []
    parts = run.method.slug.split("-")
    if run.stage == "student":
        assert cfg.S4M.REFINE.ENABLED == ("pr" in parts)
        assert cfg.S4M.ARP.ENABLED == ("arp" in parts)
        teacher = f"{run.percent}pct-seed0-teacher" + ("-sd" if "sd" in parts else "")
        assert cfg.S4M.TEACHER_WEIGHTS == f"runs/{teacher}/teacher/model_final.pth"
        assert Path(cfg.S4M.TEACHER_WEIGHTS).parents[1].name in {r.name for r in all_runs()}
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
        assert not cfg.S4M.DISTILL.ENABLED
        del cfg["S4M"]
    assert supervised == student
    shorter, _ = config(Run(runs.PLAIN_TEACHER, 10, 2))
    assert shorter.SOLVER.MAX_ITER < student.SOLVER.MAX_ITER


# Times.


def test_estimates_follow_the_runs_that_are_done():
    first, second = Run(runs.GUIDED, 10, 0), Run(runs.GUIDED, 10, 1)
    usual = {m.slug: times.usual_seconds(m, 600) for m in (runs.GUIDED, runs.FULL)}
    clock = times.Clock((300, 600), {})
    assert clock.estimate(first) == usual["gd"]
    assert clock.estimate(Run(runs.PLAIN_TEACHER, 10, 0)) < usual["gd"] / 2
    results = {run.name: result(run, seconds=s) for run, s in ((first, 100.0), (second, 300.0))}
    clock = times.Clock((300, 600), results)
    assert clock.estimate(Run(runs.GUIDED, 5, 0)) == 200.0
    slower = 200.0 / usual["gd"]
    assert clock.estimate(Run(runs.FULL, 10, 0)) == pytest.approx(slower * usual["gd-sd-pr-arp"])


def test_the_estimate_of_a_run_that_was_killed_is_of_what_is_left(tmp_path):
    run, clock = Run(runs.GUIDED, 10, 0), times.Clock((300, 600), {})
    whole = plan.remaining_seconds(run, tmp_path, clock)
    folder = tmp_path / run.name / "student"
    folder.mkdir(parents=True)
    for iteration in (99, 199, 449):
        (folder / f"model_{iteration:07}.pth").touch()
    assert plan.remaining_seconds(run, tmp_path, clock) == pytest.approx(whole / 4)


# The arithmetic.


@pytest.mark.parametrize(
    ("values", "text", "reading"),
    [
        ({}, "–", "missing"),
        ({0: 3.0}, "+3.0", "one seed: no deviation"),
        ({0: 1.0, 1: 2.0, 2: 6.0}, "+3.0 ± 2.6", "gain"),  # deviation √7
        ({0: 0.0, 1: 2.0}, "+1.0 ± 1.4", "within the deviation"),
        ({0: -3.0, 1: -2.0}, "-2.5 ± 0.7", "loss"),
    ],
)
def test_means_sample_deviations_and_their_reading(values, text, reading):
    assert Summary(values).text("+") == text
    assert Summary(values).reading == reading


def test_differences_are_paired_by_seed():
    more, less = Summary({0: 20.0, 1: 30.0, 2: 99.0}), Summary({1: 28.0, 0: 19.0, 3: 0.0})
    assert more.minus(less) == Summary({0: 1.0, 1: 2.0})
    # The seeds differ by much more than the methods do: unpaired, nothing would show.
    assert str(more.minus(less)) == "1.5 ± 0.7"


def test_the_report_by_hand():
    results = {run.name: result(run) for run in all_runs()}
    text = report.markdown(results, SEEDS)
    # AP is that of the method, + 1 for 10 %, + 2 a seed: a deviation of 2.
    assert row(text, "Guided Distillation") == ["18.0 ± 2.0", "36.0 ± 4.0", "18.5 ± 2.0", "3"]
    ceiling = row(text, "supervised, 100 % labels (ceiling)")
    assert ceiling == ["24.0 ± 2.0", "48.0 ± 4.0", "–", "3"]
    gain = ["+1.5 ± 0.0", "+1.5, +1.5, +1.5", "+1.5 ± 0.0", "3"]
    assert row(text, "SD, with PR") == [*gain, "gain, as in the paper"]
    assert row(text, "SD, in the stage-1 teacher")[:3] == ["+1.0 ± 0.0", "+1.0, +1.0, +1.0", "–"]
    assert row(text, "ARP, with SD, without PR")[-1] == "loss, as in the paper"
    assert row(text, "all of S⁴M (− Guided Distillation)")[0] == "+4.5 ± 0.0"
    assert row(text, "20 %") == ["14.0", "17.0", "21.5", "+4.5", "+4.2", "1"]
    assert row(text, "10 %")[3:] == ["+4.5 ± 0.0", "+2.5", "3"]
    as_claimed = [line for line in text.splitlines() if line.startswith("- Loss, as in the paper")]
    assert as_claimed == ["- Loss, as in the paper: ARP, with SD, without PR."]
    own = row(text, "dropping duplicates, with all of S⁴M (not in the paper)")
    assert own[0] == "+0.5 ± 0.0" and own[-1] == "gain"  # of which the paper says nothing
    assert "48 of 48 runs." in text and "Missing" not in text


def test_the_tables_of_classes_and_of_pseudo_labels_by_hand():
    results = {run.name: result(run) for run in all_runs()}
    text = report.markdown(results, SEEDS)
    assert "|  | person | car |" in text.splitlines()
    # means over the seeds: 10 + 1 + 2, and 1 to either side
    assert rows(text, "stage-1 teacher")[1] == ["12.0", "14.0"]
    assert rows(text, "Guided Distillation")[2] == ["– → 5.0", "–", "–", "–", "–"]
    assert [len(rows(text, title)) for title in ("+ SD + ARP (no PR)", "supervised only")] == [3, 2]


def test_what_is_missing_is_shown_as_missing_and_compared_with_nothing(tmp_path):
    gone = ["10pct-seed1-gd", "10pct-seed0-gd-pr", "10pct-seed1-gd-pr", "10pct-seed2-gd-pr",
            "20pct-seed0-gd"]  # fmt: skip
    results = {run.name: result(run) for run in all_runs() if run.name not in gone}
    text = report.markdown(results, SEEDS)
    assert "43 of 48 runs." in text
    assert f"**Missing:** {', '.join(run.name for run in all_runs() if run.name in gone)}." in text
    compared = row(text, "SD")
    assert compared[1] == "+1.0, +1.0" and compared[3] == "2"
    assert row(text, "PR") == ["–", "–", "–", "0", "missing"]
    assert row(text, "20 %")[1:4] == ["–", "21.5", "–"]
    draw_chart(results, SEEDS, tmp_path / "chart.png")
    draw_chart({}, SEEDS, tmp_path / "empty.png")
    assert (tmp_path / "chart.png").stat().st_size > (tmp_path / "empty.png").stat().st_size


def test_a_figure_that_a_result_lacks_is_missing_too():
    run = Run(runs.GUIDED, 10, 0)
    results = {run.name: result(run)}
    results[run.name]["models"]["student"]["AP"] = None
    del results[run.name]["models"]["EMA teacher"]
    assert summary(results, runs.GUIDED, SEEDS).count == 0
    assert summary(results, runs.GUIDED, SEEDS, model="EMA teacher").count == 0
    assert "| Guided Distillation | – |" in report.markdown(results, SEEDS)


def test_the_report_says_when_the_runs_were_made_by_different_code():
    results = {run.name: result(run) for run in all_runs()}
    assert "versions of the code" not in report.markdown(results, SEEDS)
    results["10pct-seed0-gd"]["code"] = ["abc", "def"]
    assert "2 versions of the code** (abc, def)" in report.markdown(results, SEEDS)


def test_each_comparison_is_of_methods_that_differ_by_one_part():
    parts = {method.slug: set(method.slug.split("-")[1:]) for method in runs.METHODS.values()}
    single = [c for c in COMPARISONS if c.title.startswith(("SD", "PR", "ARP"))]
    assert len(single) == 8
    for comparison in single:
        added = parts[comparison.more.slug] - parts[comparison.less.slug]
        assert parts[comparison.more.slug] > parts[comparison.less.slug]
        assert added == {comparison.title.split(",")[0].lower()}


def test_the_stand_in_gives_every_method_another_ap():
    assert len({expected_ap(slug, 10, 0) for slug in runs.METHODS}) == len(runs.METHODS)
