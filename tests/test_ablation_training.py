"""tools/ablation.py with a stand-in for train_net.py: results, resumption, failures, stops."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "datasets"), str(ROOT / "tests")]

import ablation  # noqa: E402
from ablation_runs import expected_ap  # noqa: E402
from ablation_study import setup  # noqa: E402
from ablation_study.training import read_attempts  # noqa: E402

STAND_IN = ROOT / "tests" / "ablation_runs.py"
TEACHER, STUDENT = "10pct-seed0-teacher", "10pct-seed0-gd"
SD_TEACHER, FULL = "10pct-seed0-teacher-sd", "10pct-seed0-gd-sd-pr-arp"
SUPERVISED = "10pct-seed0-supervised"


class Study:
    """An output folder, what the stand-in shall do, and what it was asked."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.data = data
        self.output = folder / "study"
        self._plan = folder / "plan.json"
        self._calls = folder / "calls.txt"
        self.plan()
        os.environ["ABLATION_PLAN"] = str(self._plan)
        os.environ["ABLATION_CALLS"] = str(self._calls)

    def plan(self, **plan) -> None:
        self._plan.write_text(json.dumps(plan))

    def command(self, *arguments: str) -> list[str]:
        return ["--output", str(self.output), "--data", str(self.data), *arguments]

    def run(self, *arguments: str) -> int:
        return ablation.main(self.command(*arguments))

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
    monkeypatch.setenv("ABLATION_PLAN", "")
    monkeypatch.setenv("ABLATION_CALLS", "")
    monkeypatch.setattr(ablation, "TRAIN_NET", STAND_IN)
    return Study(tmp_path, small_data)


def test_runs_are_trained_once_after_their_teachers_and_the_report_is_made(study, capsys):
    assert study.run("--only", FULL, STUDENT, "10pct-seed0-gd-sd") == 0
    assert study.calls() == [TEACHER, STUDENT, SD_TEACHER, FULL, "10pct-seed0-gd-sd"]
    assert study.run("--only", FULL, SUPERVISED) == 0
    assert study.calls() == [SUPERVISED]
    assert study.run("--only", FULL, SUPERVISED) == 0
    assert study.calls() == []
    before = (study.output / "ablation.md").read_text()
    assert "| Guided Distillation | 16.0 | 32.0 | 16.5 | 1 |" in before
    assert "counts train 10, val 2" in before
    for name in ("ablation.md", "ablation.png"):
        (study.output / name).unlink()
    capsys.readouterr()
    assert study.run("--report") == 0
    assert study.calls() == []
    assert (study.output / "ablation.md").read_text() == before
    assert before in capsys.readouterr().out
    assert (study.output / "ablation.png").read_bytes().startswith(b"\x89PNG")


def test_what_a_result_holds(study):
    assert study.run("--only", STUDENT, "--", "SOLVER.BASE_LR", "0.01") == 0
    found = study.results()[STUDENT]
    ap = {name: figures["AP"] for name, figures in found["models"].items()}
    student = expected_ap("gd", 10, 0)
    assert ap == {"stage-1 teacher": 11, "student": student, "EMA teacher": student + 0.5}
    figures = found["models"]["student"]
    assert figures["AP50"] == 2 * student
    assert figures["by class"] == {"person": student - 1, "car": student + 1}
    labels = found["pseudo-labels"]
    # Means over the last 2 of 15 and 3 of 30 logged iterations.
    assert labels["burn-in"] == {"pseudo_labels/per_image": 290, "refinement/fallbacks": 0.25}
    assert labels["end"] == {"pseudo_labels/per_image": 580, "refinement/fallbacks": 0.25}
    assert list(labels["history"]) == [str(i) for i in range(19, 600, 20)]
    assert found["losses"] == {"total_loss": 21}
    assert found["iterations"] == 600 and found["seconds an iteration"] == 0.5
    assert found["settings"]["S4M.TEACHER_WEIGHTS"] == (f"{TEACHER}/teacher/model_final.pth")
    assert found["overrides"][-2:] == ["SOLVER.BASE_LR", "0.01"]
    assert found["data"]["counts"] == {"train": 10, "val": 2}
    assert found["attempts"] == 1 and 0 <= found["seconds"] < 60 and len(found["code"]) == 1
    assert str(study.output) not in json.dumps(found)


