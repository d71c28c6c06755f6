"""The whole page, from the folder of a run: what it says, and what it must not hold."""

import copy
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from s4m_d2.engine.command.run_report import write_report
from s4m_d2.errors import DatasetError
from s4m_d2.report import pictures

sys.path.insert(0, str(Path(__file__).parent))
from report_pages import CONFIG, Page, make_run, student_record, write_lines  # noqa: E402


def page_of(folder) -> tuple[str, Page]:
    text = Path(write_report(str(folder))).read_text(encoding="utf-8")
    return text, Page(text)


def draw(path: Path, shade: int, size=(60, 40)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size[::-1], 3), shade, dtype=np.uint8)).save(path)


def test_a_complete_run_has_its_tables_settings_and_curves(tmp_path):
    text, page = page_of(make_run(tmp_path / "run"))
    assert "complete Every stage was trained to its end." in page.text
    assert page.row("stage-1 teacher") == ["20.2", "37.0"]
    assert page.row("student") == ["27.0", "46.9"]
    assert page.row("EMA teacher") == ["26.6", "45.8"]
    assert page.row("car") == ["30.0", "28.5", "40.0", "−1.5"]
    assert page.row("bus") == ["10.5", "–", "5.0", "–"]
    [best] = [row[0] for row in page.rows if row and row[0].endswith("best")]
    assert best == "student best"
    assert "+6.8" in page.texts  # 27.0 - 20.25
    assert page.row("stage 1") == ["300 iterations of 4 labeled images"]
    assert page.row("stage 2") == ["800 iterations of 4 labeled and 4 unlabeled images"]
    assert page.row("exchange of instances (ARP)") == ["off"]
    assert page.row("structural distillation (SD)") == ["on, weight 1.0"]
    for title in ("Loss on pseudo-labels", "Pseudo-labels", "Learning rate", "burn-in ends"):
        assert title in page.texts
    # 800 iterations of half a second.
    assert "training of the student: 800 iterations, 2 a second" in page.text
    assert "≈ 7 min" in page.texts
    assert text.count("class='swatch'") == 11  # names in legends


def test_the_page_fetches_and_runs_nothing(tmp_path):
    make_run(tmp_path / "run")
    draw(tmp_path / "run/student/figures/predictions_0000800.png", 90)
    text, page = page_of(tmp_path / "run")
    policy = [a["content"] for tag, a in page.tags if a.get("http-equiv")]
    assert len(policy) == 1 and policy[0].startswith("default-src 'none'")
    assert "script" not in policy[0].replace("default-src", "") and "http" not in policy[0]
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "object", "embed", "form", "base"}
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "srcset", "poster", "data", "xlink:href"):
                assert value.startswith(("data:image/jpeg;base64,", "#")), (tag, value[:50])
    assert not re.search(r"https?:|url\(|@import", text)
    assert any(tag == "img" for tag, _ in page.tags)


def test_texts_of_the_user_are_texts(tmp_path):
    evil = '<img src=x onerror="alert(1)">&\'\u2028'
    config = copy.deepcopy(CONFIG)
    config["DATASETS"]["TRAIN"] = [evil]
    config["MODEL"]["DEVICE"] = "</pre></script>" + evil
    folder = make_run(tmp_path / "<b>run&", config)
    results = {"segm": {"AP": 1.0, f"AP-{evil}": 2.0, "AP-" + "long " * 60: 3.0}}
    (folder / "student" / "results.json").write_text(json.dumps(results))
    write_lines(folder / "student/metrics.json", [student_record(5, **{f"loss_{evil}": 1.0})])
    (folder / "log.txt").write_text(
        f"[11/21 12:52:37] x INFO: Checked before training:\nitem  finding\n----  -------\n{evil}\n"
    )
    _, page = page_of(folder)
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert evil.replace("\u2028", "\\u2028") in page.text
    assert "S4M run: <b>run&" in page.texts


