"""Curves of metrics.json: torn and non-finite records, thinning, sums of losses; their charts."""

import base64
import doctest
import json
import math
from xml.etree import ElementTree

import numpy as np
import pytest

from s4m_d2 import errors
from s4m_d2.report import page, read_curves
from s4m_d2.report.page import Chart
from s4m_d2.report.run import Curve


def write_lines(path, records, tail=""):
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    return path


def test_lines_that_are_no_records_are_left_out(tmp_path):
    torn = '{"iteration": 39, "lr": 2.0, {"iteration": 59, "lr": 5.0}\n'  # and continued
    for tail in ('{"iteration": 39, "lr"', torn, '{"lr": 2.0}\n', "\x00\x00\n[1, 2]\n\n"):
        curves = read_curves(write_lines(tmp_path / "m.json", [{"iteration": 19, "lr": 1.0}], tail))
        curve = curves["lr"]
        assert (*curve.iterations, *curve.low, *curve.mean, *curve.high) == (19, 1, 1, 1)
        assert curves.iterations == 20


def test_values_that_are_not_finite_leave_the_curve_as_it_is(tmp_path):
    values = ["1.0", "NaN", "-Infinity", "null", "5", '"x"']
    path = tmp_path / "m.json"
    path.write_text("".join(f'{{"iteration": {i}, "lr": {v}}}\n' for i, v in enumerate(values)))
    curve = read_curves(path)["lr"]
    assert (curve.iterations.tolist(), curve.mean.tolist()) == ([0, 4], [1.0, 5.0])
    assert read_curves(path).mean("lr") == 3.0 and math.isnan(curve.last)
    path.write_text('{"iteration": 0, "lr": null}\n')
    assert not len(read_curves(path)["lr"].mean)


def test_thinning_keeps_extremes_and_means_and_repeated_iterations_come_together(tmp_path):
    count, most = 1000, 10
    records = [{"iteration": 20 * i, "lr": float(i % 7)} for i in range(count)]
    records[123]["lr"], records[777]["lr"], records[500]["lr"] = 1e6, -1e6, math.nan
    continued = records[:400] + records[300:]  # a run that was killed repeats records
    curve = read_curves(write_lines(tmp_path / "m.json", continued), most)["lr"]
    width = -(-(20 * (count - 1) + 1) // most)
    assert len(curve.mean) == most
    for place in range(most):
        group = [r["lr"] for r in continued if r["iteration"] // width == place]
        good = [value for value in group if math.isfinite(value)]
        assert curve.mean[place] == pytest.approx(sum(good) / len(good))
        assert (curve.low[place], curve.high[place]) == (min(good), max(good))
    assert curve.last == 999 % 7


def test_losses_are_summed_over_layers_by_kind_and_part(tmp_path):
    record = {"loss_ce": 1.0, "loss_ce_0": 2.0, "loss_ce_11": 4.0, "loss_sd": 8.0}
    record |= {"unsup/loss_ce": 16.0, "unsup/loss_mask_3": 32.0, "total_loss": 63.0}
    record |= {"lr": 0.1, "segm/AP": 5.0, "segm/AP50": 6.0, "segm/AP-car": 7.0, "eta_seconds": 9.0}
    record |= {"teacher/segm/AP": 4.0, "pseudo_label_quality/after/pq": 0.5}
    curves = read_curves(write_lines(tmp_path / "m.json", [{"iteration": 3, **record}]))
    assert {name: curve.last for name, curve in curves.items()} == {
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


def curve(*values, spread=0.0):
    y = np.array(values, dtype=float)
    return Curve(np.arange(len(y), dtype=float) * 10, y - spread, y, y + spread, y[-1])


def axes_of(burn_in=0, **lines):
    [axes] = Chart("t", "u", lines, burn_in).figure().axes
    return axes


def test_lines_bands_and_marks_are_where_the_values_are():
    axes = axes_of(a=curve(10, 5, 0, spread=2.5), b=curve(1, 2), burn_in=5)
    a, b, zero, mark = axes.lines
    assert a.get_xydata().tolist() == [[0, 10], [10, 5], [20, 0]]
    assert b.get_xydata().tolist() == [[0, 1], [10, 2]]
    [band] = axes.collections  # b has none
    assert band.get_datalim(axes.transData).extents.tolist() == [0, -2.5, 20, 12.5]
    assert mark.get_xdata() == [5, 5] and "burn-in" in axes.texts[0].get_text()
    assert not axes_of(a=curve(1, 2), burn_in=21).texts
    low, high = axes.get_ylim()
    assert low <= -2.5 and high >= 12.5


def test_a_chart_is_the_same_each_time_and_told_in_words():
    many = curve(*np.random.default_rng(0).random(240), spread=0.1)
    chart = Chart("<script>", "u", {"<b>&": many, "b": curve(2)}, 1000)
    start, _, content = chart.uri().partition(",")
    assert start == "data:image/svg+xml;base64" and chart.uri().endswith(content)
    text = base64.b64decode(content)
    svg = ElementTree.fromstring(text)
    assert len(text) < 40_000
    assert svg.get("viewBox") == "0 0 460 240"
    assert {"burn-in ends", "1000", "2000", "iteration"} <= {
        (e.text or "").strip() for e in svg.iter()
    }
    assert chart.in_words().startswith("<script>, u: <b>& from ")
    assert chart.in_words().endswith("; b from 2 to 2, least 2, greatest 2")


def test_examples():
    for module in (errors, page):
        result = doctest.testmod(module)
        assert result.attempted > 0 and result.failed == 0
