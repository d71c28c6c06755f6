"""The whole page, from the folder of a run: what it says, and what it must not hold."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from test_curves import write_lines

from s4m_d2.report import run as run_module
from s4m_d2.report import write_report

VOID = {"meta", "img", "br", "link", "input", "hr"}
CONFIG = {
    "DATASETS": {"TRAIN": ["a_10pct"], "TEST": ["a_val"]},
    "MODEL": {"DEVICE": "cpu"},
    "SOLVER": {"MAX_ITER": 800},
    "S4M": {"BURN_IN": 400, "TEACHER": {"MAX_ITER": 300}, "ARP": {"ENABLED": False}},
}


class Page(HTMLParser):
    """Checks that elements are nested; collects tags, attributes, texts and rows of tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.texts, self.rows, self._open = [], [], [], []
        self.feed(text)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self._open and self._open[-1] == tag, (tag, self._open)
        self._open.pop()

    def handle_data(self, data):
        if "style" in self._open:
            return
        self.texts.append(data)
        if {"td", "th"} & set(self._open):
            self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def row(self, first: str) -> list[str]:
        [row] = [row for row in self.rows if row and row[0].split(" best")[0] == first]
        return row[1:]


def student_record(iteration: int, **more) -> dict:
    record = {"iteration": iteration, "total_loss": 9.0, "loss_ce": 1.0, "loss_mask_0": 2.0}
    record |= {"unsup/loss_ce": 6.0, "pseudo_labels/per_image": 4.5, "lr": 0.001, "time": 0.5}
    return record | more


