"""Line charts as inline SVG for HTML pages: text is text, and colours are classes of the page's style sheet."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.ticker import LogLocator, MaxNLocator

from gkl_vl.report.markup import escaped, isolated

_WIDTH, _HEIGHT = 400, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 390, 12, 164
"""Edges of the plotting area in the units of the viewBox, which are about pixels."""
_MOST_POINTS = 300
_MOST_DOTS = 25


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of a chart."""

    points: Sequence[tuple[float, float]]
    """(x, y) in ascending order of x."""
    label: str = ""
    band: Sequence[tuple[float, float]] | None = None
    """The interval (low, high) of each point."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart of one or several lines."""

    title: str
    lines: Sequence[Line]
    levels: Sequence[tuple[str, float]] = ()
    """Dashed horizontal lines: name, value."""
    percent: bool = False
    """The values are percentages; the axis starts at 0."""
    x_label: str = "step"
    marked: float | None = None
    """An x with a vertical line."""


def figure(chart: Chart) -> str:
    """The chart as a figure element: title, an SVG, and the legend of several lines or the marked or last value of one.

    Values that are not finite are left out, and "" is returned without any; a line of many points is averaged over
    consecutive ones. An axis of positive values that differ by a factor above 100 is logarithmic.
    """
    lines = [_thinned(line) for line in map(_finite, chart.lines) if line.points]
    if not lines:
        return ""
    if len(lines) == 1:
        _, value = next((point for point in lines[0].points if point[0] == chart.marked), lines[0].points[-1])
        note = f"{_number(value, chart)}{', log scale' if _is_log(chart, lines) else ''}"
    else:
        keys = (f'<span class="key c{number % 6}">{isolated(line.label)}</span>' for number, line in enumerate(lines))
        note = " ".join(keys)
    return (
        f'<figure class="chart"><figcaption><b>{isolated(chart.title)}</b> <span>{note}</span></figcaption>'
        f"{_svg(chart, lines)}</figure>"
    )