def test_a_run_under_way_says_how_far_it_is(tmp_path):
    folder = make_run(tmp_path / "run")
    for name in ("model_final.pth", "results.json"):
        (folder / "student" / name).unlink()
    records = [student_record(i) for i in (19, 39, 59, 39)]
    write_lines(folder / "student" / "metrics.json", records, '{"iteration": 79, "to')
    _, page = page_of(folder)
    assert "not complete Under way, or stopped." in page.text
    assert "Stage 2: student: 60 of 800 iterations" in page.text
    assert "1 line of metrics.json could not be read." in page.text
    assert page.row("stage-1 teacher") == ["20.2", "37.0"]


def test_what_is_not_there_is_said(tmp_path):
    folder = tmp_path / "run"
    (folder / "teacher").mkdir(parents=True)
    (folder / "config.yaml").write_text("DATASETS: {TEST: []}\nS4M: {STAGE: both}\n")
    (folder / "teacher" / "results.json").write_text('{"segm": ')
    (folder / "teacher" / "metrics.json").touch()
    _, page = page_of(folder)
    for said in (
        "no records yet",
        "No AP: the config names no validation set (DATASETS.TEST).",
        "There are no metrics yet.",
        "There is no folder student in 'run': this stage has not begun.",
        "results.json of this stage cannot be read.",
        "No pictures.",
    ):
        assert said in page.text


@pytest.mark.parametrize(
    "config",
    [
        ": [",
        "- 1\n- 2\n",
        "\x00",
        "S4M: 5\nDATASETS: {TRAIN: 3}\n",
        *("a: !!bool x", "a: !!timestamp x", 'a: !!int ""', "a: !!set [1]"),
        *(f"SOLVER: {{MAX_ITER: {n}}}\n" for n in (".nan", ".inf", "-5", "1e300", "1" + "0" * 400)),
        "S4M: {BURN_IN: .inf, TEACHER: {MAX_ITER: .nan}}",
    ],
)
def test_a_config_that_is_none_costs_the_settings_only(tmp_path, config):
    folder = make_run(tmp_path / "run", None)
    (folder / "config.yaml").write_text(config)
    _, page = page_of(folder)
    assert page.row("student") == ["27.0", "46.9"]


def test_numbers_beyond_all_sense_are_left_out(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "student" / "model_final.pth").unlink()
    huge = 10**400
    results = {"segm": {"AP": huge, "AP50": -huge, "AP-car": math.inf, "AP-bus": "x"}}
    (folder / "student" / "results.json").write_text(json.dumps(results))
    values = (1e300, 1e308, -1e300, 5e-324, huge, -huge, math.nan, "text", None, True, [1])
    names = ("total_loss", "loss_ce", "time", "segm/AP", "train/bad_steps", "lr")
    records = [student_record(i, **dict.fromkeys(names, v)) for i, v in enumerate(values)]
    write_lines(folder / "student" / "metrics.json", records)
    _, page = page_of(folder)
    assert page.row("student") == ["–", "–"]
    assert page.row("car") == ["30.0", "–", "–"]


def test_no_model_without_ap_is_the_best(tmp_path):
    folder = make_run(tmp_path / "run")
    for name in ("teacher", "student"):
        (folder / name / "results.json").write_text('{"segm": {"AP": 0.0}}')
    assert page_of(folder)[1].row("student") == ["0.0"]
    assert "class='tag'>best" not in (folder / "report.html").read_text().replace('"', "'")


