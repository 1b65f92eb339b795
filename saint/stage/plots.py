"""The one way to draw: small SVG charts for HTML pages, light and dark, with round ticks.

`STYLE` belongs into the page that shows them; charts beside each other go into an element of the
class "plots".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from saint.stage.html import fragment, inline

_TEMPLATES = Path(__file__).parent / "templates"
STYLE = inline(_TEMPLATES / "plot.css")

_WIDTH, _HEIGHT = 440, 256
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 16, 46
_MOST_POINTS = 600
_FEW_POINTS = 30  # then each is marked by a dot
_RADIUS = 2.5  # of a dot
_MOST_HOVERED = 48  # points of a line that say their values under the mouse
_N_HUES = 6  # of plot.css; further series are dashed, and their dots hollow

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """Points (x, y) of one colour. texts: what a dot says under the mouse, one a point, or none.

    Points that are not finite, or not above 0 on a logarithmic axis, are left out.
    """

    name: str
    points: Sequence[Point]
    texts: Sequence[str] = ()


@dataclass(frozen=True)
class Axis:
    """One axis. include: values that its range must hold. percent: values are shares of 1."""

    label: str = ""
    logarithmic: bool = False
    percent: bool = False
    unit: str = ""
    include: tuple[float, ...] = ()

    def height(self, value: float) -> float:
        """Return where a value lies, in the axis's own measure."""
        return math.log10(value) if self.logarithmic else value

    def text(self, value: float) -> str:
        """Return a tick's text."""
        if self.percent:
            return f"{100 * value:.4g} %"
        size = abs(value)
        if size >= 1e9:
            number = f"{value / 1e9:.4g}G"
        elif size >= 1e6:
            number = f"{value / 1e6:.4g}M"
        elif size >= 1e4:
            number = f"{value / 1e3:.4g}k"
        else:
            number = f"{value:,.4g}" if size >= 1e-4 or not value else f"{value:.0e}"
        return number + self.unit


PLAIN = Axis()


@dataclass(frozen=True)
class Rule:
    """A dashed line at one value of an axis ("x" or "y"), with a name."""

    axis: str
    value: float
    name: str = ""


@dataclass(frozen=True)
class _Frame:
    """Ranges of both axes, in their own measures, and where they lie on the drawing."""

    x: Axis
    y: Axis
    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def across(self, value: float) -> float:
        low, high = self.x_range
        share = (self.x.height(value) - low) / (high - low)
        return round(_LEFT + (_WIDTH - _LEFT - _RIGHT) * share, 1)

    def down(self, value: float) -> float:
        low, high = self.y_range
        share = (self.y.height(value) - low) / (high - low)
        return round(_TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - share), 1)


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x: Axis = PLAIN,
    y: Axis = PLAIN,
    rules: Sequence[Rule] = (),
    key: bool = True,
) -> Markup:
    """Return lines over x; of more than 600 points every n-th is drawn, the last among them.

    Under the mouse a point says its value. key: whether the caption names the series.
    """
    kept = [_thinned(_finite(one, x, y), _MOST_POINTS) for one in series]
    frame = _frame(kept, x, y, rules)
    lines, dots = [], []
    for i, one in enumerate(kept):
        places = [(frame.across(px), frame.down(py)) for px, py in one.points]
        lines.append({"hue": hue(i), "points": " ".join(f"{px},{py}" for px, py in places)})
        is_seen = len(places) <= _FEW_POINTS
        for px, py in one.points if is_seen else _thinned(one, _MOST_HOVERED).points:
            name = f"{one.name}: " if one.name else ""
            text = f"{name}{y.text(py)} at {x.text(px)} {x.label}".rstrip()
            look = hue(i) if is_seen else f"{hue(i)} hit"
            dots.append({"hue": look, "x": frame.across(px), "y": frame.down(py), "text": text})
    return _draw(title, frame, kept, lines=lines, dots=dots, rules=rules, key=key)


def hue(series: int) -> str:
    """Return the classes of plot.css that give a series its colour and dash."""
    dash = series // _N_HUES % 3
    return f"s{series % _N_HUES} d{dash}" if dash else f"s{series % _N_HUES}"