@dataclass(frozen=True)
class _Scale:
    """Values -> coordinates along an axis."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def _svg(chart: Chart, lines: list[Line]) -> str:
    x, x_ticks = _x_axis(lines)
    y, y_ticks = _y_axis(chart, lines)
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escaped(_description(chart, lines))}">',
        *(f'<path class="grid" d="M{_LEFT} {y(v):.1f}H{_RIGHT}"/>' for v in y_ticks),
        *(f'<text class="y" x="{_LEFT - 6}" y="{y(v) + 4:.1f}">{_tick(v, chart)}</text>' for v in y_ticks),
        *(f'<text class="x" x="{x(v):.1f}" y="{_BOTTOM + 18}">{_step(v)}</text>' for v in x_ticks),
        f'<text class="x-label" x="{_RIGHT}" y="{_BOTTOM + 18}">{escaped(chart.x_label)}</text>',
    ]
    if chart.marked is not None:
        parts.append(f'<path class="mark" d="M{x(chart.marked):.1f} {_TOP}V{_BOTTOM}"/>')
    highest = max((value for _, value in chart.levels), default=0)
    for number, (name, value) in enumerate(chart.levels):
        below = value < highest or y(value) < _TOP + 2
        left, bottom = _LEFT + 4 + 115 * number, y(value) + (14 if below else -5)
        parts.append(f'<path class="level" d="M{_LEFT} {y(value):.1f}H{_RIGHT}"/>')
        parts.append(f'<text class="level" x="{left}" y="{bottom:.1f}">{escaped(name)} {_number(value, chart)}</text>')
    for number, line in enumerate(lines):
        parts += _line(line, f"c{number % 6}", x, y, chart)
    return "".join([*parts, "</svg>"])


def _line(line: Line, colour: str, x: _Scale, y: _Scale, chart: Chart) -> list[str]:
    places = [f"{x(step):.1f} {y(value):.1f}" for step, value in line.points]
    parts = []
    if line.band is not None:
        steps = [step for step, _ in line.points]
        upper = [f"{x(step):.1f} {y(high):.1f}" for step, (_, high) in zip(steps, line.band, strict=True)]
        lower = [f"{x(step):.1f} {y(low):.1f}" for step, (low, _) in zip(steps, line.band, strict=True)]
        parts.append(f'<path class="band {colour}" d="M{"L".join([*upper, *lower[::-1]])}Z"/>')
    parts.append(f'<path class="line {colour}" d="M{"L".join(places)}"/>')
    dots = line.points if len(line.points) <= _MOST_DOTS else line.points[-1:]
    for step, value in dots:
        title = f"{chart.x_label} {_step(step)}: {_number(value, chart)}"
        parts.append(
            f'<circle class="{colour}" cx="{x(step):.1f}" cy="{y(value):.1f}" r="3"><title>{escaped(title)}</title>'
            "</circle>"
        )
    return parts


def _x_axis(lines: list[Line]) -> tuple[_Scale, list[float]]:
    steps = [step for line in lines for step, _ in line.points]
    low, high = min(0, *steps), max(*steps, 0)
    high = high if high > low else low + 1
    locator = MaxNLocator(4, steps=[1, 2, 2.5, 5, 10], integer=all(float(step).is_integer() for step in steps))
    ticks = [tick for tick in map(float, locator.tick_values(low, high)) if low <= tick <= high]
    scale = _Scale(low, high, _LEFT + 2, _RIGHT - 4)
    return scale, [tick for tick in ticks if scale(tick) < _RIGHT - 50]  # the axis has its name at the right


def _range(chart: Chart, lines: list[Line]) -> tuple[float, float]:
    drawn = [value for line in lines for _, value in line.points] + [value for _, value in chart.levels]
    drawn += [end for line in lines for ends in ([] if line.band is None else line.band) for end in ends]
    return min(drawn), max(drawn)


def _is_log(chart: Chart, lines: list[Line]) -> bool:
    low, high = _range(chart, lines)
    return low > 0 and high > 100 * low and not chart.percent


def _y_axis(chart: Chart, lines: list[Line]) -> tuple[_Scale, list[float]]:
    low, high = _range(chart, lines)
    if _is_log(chart, lines):
        powers = [float(tick) for tick in LogLocator().tick_values(low, high) if low <= tick <= high]
        return _Scale(low * 0.9, high * 1.1, _BOTTOM, _TOP, log=True), powers
    low = min(low, 0) if chart.percent else low
    if high - low <= 1e-9 * max(abs(high), abs(low)):  # a constant
        low, high = low - max(abs(low), 1e-3) / 2, high + max(abs(high), 1e-3) / 2
    ticks = [float(tick) for tick in MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)]
    return _Scale(ticks[0], ticks[-1], _BOTTOM, _TOP), ticks


def _finite(line: Line) -> Line:
    """The line without values, and without a band, that are not finite."""
    kept = [number for number, (_, value) in enumerate(line.points) if math.isfinite(value)]
    points = [line.points[number] for number in kept]
    band = None if line.band is None else [line.band[number] for number in kept]
    whole = band is not None and all(math.isfinite(end) for ends in band for end in ends)
    return Line(points=points, label=line.label, band=band if whole else None)


def _thinned(line: Line) -> Line:
    """A line of many points with averages over consecutive ones, and its true last point."""
    count = len(line.points)
    if count <= _MOST_POINTS:
        return line
    edges = [round(part * count / (_MOST_POINTS - 1)) for part in range(_MOST_POINTS)]
    parts = [line.points[start:end] for start, end in zip(edges, edges[1:], strict=False)]
    points = [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts]
    return Line(points=[*points[:-1], line.points[-1]], label=line.label)


def _description(chart: Chart, lines: list[Line]) -> str:
    ends = []
    for line in lines:
        (first, start), (last, end) = line.points[0], line.points[-1]
        text = f"{_number(start, chart)} at {chart.x_label} {_step(first)}"
        text += f", {_number(end, chart)} at {chart.x_label} {_step(last)}" if last != first else ""
        ends.append(f"{line.label} {text}".strip())
    return f"{chart.title}: {'; '.join([*ends, *(f'{name} {_number(v, chart)}' for name, v in chart.levels)])}"


def _number(value: float, chart: Chart) -> str:
    return f"{value:.1f} %" if chart.percent else f"{value:.4g}"


def _tick(value: float, chart: Chart) -> str:
    return f"{value:g} %" if chart.percent else _step(value) if abs(value) >= 1000 else f"{value:g}"


def _step(value: float) -> str:
    if value >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}k" if value >= 1e4 else f"{value:,g}"
