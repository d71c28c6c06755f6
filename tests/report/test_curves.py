"""Curves of metrics.json: what counts of torn and non-finite records; thinning."""

import json
import math
import tracemalloc

import pytest

from s4m_d2.report import read_curves
from s4m_d2.report.charts import derive


def write(path, records, tail=""):
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    return path


def as_is(record):
    return record


def values(curve):
    return [(point.iteration, point.low, point.mean, point.high) for point in curve.points]


@pytest.mark.parametrize(
    ("tail", "unreadable"),
    [
        ('{"iteration": 39, "a"', 1),
        ('{"iteration": 39, "a": 2.0, {"iteration": 59, "a": 5.0}\n', 1),  # torn, then continued
        ("\x00\x00\n[1, 2]\n\n", 2),
        ('{"iteration": "39", "a": 2.0}\n', 1),
        ('{"a": 2.0}\n', 1),
    ],
)
def test_lines_that_are_no_records_are_counted_and_left_out(tmp_path, tail, unreadable):
    path = write(tmp_path / "m.json", [{"iteration": 19, "a": 1.0}], tail)
    curves = read_curves(path, as_is)
    assert values(curves.get("a")) == [((19, 19), 1.0, 1.0, 1.0)]
    assert (curves.records, curves.last_iteration) == (1, 19)
    assert curves.unreadable == unreadable


def test_no_file_and_an_empty_one_have_no_curves(tmp_path):
    for path in (tmp_path / "none", write(tmp_path / "m.json", [])):
        curves = read_curves(path, as_is)
        assert (curves.by_name, curves.records, curves.last_iteration) == ({}, 0, None)
        assert math.isnan(curves.mean("a"))


def test_values_that_are_not_finite_are_counted_and_leave_the_curve_as_it_is(tmp_path):
    path = tmp_path / "m.json"
    path.write_text(
        '{"iteration": 0, "a": 1.0}\n{"iteration": 1, "a": NaN}\n{"iteration": 2, "a": -Infinity}\n'
        '{"iteration": 3, "a": null}\n{"iteration": 4, "a": 5, "name": "x", "flag": true}\n'
    )
    curves = read_curves(path, as_is)
    points = curves.get("a").points
    assert [point.bad for point in points] == [0, 1, 1, 1, 0]
    assert [point.mean for point in points if not point.bad] == [1.0, 5.0]
    assert curves.mean("a") == 3.0
    assert set(curves.by_name) == {"a", "iteration"}


def test_thinning_keeps_extremes_and_means(tmp_path):
    count, most = 1000, 10
    records = [{"iteration": 20 * i, "a": float(i % 7)} for i in range(count)]
    records[123]["a"], records[777]["a"] = 1e6, -1e6
    [*points] = read_curves(write(tmp_path / "m.json", records), as_is, most).get("a").points
    assert len(points) <= most
    assert max(point.high for point in points) == 1e6
    assert min(point.low for point in points) == -1e6
    width = -(-(20 * (count - 1) + 1) // most)
    for place, point in enumerate(points):
        group = [r["a"] for r in records if r["iteration"] // width == place]
        assert point.mean == pytest.approx(sum(group) / len(group))
        assert (point.low, point.high) == (min(group), max(group))


def test_memory_does_not_grow_with_the_records(tmp_path):
    path = tmp_path / "m.json"
    padding = {f"unused_{k}": 0.123456789 for k in range(30)}
    write(path, [{"iteration": i, "a": float(i), **padding} for i in range(4000)])
    tracemalloc.start()
    read_curves(path, lambda record: {"a": record["a"]})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert path.stat().st_size > 2_000_000
    assert peak < 1_000_000


def test_losses_are_summed_over_layers_by_kind_and_part():
    record = {"loss_ce": 1.0, "loss_ce_0": 2.0, "loss_ce_11": 4.0, "loss_sd": 8.0}
    record |= {"unsup/loss_ce": 16.0, "unsup/loss_mask_3": 32.0, "total_loss": 63.0}
    record |= {"lr": 0.1, "segm/AP": 5.0, "segm/AP50": 6.0, "segm/AP-car": 7.0, "eta_seconds": 9.0}
    record |= {"teacher/segm/AP": 4.0, "pseudo_label_quality/after/pq": 0.5}
    assert derive(record) == {
        "labeled": 15.0,
        "labeled:loss_ce": 7.0,
        "labeled:loss_sd": 8.0,
        "unlabeled": 48.0,
        "unlabeled:loss_ce": 16.0,
        "unlabeled:loss_mask": 32.0,
        "total_loss": 63.0,
        "lr": 0.1,
        "segm/AP": 5.0,
        "teacher/segm/AP": 4.0,
        "pseudo_label_quality/after/pq": 0.5,
    }
