"""Charts show the values that they are given, whatever their number and range."""

import re

import pytest

from ltx_titan.metrics.chart import Curve, line_chart


def drawn(svg: str, kind: str) -> list[list[tuple[float, float]]]:
    """Pixels of all lines of a kind."""
    found = re.findall(rf'<polyline class="c\d {kind}" points="([^"]*)"', svg)
    return [[tuple(float(v) for v in point.split(",")) for point in line.split()] for line in found]


def test_a_falling_curve_falls_from_left_to_right_within_the_picture():
    ((first, *_, last),) = drawn(line_chart("loss", [Curve("total", [(1, 4.0), (2, 3.0), (3, 1.0)])]), "mean")
    assert 0 < first[0] < last[0] < 720
    assert 0 < first[1] < last[1] < 250  # pixels count from the top


@pytest.mark.parametrize("kind", ["raw", "mean"])
def test_one_outlier_does_not_flatten_the_curve(kind):
    points = [(step, 1.0 + step / 1000) for step in range(1000)]
    points[500] = (500, 1e6)
    (line,) = drawn(line_chart("loss", [Curve("total", points)], is_smoothed=True), kind)
    assert len(line) <= 500
    assert line[0][1] - line[-1][1] > 100  # of 250 pixels


@pytest.mark.parametrize("points", [[(7, 0.0)], [(1, 2.5), (2, 2.5)], [(5, -1.0), (6, 1e-9)]])
def test_single_constant_and_negative_values_have_finite_pixels(points):
    svg = line_chart("x", [Curve("x", points)])
    (line,) = drawn(svg, "mean")
    assert len(line) == len(points)
    assert all(0 <= x <= 720 and 0 <= y <= 250 for x, y in line)
    assert "nan" not in svg


def test_no_values_no_chart():
    assert line_chart("audio", [Curve("audio", [])]) == ""
