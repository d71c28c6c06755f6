"""Charts: where values are drawn, and what odd values do."""

import doctest
import math
from xml.etree import ElementTree

import pytest

from s4m_d2.report import page, run, svg, tables
from s4m_d2.report.curves import Point
from s4m_d2.report.svg import Mark, Series, chart, number, ticks

SVG = ElementTree.fromstring


def points(*pairs):
    return [Point((i, i), v, v, v) if math.isfinite(v) else Point((i, i), bad=1) for i, v in pairs]


def with_class(svg, name):
    return [e for e in svg.iter() if name in e.get("class", "").split()]


def numbers(path):
    return [float(x) for x in path.strip("MZ").replace("M", " ").split()]


def test_values_are_drawn_where_the_axes_say():
    # The plot reaches from 60 to 442 (iterations 0 to 100) and from 38 down to 200 (10 to 0).
    svg = SVG(chart("Loss", "unit", [Series("a", points((0, 10.0), (50, 5.0), (100, 0.0)))]))
    [line] = with_class(svg, "line")
    assert numbers(line.get("d")) == [60, 38, 251, 119, 442, 200]
    dots = [(float(e.get("cx")), float(e.get("cy"))) for e in with_class(svg, "dot")]
    assert dots == [(60, 38), (251, 119), (442, 200)]
    labels = {e.text: (float(e.get("x")), float(e.get("y"))) for e in with_class(svg, "yt")}
    assert labels["0"] == (54, 204) and labels["10"] == (54, 42)
    labels = {e.text: float(e.get("x")) for e in with_class(svg, "xt")}
    assert labels["0"] == 60 and labels["100"] == 442 and "iteration" in labels


def test_a_band_spans_the_least_and_the_greatest_of_each_point():
    wide = [Point((0, 9), 0.0, 4.0, 10.0), Point((90, 100), 2.0, 3.0, 5.0)]
    svg = SVG(chart("t", "u", [Series("a", wide)]))
    [band] = with_class(svg, "band")
    x0, x1 = (round(60 + 382 * x / 100, 1) for x in (4.5, 95.0))
    assert numbers(band.get("d")) == pytest.approx([x0, 38, x1, 119, x1, 167.6, x0, 200])
    narrow = SVG(chart("t", "u", [Series("a", points((0, 1.0), (9, 2.0)))]))
    assert not with_class(narrow, "band")


def test_marks_inside_the_range_are_drawn_and_others_are_not():
    series = [Series("a", points((0, 1.0), (100, 2.0)))]
    marks = [Mark(50, "burn-in ends"), Mark(90, "late"), Mark(101, "never")]
    svg = SVG(chart("t", "u", series, marks))
    drawn = [e.get("d").split()[0] for e in with_class(svg, "mark")]
    assert drawn == ["M251.0", "M403.8"]
    texts = {e.text: e for e in with_class(svg, "marktext")}
    assert set(texts) == {"burn-in ends", "late"}
    assert texts["late"].get("text-anchor") == "end"  # it would not fit on the right


def test_one_point_is_a_dot_in_the_middle():
    svg = SVG(chart("t", "u", [Series("a", points((7, 3.0)))]))
    assert not with_class(svg, "line")
    [dot] = with_class(svg, "dot")
    assert float(dot.get("cx")) == 251


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_crosses_and_no_coordinate_is_odd(bad):
    series = Series("a", points((0, 1.0), (10, bad), (20, 3.0)))
    text = chart("t", "u", [series])
    svg = SVG(text)
    assert len(with_class(svg, "bad")) == 1
    [line] = with_class(svg, "line")
    assert len(numbers(line.get("d"))) == 4
    assert "nan" not in text and "inf" not in text
    assert "no finite value" in chart("t", "u", [Series("a", points((3, bad)))])


@pytest.mark.parametrize("value", [0.0, -3.0, 1e-12, 1e300, -1e300])
def test_constant_and_extreme_values_stay_in_the_picture(value):
    svg = SVG(chart("t", "u", [Series("a", points((0, value), (10, value)))], from_zero=False))
    for dot in with_class(svg, "dot"):
        assert 38 <= float(dot.get("cy")) <= 200


def test_texts_are_escaped_and_a_pointed_column_shows_all_series():
    series = [Series("<b>&", points((0, 1.0), (5, 2.5))), Series('"c"', points((0, 3.0)))]
    svg = SVG(chart("<script>", "a<b", series, [Mark(1, "<i>")]))
    assert svg.get("role") == "img"
    assert svg.find("title").text == "<script>"
    assert '"c" from 3 to 3' in svg.find("desc").text
    columns = with_class(svg, "h")
    shown = ["".join(e.text for e in column.iter("text")) for column in columns]
    assert shown == ['iteration 0 · <b>& 1 · "c" 3', "iteration 5 · <b>& 2.5"]
    edges = [(float(r.get("x")), float(r.get("width"))) for r in svg.iter("rect")]
    assert edges == [(60.0, 191.0), (251.0, 191.0)]


def test_ticks_are_round_and_inside():
    assert ticks(0, 100, 5) == [0, 20, 40, 60, 80, 100]
    assert ticks(0.85, 0.89, 5) == [0.85, 0.86, 0.87, 0.88, 0.89]
    assert ticks(-3, 4, 5) == [-2, 0, 2, 4]
    assert [number(x) for x in (1e-7, 0.1 + 0.2, 368750.0, math.inf)] == [
        "1e-07",
        "0.3",
        "368,750",
        "–",
    ]


@pytest.mark.parametrize("module", [page, run, svg, tables], ids=lambda module: module.__name__)
def test_examples(module):
    result = doctest.testmod(module)
    assert result.attempted > 0 and result.failed == 0