def make_run(folder: Path, config: dict | None = CONFIG, *, metrics: bool = False) -> Path:
    """A complete run of both stages; drawing the curves of ``metrics`` takes a second."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    teacher = {"segm": {"AP": 20.25, "AP50": 37.0, "AP-car": 30.0, "AP-bus": 10.5}}
    student = {
        "segm": {"AP": 27.0, "AP50": 46.9, "AP-car": 28.5, "AP-bus": None},
        "teacher": {"segm": {"AP": 26.6, "AP50": 45.8, "AP-car": 40.0, "AP-bus": 5.0}},
    }
    for name, results, iterations in (("teacher", teacher, 300), ("student", student, 800)):
        (folder / name).mkdir()
        results["iterations"] = iterations
        (folder / name / "results.json").write_text(json.dumps(results))
        (folder / name / "model_final.pth").touch()
    if metrics:
        records = [{"iteration": i, "total_loss": 5.0, "loss_ce": 5.0} for i in range(19, 300, 20)]
        write_lines(folder / "teacher" / "metrics.json", records)
        records = [student_record(i) for i in range(19, 800, 20)]
        write_lines(folder / "student" / "metrics.json", records)
    return folder


def page_of(folder) -> tuple[str, Page]:
    text = Path(write_report(str(folder))).read_text(encoding="utf-8")
    return text, Page(text)


def draw(path: Path, shade: int, size=(60, 40)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size[::-1], 3), shade, dtype=np.uint8)).save(path)


PICTURE, CHART = "data:image/jpeg;base64,", "data:image/svg+xml;base64,"


def images(page: Page, kind: str = PICTURE) -> list[dict[str, str]]:
    return [a for tag, a in page.tags if tag == "img" and a["src"].startswith(kind)]


@pytest.fixture
def run(tmp_path) -> Path:
    """A complete run without curves."""
    return make_run(tmp_path / "run")


def test_a_complete_run_has_its_tables_settings_and_curves(tmp_path):
    folder = make_run(tmp_path / "run", metrics=True)
    (folder / "run.json").write_text('{"labeled data": "40 images", "torch": "2.4"}')
    _, page = page_of(folder)
    assert page.row("stage-1 teacher") == ["20.2", "37.0"]
    assert page.row("student") == ["27.0", "46.9"]
    assert page.row("EMA teacher") == ["26.6", "45.8"]
    assert page.row("car") == ["30.0", "28.5", "40.0", "−1.5"]
    assert page.row("bus") == ["10.5", "–", "5.0", "–"]
    [best] = [row[0] for row in page.rows if row and row[0].endswith("best")]
    assert best == "student best"
    assert "+6.8" in page.texts  # 27.0 - 20.25
    assert page.row("S4M.TEACHER.MAX_ITER") == ["300"]
    assert page.row("S4M.ARP.ENABLED") == ["False"]
    assert page.row("DATASETS.TRAIN") == ["a_10pct"]
    assert page.row("labeled data") == ["40 images"] and page.row("torch") == ["2.4"]
    for text in ("Loss on pseudo-labels", "Pseudo-labels", "Learning rate"):
        assert text in page.texts
    assert (
        "800 iterations, 2 per second" in page.text and "≈ 0:06:40" in page.texts
    )  # half a second
    legend = [attributes["class"] for tag, attributes in page.tags if tag == "i"]
    assert legend == ["c0", "c1", "c2", "c0", "c1", "c0", "c0", "c0", "c0", "c0", "c0"]
    assert len(images(page, CHART)) == 8


def test_fine_tuning_is_compared_with_the_student(tmp_path):
    config = CONFIG | {"S4M": {"FINETUNE": {"MAX_ITER": 50}}}
    folder = make_run(tmp_path / "run", config) / "finetune"
    assert "complete" not in page_of(folder.parent)[1].texts
    folder.mkdir()
    (folder / "results.json").write_text('{"iterations": 50, "segm": {"AP": 28.5, "AP50": 47.0}}')
    (folder / "model_final.pth").touch()
    _, page = page_of(folder.parent)
    assert page.row("fine-tuned student") == ["28.5", "47.0"] and "complete" in page.texts
    assert "+1.5" in page.texts and "+6.8" in page.texts  # against the student, and the student's


def test_the_page_fetches_and_runs_nothing(tmp_path):
    folder = make_run(tmp_path / "run", metrics=True)
    draw(folder / "student/figures/predictions_0000800.png", 90)
    text, page = page_of(folder)
    policy = [a["content"] for tag, a in page.tags if a.get("http-equiv")]
    assert len(policy) == 1 and policy[0].startswith("default-src 'none'")
    assert "script" not in policy[0].replace("default-src", "") and "http" not in policy[0]
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "object", "embed", "form", "base"}
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "srcset", "poster", "data", "xlink:href"):
                assert value.startswith((PICTURE, CHART, "#")), (tag, value[:50])
    assert not re.search(r"https?:|url\((?!#)|@import", text)
    assert images(page)


def test_texts_of_the_user_are_texts(tmp_path):
    evil = '<img src=x onerror="alert(1)">&\'\u2028\x1b{{ 7 * 7 }}'
    config = {"DATASETS": {"TRAIN": [evil]}, "MODEL": {"DEVICE": "</pre></script>" + evil}}
    folder = make_run(tmp_path / "<b>run&", CONFIG | config)
    results = {"segm": {"AP": 1.0, f"AP-{evil}": 2.0, "AP-" + "long " * 60: 3.0}}
    (folder / "student" / "results.json").write_text(json.dumps({**results, evil: results}))
    write_lines(folder / "student/metrics.json", [student_record(5, **{f"loss_{evil}": 1.0})])
    (folder / "run.json").write_text(json.dumps({"torch": evil}))
    _, page = page_of(folder)
    shown = evil.replace("\u2028", "\\u2028").replace("\x1b", "\\x1b")
    places = [shown, f"loss_{shown}", f"student, {shown}"]
    assert all(place in page.text for place in places)
    assert page.row("torch") == [shown] and page.row("DATASETS.TRAIN") == [shown]
    assert "S4M run: <b>run&" in page.texts and "script" not in {tag for tag, _ in page.tags}


def test_a_run_under_way_says_how_far_it_is(run):
    for name in ("model_final.pth", "results.json"):
        (run / "student" / name).unlink()
    records = [student_record(i) for i in (19, 39, 59, 39)]
    write_lines(run / "student" / "metrics.json", records, '{"iteration": 79, "to')
    _, page = page_of(run)
    assert "not complete" in page.texts and "60 of 800" in page.text
    assert page.row("stage-1 teacher") == ["20.2", "37.0"]


def test_a_run_that_was_killed_in_its_last_evaluation_is_not_complete(run):
    assert "complete" in page_of(run)[1].texts
    results = run / "student" / "results.json"
    results.write_text(results.read_text().replace("800", "760"))  # of an earlier evaluation
    write_lines(run / "student" / "metrics.json", [student_record(779)])
    _, page = page_of(run)
    assert "not complete" in page.texts and "780 of 800" in page.text


def test_what_is_not_there_is_said(tmp_path):
    folder = tmp_path / "run"
    (folder / "teacher").mkdir(parents=True)
    (folder / "config.yaml").write_text("DATASETS: {TEST: []}\nS4M: {STAGE: both}\n")
    (folder / "teacher" / "results.json").write_text('{"segm": ')
    (folder / "teacher" / "metrics.json").touch()
    (folder / "run.json").write_text("[1]")
    _, page = page_of(folder)
    for said in ("no records yet", "DATASETS.TEST", "No pictures"):
        assert said in page.text


def test_a_config_that_is_none_costs_the_settings_only(tmp_path):
    folder = make_run(tmp_path / "run", None)
    for config in (": [", "- 1\n", "S4M: 5\nDATASETS: {TRAIN: 3}\n", "[" * 1000, "a: !!bool x"):
        (folder / "config.yaml").write_text(config)
        assert page_of(folder)[1].row("student") == ["27.0", "46.9"]


def test_the_gallery_has_the_latest_of_each_kind_once(run, monkeypatch):
    for shade, name in enumerate(("arp_0000040", "arp_0000080", "predictions_0000080")):
        draw(run / "student/figures" / f"{name}.png", 50 * shade)
    for stage in ("teacher", "student"):
        draw(run / stage / "figures" / "labeled_0000040.png", 200)
    (run / "student/figures/views_0000040.png").write_bytes(b"no picture")
    (run / "student/figures/notes.png").touch()
    Image.new("RGB", (9, 9)).save(run / "student/figures/similarity_0000040.png", format="gif")
    assert [image["alt"] for image in images(page_of(run)[1])] == [
        "Stage 2: student · predictions after 80 iterations",
        "Stage 2: student · ARP after 80 iterations",
        "Stage 2: student · labeled images and augmentation after 40 iterations",
    ]
    monkeypatch.setattr(run_module, "MOST_PICTURES", 2)
    assert len(images(page_of(run)[1])) == 2
