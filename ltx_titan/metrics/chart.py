"""Line charts as inline SVG, in the colors of the page that contains them.

A chart of a page must adapt to its dark or light scheme and must not load anything, so it is markup with CSS classes
(`ltx_titan/assets/report.css`) instead of an image.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ltx_titan.metrics.summary import smooth

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT = 720, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 14, 34
# More points than pixels only make the file larger.
_MAX_POINTS = 500
# A mean over about ten logged steps: single steps differ by their sigmas more than by what was learned.
_SMOOTHING = 0.9
# Spikes of the raw values beyond these shares are cut off, or one of them would flatten the whole curve.
_LOWEST, _HIGHEST = 0.01, 0.99


@dataclass(frozen=True)
class Curve:
    """A named series; `points` are (step, value), finite and ordered by step."""

    label: str
    points: Points


def line_chart(name: str, curves: Sequence[Curve], *, is_smoothed: bool = False) -> str:
    """Draws curves over the optimizer step.

    Args:
        name: unique on the page; also read out by screen readers.
        curves: at most six, for which the page has colors; those without points are skipped.
        is_smoothed: draw the values faint and their exponential mean on top.

    Returns:
        An `<svg>` element; empty if no curve has a point.
    """
    drawn = [curve for curve in curves if curve.points]
    if not drawn:
        return ""
    lines = [_lines(curve.points, is_smoothed) for curve in drawn]
    x = _Axis(*_ends([step for curve in drawn for step, _ in curve.points]), _LEFT, _WIDTH - _RIGHT)
    y = _Axis(*_value_range([curve.points for curve in drawn]), _HEIGHT - _BOTTOM, _TOP)
    clip = "clip-" + "".join(character if character.isalnum() else "-" for character in name)
    marks = [*_grid(x, y), f'<g clip-path="url(#{clip})">']
    for index, parts in enumerate(lines):
        for points, kind in parts:
            marks.append(f'<polyline class="c{index} {kind}" points="{_path(_thinned(points), x, y)}"/>')
            if len(points) == 1:
                (step, value) = points[0]
                marks.append(f'<circle class="c{index}" cx="{x(step):.1f}" cy="{y(value):.1f}" r="3"/>')
    marks.append("</g>")
    area = f'x="{_LEFT}" y="{_TOP}" width="{_WIDTH - _LEFT - _RIGHT}" height="{_HEIGHT - _TOP - _BOTTOM}"'
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(name)}">'
        f'<clipPath id="{clip}"><rect {area}/></clipPath>{"".join(marks)}</svg>{_legend(drawn)}'
    )


@dataclass(frozen=True)
class _Axis:
    """Linear map from [low, high] to pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, count: int) -> list[float]:
        """Round numbers within the range, about `count` of them."""
        rough = (self.high - self.low) / count
        power = 10 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [number * step for number in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _ends(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _value_range(curves: Sequence[Points]) -> tuple[float, float]:
    ends = [end for points in curves for end in _usual_range(points)]
    low, high = min(ends), max(ends)
    # A flat curve is drawn in the middle; others get a margin.
    margin = 0.05 * (high - low) or abs(high) * 0.1 or 1.0
    # Losses, times and bytes are never negative, so the margin does not cross zero.
    return (max(low - margin, 0.0) if low >= 0 else low - margin), high + margin


def _usual_range(points: Points) -> tuple[float, float]:
    ordered = sorted(value for _, value in points)
    last = len(ordered) - 1
    return ordered[round(last * _LOWEST)], ordered[round(last * _HIGHEST)]


def _lines(points: Points, is_smoothed: bool) -> list[tuple[Points, str]]:
    if not is_smoothed:
        return [(points, "mean")]
    low, high = _usual_range(points)
    # Without the spikes, each of which would lift the mean of the next fifty steps out of the chart.
    means = smooth([min(max(value, low), high) for _, value in points], _SMOOTHING)
    return [(points, "raw"), ([(step, mean) for (step, _), mean in zip(points, means, strict=True)], "mean")]


def _thinned(points: Points) -> Points:
    if len(points) <= _MAX_POINTS:
        return points
    # Every n-th point, and always the newest.
    every = math.ceil(len(points) / _MAX_POINTS)
    return [*points[::-every]][::-1]


def _path(points: Points, x: _Axis, y: _Axis) -> str:
    return " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)


def _grid(x: _Axis, y: _Axis) -> list[str]:
    bottom = _HEIGHT - _BOTTOM
    marks = []
    for value in y.ticks(4):
        marks.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>'
        )
        marks.append(f'<text class="tick" x="{_LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    for value in x.ticks(6):
        if value == round(value):  # steps are whole
            marks.append(
                f'<text class="tick" x="{x(value):.1f}" y="{bottom + 20}" text-anchor="middle">{round(value):,}</text>'
            )
    return marks


def _legend(curves: Sequence[Curve]) -> str:
    if len(curves) == 1:  # the page's heading says it
        return ""
    entries = (f'<span class="c{i}">{html.escape(curve.label)}</span>' for i, curve in enumerate(curves))
    return f'<p class="legend">{"".join(entries)}</p>'
