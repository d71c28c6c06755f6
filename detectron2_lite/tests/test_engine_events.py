"""The event storage and what the writers make of it."""

import json
import logging

import numpy as np
import pytest
import torch
from detectron2.utils.events import (
    CommonMetricPrinter,
    EventStorage,
    JSONWriter,
    TensorboardXWriter,
    get_event_storage,
)


def fill(storage, values, name="loss", **kwargs):
    for iteration, value in enumerate(values):
        storage.iter = iteration
        storage.put_scalar(name, value, **kwargs)


def test_the_innermost_storage_is_current():
    with pytest.raises(AssertionError):
        get_event_storage()
    with EventStorage() as outer:
        with EventStorage(5) as inner:
            assert get_event_storage() is inner
            assert inner.iter == 5
        assert get_event_storage() is outer
    with pytest.raises(AssertionError):
        get_event_storage()


@pytest.mark.parametrize("window, expected", [(1, 9.0), (2, 5.0), (3, 2.0), (20, 1.5)])
def test_smoothing_is_the_median_of_the_window(window, expected):
    with EventStorage() as storage:
        fill(storage, [0.0, 2.0, 1.0, 9.0])
        assert storage.latest_with_smoothing_hint(window) == {"loss": (expected, 3)}
        assert storage.latest() == {"loss": (9.0, 3)}


def test_unsmoothed_scalars_show_their_latest_value():
    with EventStorage() as storage:
        fill(storage, [0.0, 2.0, 9.0], smoothing_hint=False)
        assert storage.latest_with_smoothing_hint(20) == {"loss": (9.0, 2)}


def test_the_window_counts_iterations_and_not_values():
    with EventStorage() as storage:
        for iteration in (0, 10, 20, 25):
            storage.put_scalar("rare", iteration, cur_iter=iteration)
        assert storage.count_samples("rare", 20) == 3
        assert storage.count_samples("rare", 5) == 1
        assert storage.latest_with_smoothing_hint(20)["rare"] == (20.0, 25)


def test_a_scalar_keeps_its_smoothing_hint():
    with EventStorage() as storage:
        storage.put_scalar("lr", 1, smoothing_hint=False)
        with pytest.raises(AssertionError, match="lr"):
            storage.put_scalar("lr", 1)


def test_tensors_are_recorded_as_numbers_at_the_current_iteration():
    with EventStorage(3) as storage:
        storage.put_scalars(a=torch.tensor(2.5, requires_grad=True).detach(), b=True)
        storage.put_scalar("a", 4, cur_iter=9)
        assert storage.latest() == {"a": (4.0, 9), "b": (1.0, 3)}
        assert storage.history("a").values() == [(2.5, 3), (4.0, 9)]


def test_history_of_an_unknown_scalar_is_an_error_and_adds_nothing():
    with EventStorage() as storage:
        with pytest.raises(KeyError):
            storage.history("unknown")
        assert not storage.histories()


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_json_lines_hold_each_new_scalar_once(tmp_path):
    path = tmp_path / "metrics.json"
    with EventStorage() as storage:
        writer = JSONWriter(str(path), window_size=2)
        fill(storage, [1.0, 3.0])
        storage.put_scalar("AP", 40.0, smoothing_hint=False, cur_iter=0)
        writer.write()
        writer.write()  # nothing new
        storage.put_scalar("loss", 7.0, cur_iter=2)
        writer.write()
        writer.close()
    by_iteration = sorted(read_lines(path), key=lambda line: line["iteration"])
    assert by_iteration == [
        {"AP": 40.0, "iteration": 0},
        {"iteration": 1, "loss": 2.0},
        {"iteration": 2, "loss": 5.0},
    ]


def test_a_resumed_run_appends_to_its_json(tmp_path):
    path = tmp_path / "metrics.json"
    for start in (0, 5):
        with EventStorage(start) as storage:
            writer = JSONWriter(str(path))
            storage.put_scalar("loss", start)
            writer.write()
            writer.close()
    assert read_lines(path) == [{"iteration": 0, "loss": 0.0}, {"iteration": 5, "loss": 5.0}]


@pytest.fixture
def printed():
    """Messages that the metric printer logs."""
    messages, handler = [], logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("detectron2.utils.events")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_the_console_line_shows_progress(printed):
    with EventStorage() as storage:
        fill(storage, [2.0, 4.0, 6.0], name="total_loss")
        storage.put_scalars(loss_mask=0.123456, time=2.0, data_time=0.5)
        storage.put_scalar("[metric]kept", 3.0)
        storage.put_scalar("accuracy", 0.9)
        storage.put_scalar("lr", 1e-4, smoothing_hint=False)
        CommonMetricPrinter(max_iter=63).write()
        assert storage.latest()["eta_seconds"] == (120.0, 2)
    (line,) = printed
    words = line.split()
    expected = {
        "eta:": "0:02:00", "iter:": "2", "total_loss:": "4", "loss_mask:": "0.1235",
        "[metric]kept:": "3", "time:": "2.0000", "last_time:": "2.0000",
        "data_time:": "0.5000", "last_data_time:": "0.5000", "lr:": "0.0001",
    }  # fmt: skip
    assert {word: words[words.index(word) + 1] for word in expected} == expected
    assert "accuracy" not in line


def test_the_console_line_needs_no_scalars(printed):
    with EventStorage(4):
        CommonMetricPrinter().write()
    assert "iter: 4" in printed[0]
    assert "lr: N/A" in printed[0]


def test_the_console_is_silent_after_the_last_iteration(printed):
    with EventStorage(4):
        CommonMetricPrinter(max_iter=4).write()
    assert not printed


def test_tensorboard_gets_each_new_scalar_once(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with EventStorage() as storage:
        writer = TensorboardXWriter(str(tmp_path), window_size=2)
        fill(storage, [1.0, 3.0])
        writer.write()
        writer.write()
        fill(storage, [1.0, 3.0, 7.0])
        writer.write()
        writer.close()
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 2.0), (2, 5.0)]


def test_tensorboard_gets_each_picture_once(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    picture = np.zeros((3, 4, 6), dtype=np.uint8)
    with EventStorage(7) as storage:
        writer = TensorboardXWriter(str(tmp_path))
        storage.put_image("figures/a", picture)
        writer.write()
        writer.write()
        storage.iter = 9
        storage.put_image("figures/a", picture)
        storage.clear_images()
        storage.put_image("figures/b", torch.from_numpy(picture))
        writer.write()
        writer.close()
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    found = {
        tag: [(e.step, e.height, e.width) for e in events.Images(tag)]
        for tag in ("figures/a", "figures/b")
    }
    assert found == {"figures/a": [(7, 4, 6)], "figures/b": [(9, 4, 6)]}


def test_tensorboard_creates_no_file_without_events(tmp_path):
    TensorboardXWriter(str(tmp_path / "log")).close()
    assert not (tmp_path / "log").exists()