def scatter_chart(
    title: str,
    series: Sequence[Series],
    *,
    x: Axis = PLAIN,
    y: Axis = PLAIN,
    rules: Sequence[Rule] = (),
    key: bool = True,
) -> Markup:
    """Return one dot a point. key: whether the caption names the series."""
    kept = [_finite(one, x, y) for one in series]
    frame = _frame(kept, x, y, rules)
    dots = [
        {"hue": hue(i), "x": frame.across(px), "y": frame.down(py), "text": text}
        for i, one in enumerate(kept)
        for (px, py), text in zip(one.points, one.texts or [""] * len(one.points), strict=True)
    ]
    radius = 4.5 if len(dots) <= _FEW_POINTS else _RADIUS
    return _draw(title, frame, kept, dots=dots, rules=rules, key=key, radius=radius)


def histogram_chart(
    title: str,
    counts: Sequence[float],
    edges: Sequence[float],
    *,
    x: Axis = PLAIN,
    y: Axis = PLAIN,
    rules: Sequence[Rule] = (),
) -> Markup:
    """Return one bar a bin. counts: (n,), not negative. edges: (n + 1,), ascending."""
    if len(edges) != len(counts) + 1:
        raise ValueError(f"{len(counts)} bins have {len(counts) + 1} edges, not {len(edges)}")
    y = Axis(y.label, y.logarithmic, y.percent, y.unit, (*y.include, 0.0))
    points = [(edge, max(counts, default=0)) for edge in edges] if any(counts) else []
    frame = _frame([Series("", points)], x, y, rules)
    boxes = [
        _box(frame, (low, high), count, text=f"{x.text(low)} to {x.text(high)}: {y.text(count)}")
        for low, high, count in zip(edges, edges[1:], counts, strict=False)
        if count
    ]
    return _draw(title, frame, [Series("", points)], boxes=boxes, rules=rules)


def bar_chart(title: str, bars: Sequence[tuple[str, float]], *, y: Axis = PLAIN) -> Markup:
    """Return one bar a name, its value above it. Values are finite and not negative."""
    y = Axis(y.label, y.logarithmic, y.percent, y.unit, (*y.include, 0.0))
    points = [(float(i), value) for i, (_, value) in enumerate(bars)]
    x = Axis(include=(-0.5, len(bars) - 0.5))
    frame = _frame([Series("", points)], x, y, ())
    boxes = [
        _box(frame, (i - 0.32, i + 0.32), value, text=name, shown=y.text(value), series=i)
        for i, (name, value) in enumerate(bars)
    ]
    ticks = [{"at": frame.across(i), "text": name} for i, (name, _) in enumerate(bars)]
    return _draw(title, frame, [Series("", points)], boxes=boxes, x_ticks=ticks)


def _box(
    frame: _Frame,
    x: tuple[float, float],
    count: float,
    *,
    text: str,
    shown: str = "",
    series: int = 0,
) -> dict[str, Any]:
    left, right, top = frame.across(x[0]), frame.across(x[1]), frame.down(count)
    return {
        "x": left,
        "y": top,
        "width": max(0.5, round(right - left - 1, 1)),
        "height": round(_HEIGHT - _BOTTOM - top, 1),
        "text": text,
        "shown": shown,
        "hue": hue(series),
    }


def _finite(series: Series, x: Axis, y: Axis) -> Series:
    def fits(value: float, axis: Axis) -> bool:
        return math.isfinite(value) and (value > 0 or not axis.logarithmic)

    kept = [i for i, (px, py) in enumerate(series.points) if fits(px, x) and fits(py, y)]
    texts = [series.texts[i] for i in kept] if series.texts else ()
    return Series(series.name, [series.points[i] for i in kept], texts)


def _thinned(series: Series, most: int) -> Series:
    step = max(1, math.ceil(len(series.points) / most))
    return Series(series.name, series.points[(len(series.points) - 1) % step :: step])


