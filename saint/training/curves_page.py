"""A training run's curves as one self-contained HTML page, light and dark."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WIDTH, HEIGHT = 420, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 10, 24
_MOST_POINTS = 600

Entries = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Panel:
    """One diagram: which metrics, over training tokens, and how they are shown."""

    title: str
    names: tuple[str, ...]
    logarithmic: bool = False
    percent: bool = False


PANELS = (
    Panel("normalised MSE", ("train/loss", "val/loss"), logarithmic=True),
    Panel("fraction of variance unexplained (FVU)", ("train/fvu", "val/fvu")),
    Panel("dead latents", ("debug/dead_latents_ratio",), percent=True),
    Panel(
        "log10 of latent density: 10, 50, 90 % of those that fire",
        ("val/log10_density_p10", "val/log10_density_p50", "val/log10_density_p90"),
    ),
    Panel("active latents per token (L0)", ("train/l0", "val/l0")),
    Panel("AuxK loss", ("train/aux_loss",)),
    Panel("norm of the gradient", ("train/grad_norm",), logarithmic=True),
    Panel("learning rate", ("learning_rate",)),
    Panel("tokens per second", ("tokens_per_s",)),
)

STYLE = """
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1rem; }
.curves figure { margin: 0; } .curves figcaption { font-size: .9rem; margin-bottom: .2rem; }
.curves svg { width: 100%; height: auto; overflow: visible; }
.curves text { font: 11px system-ui, sans-serif; fill: currentColor; opacity: .7; }
.curves .grid { stroke: currentColor; opacity: .15; }
.curves .line { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
.curves .c0 { stroke: #2f6fde; } .curves .c1 { stroke: #d9622b; }
.curves .c2 { stroke: #2b9a6b; } .curves b.c2 { color: #2b9a6b; } .curves .dot.c2 { fill: #2b9a6b; }
.curves b.c0 { color: #2f6fde; } .curves b.c1 { color: #d9622b; }
.curves .dot.c0 { fill: #2f6fde; } .curves .dot.c1 { fill: #d9622b; }
@media (prefers-color-scheme: dark) {
  .curves .c0 { stroke: #7aa7ff; } .curves .c1 { stroke: #ff9d6b; }
  .curves b.c0 { color: #7aa7ff; } .curves b.c1 { color: #ff9d6b; }
  .curves .dot.c0 { fill: #7aa7ff; } .curves .dot.c1 { fill: #ff9d6b; }
  .curves .c2, .curves .dot.c2 { stroke: #6fd6a8; }
  .curves b.c2 { color: #6fd6a8; } .curves .dot.c2 { fill: #6fd6a8; }
}
"""


def curves(entries: Entries) -> str:
    """Return the diagrams of logged metrics as HTML with inline SVG; `STYLE` belongs to it."""
    figures = [_figure(panel, entries) for panel in PANELS]
    return f'<div class="curves">{"".join(figures)}</div>'


def training_page(entries: Entries, *, title: str, settings: Mapping[str, Any], done: bool) -> str:
    """Return the whole page; while the run goes on, an open page renews itself."""
    renew = "" if done else '<meta http-equiv="refresh" content="20">'
    last = entries[-1] if entries else {}
    facts = {
        "step": f"{last.get('step', 0):,}",
        "tokens": f"{last.get('tokens', 0):,}",
        "loss": _short(last.get("train/loss", math.nan)),
        "held-out FVU": _short(next((e["val/fvu"] for e in entries[::-1] if "val/fvu" in e), None)),
        "dead latents": f"{last.get('debug/dead_latents_ratio', 0):.1%}",
        "tokens/s": f"{last.get('tokens_per_s', 0):,.0f}",
    }
    tiles = "".join(f"<div><b>{v}</b><span>{k}</span></div>" for k, v in facts.items())
    rows = "".join(
        f"<tr><td>{html.escape(str(k))}</td><td>{html.escape(str(v))}</td></tr>"
        for k, v in settings.items()
    )
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">{renew}
<title>{html.escape(title)}</title>
<style>
:root {{ color-scheme: light dark; --bg: #fbfaf8; --fg: #1d1f24; --line: #e3e1dc; }}
@media (prefers-color-scheme: dark) {{ :root {{ --bg: #14161a; --fg: #e8e6e1; --line: #31353d; }} }}
body {{ margin: 0 auto; max-width: 72rem; padding: 2rem 1.2rem; background: var(--bg);
  color: var(--fg); font: 16px/1.5 system-ui, sans-serif; }}
h1 {{ font-size: 1.4rem; }} table {{ border-collapse: collapse; font-size: .9rem; }}
td {{ padding: .15rem 1rem .15rem 0; border-bottom: 1px solid var(--line); }}
.tiles {{ display: flex; flex-wrap: wrap; gap: 1.6rem; margin: 1rem 0; }}
.tiles b {{ display: block; font-size: 1.3rem; }} .tiles span {{ opacity: .7; font-size: .9rem; }}
{STYLE}</style>
<h1>{html.escape(title)} <small>{"finished" if done else "training"}</small></h1>
<div class="tiles">{tiles}</div>
{curves(entries)}
<details><summary>recipe</summary><table>{rows}</table></details>
</html>
"""


def _short(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.4g}"


def _figure(panel: Panel, entries: Entries) -> str:
    series = []
    for name in panel.names:
        points = [(float(e["tokens"]), float(e[name])) for e in entries if name in e]
        good = [p for p in points if math.isfinite(p[1]) and (p[1] > 0 or not panel.logarithmic)]
        series.append(good[:: max(1, math.ceil(len(good) / _MOST_POINTS))])
    legend = ""
    if len(panel.names) > 1:
        legend = " · ".join(f'<b class="c{i}">{name}</b>' for i, name in enumerate(panel.names))
    body = _diagram(series, panel) if any(series) else '<text x="60" y="100">nothing yet</text>'
    return (
        f"<figure><figcaption>{panel.title} {legend}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{panel.title}">{body}</svg>'
        "</figure>"
    )


def _diagram(series: list[list[tuple[float, float]]], panel: Panel) -> str:
    def height(value: float) -> float:
        return math.log10(value) if panel.logarithmic else value

    def label(value: float) -> str:
        if panel.percent:
            return f"{value:.1%}"
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

    everything = [point for points in series for point in points]
    last = max(x for x, _ in everything) or 1.0
    low, high = min(height(y) for _, y in everything), max(height(y) for _, y in everything)
    if not panel.logarithmic:
        low = min(0.0, low)
    if high - low < 1e-9:
        high = low + 1

    def place(x: float, y: float) -> str:
        across = _LEFT + (WIDTH - _LEFT - _RIGHT) * x / last
        down = _TOP + (HEIGHT - _TOP - _BOTTOM) * (high - height(y)) / (high - low)
        return f"{across:.1f},{down:.1f}"

    parts = []
    for i in range(5):
        level = low + (high - low) * i / 4
        down = _TOP + (HEIGHT - _TOP - _BOTTOM) * (1 - i / 4)
        parts.append(f'<path class="grid" d="M{_LEFT} {down:.1f}H{WIDTH - _RIGHT}"/>')
        text = label(10**level if panel.logarithmic else level)
        parts.append(f'<text x="{_LEFT - 5}" y="{down + 4:.1f}" text-anchor="end">{text}</text>')
    for share in (0.0, 0.5, 1.0):
        across = _LEFT + (WIDTH - _LEFT - _RIGHT) * share
        anchor = ("start", "middle", "end")[round(2 * share)]
        text = f"{last * share / 1e6:.3g}M" if last >= 1e6 else f"{last * share:,.0f}"
        parts.append(f'<text x="{across}" y="{HEIGHT - 6}" text-anchor="{anchor}">{text}</text>')
    for i, points in enumerate(series):
        path = " ".join(place(*point) for point in points)
        parts.append(f'<polyline class="line c{i}" points="{path}"/>')
        if len(points) <= 30:
            for point in points:
                across, down = place(*point).split(",")
                parts.append(f'<circle class="dot c{i}" r="2.5" cx="{across}" cy="{down}"/>')
    return "".join(parts)
