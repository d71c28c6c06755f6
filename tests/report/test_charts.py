"""Charts: the values of their lines, what odd values do, and what a page may hold of them."""

import base64
import doctest
from xml.etree import ElementTree

import numpy as np

from s4m_d2 import errors
from s4m_d2.report import page
from s4m_d2.report.page import Chart
from s4m_d2.report.run import Curve


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