def _frame(series: Sequence[Series], x: Axis, y: Axis, rules: Sequence[Rule]) -> _Frame:
    points = [point for one in series for point in one.points]
    ranges = []
    for place, axis, name in ((0, x, "x"), (1, y, "y")):
        values = [point[place] for point in points] + list(axis.include)
        values += [rule.value for rule in rules if rule.axis == name]
        heights = [axis.height(value) for value in values] or [0.0, 1.0]
        low, high = min(heights), max(heights)
        if high - low < 1e-9 * max(1.0, abs(high)):
            low, high = low - 0.5, high + 0.5
        ranges.append((low, high))
    low, high = ranges[1]
    if not y.logarithmic:  # up to the next tick, so that no curve leaves the grid
        step = _step(high - low)
        ranges[1] = (math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step)
    return _Frame(x, y, ranges[0], ranges[1])


def _step(length: float, most: int = 5) -> float:
    """Return the smallest of 1, 2, 5 times a power of ten that goes into `length` `most` times."""
    raw = length / most
    power = 10.0 ** math.floor(math.log10(raw))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))


def ticks(axis: Axis, low: float, high: float) -> list[float]:
    """Return round values on an axis whose range, in its own measure, is low to high."""
    if not axis.logarithmic:
        step = _step(high - low)
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        return [float(f"{i * step:.12g}") for i in range(first, last + 1)]
    factors = (1, 2, 5) if high - low < 2.5 else (1,)
    every = 1 if high - low < 6 else math.ceil((high - low) / 5)
    powers = range(math.floor(low), math.ceil(high) + 1)
    found = [m * 10.0**p for p in powers if p % every == 0 for m in factors]
    inside = [value for value in found if low - 1e-9 <= math.log10(value) <= high + 1e-9]
    if len(inside) >= 2:
        return inside
    # Less than a step of 1, 2, 5: round values between, as on a linear axis.
    return ticks(PLAIN, 10.0**low, 10.0**high)


def _ruled(frame: _Frame, rule: Rule) -> dict[str, Any]:
    if rule.axis == "y":
        at = frame.down(rule.value)
        path, x, y, anchor = f"M{_LEFT} {at}H{_WIDTH - _RIGHT}", _WIDTH - _RIGHT, at - 4, "end"
    else:
        at = frame.across(rule.value)
        path, x, y = f"M{at} {_TOP}V{_HEIGHT - _BOTTOM}", at, _TOP - 4
        middle = (_LEFT + _WIDTH - _RIGHT) / 2
        anchor = "start" if at < 0.6 * middle else "end" if at > 1.4 * middle else "middle"
    return {"path": path, "x": x, "y": round(y, 1), "anchor": anchor, "text": rule.name}


def _draw(
    title: str,
    frame: _Frame,
    series: Sequence[Series],
    *,
    lines: Sequence[dict[str, Any]] = (),
    dots: Sequence[dict[str, Any]] = (),
    boxes: Sequence[dict[str, Any]] = (),
    rules: Sequence[Rule] = (),
    x_ticks: Sequence[dict[str, Any]] | None = None,
    key: bool = True,
    radius: float = _RADIUS,
) -> Markup:
    empty = not any(one.points for one in series)
    if x_ticks is None:
        values = ticks(frame.x, *frame.x_range)
        x_ticks = [{"at": frame.across(v), "text": frame.x.text(v)} for v in values]
    y_ticks = [
        {"at": frame.down(v), "text": frame.y.text(v)} for v in ticks(frame.y, *frame.y_range)
    ]
    drawing = {
        "title": f"{title}{', ' if title and frame.y.label else ''}{frame.y.label}",
        "names": [(hue(i), one.name) for i, one in enumerate(series) if key],
        "width": _WIDTH,
        "height": _HEIGHT,
        "left": _LEFT,
        "right": _WIDTH - _RIGHT,
        "bottom": _HEIGHT - _BOTTOM,
        "radius": radius,
        "empty": empty,
        "x_ticks": [] if empty else x_ticks,
        "y_ticks": [] if empty else y_ticks,
        "x_label": frame.x.label,
        "rules": [] if empty else [_ruled(frame, rule) for rule in rules],
        "lines": lines,
        "dots": dots,
        "boxes": boxes,
    }
    return fragment(_TEMPLATES, "plot.html", "chart", drawing)
