"""Logging to a disk that is full."""

import json
import logging
import os
from pathlib import Path

import pytest
from detectron2.utils.events import EventStorage, EventWriter, JSONWriter

from s4m_d2.engine import TeacherTrainer, stage_config
from s4m_d2.engine.training.writers import ForgivingWriter

FULL = "/dev/full"  # every write fails: no space left on device
needs_full_device = pytest.mark.skipif(not os.path.exists(FULL), reason="needs Linux' /dev/full")


class Flaky(EventWriter):
    def __init__(self, *fails):
        self.fails, self.calls = iter(fails), 0

    def write(self):
        self.calls += 1
        if next(self.fails):
            raise OSError(28, "No space left on device")


def warnings(caplog):
    return [record for record in caplog.records if record.name == "s4m_d2.engine.training.writers"]


def test_each_outage_is_reported_once(caplog):
    inner = Flaky(False, True, True, False, True)
    writer = ForgivingWriter(inner)
    counts = []
    for _ in range(5):
        writer.write()
        counts.append(len(warnings(caplog)))
    assert counts == [0, 1, 1, 1, 2] and inner.calls == 5
    assert "Flaky cannot write" in caplog.text and "No space left" in caplog.text


def test_other_errors_are_not_hidden():
    class Wrong(EventWriter):
        def write(self):
            raise KeyError("a mistake")

    with pytest.raises(KeyError):
        ForgivingWriter(Wrong()).write()


@needs_full_device
def test_a_full_disk_does_not_end_the_writing_of_metrics(caplog):
    with EventStorage(0) as storage:
        writer = ForgivingWriter(JSONWriter(FULL))
        for iteration in range(2):
            storage.iter = iteration
            storage.put_scalar("loss", 1.0)
            writer.write()
        writer.close()
    assert len(warnings(caplog)) == 1


@needs_full_device
def test_training_goes_on_where_metrics_cannot_be_written(small_config, caplog):
    cfg = stage_config(small_config(S4M__TEACHER__MAX_ITER=1, DATASETS__TEST="()"), "teacher")
    Path(cfg.OUTPUT_DIR).mkdir(parents=True)
    (Path(cfg.OUTPUT_DIR) / "metrics.json").symlink_to(FULL)
    trainer = TeacherTrainer(cfg)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert (Path(cfg.OUTPUT_DIR) / "model_final.pth").is_file()
    assert [record.levelname for record in warnings(caplog)] == ["WARNING"]


def test_metrics_are_written_where_they_can_be(small_config):
    cfg = stage_config(small_config(S4M__TEACHER__MAX_ITER=1, DATASETS__TEST="()"), "teacher")
    Path(cfg.OUTPUT_DIR).mkdir(parents=True)
    TeacherTrainer(cfg).train()
    lines = (Path(cfg.OUTPUT_DIR) / "metrics.json").read_text().splitlines()
    assert "total_loss" in json.loads(lines[-1])
