"""A training run's curves as one self-contained HTML page, light and dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from saint.stage.html import fragment, render
from saint.stage.plots import Axis, Series, line_chart

TEMPLATES = Path(__file__).parent / "templates"
_TOKENS = Axis("training tokens", include=(0.0,))

Entries = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Panel:
    """One diagram: which metrics, over training tokens, and how they are shown."""

    title: str
    names: tuple[str, ...]
    y: Axis = Axis(include=(0.0,))


PANELS = (
    Panel("normalised MSE", ("train/loss", "val/loss"), Axis(logarithmic=True)),
    Panel("fraction of variance unexplained (FVU)", ("train/fvu", "val/fvu")),
    Panel("dead latents", ("debug/dead_latents_ratio",), Axis(percent=True, include=(0.0,))),
    Panel(
        "log10 of latent density: 10, 50, 90 % of those that fire",
        ("val/log10_density_p10", "val/log10_density_p50", "val/log10_density_p90"),
    ),
    Panel("active latents per token (L0)", ("train/l0", "val/l0")),
    Panel("AuxK loss", ("train/aux_loss",)),
    Panel("norm of the gradient", ("train/grad_norm",), Axis(logarithmic=True)),
    Panel("learning rate", ("learning_rate",)),
    Panel("tokens per second", ("tokens_per_s",)),
)


def curves(entries: Entries) -> Markup:
    """Return the diagrams of logged metrics as HTML with inline SVG; `plots.STYLE` goes with it.

    What never changed is a line of text instead of a diagram.
    """
    charts, constants = [], []
    for panel in PANELS:
        series = [
            Series(name, [(float(e["tokens"]), float(e[name])) for e in entries if name in e])
            for name in panel.names
        ]
        values = {y for one in series for _, y in one.points}
        if len(values) == 1 and sum(len(one.points) for one in series) > 1:
            constants.append(f"{panel.title} {panel.y.text(values.pop())}")
        else:
            charts.append(line_chart(panel.title, series, x=_TOKENS, y=panel.y))
    return fragment(TEMPLATES, "figures.html", "charts", charts, constants)


def training_page(
    entries: Entries, *, title: str, settings: Mapping[str, Any], done: bool
) -> Markup:
    """Return the whole page; while the run goes on, an open page renews itself."""
    last = entries[-1] if entries else {}
    facts = {
        "step": f"{last.get('step', 0):,}",
        "tokens": f"{last.get('tokens', 0):,}",
        "loss": _short(last.get("train/loss", math.nan)),
        "held-out FVU": _short(next((e["val/fvu"] for e in entries[::-1] if "val/fvu" in e), None)),
        "dead latents": f"{last.get('debug/dead_latents_ratio', 0):.1%}",
        "tokens/s": f"{last.get('tokens_per_s', 0):,.0f}",
    }
    values = {"title": title, "done": done, "facts": facts, "settings": settings}
    return render(TEMPLATES, "training.html", curves=curves(entries), **values)


def _short(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.4g}"
