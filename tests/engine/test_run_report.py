"""The report at the end of a run: when it is written, and that it costs no training."""

import json
import logging
import re
import runpy

import pytest
import torch
from detectron2.utils import comm
from helpers import ROOT

from s4m_d2 import __version__
from s4m_d2.engine import TeacherTrainer, stage_config
from s4m_d2.engine.command import run
from s4m_d2.engine.command.run import draw_final, reported, write_facts
from s4m_d2.errors import DivergenceError, Finding


@pytest.fixture
def folder(tmp_path):
    """An output folder in which a run has begun."""
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "metrics.json").write_text('{"iteration": 19, "total_loss": 2.5}\n')
    return tmp_path


def test_what_a_run_was_started_with_is_in_its_report(folder):
    own = [Finding("derived", "SEED 3"), Finding("derived", "SEED 4")]
    findings = [*own, Finding("data", "40 <images>", warnings=("1 has no instances",))]
    facts = write_facts(str(folder), findings)
    assert facts == json.loads((folder / "run.json").read_text())
    assert facts["derived"] == "SEED 3; SEED 4" and facts["torch"] == torch.__version__
    assert facts["s4m_d2"] == __version__
    with reported(str(folder)):
        pass
    assert "40 &lt;images&gt;" in (folder / "report.html").read_text()


def test_a_training_that_ends_early_has_a_report_that_says_why(folder):
    (folder / "teacher" / "model_final.pth").touch()  # trained to its end, but not evaluated
    (folder / "config.yaml").write_text("S4M: {STAGE: teacher}\n")
    for error, said in (
        (DivergenceError("the loss is <nan>"), "DivergenceError: the loss is &lt;nan&gt;"),
        (KeyboardInterrupt(), "--resume"),
        (SystemExit(75), "--resume"),
        (ValueError("a bug"), "ValueError(&#39;a bug&#39;)"),
    ):
        with pytest.raises(type(error)) as raised, reported(str(folder)):
            raise error
        assert raised.value is error
        page = (folder / "report.html").read_text()
        assert "ended early" in page and said in page


def test_a_report_that_fails_is_a_warning(folder, monkeypatch, caplog):
    for error in (OSError("disk full"), RecursionError(), MemoryError(), KeyboardInterrupt()):

        def fails(*args, error=error):
            raise error

        monkeypatch.setattr(run, "write_report", fails)
        caplog.clear()
        with caplog.at_level(logging.WARNING), reported(str(folder)):
            pass
        assert caplog.records
        with pytest.raises(DivergenceError), reported(str(folder)):
            raise DivergenceError("first")
        assert not (folder / "report.html").exists()


def test_the_main_process_writes_and_removes_what_a_killed_run_left(folder, monkeypatch):
    left, other = folder / ".report.html.a1b2c3d4.tmp", folder / ".notes.tmp"
    left.write_text("half a page")
    other.write_text("the user's")
    with monkeypatch.context() as patch, reported(str(folder)):
        patch.setattr(comm, "is_main_process", lambda: False)
        assert not left.exists()
    assert not (folder / "report.html").exists()
    with reported(str(folder)):
        pass
    assert other.exists() and "ended early" not in (folder / "report.html").read_text()


def test_the_final_models_are_drawn_in_evaluations_size_once_and_a_failure_is_a_warning(
    small_config, monkeypatch, caplog
):
    changes = {"INPUT__MIN_SIZE_TEST": 32, "INPUT__MAX_SIZE_TEST": 48}
    changes |= {"S4M__DISTILL__ENABLED": False, "S4M__TEACHER__MAX_ITER": 7}
    cfg = stage_config(small_config(**changes), "teacher")
    model = TeacherTrainer.build_model(cfg).train()
    shapes = []
    model.register_forward_pre_hook(lambda _, given: shapes.append(given[0][0]["image"].shape[1:]))
    draw_final(cfg, model)
    with open(f"{cfg.OUTPUT_DIR}/figures/predictions_0000007.png", "rb") as file:
        assert file.read(4) == b"\x89PNG"
    assert model.training and set(shapes) == {(24, 48)}

    drawn = len(shapes)
    draw_final(cfg, model)  # it is there
    assert len(shapes) == drawn
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    monkeypatch.setattr(run, "write_png", lambda *args: 1 / 0)
    draw_final(
        stage_config(small_config(**changes | {"S4M__TEACHER__MAX_ITER": 8}), "teacher"), model
    )
    assert "ZeroDivisionError" in caplog.text


def test_the_tool_writes_the_report_or_says_what_is_missing(folder, capsys):
    main = runpy.run_path(str(ROOT / "tools" / "report.py"))["main"]
    (folder / "empty").mkdir()
    assert main([str(folder)]) == 0 and main([str(folder / "empty")]) == 1
    said = capsys.readouterr()
    assert said.out == f"{folder}/report.html\n"
    assert re.match("DatasetError: .*empty", said.err) and not list((folder / "empty").iterdir())