def test_a_failed_run_is_named_the_others_go_on_and_it_is_tried_again(study, capsys):
    study.plan(fail=[SD_TEACHER])
    only = ("--only", STUDENT, FULL, SUPERVISED)
    assert study.run(*only) == 1
    assert study.calls() == [SUPERVISED, TEACHER, STUDENT, SD_TEACHER]
    assert set(study.results()) == {SUPERVISED, TEACHER, STUDENT}
    printed = capsys.readouterr().out
    assert "exit status 3" in printed and "the reason why it failed" in printed
    closing = printed[printed.index("Failed:") :]
    assert f"{SD_TEACHER}: failed" in closing and f"{FULL}: it needs {SD_TEACHER}" in closing
    study.plan()
    assert study.run(*only) == 0
    assert study.calls() == [SD_TEACHER, FULL]
    assert study.results()[SD_TEACHER]["attempts"] == 2


def test_a_training_that_leaves_no_results_has_failed(study, monkeypatch, tmp_path, capsys):
    does_nothing = tmp_path / "nothing.py"
    does_nothing.write_text("")
    monkeypatch.setattr(ablation, "TRAIN_NET", does_nothing)
    assert study.run("--only", SUPERVISED) == 1
    assert "no complete results" in capsys.readouterr().out
    assert study.results() == {}


def test_a_teacher_whose_weights_are_gone_is_trained_again(study):
    assert study.run("--only", STUDENT) == 0
    study.calls()
    (study.output / "runs" / TEACHER / "teacher" / "model_final.pth").unlink()
    assert study.run("--only", STUDENT) == 0
    assert study.calls() == []
    assert study.run("--only", STUDENT, "10pct-seed0-gd-pr") == 0
    assert study.calls() == [TEACHER, "10pct-seed0-gd-pr"]


def test_a_run_that_would_not_be_done_in_time_is_not_begun_but_a_shorter_one_is(study, capsys):
    # About 3 and 1.8 minutes; what a run really takes is not what counts here.
    assert study.run("--only", SUPERVISED, TEACHER, "--max-minutes", "2") == 0
    assert study.calls() == [TEACHER]
    assert SUPERVISED in capsys.readouterr().out.split("Left for the next time")[1]


@pytest.mark.parametrize("how", ["wait", "deaf"])  # deaf: too young to save, the signal ends it
def test_at_the_end_of_its_time_a_run_is_saved_and_later_continued(study, monkeypatch, how):
    study.plan(**{how: [TEACHER]})
    monkeypatch.setattr(ablation, "remaining_seconds", lambda *_: 0.0)
    assert study.run("--only", STUDENT, "--max-minutes", "0.03") == 0
    assert study.calls() == [TEACHER]  # and nothing after it
    assert study.results() == {}
    study.plan()
    assert study.run("--only", STUDENT) == 0
    assert study.results()[TEACHER]["attempts"] == 2
    stage = study.output / "runs" / TEACHER / "teacher"
    assert [path.name for path in stage.glob("*.pth")] == ["model_final.pth"]


def test_data_is_made_where_none_is_given_and_missing_data_is_refused(study, capsys, monkeypatch):
    for name, few in (("TRAIN_IMAGES", 20), ("VAL_IMAGES", 3)):
        monkeypatch.setattr(setup, name, few)
    output = str(study.output)
    assert ablation.main(["--output", output, "--only", SUPERVISED]) == 0
    assert study.results()[SUPERVISED]["data"]["counts"] == {"train": 20, "val": 3}
    assert (study.output / "data" / "toyscapes" / "toyscapes.json").exists()
    assert ablation.main(["--output", output, "--data", output, "--only", SUPERVISED]) == 1
    assert "no toyscapes in it. Make it with: python" in capsys.readouterr().err
    assert study.run("--only", SUPERVISED) == 1  # the fixture's, in a folder of runs on another
    assert "data.counts.train was 20 and is 10" in capsys.readouterr().err


def wait_for_checkpoint(study: Study) -> None:
    deadline = time.monotonic() + 60
    while not list(study.output.glob("runs/*/*/model_*.pth")) and time.monotonic() < deadline:
        time.sleep(0.02)