def test_a_folder_without_a_run_is_refused_and_left_alone(tmp_path):
    with pytest.raises(DatasetError, match="holds no run"):
        write_report(str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_results_on_several_data_sets_are_told_apart(tmp_path):
    folder = make_run(tmp_path / "run")
    results = {"x": {"segm": {"AP": 1.0}}, "y": {"segm": {"AP": 2.0}}}
    results["teacher"] = {"x": {"segm": {"AP": 3.0}}}
    (folder / "student" / "results.json").write_text(json.dumps(results))
    _, page = page_of(folder)
    assert page.row("student, y")[0] == "2.0"
    assert page.row("EMA teacher, x")[0] == "3.0"


@pytest.mark.parametrize(("count", "opened"), [(1, True), (80, False)])
def test_classes_are_folded_away_where_they_are_many(tmp_path, count, opened):
    folder = make_run(tmp_path / "run")
    for name in ("teacher", "student"):
        segm = {"AP": 5.0, **{f"AP-class {k}": float(k) for k in range(count)}}
        (folder / name / "results.json").write_text(json.dumps({"segm": segm}))
    _, page = page_of(folder)
    assert page.row(f"class {count - 1}") == [f"{count - 1}.0"] * 2 + ["0.0"]
    first = next(attributes for tag, attributes in page.tags if tag == "details")
    assert ("open" in first) == opened


def test_ap_of_both_models_is_a_curve_beside_the_stage_one_teacher(tmp_path):
    folder = make_run(tmp_path / "run")
    more = [{}, {"segm/AP": 10.0}, {"segm/AP": 20.0, "teacher/segm/AP": 30.0}]
    records = [student_record(100 * i + 100, **values) for i, values in enumerate(more)]
    write_lines(folder / "student" / "metrics.json", records)
    text, _ = page_of(folder)
    svg = text[text.index("<title>Mask AP while the student is trained") :]
    svg = svg[: svg.index("</svg>")]
    # Iterations 200 and 300 are at 60 and 442; AP 0 to 30 at 200 to 38.
    assert 'd="M60.0 146.0 442.0 92.0"' in svg
    assert 'cx="442.0" cy="38.0"' in svg
    assert "stage-1 teacher, at its end from 20.25 to 20.25" in svg


def test_a_long_run_has_a_small_page(tmp_path):
    folder = make_run(tmp_path / "run")
    records = [student_record(i, loss_dice=float(i % 9)) for i in range(0, 200_000, 20)]
    write_lines(folder / "student" / "metrics.json", records)
    text, _ = page_of(folder)
    assert len(text.encode()) < 1_000_000


def test_the_gallery_has_the_latest_of_each_kind_once(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "run")
    for shade, name in enumerate(("arp_0000040", "arp_0000080", "predictions_0000080")):
        draw(folder / "student/figures" / f"{name}.png", 50 * shade)
    for stage in ("teacher", "student"):
        draw(folder / stage / "figures" / "labeled_0000040.png", 200)
    (folder / "student/figures/views_0000040.png").write_bytes(b"no picture")
    (folder / "student/figures/notes.png").touch()
    Image.new("RGB", (9, 9)).save(folder / "student/figures/similarity_0000040.png", format="gif")
    _, page = page_of(folder)
    assert [a["alt"] for tag, a in page.tags if tag == "img"] == [
        "Stage 2: student · predictions after 80 iterations",
        "Stage 2: student · ARP after 80 iterations",
        "Stage 2: student · labeled images and augmentation after 40 iterations",
    ]
    monkeypatch.setattr(pictures, "MOST_PICTURES", 2)
    _, page = page_of(folder)
    assert len([1 for tag, _ in page.tags if tag == "img"]) == 2


def test_no_folder_of_figures_is_no_gallery(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "student" / "figures").touch()
    (folder / "teacher" / "figures").symlink_to("figures")
    assert "No pictures." in page_of(folder)[1].text


def test_large_pictures_are_made_smaller_and_bytes_are_bounded(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "run")
    draw(folder / "student/figures/predictions_0000800.png", 7, size=(3200, 800))
    _, page = page_of(folder)
    [image] = [a for tag, a in page.tags if tag == "img"]
    assert (image["width"], image["height"]) == ("1600", "400")
    monkeypatch.setattr(pictures, "MOST_BYTES", 100)
    _, page = page_of(folder)
    assert not [1 for tag, _ in page.tags if tag == "img"]
