"""Logging to a disk that is full."""

import logging
import os
from pathlib import Path

import pytest
from detectron2.utils.events import EventWriter

from s4m_d2.engine import TeacherTrainer, stage_config
from s4m_d2.engine.training.writers import ForgivingWriter

from .test_trainer import BARE

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


@needs_full_device
def test_training_goes_on_where_metrics_cannot_be_written(small_config, caplog):
    cfg = stage_config(small_config(S4M__TEACHER__MAX_ITER=1, **BARE), "teacher")
    Path(cfg.OUTPUT_DIR).mkdir(parents=True)
    (Path(cfg.OUTPUT_DIR) / "metrics.json").symlink_to(FULL)
    trainer = TeacherTrainer(cfg)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert (Path(cfg.OUTPUT_DIR) / "model_final.pth").is_file()
    assert [record.levelname for record in warnings(caplog)] == ["WARNING"]