def test_a_stopped_tool_saves_its_run_and_the_next_one_continues_it(study):
    study.plan(wait=[SUPERVISED])

    def stop():
        wait_for_checkpoint(study)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    assert study.run("--only", SUPERVISED) == 75
    thread.join()
    (attempt,) = read_attempts(study.output / "runs" / SUPERVISED)
    assert study.results() == {}
    assert study.run("--only", SUPERVISED) == 0
    assert study.calls() == [SUPERVISED] * 2
    assert study.results()[SUPERVISED]["seconds"] >= attempt["seconds"] > 0


def test_a_training_that_outlives_its_tool_is_left_alone(study, capsys):
    study.plan(wait=[SUPERVISED])
    code = f"import ablation; ablation.TRAIN_NET = {str(STAND_IN)!r}; ablation.main()"
    paths = os.pathsep.join([str(ROOT / "tools"), *sys.path])
    process = subprocess.Popen(
        [sys.executable, "-c", code, *study.command("--only", SUPERVISED)],
        env=os.environ | {"PYTHONPATH": paths},
    )
    wait_for_checkpoint(study)
    process.kill()
    process.wait()
    assert study.run("--only", SUPERVISED, STUDENT) == 0
    assert study.calls() == [SUPERVISED, TEACHER, STUDENT]
    assert "another process trains in" in capsys.readouterr().out
    output = (study.output / "runs" / SUPERVISED / "output.txt").read_text()
    os.kill(int(output.split()[-1]), signal.SIGTERM)
    deadline = time.monotonic() + 30
    while SUPERVISED not in study.results() and time.monotonic() < deadline:
        assert study.run("--only", SUPERVISED) == 0
    assert study.results()[SUPERVISED]["attempts"] == 2


def test_the_seconds_of_a_killed_attempt_are_those_until_its_last_words(tmp_path):
    began = {"started": "2026-01-02T03:04:05+00:00", "code": "abc"}
    (tmp_path / "attempts.json").write_text(json.dumps([{**began, "seconds": 7.0}, began]))
    (tmp_path / "output.txt").touch()
    os.utime(tmp_path / "output.txt", times=(0, 1767323045 + 90))  # the start and 90 s
    assert [attempt["seconds"] for attempt in read_attempts(tmp_path)] == [7.0, 90.0]


def test_an_output_folder_holds_runs_of_one_configuration(study, capsys):
    assert study.run("--only", SUPERVISED) == 0
    study.calls()
    assert study.run("--only", SUPERVISED, "--", "SOLVER.MAX_ITER", "700") == 1
    assert "SOLVER.MAX_ITER was 600 and is 700" in capsys.readouterr().err
    settings = json.loads((study.output / "study.json").read_text())
    settings["config"]["S4M"]["KEY_OF_ANOTHER_VERSION"] = 1
    (study.output / "study.json").write_text(json.dumps(settings))
    assert study.run("--only", SUPERVISED) == 0
    assert study.calls() == []


def test_listing_trains_and_writes_nothing(study, capsys):
    assert study.run("--list", "--only", STUDENT, SUPERVISED) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in printed[:-1]] == [
        ["missing", name] for name in (SUPERVISED, TEACHER, STUDENT)
    ]
    assert printed[-1].startswith("0 done, 3 missing")
    assert not study.output.exists() and study.calls() == []
    assert study.run("--only", SUPERVISED) == 0
    capsys.readouterr()
    assert study.run("--list", "--only", STUDENT, SUPERVISED) == 0
    printed = capsys.readouterr().out
    assert f"done     {SUPERVISED}" in printed and "AP 13.0" in printed
    assert "1 done, 2 missing" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--report"], "holds no results of the seeds 0, 1, 2"),
        (["--only", "10pct-seed9-gd"], "no run of the seeds 0, 1, 2"),
        (["--", "SOLVER.MAXITER", "3"], "SOLVER.MAX_ITER"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(study, capsys, arguments, message):
    assert study.run(*arguments) == 1
    assert message in capsys.readouterr().err
    assert not study.output.exists()


def test_a_damaged_result_is_named(study, capsys):
    assert study.run("--only", SUPERVISED) == 0
    path = study.output / "results" / f"{SUPERVISED}.json"
    path.write_text(path.read_text()[:50])
    assert study.run("--report") == 1
    error = capsys.readouterr().err
    assert str(path) in error and "Remove it" in error
    path.unlink()
    assert study.run("--only", SUPERVISED) == 0
    assert SUPERVISED in study.results()
