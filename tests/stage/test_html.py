"""Templates escape what they are given, and charts put values where they belong."""

from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from jinja2 import UndefinedError
from markupsafe import Markup

from saint.stage import plots
from saint.stage.html import render
from saint.stage.plots import Axis, Rule, Series


def parts(chart: str, kind: str) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(chart).iter(kind))


def ticks_of(chart: str, anchor: str) -> dict[str, float]:
    """Texts of the ticks beside ("end") or below ("middle") the axes, and where they stand."""
    found = [e for e in parts(chart, "text") if e.get("text-anchor") == anchor]
    place = "y" if anchor == "end" else "x"
    return {(e.text or ""): float(e.get(place) or 0) for e in found if not e.get("class")}


def test_values_are_escaped_and_must_be_there(tmp_path: Path):
    (tmp_path / "a.html").write_text('<p title="{{ text }}">{{ text }}{{ good }}</p>')
    filled = render(tmp_path, "a.html", text='<script>"&', good=Markup("<b>ours</b>"))
    assert filled == ('<p title="&lt;script&gt;&#34;&amp;">&lt;script&gt;&#34;&amp;<b>ours</b></p>')
    with pytest.raises(UndefinedError, match="good"):
        render(tmp_path, "a.html", text="x")


def test_points_lie_between_their_ticks():
    chart = plots.line_chart(
        "loss <b>", [Series("a", [(0, 1.0), (50, 0.25)]), Series("b", [(100, 0.5)])], y=Axis("nats")
    )
    assert "loss &lt;b&gt;, nats" in chart
    across, down = ticks_of(chart, "middle"), ticks_of(chart, "end")
    dots = {
        (e.get("class"), float(e.get("cx") or 0), float(e.get("cy") or 0))
        for e in parts(chart, "circle")
    }
    one, half, low = down["1"] - 4, down["0.6"] - 4, down["0.2"] - 4
    assert ("fill s0", across["0"], one) in dots
    expected = half + (low - half) * 0.35 / 0.4
    assert any(c == "fill s0" and abs(y - expected) < 0.11 for c, _, y in dots)
    assert any(c == "fill s1" and x == across["100"] for c, x, _ in dots)


def test_a_logarithmic_axis_has_decades_and_no_zeros():
    points = [(i, value) for i, value in enumerate((1e-4, 0.0, -1.0, float("nan"), 1.0))]
    chart = plots.line_chart("density", [Series("d", points)], y=Axis(logarithmic=True))
    assert len(parts(chart, "circle")) == 2
    down = ticks_of(chart, "end")
    assert list(down) == ["0.0001", "0.001", "0.01", "0.1", "1"]
    steps = {round(a - b, 1) for a, b in zip(down.values(), list(down.values())[1:], strict=False)}
    assert max(steps) - min(steps) < 0.3


def test_bars_are_as_high_as_their_counts():
    chart = plots.histogram_chart("tokens", [4, 0, 1], [0, 1, 2, 3], rules=[Rule("x", 1.5, "here")])
    high, low = (float(e.get("height") or 0) for e in parts(chart, "rect"))
    assert high == pytest.approx(4 * low, abs=0.5)
    assert [e.text for e in parts(chart, "text") if e.get("class") == "name"] == ["here"]
    named = plots.bar_chart("nats", [("plain", 3.0), ("SAE", 3.5)])
    assert [e.text for e in parts(named, "text") if e.get("class") == "figure"] == ["3", "3.5"]


def test_nothing_is_said_to_be_nothing():
    for chart in (
        plots.line_chart("x", [Series("a", [])]),
        plots.scatter_chart("x", [Series("a", [(1, float("inf"))])]),
        plots.histogram_chart("x", [0, 0], [0, 1, 2]),
    ):
        assert "nothing yet" in chart and not parts(chart, "circle") + parts(chart, "rect")


@given(st.floats(-1e9, 1e9, allow_nan=False), st.floats(1e-6, 1e9, allow_nan=False), st.booleans())
@example(-952230008.0, 1.0, True)
def test_ticks_are_round_few_and_inside(low: float, length: float, logarithmic: bool):
    axis = Axis(logarithmic=logarithmic)
    if logarithmic:
        low, length = max(-30.0, min(low / 1e8, 8.0)), max(1e-3, min(length / 1e8, 10.0))
    found = plots.ticks(axis, low, low + length)
    assert (2 if logarithmic or length > 1e-3 else 1) <= len(found) <= 12
    slack = 1e-6 * max(length, abs(low), 1)
    assert all(low - slack <= axis.height(v) <= low + length + slack for v in found)
