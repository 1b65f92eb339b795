"""An evaluation's figures as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from saint.stage.html import fragment, render
from saint.stage.plots import Axis, bar_chart, histogram_chart

TEMPLATES = Path(__file__).parent / "templates"


def evaluation_charts(report: Mapping[str, Any]) -> Markup:
    """Return the diagrams of `sae_evaluation.py`'s report: cross-entropies, latent densities."""
    losses = [
        ("clean", report["ce_clean"]),
        ("SAE", report["ce_sae"]),
        ("mean-ablated", report["ce_mean_ablated"]),
    ]
    density = report["density_histogram"]
    charts = [
        bar_chart("cross-entropy", losses, y=Axis("nats per token")),
        histogram_chart(
            "latent density",
            density["n_latents"],
            density["log10_edges"],
            x=Axis("log10 of the share of tokens on which a latent fires"),
            y=Axis("latents"),
        ),
    ]
    return fragment(TEMPLATES, "figures.html", "charts", charts, [])


def evaluation_page(report: Mapping[str, Any], *, title: str) -> Markup:
    """Return the page of `sae_evaluation.py`."""
    facts = {
        "variance explained": f"{1 - report['fvu']:.1%}",
        "cross-entropy recovered": f"{report['loss_recovered']:.1%}",
        "active latents (L0)": f"{report['l0']:.1f}",
        "dead latents": f"{report['dead_share']:.1%}",
        "tokens": f"{report['n_tokens']:,}",
    }
    numbers = {k: v for k, v in report.items() if not isinstance(v, Mapping)}
    charts = evaluation_charts(report)
    values = {"title": title, "facts": facts, "numbers": numbers, "charts": charts}
    return render(TEMPLATES, "evaluation.html", **values)
